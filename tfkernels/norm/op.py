"""Norms modulated by the image that each token belongs to, and gated residuals: adaLN-zero for rows of text and images.

With n the image id of a token, -1 for text, for which scale[-1] = shift[-1] = 0 and gate[-1] = 1:

    modulated_rms_norm        y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale[n]) + shift[n]
    modulated_layer_norm      y = ((x - mean(x)) / sqrt(var(x) + eps) * weight + bias) * (1 + scale[n]) + shift[n]
    gated_residual            y = residual + gate[n] * branch
    gated_residual_rms_norm   residual' = gated_residual(residual, branch, gate)
                              normed = modulated_rms_norm(residual', ...)

Sources: RMS norm arXiv:1910.07467, layer norm arXiv:1607.06450, adaLN-zero arXiv:2212.09748 (section 3.2). scale, shift
and gate hold one row per image and are never expanded to tokens: a program reads its token's row. The forward saves x,
1 / std and the mean. The backward computes the rest again in one pass over the tokens, sorted by image, and sums
dscale, dshift, dgate and dweight per image in an order that depends on the shapes and on the device's multiprocessors
alone. There are no atomics and no host synchronisation, and gradients are equal to the bit each time. The specification
is in `reference.py`, the kernels are in `triton.py`.

Bytes that must move, with e bytes per element, T tokens and C columns (tables and statistics aside):

    op                          forward    backward
    modulated norms             2 T C e    3 T C e     reads x (and dy), writes y (dx)
    gated_residual              3 T C e    3 T C e     reads residual and branch, writes y; dresidual is dy
    gated_residual_rms_norm     4 T C e    6 T C e     reads two and writes two; reads four and writes two

Rows of more than 4096 columns take their two means in a pass of their own: backward reads their x and dy twice.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_eps, need_tensors
from tfkernels._library import register
from tfkernels.norm import cpu, triton
from tfkernels.norm.reference import ResidualNorm
from tfkernels.norm.sums import tables as kernel_tables

MAX_WIDTH = 16384
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def modulated_rms_norm(x: Tensor, weight: Tensor | None, scale: Tensor, shift: Tensor | None, index: Tensor | None, *,
                       eps: float = 1e-6) -> Tensor:
    """Return rms_norm(x) * weight * (1 + scale[n]) + shift[n], n the image of each token.

    For text, n < 0, that is rms_norm(x) * weight.

    Args:
        x: (T, C) or (B, S, C) in float16, bfloat16 or float32, C at most 16384; any strides (unit columns cost no
            copy).
        weight: (C,), or None for 1.
        scale, shift: (N, C), a row per image; slices of one wider table cost no copy. shift may be None for 0; N may be
            0.
        index: (T,) or (B, S) like x's tokens, int32 or int64: the image id n of each token, in any order, negative for
            text. N or more raises on a CPU; on a GPU, where looking would synchronise, such a token's output and
            gradients are NaN. None: the tokens of batch row n of a (B, S, C) are image n, N = B, as in a diffusion
            transformer with a timestep per row; then nothing is read or sorted for it.
        eps: added to the mean square, 0 or more.

    Returns:
        Like x, contiguous, in x's dtype; weight, scale and shift may each have their own. Statistics and sums are
        float32. Gradients flow to x, weight, scale and shift, and are deterministic; an image without tokens gets 0.
        Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named.
    """
    _check("modulated_rms_norm", "x", x, index, {"weight": weight}, {"scale": scale, "shift": shift})
    return _norm_forward(x, weight, None, scale, shift, index, need_eps("modulated_rms_norm", eps), False)[0]


def modulated_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None,
                         index: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """Return layer_norm(x, weight, bias) * (1 + scale[n]) + shift[n], n the image of each token.

    For text, n < 0, that is layer_norm(x, weight, bias). bias is (C,) or None for 0; everything else is as in
    `modulated_rms_norm`.
    """
    _check("modulated_layer_norm", "x", x, index, {"weight": weight, "bias": bias}, {"scale": scale, "shift": shift})
    return _norm_forward(x, weight, bias, scale, shift, index, need_eps("modulated_layer_norm", eps), True)[0]


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """Return residual + gate[n] * branch, n the image of each token; for text, n < 0, residual + branch.

    residual is as x and gate (N, C) as scale in `modulated_rms_norm`. branch has residual's shape and may have a dtype
    of its own.
    """
    _check("gated_residual", "residual", residual, index, {}, {"gate": gate}, {"branch": branch})
    return _gated_forward(residual, branch, gate, index)


def gated_residual_rms_norm(residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None, scale: Tensor,
                            shift: Tensor | None, index: Tensor | None, *, eps: float = 1e-6) -> ResidualNorm:
    """Return `gated_residual` and its `modulated_rms_norm` from one pass; gradients may arrive on either or both.

    It stands between two sublayers, with the gate of the one and the scale and shift of the next: from weight on they
    are best given by keyword, gated_residual_rms_norm(x, branch, gate, weight=..., scale=..., shift=..., index=...).
    What is normalised is the residual as returned, rounded to its dtype.
    """
    tables = {"gate": gate, "scale": scale, "shift": shift}
    _check("gated_residual_rms_norm", "residual", residual, index, {"weight": weight}, tables, {"branch": branch})
    eps = need_eps("gated_residual_rms_norm", eps)
    return ResidualNorm(*_gated_norm_forward(residual, branch, gate, weight, scale, shift, index, eps)[:2])


def _check(
    op: str, name: str, x: Tensor, index: Tensor | None, vectors: dict, tables: dict, branch: dict | None = None
) -> None:
    branch = branch or {}
    need_tensors(op, {name: x, **branch, **vectors, **tables}, ("weight", "bias", "shift"))
    branch = branch.get("branch")
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; (tokens, C) or (batch, tokens, C) fits")
    if x.dtype not in _DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}; float16, bfloat16 or float32 fits (float64 on CPU "
                         "only)")
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: {name} has {x.shape[-1]} columns; 1 to {MAX_WIDTH} fits")
    given = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    if index is not None and not (given and index.shape == x.shape[:-1] and index.device == x.device):
        raise ValueError(f"{op}: index is {got(index)}; int32 or int64 of shape {tuple(x.shape[:-1])} on {x.device} "
                         "fits, the image of each token, -1 for text")
    if branch is not None and (branch.shape != x.shape or branch.device != x.device):
        raise ValueError(f"{op}: branch has shape {tuple(branch.shape)} on {branch.device} and {name} "
                         f"{tuple(x.shape)} on {x.device}; equal ones fit")
    first = next(iter(tables))
    for key, t in {**vectors, **tables, "branch": branch}.items():
        if t is None:
            continue
        if t.dtype not in _DTYPES and not (t.dtype == x.dtype == torch.float64) or t.device != x.device:
            raise ValueError(f"{op}: {key} is {t.dtype} on {t.device} and {name} {x.dtype} on {x.device}; "
                             "float16, bfloat16 or float32 on the same device fits (float64 for float64)")
        if key in vectors and t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {key} has shape {tuple(t.shape)} and {name} {x.shape[-1]} columns; "
                             f"({x.shape[-1]},) or None fits")
        if key in tables and (t.ndim != 2 or t.shape[-1] != x.shape[-1]):
            raise ValueError(f"{op}: {key} has shape {tuple(t.shape)} and {name} {x.shape[-1]} columns; (images, "
                             f"{x.shape[-1]}) fits, a row for each image")
        if key in tables and t.shape[0] != tables[first].shape[0]:
            raise ValueError(f"{op}: {key} has {t.shape[0]} rows and {first} {tables[first].shape[0]}; one row per "
                             "image in each fits")
    if index is None and (x.ndim != 3 or tables[first].shape[0] != x.shape[0]):
        raise ValueError(f"{op}: index is None, {name} has shape {tuple(x.shape)} and {first} "
                         f"{tables[first].shape[0]} rows; (batch, tokens, C) and a row for each of the batch fit; pass "
                         "the image of each token, -1 for text")


def _forwards(forward):
    """The three forward operators of an implementation."""

    def modulated_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None,
                       image_ids: Tensor | None, eps: float, center: bool) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, None, None, weight, bias, scale, shift, image_ids, eps, center)[1:]

    def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor, image_ids: Tensor | None) -> Tensor:
        return forward(residual, branch, gate, None, None, None, None, image_ids, 0.0, False)[0]

    def gated_residual_norm(
        residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None, scale: Tensor, shift: Tensor | None,
        image_ids: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, y, _, rstd = forward(residual, branch, gate, weight, None, scale, shift, image_ids, eps, False)
        return out, y, rstd

    return modulated_norm, gated_residual, gated_residual_norm


def _backwards(backward, tables):
    """The three backward operators of an implementation; the gradient of an input that is None is empty."""

    def modulated_norm_backward(
        dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None,
        image_ids: Tensor | None, mean: Tensor, rstd: Tensor, center: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        level = bias is not None or shift is not None
        dx, _, sums = backward(dy, None, x, None, None, weight, scale, image_ids, mean, rstd, center, level)
        return dx, *tables(sums, weight, bias, scale, shift, None)[:4]

    def gated_residual_backward(dout: Tensor, branch: Tensor, gate: Tensor,
                                image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        empty = dout.new_empty(0)
        _, dbranch, sums = backward(None, dout, dout, branch, gate, None, None, image_ids, empty, empty, False, False)
        return dbranch, sums[0][1:].to(gate.dtype, copy=True)

    def gated_residual_norm_backward(
        dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None, scale: Tensor,
        shift: Tensor | None, image_ids: Tensor | None, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dx, dbranch, sums = backward(dy, dout, out, branch, gate, weight, scale, image_ids, rstd.new_empty(0), rstd,
                                     False, shift is not None)
        dweight, _, dscale, dshift, dgate = tables(sums, weight, None, scale, shift, gate)
        return dx, dbranch, dgate, dweight, dscale, dshift

    return modulated_norm_backward, gated_residual_backward, gated_residual_norm_backward


def _statistics(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape[:-1] if wanted else 0, dtype=torch.promote_types(x.dtype, torch.float32))


def _like(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous gradients of `tensors`, empty for None."""
    return [x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32)) if t is None else t.new_empty(t.shape)
            for t in tensors]


