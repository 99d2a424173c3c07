"""The diffusion loss of each image from the hidden states on: final modulated norm, linear head, noising target and squared error in one pass.

    y_r    = norm(hidden[places_r]) * (1 + scale[n]) + shift[n]                   layer or RMS norm without weight (DiT's final layer, arXiv:2212.09748)
    pred_r = weight @ y_r + bias
    loss_n = loss_weight_n / (T_n D) * sum over n's T_n patches and D elements of (pred_r - target_r)^2      (see `tfkernels.diffusion_loss`)

What depends on the image alone is taken out of the rows: pred_r = acc_r + base[n], with acc_r = weight @ (xhat_r * (1 + scale[n])) and
base = shift @ weight^T + bias, (N, D), plain PyTorch. With g_r = dloss_n * 2 loss_weight_n / (T_n D) * (pred_r - target_r):

    dbase_n = sum g_r          dxhat_r = (g_r @ weight) * (1 + scale[n])          dhidden = rstd * (dxhat - xhat * along - level)
    along   = mean(dxhat * xhat) = g_r . acc_r / C          level = mean(dxhat) = g_r . ws[n] / C, layer norm only          ws = (1 + scale) @ weight^T
    dscale_n = sum (g_r @ weight) * xhat_r                  dweight = sum g_r^T (xhat_r * (1 + scale[n]))

Both means are thus known in forward, and backward sees each column by itself. Kept for backward: pred - target (P, D), which is the
gradient up to a factor per image, and two (RMS norm) or four numbers per patch: 1 / std, along, mean, level. Never in memory: gathered
rows, normed rows, prediction, target, noise. Sums have an order that depends on shapes alone: no atomics, gradients equal to the bit each time.

Bytes that must move, e bytes per element, T hidden states, of which P are patches (D, a few dozen, and the weight aside):

    op                 forward    plain PyTorch                                  backward       plain PyTorch
    norm, head, loss   P C e      13 P C e: gather 2, norm 2, scale 4,           (P + T) C e    15 P C e + T C e: linear 2, shift 1, scale 7,
                                  shift 4, linear 1                                             norm 3, gather 2, zeros of T C e

Ours writes P C e more in backward, for the zeros of rows without a patch go over all rows first, and reads hidden once per 64 elements of D.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_distinct, need_eps, need_tensors, shown
from tfkernels._library import register
from tfkernels.losses import head_kernels
from tfkernels.losses.diffusion import _counts, _error, diffusion_loss_reference
from tfkernels.norm.op import MAX_WIDTH, modulated_layer_norm_reference, modulated_rms_norm_reference
from tfkernels.patches.latents import PackedLatents, Source, check_constant, check_floating, check_per_image, locate_reference, source, uniform_offsets
from tfkernels.patches.philox import seed_tensor


def modulated_layer_norm_diffusion_loss(hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
                                        x0: Tensor | PackedLatents, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor | int, *,
                                        patch_size: int | None = None, offsets: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return `diffusion_loss` of linear(layer_norm(hidden[places]) * (1 + scale[n]) + shift[n], weight, bias), n the image of each patch.

    Args:
        hidden: (T, C) or (B, S, C) the last hidden states in float16, bfloat16 or float32 (float64 on CPU), C at most 16384; any strides
            (unit columns cost no copy).
        places: (P,) int64, the row of hidden, flat over its first dimensions, of each of x0's P patches, each at most once; of a row of
            x0 outside every image anything. A row that is not there, or is named twice, raises on a CPU; on a GPU,
            where looking would synchronise, the loss and gradients of the image of a row that is not there are NaN, and
            a row named twice counts twice in the loss and gets the gradient of one of them.
        scale, shift: (N, C), a row per image; slices of one wider table cost no copy. shift may be None for 0.
        weight, bias: (D, C) and (D,) the head; bias may be None for 0. weight is rounded to hidden's dtype where it is multiplied.
        x0, p, q, loss_weight, seed, patch_size, offsets: what `diffusion_loss` takes, loss_weight as its weight.
        eps: added to the variance.

    Returns:
        (N,) float32 (float64 for float64), 0 for an image without rows, whatever its numbers. Differentiable in hidden
        (rows without a patch get 0), scale, shift, weight and bias, which may each have their own dtype; statistics and
        sums are float32; deterministic. Autocast changes nothing
        (of shift and weight where, as PyTorch asks, backward runs outside it).

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also another argument that requires a gradient.
    """
    return _public("modulated_layer_norm_diffusion_loss", hidden, places, scale, shift, weight, bias, x0, p, q, loss_weight, seed, patch_size, offsets,
                   eps, True)


