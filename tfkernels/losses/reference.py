"""The losses of both heads in plain PyTorch, with logits, noise and targets in memory: the kernels' specification."""
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels.norm.reference import modulated_layer_norm_reference, modulated_rms_norm_reference
from tfkernels.patches.latents import images_of_rows, locate_reference, of_rows, rows_per_image
from tfkernels.patches.reference import noise_reference, patchify_reference


class LinearCrossEntropy(NamedTuple):
    """`loss` () and `losses` (R,) of each row without its weight, both differentiable, float32, in nats;
    `losses.detach()` is for logging."""

    loss: Tensor
    losses: Tensor


class LinearCrossEntropyLSE(NamedTuple):
    """`LinearCrossEntropy`, and `lse` (R,), each row's log-sum-exp of the logits, 0 without a target; differentiable,
    float32."""

    loss: Tensor
    losses: Tensor
    lse: Tensor


class EntropyOptions(NamedTuple):
    """What a cross-entropy adds to its plain form; 0 where it does not."""

    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *, bias: Tensor | None = None,
    row_weight: Tensor | None = None, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LinearCrossEntropy:
    """The specification in plain PyTorch, with every row's logits in memory.

    Logits are in hidden's dtype; the bound and the softmax are in float32 (float64 stays).
    """
    return LinearCrossEntropy(*linear_cross_entropy_with_lse_reference(
        hidden, weight, targets, rows, bias=bias, row_weight=row_weight, softcap=softcap,
        label_smoothing=label_smoothing, z_loss=z_loss)[:2])


def linear_cross_entropy_with_lse_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *, bias: Tensor | None = None,
    row_weight: Tensor | None = None, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LinearCrossEntropyLSE:
    """The specification in plain PyTorch, as in `linear_cross_entropy_reference`."""
    logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias)
    logits = logits.to(statistics_dtype(logits))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, targets.clamp(min=-1), reduction="none", ignore_index=-1,
                                               label_smoothing=label_smoothing)
    lse = torch.where(targets < 0, 0, logits.logsumexp(-1))
    losses = losses + z_loss * lse.square() if z_loss else losses
    return LinearCrossEntropyLSE(weighted(losses, targets, row_weight).sum(), losses, lse)


def weighted(losses: Tensor, targets: Tensor, row_weight: Tensor | None) -> Tensor:
    """losses * row_weight, 0 without a target whatever the weight holds."""
    return losses if row_weight is None else torch.where(targets < 0, losses, losses * row_weight)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def diffusion_loss_reference(prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor,
                             offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, in prediction's dtype, with eps and the target in memory."""
    error, image_ids, inside = prediction_error(prediction, x0, p, q, seed, offsets, columns, channels, patch)
    rows = torch.where(inside, error.square().sum(-1), 0)
    counts = rows_per_image(offsets, len(p), len(prediction), p.device).to(rows.dtype) * max(1, prediction.shape[1])
    sums = rows.new_zeros(max(1, len(p))).index_add(0, image_ids, rows)[:len(p)]
    loss = sums / counts.clamp(min=1)
    return loss if weight is None else torch.where(counts > 0, loss * weight.to(rows.dtype), 0)


def prediction_error(prediction, x0, x0_factor, eps_factor, seed, offsets, columns, channels, patch):
    """Return (prediction - target) in prediction's dtype, each row's image id, and whether it has one."""
    x0 = patchify_reference(x0, offsets, columns, channels, patch).to(prediction.dtype)
    image_ids, eps = noise_reference(seed, offsets, len(x0_factor), *x0.shape, prediction.dtype)
    x0_factor, eps_factor = (of_rows(v.to(prediction.dtype), image_ids)[:, None] for v in (x0_factor, eps_factor))
    inside = (torch.ones_like(image_ids, dtype=torch.bool)
              if offsets is None else locate_reference(offsets, len(prediction))[2])
    return prediction - (x0_factor * x0 + eps_factor * eps), image_ids, inside


def modulated_layer_norm_diffusion_loss_reference(
    hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
    x0: Tensor, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None,
    columns: Tensor | None, channels: int, patch: int, *, eps: float = 1e-6
) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype, with everything in memory."""
    states, image_ids = _patches(hidden, places, offsets, len(p))
    y = modulated_layer_norm_reference(states, None, None, scale, shift, image_ids, eps=eps)
    return diffusion_loss_reference(torch.nn.functional.linear(y, weight, bias), x0, p, q, loss_weight, seed, offsets,
                                    columns, channels, patch)


def modulated_rms_norm_diffusion_loss_reference(
    hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
    x0: Tensor, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None,
    columns: Tensor | None, channels: int, patch: int, *, eps: float = 1e-6
) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype, with everything in memory."""
    states, image_ids = _patches(hidden, places, offsets, len(p))
    y = modulated_rms_norm_reference(states, None, scale, shift, image_ids, eps=eps)
    return diffusion_loss_reference(torch.nn.functional.linear(y, weight, bias), x0, p, q, loss_weight, seed, offsets,
                                    columns, channels, patch)


def _patches(hidden: Tensor, places: Tensor, offsets: Tensor | None, images: int) -> tuple[Tensor, Tensor]:
    """Return gathered hidden states (P, C), zeros where a row has no image, and their image ids, -1 there."""
    image_ids, inside = images_of_rows(offsets, images, len(places), hidden.device)
    hidden = torch.nn.functional.pad(hidden.reshape(-1, hidden.shape[-1]), (0, 0, 0, 1))
    return hidden[torch.where(inside, places, -1)], torch.where(inside, image_ids, -1)
