"""Norm of queries and keys and rotary position embedding in one pass.

    n   = x / sqrt(mean(x^2) + eps) * weight                     per head over D; without a weight n = x
    out = (n1 cos - n2 sin, n2 cos + n1 sin, rest)               n = (n1, n2, rest); n1 and n2, R/2 long, turn together
    dn  = (dout1 cos + dout2 sin, dout2 cos - dout1 sin, rest)   the rotation by -angle
    dx  = (dn weight - xhat mean(dn weight xhat)) / rms          xhat = x / rms
    dweight = sum over tokens and heads of dn xhat

Sources: rotary embedding arXiv:2104.09864, in the order of Hugging Face's `rotate_half`; norm of queries and keys
arXiv:2010.04245; RMS norm arXiv:1910.07467; an axis for each frequency arXiv:2409.12191 (section 2.1). Without a norm,
x is neither saved for the backward nor read by it. The specification is in `reference.py`, the kernels are in
`triton.py`.

Bytes that must move for T tokens and H + K heads of D elements of e bytes (cos, sin and weights aside):

    op                  forward            backward
    rotary              2 T (H + K) D e    2 T (H + K) D e    both weights None
    qk_norm_rotary      2 T (H + K) D e    3 T (H + K) D e    reads q and k too
"""
import torch
from torch import Tensor

from tfkernels._arguments import need_eps, need_tensors
from tfkernels._library import register
from tfkernels.rotary import cpu, triton
from tfkernels.rotary.reference import RotatedQK
from tfkernels.rotary.results import dense_rows, empty_gradients, empty_like

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def qk_norm_rotary(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, *,
                   eps: float = 1e-6) -> RotatedQK:
    """Return rotary(rms_norm(q) * q_weight) and rotary(rms_norm(k) * k_weight), each norm over a head.

    Where a weight is None there is no norm.

    Args:
        q, k: (B, H, S, D) and (B, K, S, D) of one dtype, float16, bfloat16 or float32 (float64 on CPU), D even and at
            most 256; any strides (unit in the last dimension costs no copy: projections (B, S, H, D), or slices of one,
            transposed).
        q_weight, k_weight: (D,) or None.
        cos, sin: (S, R/2), (1, S, R/2) or (B, S, R/2) in float32 or q's dtype, R at most D: the first R elements of a
            head turn, the others stay. Constants. `rotary_table` makes them; Hugging Face's, which hold each half
            twice, fit as cos[..., :R // 2], without a copy.
        eps: added to the mean square.

    Returns:
        In q's dtype, dense, with heads and tokens in memory in the order in which q (k) has them. Statistics and sums
        are float32. Gradients flow to q, k and the weights and are deterministic. Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; cos or sin that requires a gradient.
    """
    need_tensors("qk_norm_rotary", {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin},
                 ("q_weight", "k_weight"))
    eps = need_eps("qk_norm_rotary", eps)
    _check(q, k, {"q_weight": q_weight, "k_weight": k_weight}, {"cos": cos, "sin": sin})
    cos, sin = (dense_rows(x).expand(q.shape[0], -1, -1) for x in (cos, sin))
    return RotatedQK(*_forward(dense_rows(q), dense_rows(k), q_weight, k_weight, cos, sin, eps))


def _check(q: Tensor, k: Tensor, weights: dict, tables: dict) -> None:
    op = "qk_norm_rotary"
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; (batch, heads, tokens, D) with at least one head fits")
    if q.dtype not in _DTYPES and not (q.dtype == torch.float64 and q.device.type == "cpu"):
        raise ValueError(f"{op}: q is {q.dtype} on {q.device}; float16, bfloat16 or float32 fits (float64 on CPU only)")
    batch, _, tokens, dim = q.shape
    if dim % 2 or not 2 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has heads of {dim} elements; an even number from 2 to {MAX_HEAD_DIM} fits")
    if k.ndim != 4 or k.shape[1] < 1 or (k.shape[0], *k.shape[2:]) != (batch, tokens, dim):
        raise ValueError(f"{op}: k has shape {tuple(k.shape)} and q {tuple(q.shape)}; ({batch}, heads, {tokens}, "
                         f"{dim}) with at least one head fits")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"{op}: k is {k.dtype} on {k.device} and q {q.dtype} on {q.device}; equal ones fit")
    for name, weight in weights.items():
        if weight is not None and (weight.shape != (dim,) or weight.device != q.device or
                                   weight.dtype not in _DTYPES and not weight.dtype == q.dtype == torch.float64):
            raise ValueError(f"{op}: {name} is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}; "
                             f"float16, bfloat16 or float32 (float64 for float64) of shape ({dim},) on {q.device} or "
                             "None fits")
    half = tables["cos"].shape[-1] if tables["cos"].ndim else 0
    for name, table in tables.items():
        if table.shape not in ((tokens, half), (1, tokens, half), (batch, tokens, half)) or not 1 <= half <= dim // 2:
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)} and q {tuple(q.shape)}; ({tokens}, R/2), "
                             f"(1, {tokens}, R/2) or ({batch}, {tokens}, R/2) with one R/2 of 1 to {dim // 2} for cos "
                             f"and sin fits; of a table that holds each half twice pass {name}[..., :R // 2]")
        if table.dtype not in (torch.float32, q.dtype) or table.device != q.device:
            raise ValueError(f"{op}: {name} is {table.dtype} on {table.device} and q {q.dtype} on {q.device}; float32 "
                             "or q's dtype on the same device fits")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, which {op} does not compute; a tensor without one "
                             f"fits; pass {name}.detach()")


def _forward_fake(q, k, q_weight, k_weight, cos, sin, eps):
    return empty_like(q), empty_like(k)


_forward = register("qk_norm_rotary", kernel=triton.forward, cpu=cpu.forward, fake=_forward_fake)
_backward = register("qk_norm_rotary_backward", kernel=triton.backward, cpu=cpu.backward, fake=empty_gradients)


def _save(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(
        None if q_weight is None else q, None if k_weight is None else k, q_weight, k_weight, cos, sin
    )


def _gradients(ctx, dq_out, dk_out):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    q_needed, k_needed = (ctx.needs_input_grad[i] or ctx.needs_input_grad[i + 2] for i in (0, 1))
    dq_out, q, q_weight = (dense_rows(dq_out), q, q_weight) if q_needed else (None, None, None)
    dk_out, k, k_weight = (dense_rows(dk_out), k, k_weight) if k_needed else (None, None, None)
    gradients = _backward(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, ctx.eps)
    return (*(g if x is not None else None for g, x in zip(gradients, (dq_out, dk_out, q_weight, k_weight))), None,
            None, None)


_forward.register_autograd(_gradients, setup_context=_save)