def _norm_fake(x, weight, bias, scale, shift, image_ids, eps, center):
    return x.new_empty(x.shape), _statistics(x, center), _statistics(x)


def _norm_backward_fake(dy, x, weight, bias, scale, shift, image_ids, mean, rstd, center):
    return tuple(_like(x, x, weight, bias, scale, shift))


def _gated_fake(residual, branch, gate, image_ids):
    return residual.new_empty(residual.shape)


def _gated_backward_fake(dout, branch, gate, image_ids):
    return tuple(_like(dout, branch, gate))


def _gated_norm_fake(residual, branch, gate, weight, scale, shift, image_ids, eps):
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape), _statistics(residual)


def _gated_norm_backward_fake(dout, dy, out, branch, gate, weight, scale, shift, image_ids, rstd):
    return tuple(_like(out, out, branch, gate, weight, scale, shift))


_NAMES = ("modulated_norm", "gated_residual", "gated_residual_norm")
_norm_forward, _gated_forward, _gated_norm_forward = (
    register(f"{name}_forward", kernel=kernel, cpu=cpu, fake=fake) for name, kernel, cpu, fake in
    zip(_NAMES, _forwards(triton.forward), _forwards(cpu.forward), (_norm_fake, _gated_fake, _gated_norm_fake)))