def modulated_rms_norm_diffusion_loss(hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
                                      x0: Tensor | PackedLatents, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor | int, *,
                                      patch_size: int | None = None, offsets: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return `diffusion_loss` of linear(rms_norm(hidden[places]) * (1 + scale[n]) + shift[n], weight, bias), n the image of each patch.

    Everything as in `modulated_layer_norm_diffusion_loss`; eps is added to the mean square.
    """
    return _public("modulated_rms_norm_diffusion_loss", hidden, places, scale, shift, weight, bias, x0, p, q, loss_weight, seed, patch_size, offsets,
                   eps, False)


def modulated_layer_norm_diffusion_loss_reference(hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor,
                                                  bias: Tensor | None, x0: Tensor, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor,
                                                  offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, *,
                                                  eps: float = 1e-6) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype, with everything in memory."""
    rows, index = _patches(hidden, places, offsets, len(p))
    y = modulated_layer_norm_reference(rows, None, None, scale, shift, index, eps=eps)
    return diffusion_loss_reference(torch.nn.functional.linear(y, weight, bias), x0, p, q, loss_weight, seed, offsets, columns, channels, patch)


def modulated_rms_norm_diffusion_loss_reference(hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor,
                                                bias: Tensor | None, x0: Tensor, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor,
                                                offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, *,
                                                eps: float = 1e-6) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype, with everything in memory."""
    rows, index = _patches(hidden, places, offsets, len(p))
    y = modulated_rms_norm_reference(rows, None, scale, shift, index, eps=eps)
    return diffusion_loss_reference(torch.nn.functional.linear(y, weight, bias), x0, p, q, loss_weight, seed, offsets, columns, channels, patch)


def _images(offsets: Tensor | None, images: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each patch's image (P,), 0 where it has none, and whether it has one."""
    return locate_reference(uniform_offsets(images, rows, device) if offsets is None else offsets, rows)[::2]


def _patches(hidden: Tensor, places: Tensor, offsets: Tensor | None, images: int) -> tuple[Tensor, Tensor]:
    """Gathered hidden states (P, C), zeros where a row has no image, and their images, -1 there."""
    image, inside = _images(offsets, images, len(places), hidden.device)
    hidden = torch.nn.functional.pad(hidden.reshape(-1, hidden.shape[-1]), (0, 0, 0, 1))
    return hidden[torch.where(inside, places, -1)], torch.where(inside, image, -1)


def _public(op, hidden, places, scale, shift, weight, bias, x0, p, q, loss_weight, seed, patch_size, offsets, eps, center):
    need_tensors(op, {"hidden": hidden})
    s = source(op, "x0", x0, patch_size, offsets)
    eps = need_eps(op, eps)
    _check(op, s, hidden, places, scale, shift, weight, bias)
    check_constant(op, "x0", s.x)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, s.x.dtype), torch.float32)
    named = (("p", p), ("q", q)) + (() if loss_weight is None else (("loss_weight", loss_weight),))
    p, q, *weights = (check_per_image(op, name, x, s.images, s.x.device, dtype) for name, x in named)
    seed = seed_tensor(op, seed, s.x.device)
    with torch.autocast(hidden.device.type, enabled=False):
        # 0 * NaN of an image without rows would reach dweight
        some = _counts(s.offsets, s.images, s.rows, hidden.device) > 0
        base = None if shift is None else torch.where(some[:, None], shift.to(dtype), 0) @ weight.to(dtype).T
        if bias is not None:
            base = bias.to(dtype).expand(s.images, s.dim) if base is None else base + bias.to(dtype)
    return _loss(hidden.reshape(-1, hidden.shape[-1]), places.contiguous(), scale, weight, base, s.x, p, q, weights[0] if weights else None, seed,
                 s.offsets, s.columns, s.channels, s.patch, eps, center)[0]


