"""The losses on the CPU: plain PyTorch, sums per image in float64, gradients written out."""
import torch
from torch import Tensor

from tfkernels._arguments import need_distinct
from tfkernels.losses.reference import EntropyOptions, diffusion_loss_reference, prediction_error
from tfkernels.norm.blocks import token_blocks
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


def _patch_rows(hidden: Tensor, places: Tensor, offsets: Tensor | None,
                images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows have an image, its id, and where their hidden states are (K,)."""
    image_ids, inside = images_of_rows(offsets, images, len(places), hidden.device)
    at = places[inside]
    if at.numel() and not 0 <= at.min() <= at.max() < len(hidden):
        raise ValueError(f"head loss: places has rows {at.min().item()} to {at.max().item()} and hidden "
                         f"{len(hidden)}; 0 to {len(hidden) - 1} fits")
    return inside, image_ids[inside], at


@torch.autocast("cpu", enabled=False)
def head_loss(
    hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, base: Tensor | None, x0: Tensor, x0_factor: Tensor,
    eps_factor: Tensor, loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None,
    channels: int, patch: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `triton.head.forward` computes."""
    inside, image_ids, at = _patch_rows(hidden, places, offsets, len(x0_factor))
    need_distinct("head loss", "places", at)
    factor, weight = 1 + scale.to(x0_factor.dtype), weight.to(x0_factor.dtype)
    mean, rstd = x0_factor.new_zeros(2, len(at), 1)
    products = x0_factor.new_empty(len(at), len(weight))
    for rows in token_blocks(image_ids, hidden.shape[-1]):
        x = hidden[at[rows.at]].to(x0_factor.dtype)
        if center:
            y, mean[rows.at], rstd[rows.at] = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
        else:
            rstd[rows.at] = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            y = x.mul_(rstd[rows.at])
        products[rows.at] = y.mul_(rows.of(factor)) @ weight.T
    acc = x0_factor.new_zeros(len(places), len(weight))
    acc[inside] = products
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
    statistics[:, inside] = torch.stack([rstd[:, 0], means[0] / hidden.shape[1]]
                                        + ([mean[:, 0], means[1] / hidden.shape[1]] if center else []))
    if loss_weight is not None:
        loss = torch.where(rows_per_image(offsets, len(x0_factor), len(places), x0_factor.device) > 0,
                           loss * loss_weight, 0)
    return loss, error.to(hidden.dtype, copy=True), statistics


@torch.autocast("cpu", enabled=False)
def head_loss_backward(dloss: Tensor, hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor,
                       loss_weight: Tensor | None, offsets: Tensor | None, error: Tensor, statistics: Tensor,
                       wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `triton.head.backward` computes."""
    inside, image_ids, at = _patch_rows(hidden, places, offsets, len(dloss))
    rstd, along, *center = statistics[:, inside, None]
    k = dloss * 2 / _denominators(offsets, dloss, error) * (1 if loss_weight is None else loss_weight)
    k, factor, wide_weight = k[image_ids][:, None], 1 + scale.to(dloss.dtype), weight.to(dloss.dtype)
    error = k * error[inside].to(dloss.dtype)
    dhidden, dscale, dweight, dbase = empty_head_gradients(dloss, hidden, scale, weight, wanted)
    dhidden.zero_()
    sums, products, of_images = (dloss.new_zeros(*shape, dtype=torch.float64) for shape in (
        scale.shape, weight.shape, (len(dloss), len(weight))))
    for rows in token_blocks(image_ids, hidden.shape[-1]):
        x, row_rstd = hidden[at[rows.at]].to(dloss.dtype), rstd[rows.at]
        xhat = (x - center[0][rows.at] if center else x) * row_rstd
        dy = error[rows.at] @ wide_weight
        if wanted[1]:
            rows.add(dy * xhat, sums)
        if wanted[2]:
            products += error[rows.at].T @ (xhat * rows.of(factor))
        if wanted[0]:
            dx = dy.mul_(rows.of(factor)).addcmul_(xhat, k[rows.at] * along[rows.at], value=-1)
            dx = dx.sub_(k[rows.at] * center[1][rows.at]) if center else dx
            dhidden[at[rows.at]] = dx.mul_(row_rstd).to(hidden.dtype)
        if wanted[3]:
            rows.add(error[rows.at], of_images)
    for gradient, found, is_wanted in zip((dscale, dweight, dbase), (sums, products, of_images), wanted[1:]):
        if is_wanted:
            gradient.copy_(found)
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
