"""An image's way around the decoder: noise, patches, embedding, and from the hidden states to the loss, in one chain.

    python -m benchmarks.image_chain --out DIR [--quick] [--cpu]

The chain is `noise_patchify`, `embed_patches` and `modulated_layer_norm_diffusion_loss`. Nothing stands between the
last two, so the packed sequence is the hidden states. It has as many rows of text as of patches, in stretches of 256.
The bytes that must move are the sum of the three operators' tables. Contenders are ours, and plain PyTorch, eager and
compiled: once with its noise, Philox's, ready made in memory, whose making is not timed, which favours plain PyTorch;
once with noise that PyTorch draws on the way, and keeps for the loss.
"""
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

import tfkernels
from benchmarks.bandwidth import Problem, functions, results, run_benchmark
from tfkernels.patches import noise_reference

IMAGE, DIM = 256, 64


class Case(NamedTuple):
    """`patches` patches of DIM elements in a sequence of twice as many rows of `width`."""

    patches: int
    width: int


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    first = [Case(16_384, 2048), Case(16_384, 4096)]
    return first if quick else [*first, Case(8192, 4096), Case(16_384, 8192), Case(32_768, 2048)]


def moved(case: Case, size: int) -> dict[str, int]:
    """Bytes that must move: noise_patchify's, embed_patches' and the head loss's."""
    wide, narrow = case.patches * case.width, case.patches * DIM
    return {"forward": (3 * wide + 3 * narrow + wide) * size, "backward": (4 * wide + narrow + 3 * wide) * size}


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    images, tokens = case.patches // IMAGE, 2 * case.patches
    seed = torch.tensor([5, 7], device=device)
    offsets = torch.arange(images + 1, dtype=torch.int32, device=device) * IMAGE
    index, eps = noise_reference(seed, offsets, images, case.patches, DIM)
    places = torch.arange(tokens, device=device).view(-1, 2, IMAGE)[:, 1].flatten()
    x0, t = random(case.patches, DIM).to(dtype), torch.linspace(0.1, 0.9, images, device=device)
    p, q, dloss = -torch.ones_like(t), torch.ones_like(t), random(images)
    tensors = {
        "text": random(tokens, case.width), "weight": random(case.width, DIM) / DIM**0.5,
        "timestep": random(images, case.width), "scale": random(images, case.width),
        "shift": random(images, case.width), "head": random(DIM, case.width) / case.width**0.5, "bias": random(DIM)}
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}

    def ours(text, weight, timestep, scale, shift, head, bias):
        noised = tfkernels.noise_patchify(x0, 1 - t, t, seed, offsets=offsets)
        hidden = tfkernels.embed_patches(text, noised, weight, timestep, places, offsets)
        return tfkernels.modulated_layer_norm_diffusion_loss(
            hidden, places, scale=scale, shift=shift, weight=head, bias=bias, x0=x0, p=p, q=q, loss_weight=None,
            seed=seed, offsets=offsets)

    def plain(text, weight, timestep, scale, shift, head, bias, drawn=False):
        wide = torch.promote_types(text.dtype, torch.float32)
        noise = torch.randn(eps.shape, device=device, dtype=wide) if drawn else eps
        noised = ((1 - t).to(wide)[index][:, None] * x0 + t.to(wide)[index][:, None] * noise).to(text.dtype)
        hidden = text.index_copy(0, places, F.linear(noised, weight) + timestep[index])
        normed = tfkernels.modulated_layer_norm_reference(hidden[places], None, None, scale, shift, index)
        prediction = F.linear(normed, head, bias)
        return (prediction - (noise.to(wide) - x0)).square().view(images, -1).mean(-1)

    loss, *gradients = results(plain, list(tensors.values()), [dloss])
    terms = {"loss": IMAGE**0.5 * loss.abs()}  # a sum of IMAGE rows
    for name, gradient in zip(tensors, gradients):  # prediction - target cancels
        terms[f"d{name}"] = gradient.abs() + gradient.abs().amax()
    return Problem(tensors, {"loss": dloss}, moved(case, x0.element_size()),
                   functions(ours, plain, compiled=device == "cuda", drawing=partial(plain, drawn=True)), terms)


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    return run_benchmark("image_chain", __doc__, arguments, settings={"image_patches": IMAGE, "patch_elements": DIM},
                         cases=cases, cpu_cases=lambda quick: [Case(1024, 128) if quick else Case(2048, 512)],
                         problem=problem)


if __name__ == "__main__":
    raise SystemExit(main())
