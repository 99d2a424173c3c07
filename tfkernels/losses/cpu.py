"""The losses on the CPU: plain PyTorch, sums per image in float64, gradients written out."""
import torch
from torch import Tensor

from tfkernels._arguments import need_distinct
from tfkernels.losses.reference import EntropyOptions, diffusion_loss_reference, prediction_error
from tfkernels.patches.latents import images_of_rows, of_rows, rows_per_image


def entropy(logits: Tensor, targets: Tensor, places: Tensor, row_weight: Tensor | None, lse_weight: Tensor | None,
            losses: Tensor, lse: Tensor | None, tokens: int, gradient: bool, options: EntropyOptions) -> Tensor:
    """What the kernel does, in plain PyTorch."""
    softcap, smoothing, z_loss = options
    without, index = targets < 0, targets.clamp(min=0)[:, None]
    z = logits.to(losses.dtype)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    log_p = z.log_softmax(-1)
    found = -log_p.gather(1, index)[:, 0]
    found = (1 - smoothing) * found - smoothing * log_p.mean(-1) if smoothing else found
    sums = z.logsumexp(-1).masked_fill_(without, 0) if z_loss or lse is not None else None
    losses.copy_(found + z_loss * sums.square() if z_loss else found).masked_fill_(without, 0)
    if lse is not None:
        lse.copy_(sums)
    if not gradient:
        return logits
    p = log_p.exp_()
    if lse_weight is not None:                                      # row_weight is there, too
        lse_gradient = p * lse_weight[:, None]
    dz = p * (1 + 2 * z_loss * sums)[:, None] if z_loss else p
    dz = dz - smoothing / dz.shape[1] if smoothing else dz
    dz.scatter_add_(1, index, dz.new_full((1, 1), smoothing - 1).expand_as(index))
    if row_weight is not None:
        dz *= row_weight[:, None]
    if lse_weight is not None:
        dz += lse_gradient
    if softcap:
        dz *= (1 - z / softcap) * (1 + z / softcap)
    if without.any():
        dz.masked_fill_(without[:, None], 0)
    return dz.to(logits.dtype)


def look(targets: Tensor, places: Tensor, tokens: int, vocabulary: int) -> None:
    """Refuse values that do not fit, where looking costs nothing."""
    if len(targets) and targets.max() >= vocabulary:
        raise ValueError(f"linear_cross_entropy: targets holds {targets.max().item()} and weight has {vocabulary} "
                         f"rows; 0 to {vocabulary - 1} fits, negative for no target")
    if len(places) and (places.min() < 0 or places.max() >= tokens):
        raise ValueError(f"linear_cross_entropy: rows holds {places.min().item()} to {places.max().item()} and hidden "
                         f"has {tokens} rows; 0 to {tokens - 1} fits")
    if len(places) and (counts := places.bincount()).max() > 1:
        raise ValueError(f"linear_cross_entropy: rows names row {counts.argmax().item()} {counts.max().item()} times; "
                         "each row at most once fits")


