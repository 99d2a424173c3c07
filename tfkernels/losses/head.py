"""The diffusion loss of each image from the hidden states on: final modulated norm, linear head, target and error.

    y_r    = norm(hidden[places_r]) * (1 + scale[n]) + shift[n]   layer or RMS norm without weight (DiT's final layer,
    pred_r = weight @ y_r + bias                                  arXiv:2212.09748)
    loss_n = loss_weight_n / (T_n D) * sum over n's T_n patches and D elements of (pred_r - target_r)^2

The target and its coefficients p and q are those of `tfkernels.diffusion_loss`. What depends on the image alone is
taken out of the rows: pred_r = acc_r + base[n], with acc_r = weight @ (xhat_r * (1 + scale[n])) and, in plain PyTorch,
base = shift @ weight^T + bias, (N, D). With g_r = dloss_n * 2 loss_weight_n / (T_n D) * (pred_r - target_r):

    dbase_n  = sum g_r                        dxhat_r = (g_r @ weight) * (1 + scale[n])
    dscale_n = sum (g_r @ weight) * xhat_r    dweight = sum g_r^T (xhat_r * (1 + scale[n]))
    dhidden  = rstd * (dxhat - xhat * along - level)
    along    = mean(dxhat * xhat) = g_r . acc_r / C
    level    = mean(dxhat) = g_r . ws[n] / C, for a layer norm only         ws = (1 + scale) @ weight^T

Both means are thus known in the forward, and the backward sees each column by itself. Kept for the backward are pred -
target (P, D), which is the gradient up to a factor per image, and two numbers per patch (1 / std and along), or four
for a layer norm (mean and level too). Gathered rows, normed rows, prediction, target and noise are never in memory.
Sums have an order that depends on shapes alone: no atomics, gradients equal to the bit each time. The specification is
in `reference.py`, the kernels are in `triton/head.py`.

Bytes that must move, with e bytes per element and T hidden states, of which P are patches (D, a few dozen, and the
weight aside):

    norm, head, loss   forward    backward
    ours               P C e      (P + T) C e
    plain PyTorch      13 P C e   15 P C e + T C e

Plain PyTorch's forward moves, in P C e, 2 for the gather, 2 for the norm, 4 for the scale, 4 for the shift and 1 for
the linear layer; its backward 2 for linear, 1 for shift, 7 for scale, 3 for norm, 2 for the gather, and T C e of zeros.
Ours writes P C e more in backward, for the zeros of rows without a patch go over all rows first, and it reads hidden
once per 64 elements of D.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_eps, need_tensors, shown
from tfkernels._library import register
from tfkernels.losses import cpu
from tfkernels.losses.triton import head as kernels
from tfkernels.norm.op import MAX_WIDTH
from tfkernels.patches.latents import (
    PackedLatents,
    Source,
    check_constant,
    check_floating,
    check_per_image,
    rows_per_image,
    source,
)
from tfkernels.patches.philox import seed_tensor


def modulated_layer_norm_diffusion_loss(
    hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
    x0: Tensor | PackedLatents, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor | int, *,
    patch_size: int | None = None, offsets: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return `diffusion_loss` of a layer norm, modulated per image, and a linear head, with n the image of each patch.

        prediction = linear(layer_norm(hidden[places]) * (1 + scale[n]) + shift[n], weight, bias)

    So many tensors are best given by keyword, from scale on.

    Args:
        hidden: (T, C) or (B, S, C) the last hidden states in float16, bfloat16 or float32 (float64 on CPU), C at most
            16384; any strides (unit columns cost no copy).
        places: (P,) int64, the flat row of hidden (b S + s of a batch) of each of x0's P patches, each at most once. It
            may be anything for a row of x0 outside every image. A row that is not there, or is named twice, raises on
            a CPU. On a GPU, where looking would synchronise, the loss and gradients of the image of a row that is not
            there are NaN; a row named twice counts twice in the loss and gets the gradient of one of them.
        scale, shift: (N, C), a row per image; slices of one wider table cost no copy. shift may be None for 0.
        weight, bias: (D, C) and (D,) the head; bias may be None for 0. weight is rounded to hidden's dtype where it is
            multiplied.
        x0, p, q, loss_weight, seed, patch_size, offsets: what `diffusion_loss` takes, loss_weight as its weight; the
            target is p x0 + q eps.
        eps: added to the variance.

    Returns:
        (N,) float32 (float64 for float64), 0 for an image without rows, whatever its numbers. Differentiable in hidden
        (rows without a patch get 0), scale, shift, weight and bias, which may each have their own dtype; statistics and
        sums are float32; deterministic. Autocast changes nothing, except the gradients of shift and weight where the
        backward runs inside it, which PyTorch advises against.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also another argument that requires a
            gradient.
    """
    return _public("modulated_layer_norm_diffusion_loss", hidden, places, scale, shift, weight, bias, x0, p, q,
                   loss_weight, seed, patch_size, offsets, eps, True)