_norm_backward, _gated_backward, _gated_norm_backward = (
    register(f"{name}_backward", kernel=kernel, cpu=cpu, fake=fake)
    for name, kernel, cpu, fake in zip(_NAMES, _backwards(triton.backward, kernel_tables),
                                       _backwards(cpu.backward, cpu.tables),
                                       (_norm_backward_fake, _gated_backward_fake, _gated_norm_backward_fake))
)


def _save_norm(ctx, inputs, output):
    x, weight, bias, scale, shift, image_ids, _, ctx.center = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, image_ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros are made for the statistics


def _norm_gradients(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    return *_given(_norm_backward(dy, *saved, ctx.center), saved), None, None, None


def _save_gated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gated_gradients(ctx, dout):
    return dout, *_gated_backward(dout, *ctx.saved_tensors), None


def _save_gated_norm(ctx, inputs, output):
    _, *saved, _ = inputs
    ctx.save_for_backward(output[0], *saved, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gated_norm_gradients(ctx, dout, dy, drstd):
    if dout is None and dy is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    dout, dy = (torch.zeros_like(saved[0]) if x is None else x for x in (dout, dy))
    return *_given(_gated_norm_backward(dout, dy, *saved), saved), None, None


def _given(gradients, inputs):
    """None in place of the gradient of an input that is None."""
    return [g if x is not None else None for g, x in zip(gradients, inputs)]


_norm_forward.register_autograd(_norm_gradients, setup_context=_save_norm)
_gated_forward.register_autograd(_gated_gradients, setup_context=_save_gated)
_gated_norm_forward.register_autograd(_gated_norm_gradients, setup_context=_save_gated_norm)