def diffusion_loss(prediction: Tensor, x0: Tensor, x0_factor: Tensor, eps_factor: Tensor, weight: Tensor | None,
                   seed: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """Return each image's loss, computed in the dtype of the target's factors."""
    prediction = prediction.to(x0_factor.dtype)
    return diffusion_loss_reference(prediction, x0, x0_factor, eps_factor, weight, seed, offsets, columns, channels,
                                    patch).contiguous()


def diffusion_loss_backward(dloss: Tensor, prediction: Tensor, x0: Tensor, x0_factor: Tensor, eps_factor: Tensor,
                            weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None,
                            channels: int, patch: int) -> Tensor:
    """Return the gradient of the prediction."""
    error, image_ids, inside = prediction_error(prediction.to(x0_factor.dtype), x0, x0_factor, eps_factor, seed,
                                                offsets, columns, channels, patch)
    scale = dloss * 2 / (rows_per_image(offsets, len(x0_factor), len(prediction), x0_factor.device).clamp(min=1)
                         * max(1, prediction.shape[1]))
    scale = scale if weight is None else scale * weight
    return torch.where(inside[:, None], of_rows(scale, image_ids)[:, None] * error, 0).to(prediction.dtype).contiguous()


def _normed(
    hidden: Tensor, places: Tensor, offsets: Tensor | None, images: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return which rows have an image, its id, their places, and their hidden states (K, C) in `dtype`."""
    image_ids, inside = images_of_rows(offsets, images, len(places), hidden.device)
    at = places[inside]
    if at.numel() and not 0 <= at.min() <= at.max() < len(hidden):
        raise ValueError(f"head loss: places has rows {at.min().item()} to {at.max().item()} and hidden "
                         f"{len(hidden)}; 0 to {len(hidden) - 1} fits")
    return inside, image_ids[inside], at, hidden[at].to(dtype)


@torch.autocast("cpu", enabled=False)
def head_loss(
    hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, base: Tensor | None, x0: Tensor, x0_factor: Tensor,
    eps_factor: Tensor, loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None,
    channels: int, patch: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `triton.head.forward` computes."""
    inside, image_ids, at, x = _normed(hidden, places, offsets, len(x0_factor), x0_factor.dtype)
    need_distinct("head loss", "places", at)
    mean = x.mean(-1, keepdim=True) if center else x.new_zeros(len(x), 1)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    factor, weight = 1 + scale.to(x0_factor.dtype), weight.to(x0_factor.dtype)
    acc = x0_factor.new_zeros(len(places), len(weight))
    acc[inside] = ((x - mean) * rstd * factor[image_ids]) @ weight.T
    prediction = acc.clone()
    prediction[inside] += 0 if base is None else base[image_ids]
    error, of_row, _ = prediction_error(prediction, x0, x0_factor, eps_factor, seed, offsets, columns, channels, patch)
    error = torch.where(inside[:, None], error, 0)
    loss = x0_factor.new_zeros(max(1, len(x0_factor)), dtype=torch.float64).index_add_(
        0, of_row, error.square().sum(-1).double()
    )[:len(x0_factor)].to(x0_factor.dtype) / _denominators(offsets, x0_factor, error)
    means = [(error * acc).sum(-1)[inside]] + ([(error[inside] * (factor @ weight.T)[image_ids]).sum(-1)]
                                               if center else [])
    statistics = x0_factor.new_zeros(4 if center else 2, len(places))
    statistics[:, inside] = torch.stack([rstd[:, 0], means[0] / x.shape[1]]
                                        + ([mean[:, 0], means[1] / x.shape[1]] if center else []))
    if loss_weight is not None:
        loss = torch.where(rows_per_image(offsets, len(x0_factor), len(places), x0_factor.device) > 0,
                           loss * loss_weight, 0)
    return loss, error.to(hidden.dtype, copy=True), statistics


@torch.autocast("cpu", enabled=False)
def head_loss_backward(dloss: Tensor, hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor,
                       loss_weight: Tensor | None, offsets: Tensor | None, error: Tensor, statistics: Tensor,
                       wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `triton.head.backward` computes."""
    inside, image_ids, at, x = _normed(hidden, places, offsets, len(dloss), dloss.dtype)
    rstd, along, *center = statistics[:, inside, None]
    xhat = (x - center[0] if center else x) * rstd
    k = dloss * 2 / _denominators(offsets, dloss, error) * (1 if loss_weight is None else loss_weight)
    k, error, factor = k[image_ids][:, None], error[inside].to(dloss.dtype), 1 + scale.to(dloss.dtype)[image_ids]
    dy = k * error @ weight.to(dloss.dtype)
    dx = (dy * factor - k * (along * xhat + center[1] if center else along * xhat)) * rstd

    def per_image(values):  # index_add_ adds row by row: in float32 its error would grow with the rows
        return values.new_zeros(
            len(dloss), values.shape[1], dtype=torch.float64
        ).index_add_(0, image_ids, values.double()).to(values.dtype)

    dhidden, dscale, dweight, dbase = empty_head_gradients(dloss, hidden, scale, weight, wanted)
    if wanted[0]:
        dhidden.zero_()[at] = dx.to(hidden.dtype)
    if wanted[1]:
        dscale.copy_(per_image(dy * xhat))
    if wanted[2]:
        dweight.copy_((k * error).T @ (xhat * factor))
    if wanted[3]:
        dbase.copy_(per_image(k * error))
    return dhidden, dscale, dweight, dbase


def _denominators(offsets: Tensor | None, x0_factor: Tensor, error: Tensor) -> Tensor:
    """T_n D, (N,), at least 1."""
    return (
        rows_per_image(offsets, len(x0_factor), len(error), x0_factor.device) * error.shape[1]
    ).clamp(min=1).to(x0_factor.dtype)


def empty_head_gradients(
    dloss: Tensor, hidden: Tensor, scale: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, scale, weight and base to be filled, empty where not `wanted`."""
    return (hidden.new_empty(hidden.shape if wanted[0] else 0), scale.new_empty(scale.shape if wanted[1] else 0),
            weight.new_empty(weight.shape if wanted[2] else 0),
            dloss.new_empty((dloss.shape[0], weight.shape[0]) if wanted[3] else 0))