def _check(
    op: str,
    s: Source,
    hidden: Tensor,
    places: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    if hidden.ndim not in (2, 3) or not 1 <= hidden.shape[-1] <= MAX_WIDTH or hidden.device != s.x.device:
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)} on {hidden.device}; (tokens, C) or (batch, tokens, C) on {s.x.device} fits, "
                         f"C 1 to {MAX_WIDTH}")
    check_floating(op, "hidden", hidden)
    if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.shape != (s.rows,) or places.device != s.x.device:
        raise ValueError(f"{op}: places is {got(places)}; int64 ({s.rows},) on {s.x.device} fits, the row of hidden "
                         "of each of x0's patches")
    width = hidden.shape[-1]
    shapes = {"scale": (scale, (s.images, width)), "shift": (shift, (s.images, width)), "weight": (weight, (s.dim, width)), "bias": (bias, (s.dim,))}
    for name, (x, shape) in shapes.items():
        if x is None and name in ("shift", "bias"):
            continue
        if not isinstance(x, Tensor) or x.shape != shape:
            found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is {shown(x)}"
            raise ValueError(f"{op}: {name} {found}; {shape} fits {s.images} images of {s.dim} elements a patch and "
                             f"{width} columns of hidden")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) and not x.dtype == hidden.dtype == torch.float64 or x.device != hidden.device:
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on {hidden.device}; "
                             "float16, bfloat16 or float32 on the same device fits (float64 for float64)")


