"""Kernels of `tfkernels.qk_norm_rotary`: one forward, one backward; no atomics.

A program takes a token, loads its cos and sin once and turns its heads in blocks. In backward it takes a run of tokens,
computes 1 / rms again and adds up dweight in registers. It writes one row of sums; the number of these rows depends on
the sizes alone, and they are added in order.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import ROUNDED_PRODUCTS, cdiv, next_power_of_2
from tfkernels._library import INTERPRET
from tfkernels.rotary.results import dense_rows, empty_gradients, empty_like, even_rows

# of the backward kernel at most, and so of rows of partial sums; fixed: the sums' order is, too
PROGRAMS = 3 if INTERPRET else 1024
# elements of the heads that a program holds at a time, and of these a warp;
FORWARD = (128, 64) if INTERPRET else (4096, 1024)
# few in the interpreter, whose tests cross many edges; more for a warp in backward spill
BACKWARD = (128, 64) if INTERPRET else (2048, 256)


@triton.jit
def _load(x_ptr, at, inside, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Load rows at `at` in float32, 0 where there is nothing: the two halves that turn together, and the rest.

    Without a rest, the first half stands for it.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    x1 = tl.load(x_ptr + at + cols, mask=inside & (cols < HALF), other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + (HALF + cols), mask=inside & (cols < HALF), other=0.0).to(tl.float32)
    rest = x1
    if REST:
        cols = tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.load(x_ptr + at + (2 * HALF + cols), mask=inside & (cols < REST), other=0.0).to(tl.float32)
    return x1, x2, rest


@triton.jit
def _store(x_ptr, at, inside, x1, x2, rest,
           HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(x_ptr + at + cols, x1.to(x_ptr.dtype.element_ty), mask=inside & (cols < HALF))
    tl.store(x_ptr + at + (HALF + cols), x2.to(x_ptr.dtype.element_ty), mask=inside & (cols < HALF))
    if REST:
        cols = tl.arange(0, BLOCK_REST)[None, :]
        tl.store(x_ptr + at + (2 * HALF + cols), rest.to(x_ptr.dtype.element_ty), mask=inside & (cols < REST))


@triton.jit
def _mean(x1, x2, rest, y1, y2, y_rest, HALF: tl.constexpr, REST: tl.constexpr):
    """Mean of x * y over a head, (R, 1)."""
    total = tl.sum(x1 * y1 + x2 * y2, 1)
    if REST:
        total += tl.sum(rest * y_rest, 1)
    return total[:, None] / (2 * HALF + REST)


@triton.jit
def _inverse_rms(x1, x2, rest, inside, eps, HALF: tl.constexpr, REST: tl.constexpr):
    """1 / rms of each head, (R, 1); 1 behind the last head, where it would be infinite without eps."""
    return tl.rsqrt(tl.where(inside, _mean(x1, x2, rest, x1, x2, rest, HALF, REST) + eps, 1.0))


@triton.jit
def _angle(cos_ptr, sin_ptr, b, s, rows_cb, stride_cs, rows_nb, stride_ns, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of a token, (1, BLOCK) float32."""
    cols = tl.arange(0, BLOCK)[None, :]
    cos = tl.load(cos_ptr + (b * rows_cb + s) * stride_cs + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + (b * rows_nb + s) * stride_ns + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _turn(x_ptr, weight_ptr, out_ptr, cos, sin, eps, stride_xh, stride_oh,
          HEADS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr,
          BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Norm and rotation of one token's heads."""
    if NORM:
        w1, w2, w_rest = _load(weight_ptr, 0, True, HALF, REST, BLOCK, BLOCK_REST)
    for first in range(0, HEADS, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H))[:, None]
        inside, head = head < HEADS, head.to(tl.int64)
        x1, x2, rest = _load(x_ptr, head * stride_xh, inside, HALF, REST, BLOCK, BLOCK_REST)
        if NORM:
            rstd = _inverse_rms(x1, x2, rest, inside, eps, HALF, REST)
            x1, x2, rest = x1 * rstd * w1, x2 * rstd * w2, rest * rstd * w_rest
        _store(out_ptr, head * stride_oh, inside, x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest, HALF, REST, BLOCK,
               BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "rows_cb", "rows_nb"])