def modulated_rms_norm_diffusion_loss(
    hidden: Tensor, places: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
    x0: Tensor | PackedLatents, p: Tensor, q: Tensor, loss_weight: Tensor | None, seed: Tensor | int, *,
    patch_size: int | None = None, offsets: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return `diffusion_loss` of an RMS norm, modulated per image, and a linear head, with n the image of each patch.

        prediction = linear(rms_norm(hidden[places]) * (1 + scale[n]) + shift[n], weight, bias)

    Everything as in `modulated_layer_norm_diffusion_loss`; eps is added to the mean square.
    """
    return _public("modulated_rms_norm_diffusion_loss", hidden, places, scale, shift, weight, bias, x0, p, q,
                   loss_weight, seed, patch_size, offsets, eps, False)


def _public(op, hidden, places, scale, shift, weight, bias, x0, p, q, loss_weight, seed, patch_size, offsets, eps,
            center):
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
        some = rows_per_image(s.offsets, s.images, s.rows, hidden.device) > 0
        base = None if shift is None else torch.where(some[:, None], shift.to(dtype), 0) @ weight.to(dtype).T
        if bias is not None:
            base = bias.to(dtype).expand(s.images, s.dim) if base is None else base + bias.to(dtype)
    return _loss(hidden.reshape(-1, hidden.shape[-1]), places.contiguous(), scale, weight, base, s.x, p, q,
                 weights[0] if weights else None, seed, s.offsets, s.columns, s.channels, s.patch, eps, center)[0]


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
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)} on {hidden.device}; (tokens, C) or (batch, "
                         f"tokens, C) on {s.x.device} fits, C 1 to {MAX_WIDTH}")
    check_floating(op, "hidden", hidden)
    if (not isinstance(places, Tensor) or places.dtype != torch.int64 or places.shape != (s.rows,)
        or places.device != s.x.device):
        raise ValueError(f"{op}: places is {got(places)}; int64 ({s.rows},) on {s.x.device} fits, the row of hidden "
                         "of each of x0's patches")
    width = hidden.shape[-1]
    shapes = {"scale": (scale, (s.images, width)), "shift": (shift, (s.images, width)),
              "weight": (weight, (s.dim, width)), "bias": (bias, (s.dim,))}
    for name, (x, shape) in shapes.items():
        if x is None and name in ("shift", "bias"):
            continue
        if not isinstance(x, Tensor) or x.shape != shape:
            found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is {shown(x)}"
            raise ValueError(f"{op}: {name} {found}; {shape} fits {s.images} images of {s.dim} elements a patch and "
                             f"{width} columns of hidden")
        if x.dtype not in (
            torch.float16, torch.bfloat16, torch.float32
        ) and not x.dtype == hidden.dtype == torch.float64 or x.device != hidden.device:
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on {hidden.device}; "
                             "float16, bfloat16 or float32 on the same device fits (float64 for float64)")


def _loss_fake(hidden, places, scale, weight, base, x0, x0_factor, eps_factor, loss_weight, seed, offsets, columns,
               channels, patch, eps, center):
    rows = places.shape[0]
    return (x0_factor.new_empty(x0_factor.shape), hidden.new_empty(rows, weight.shape[0]),
            x0_factor.new_empty(4 if center else 2, rows))


def _backward_fake(dloss, hidden, places, scale, weight, loss_weight, offsets, error, statistics, wanted):
    return cpu.empty_head_gradients(dloss, hidden, scale, weight, wanted)


_loss = register("modulated_norm_diffusion_loss", kernel=kernels.forward, cpu=cpu.head_loss, fake=_loss_fake)
_backward = register("modulated_norm_diffusion_loss_backward", kernel=kernels.backward, cpu=cpu.head_loss_backward,
                     fake=_backward_fake)


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