def _normed(hidden: Tensor, places: Tensor, offsets: Tensor | None, images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which of the rows have an image, which, their places, and their hidden states (K, C) in `dtype`."""
    image, inside = _images(offsets, images, len(places), hidden.device)
    at = places[inside]
    if at.numel() and not 0 <= at.min() <= at.max() < len(hidden):
        raise ValueError(f"head loss: places has rows {at.min().item()} to {at.max().item()} and hidden {len(hidden)}; 0 to {len(hidden) - 1} fits")
    return inside, image[inside], at, hidden[at].to(dtype)


@torch.autocast("cpu", enabled=False)
def _loss_cpu(hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, base: Tensor | None, x0: Tensor, p: Tensor, q: Tensor,
              loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, eps: float,
              center: bool) -> tuple[Tensor, Tensor, Tensor]:
    inside, image, at, x = _normed(hidden, places, offsets, len(p), p.dtype)
    need_distinct("head loss", "places", at)
    mean = x.mean(-1, keepdim=True) if center else x.new_zeros(len(x), 1)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    factor, weight = 1 + scale.to(p.dtype), weight.to(p.dtype)
    acc = p.new_zeros(len(places), len(weight))
    acc[inside] = ((x - mean) * rstd * factor[image]) @ weight.T
    prediction = acc.clone()
    prediction[inside] += 0 if base is None else base[image]
    error, of_row, _ = _error(prediction, x0, p, q, seed, offsets, columns, channels, patch)
    error = torch.where(inside[:, None], error, 0)
    loss = torch.zeros_like(p, dtype=torch.float64).index_add_(0, of_row, error.square().sum(-1).double()).to(p.dtype) / _denominators(offsets, p, error)
    means = [(error * acc).sum(-1)[inside]] + ([(error[inside] * (factor @ weight.T)[image]).sum(-1)] if center else [])
    statistics = p.new_zeros(4 if center else 2, len(places))
    statistics[:, inside] = torch.stack([rstd[:, 0], means[0] / x.shape[1]] + ([mean[:, 0], means[1] / x.shape[1]] if center else []))
    if loss_weight is not None:
        loss = torch.where(_counts(offsets, len(p), len(places), p.device) > 0, loss * loss_weight, 0)
    return loss, error.to(hidden.dtype, copy=True), statistics


@torch.autocast("cpu", enabled=False)
def _backward_cpu(dloss: Tensor, hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, loss_weight: Tensor | None, offsets: Tensor | None,
                  error: Tensor, statistics: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside, image, at, x = _normed(hidden, places, offsets, len(dloss), dloss.dtype)
    rstd, along, *center = statistics[:, inside, None]
    xhat = (x - center[0] if center else x) * rstd
    k = dloss * 2 / _denominators(offsets, dloss, error) * (1 if loss_weight is None else loss_weight)
    k, error, factor = k[image][:, None], error[inside].to(dloss.dtype), 1 + scale.to(dloss.dtype)[image]
    dy = k * error @ weight.to(dloss.dtype)
    dx = (dy * factor - k * (along * xhat + center[1] if center else along * xhat)) * rstd

    def per_image(values):  # index_add_ adds row by row: in float32 its error would grow with the rows
        return values.new_zeros(len(dloss), values.shape[1], dtype=torch.float64).index_add_(0, image, values.double()).to(values.dtype)

    dhidden, dscale, dweight, dbase = _backward_fake(dloss, hidden, places, scale, weight, loss_weight, offsets, error, statistics, wanted)
    if wanted[0]:
        dhidden.zero_()[at] = dx.to(hidden.dtype)
    if wanted[1]:
        dscale.copy_(per_image(dy * xhat))
    if wanted[2]:
        dweight.copy_((k * error).T @ (xhat * factor))
    if wanted[3]:
        dbase.copy_(per_image(k * error))
    return dhidden, dscale, dweight, dbase


def _denominators(offsets: Tensor | None, p: Tensor, error: Tensor) -> Tensor:
    """T_n D, (N,), at least 1."""
    return (_counts(offsets, len(p), len(error), p.device) * error.shape[1]).clamp(min=1).to(p.dtype)


def _loss_fake(hidden, places, scale, weight, base, x0, p, q, loss_weight, seed, offsets, columns, channels, patch, eps, center):
    rows = places.shape[0]
    return p.new_empty(p.shape), hidden.new_empty(rows, weight.shape[0]), p.new_empty(4 if center else 2, rows)


def _backward_fake(dloss, hidden, places, scale, weight, loss_weight, offsets, error, statistics, wanted):
    return (hidden.new_empty(hidden.shape if wanted[0] else 0), scale.new_empty(scale.shape if wanted[1] else 0),
            weight.new_empty(weight.shape if wanted[2] else 0), dloss.new_empty((dloss.shape[0], weight.shape[0]) if wanted[3] else 0))


_loss = register("modulated_norm_diffusion_loss", kernel=head_kernels.forward, cpu=_loss_cpu, fake=_loss_fake)
_backward = register("modulated_norm_diffusion_loss_backward", kernel=head_kernels.backward, cpu=_backward_cpu, fake=_backward_fake)


def _save(ctx, inputs, output):
    hidden, places, scale, weight, _, _, _, _, loss_weight, _, offsets, *_ = inputs
    ctx.save_for_backward(hidden, places, scale, weight, loss_weight, offsets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, dloss, derror, dstatistics):
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]  # hidden, scale, weight, base
    gradients = _backward(dloss.contiguous(), *ctx.saved_tensors, wanted)
    dhidden, dscale, dweight, dbase = (g if w else None for g, w in zip(gradients, wanted))
    return dhidden, None, dscale, dweight, dbase, *(None,) * 11


_loss.register_autograd(_gradient, setup_context=_save)
