"""The training loss in plain PyTorch, every intermediate in memory: what the model's fused operators must equal."""
import torch
from torch import Tensor

from tfkernels.patches import noise_reference
from transfusion.model.transfusion import TransfusionOutput


def add_noise(objective, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_t, target) for t that broadcasts against x0."""
    (signal, noise), (p, q) = objective.path(t), objective.target(t)
    return signal * x0 + noise * eps, p * x0 + q * eps


def noise_of(sequence, seed: int) -> Tensor:
    """The noise (P, patch_dim) that a model adds under `seed`."""
    return noise_reference(
        torch.tensor([seed, 0]), sequence.layout.offsets, sequence.image_count, *sequence.patches.shape
    )[1]


def plain_output(model, sequence, times: Tensor, seed: int) -> TransfusionOutput:
    """`model(sequence, times, seed)`, written out."""
    drawn = [n for n, counts in enumerate(sequence.drawn.tolist()) if counts]
    times = torch.stack([t if n in drawn else t * 0 for n, t in enumerate(times)]) if len(times) else times
    noised, target = add_noise(
        model.objective, sequence.patches, noise_of(sequence, seed), times[sequence.layout.image_ids][:, None]
    )
    condition = model.timestep(times)
    timestep = model.patch_embedding.time(condition)[sequence.layout.image_ids]
    x = model.backbone.embed(sequence.tokens).flatten(0, 1)
    x = x.index_copy(0, sequence.patch_places, model.patch_embedding.linear(noised + timestep)).view(
        *sequence.tokens.shape, -1
    )
    positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
    x = model.backbone(x, positions, sequence.mask(), condition, sequence.modality).flatten(0, 1)
    logits = model.backbone.logits(x[sequence.target_places]).float()
    text = torch.nn.functional.cross_entropy(logits, sequence.text_targets, reduction="sum") / max(
        1, len(sequence.text_targets)
    )
    y = x[sequence.patch_places]
    if model.config.image_layers == "dit":
        shift, scale = model.image_head.modulation(torch.nn.functional.silu(condition)).chunk(2, -1)
        y = (
            torch.nn.functional.layer_norm(y, x.shape[-1:], eps=1e-6) * (1 + scale[sequence.layout.image_ids])
            + shift[sequence.layout.image_ids]
        )
    prediction = model.image_head.linear(y)
    error = (prediction - target).square().mean(-1)
    images = error.new_zeros(sequence.image_count)
    for n in drawn:
        images[n] = error[sequence.layout.image_ids == n].mean()
    diffusion = images.sum() / max(1, len(drawn))
    return TransfusionOutput(text + model.config.diffusion_weight * diffusion, text, diffusion, images)