def _qk_norm_rotary_fwd(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, eps,
                        rows_cb, stride_cs, rows_nb, stride_ns, stride_qb, stride_qh, stride_qs, stride_kb,
                        stride_kh, stride_ks, stride_oqb, stride_oqh, stride_oqs, stride_okb, stride_okh, stride_oks,
                        H: tl.constexpr, K: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                        HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
                        BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    b, s = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    cos, sin = _angle(cos_ptr, sin_ptr, b, s, rows_cb, stride_cs, rows_nb, stride_ns, HALF, BLOCK)
    _turn(q_ptr + b * stride_qb + s * stride_qs, q_weight_ptr, q_out_ptr + b * stride_oqb + s * stride_oqs, cos, sin,
          eps, stride_qh, stride_oqh, H, Q_NORM, HALF, REST, BLOCK_H, BLOCK, BLOCK_REST)
    _turn(k_ptr + b * stride_kb + s * stride_ks, k_weight_ptr, k_out_ptr + b * stride_okb + s * stride_oks, cos, sin,
          eps, stride_kh, stride_okh, K, K_NORM, HALF, REST, BLOCK_K, BLOCK, BLOCK_REST)


@triton.jit
def _turn_back(dout_ptr, x_ptr, weight_ptr, dx_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps, rows_cb,
               stride_cs, rows_nb, stride_ns, stride_gb, stride_gh, stride_gs, stride_xb, stride_xh, stride_xs,
               stride_db, stride_dh, stride_ds,
               HEADS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr,
               BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Write the gradients of the heads of tokens `first` to `last`, and to a row of `parts` the weight's, summed."""
    if NORM:
        w1, w2, w_rest = _load(weight_ptr, 0, True, HALF, REST, BLOCK, BLOCK_REST)
        a1, a2 = tl.zeros([BLOCK_H, BLOCK], tl.float32), tl.zeros([BLOCK_H, BLOCK], tl.float32)
        a_rest = tl.zeros([BLOCK_H, BLOCK_REST], tl.float32)
    for token in range(first, last):
        b, s = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
        cos, sin = _angle(cos_ptr, sin_ptr, b, s, rows_cb, stride_cs, rows_nb, stride_ns, HALF, BLOCK)
        for start in range(0, HEADS, BLOCK_H):
            head = (start + tl.arange(0, BLOCK_H))[:, None]
            inside, head = head < HEADS, head.to(tl.int64)
            g1, g2, g_rest = _load(dout_ptr + b * stride_gb + s * stride_gs, head * stride_gh, inside, HALF, REST,
                                   BLOCK, BLOCK_REST)
            d1, d2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
            if NORM:
                x1, x2, x_rest = _load(x_ptr + b * stride_xb + s * stride_xs, head * stride_xh, inside, HALF, REST,
                                       BLOCK, BLOCK_REST)
                rstd = _inverse_rms(x1, x2, x_rest, inside, eps, HALF, REST)
                x1, x2 = x1 * rstd, x2 * rstd
                a1 += d1 * x1
                a2 += d2 * x2
                d1, d2 = d1 * w1, d2 * w2
                if REST:
                    x_rest *= rstd
                    a_rest += g_rest * x_rest
                    g_rest *= w_rest
                along = _mean(d1, d2, g_rest, x1, x2, x_rest, HALF, REST)
                d1, d2 = (d1 - x1 * along) * rstd, (d2 - x2 * along) * rstd
                if REST:
                    g_rest = (g_rest - x_rest * along) * rstd
            _store(dx_ptr + b * stride_db + s * stride_ds, head * stride_dh, inside, d1, d2, g_rest, HALF, REST, BLOCK,
                   BLOCK_REST)
    if NORM:
        a1, a2, a_rest = tl.sum(a1, 0)[None, :], tl.sum(a2, 0)[None, :], tl.sum(a_rest, 0)[None, :]
        _store(parts_ptr, 0, True, a1, a2, a_rest, HALF, REST, BLOCK, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "count", "rows", "rows_cb", "rows_nb"])
def _qk_norm_rotary_bwd(dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr,
                        dk_ptr, parts_ptr, tokens, count, rows, eps, rows_cb, stride_cs, rows_nb, stride_ns,
                        stride_gqb, stride_gqh, stride_gqs, stride_gkb, stride_gkh, stride_gks, stride_qb, stride_qh,
                        stride_qs, stride_kb, stride_kh, stride_ks, stride_dqb, stride_dqh, stride_dqs, stride_dkb,
                        stride_dkh, stride_dks,
                        H: tl.constexpr, K: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                        HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
                        BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, count)
    parts_ptr += tl.program_id(0) * (2 * HALF + REST)
    _turn_back(dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps,
               rows_cb, stride_cs, rows_nb, stride_ns, stride_gqb, stride_gqh, stride_gqs, stride_qb, stride_qh,
               stride_qs, stride_dqb, stride_dqh, stride_dqs, H, Q_NORM, HALF, REST, BLOCK_H, BLOCK, BLOCK_REST)
    parts_ptr += Q_NORM * tl.num_programs(0) * (2 * HALF + REST)
    _turn_back(dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps,
               rows_cb, stride_cs, rows_nb, stride_ns, stride_gkb, stride_gkh, stride_gks, stride_kb, stride_kh,
               stride_ks, stride_dkb, stride_dkh, stride_dks, K, K_NORM, HALF, REST, BLOCK_K, BLOCK, BLOCK_REST)


@functools.cache
def launch_config(heads: int, kv_heads: int, dim: int, half: int, tile: int, warp: int) -> tuple[dict, int]:
    """Return the constexprs of a program's tiles of at most `tile` elements, and its warps, one for `warp` of them."""
    rest = dim - 2 * half
    block, block_rest = next_power_of_2(half), next_power_of_2(max(1, rest))
    row = next_power_of_2(2 * block + (block_rest if rest else 0))
    block_h, block_k = (min(next_power_of_2(max(1, n)), max(1, tile // row)) for n in (heads, kv_heads))
    sizes = {"H": heads, "K": kv_heads, "HALF": half, "REST": rest}
    return (sizes | {"BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK": block, "BLOCK_REST": block_rest},
            max(1, max(block_h, block_k) * row // warp))


def forward(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: q and k, normalised and turned."""
    outputs, (batch, heads, tokens, dim) = (empty_like(q), empty_like(k)), q.shape
    if batch * tokens:
        q, k, cos, sin = dense_rows(q), dense_rows(k), even_rows(cos), even_rows(sin)
        constants, warps = launch_config(heads, k.shape[1], dim, cos.shape[-1], *FORWARD)
        strides = [n for x in (cos, sin) for n in (x.stride(0) // x.stride(1), x.stride(1))] + [
            n for x in (q, k, *outputs) for n in x.stride()[:3]
        ]
        _qk_norm_rotary_fwd[(batch * tokens,)](q, k, *_or(q, q_weight, k_weight), cos, sin, *outputs, tokens, eps,
                                               *strides, **constants, Q_NORM=q_weight is not None,
                                               K_NORM=k_weight is not None, num_warps=warps, **ROUNDED_PRODUCTS)
    return outputs


def backward(dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, q_weight: Tensor | None,
             k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel: the gradients of q, k and their weights, empty where nobody asked for them."""
    dq, dk, *dweights = empty_gradients(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps)
    batch, tokens, half = cos.shape
    if batch * tokens == 0:
        return dq, dk, *(x.zero_() for x in dweights)
    heads, kv_heads = (0 if x is None else x.shape[1] for x in (dq_out, dk_out))
    given = dk_out if dq_out is None else dq_out
    cos, sin = even_rows(cos), even_rows(sin)
    constants, warps = launch_config(heads, kv_heads, given.shape[-1], half, *BACKWARD)
    rows = cdiv(batch * tokens, PROGRAMS)
    programs = cdiv(batch * tokens, rows)
    norms = q_weight is not None, k_weight is not None
    parts = cos.new_empty(sum(norms), programs, given.shape[-1], dtype=torch.float32)
    tensors = _or(given, dq_out, dk_out, q, k)
    strides = [n for x in (cos, sin) for n in (x.stride(0) // x.stride(1), x.stride(1))]
    strides += [n for x in (*tensors, *(given if x.ndim == 1 else x for x in (dq, dk))) for n in x.stride()[:3]]
    _qk_norm_rotary_bwd[(programs,)](
        *tensors, *_or(given, q_weight, k_weight), cos, sin, dq, dk, parts, tokens, batch * tokens, rows, eps, *strides,
        **constants, Q_NORM=norms[0], K_NORM=norms[1], num_warps=warps, **ROUNDED_PRODUCTS
    )
    if any(norms):
        for dweight, total in zip((x for x, norm in zip(dweights, norms) if norm), parts.sum(1)):
            dweight.copy_(total)
    return dq, dk, *dweights


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Pointers that no program follows still have to point at something; weights (D,) are made contiguous."""
    return [stand_in if x is None else dense_rows(x) for x in tensors]
