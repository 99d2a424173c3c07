"""Norm of queries and keys and rotary position embedding in one pass; the tables of angles, and positions in two dimensions.

    n   = x / sqrt(mean(x^2) + eps) * weight                           per head over D; without a weight n = x
    out = (n1 cos - n2 sin, n2 cos + n1 sin, rest)                     n = (n1, n2, rest), n1 and n2 R/2 long: the halves turn with each other
    dn  = (dout1 cos + dout2 sin, dout2 cos - dout1 sin, rest)         the rotation by -angle
    dx  = (dn weight - xhat mean(dn weight xhat)) / rms                xhat = x / rms;  dweight = sum over tokens and heads of dn xhat

Sources: rotary embedding arXiv:2104.09864, in the order of Hugging Face's `rotate_half`; norm of queries and keys arXiv:2010.04245, RMS norm
arXiv:1910.07467; an axis for each frequency arXiv:2409.12191 (section 2.1). A program takes a token, loads its cos and sin once and turns its
heads in blocks; in backward it takes a run of tokens, makes 1 / rms again and adds up dweight in registers, and the programs' rows, as many
as the sizes say, are summed in order: no atomics. Without a norm x is neither saved nor read. Bytes that must move, T tokens, H + K heads of
D elements of e bytes (cos, sin and weights aside):

    op                  forward            backward
    rotary              2 T (H + K) D e    2 T (H + K) D e    weights None
    qk_norm_rotary      2 T (H + K) D e    3 T (H + K) D e    reads q and k too
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._arguments import got, need_eps, need_range, need_tensors
from tfkernels._library import INTERPRET, register

MAX_HEAD_DIM = 256
PROGRAMS = 3 if INTERPRET else 1024  # of the backward kernel at most, and so of rows of partial sums; fixed: the sums' order is, too
FORWARD = (128, 64) if INTERPRET else (4096, 1024)  # elements of the heads that a program holds at a time, and of these a warp;
BACKWARD = (128, 64) if INTERPRET else (2048, 256)  # few in the interpreter, whose tests cross many edges; more for a warp in backward spill
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class RotatedQK(NamedTuple):
    """`q` and `k`, normalised and turned, like those that came in."""

    q: Tensor
    k: Tensor


def qk_norm_rotary(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, *,
                   eps: float = 1e-6) -> RotatedQK:
    """Return rotary(rms_norm(q) * q_weight) and rotary(rms_norm(k) * k_weight), each norm over a head; a weight that is None: no norm.

    Args:
        q, k: (B, H, S, D) and (B, K, S, D) of one dtype, float16, bfloat16 or float32 (float64 on CPU), D even and at most 256; any strides
            (unit in the last dimension costs no copy: projections (B, S, H, D), or slices of one, transposed).
        q_weight, k_weight: (D,) or None.
        cos, sin: (S, R/2), (1, S, R/2) or (B, S, R/2) in float32 or q's dtype, R at most D: the first R elements of a head turn, the others
            stay. Constants. `rotary_table` makes them; Hugging Face's, which hold each half twice, fit as cos[..., :R // 2], without a copy.
        eps: added to the mean square.

    Returns:
        In q's dtype, dense, with heads and tokens in memory in the order in which q (k) has them. Statistics and sums are float32.
        Gradients flow to q, k and the weights and are deterministic. Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; cos or sin that requires a gradient.
    """
    need_tensors("qk_norm_rotary", {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin},
                 ("q_weight", "k_weight"))
    eps = need_eps("qk_norm_rotary", eps)
    _check(q, k, {"q_weight": q_weight, "k_weight": k_weight}, {"cos": cos, "sin": sin})
    cos, sin = (_dense_rows(x).expand(q.shape[0], -1, -1) for x in (cos, sin))
    return RotatedQK(*_forward(_dense_rows(q), _dense_rows(k), q_weight, k_weight, cos, sin, eps))


def qk_norm_rotary_reference(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, *,
                             eps: float = 1e-6) -> RotatedQK:
    """The specification in plain PyTorch: statistics in float32 (float64 stays), the rest in q's dtype."""

    def turned(x, weight):
        n = x if weight is None else (_wide(x) * _rstd(x, eps)).to(x.dtype) * weight
        return _rotate(n, cos, sin).to(x.dtype)

    return RotatedQK(turned(q, q_weight), turned(k, k_weight))


def rotary_table(positions: Tensor, frequencies: Tensor, axes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions * frequencies, float32 (..., S, R/2).

    The angle is a float32 product of the position as float32 (whole numbers to 2^24 are exact) and the frequency, as Hugging Face's models
    compute theirs: weights were trained with those roundings.

    Args:
        positions: (S,) or (B, S), or with `axes` (..., S, A): a number for each of A axes, such as row and column. Tokens whose numbers are
            equal, text, turn to the bit as in one dimension.
        frequencies: (R/2,) float32, such as theta^(-2 i / R).
        axes: (R/2,) int64, the axis that each frequency turns with; `torch.arange(R // 2) % 2` gives them out in turn.
            A number that is none of 0 to A - 1 raises on a CPU; on a GPU, where looking would synchronise, it is the
            nearest of them.

    Raises:
        ValueError: a shape or dtype that does not fit, named.
    """
    need_tensors("rotary_table", {"positions": positions, "frequencies": frequencies, "axes": axes}, ("axes",))
    if frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        raise ValueError(f"rotary_table: frequencies is {frequencies.dtype} of shape {tuple(frequencies.shape)}; float32 (R/2,) fits")
    if axes is not None and (axes.shape != frequencies.shape or axes.dtype != torch.int64):
        raise ValueError(f"rotary_table: axes is {axes.dtype} of shape {tuple(axes.shape)} and frequencies has {len(frequencies)} elements; "
                         f"int64 ({len(frequencies)},) fits, an axis for each frequency")
    least = 1 if axes is None else 2
    if positions.ndim not in (least, least + 1):
        raise ValueError(f"rotary_table: positions has shape {tuple(positions.shape)} and axes is {'None' if axes is None else 'given'}; "
                         "(S,) or (B, S) fits without axes, (S, A) or (B, S, A) with them")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"rotary_table: positions is {got(positions)}; integers or floating-point numbers fit")
    if axes is not None:
        need_range("rotary_table", "axes", axes, 0, positions.shape[-1] - 1, "for positions has that many axes")
        axes = axes.clamp(0, max(0, positions.shape[-1] - 1))
    positions = positions.float()
    angles = (positions[..., None] if axes is None else positions[..., axes]) * frequencies
    return angles.cos(), angles.sin()


def grid_positions(positions: Tensor, index: Tensor, columns: Tensor) -> Tensor:
    """Return (B, S, 2), the row and column of every token: patches on a grid that starts where their image does, text (p, p).

        an image's first token has position s:  its patch t is at (s + t // columns, s + t % columns);  a token of none at (p, p), p its position

    Tokens behind an image keep their positions, so text turns as it would in one dimension. On the device, without synchronisation.

    Args:
        positions: (B, S) or (S,) integers, one more for each token of an image.
        index: like positions, int32 or int64: the image of each token, over the whole batch, negative for text. An
            image's first token must be there. N or more raises on a CPU; on a GPU, where looking would synchronise, it
            is text.
        columns: (N,) int32 or int64, how many patches of image n make a row; less than 1 raises on a CPU and is 1 on a
            GPU.

    Raises:
        ValueError: a shape or dtype that does not fit, named.
    """
    need_tensors("grid_positions", {"positions": positions, "index": index, "columns": columns})
    integers = (torch.int32, torch.int64)
    if positions.dtype not in integers:
        raise ValueError(f"grid_positions: positions is {positions.dtype}; int32 or int64 fits")
    if index.shape != positions.shape or index.dtype not in integers:
        raise ValueError(f"grid_positions: index is {index.dtype} of shape {tuple(index.shape)} and positions has shape {tuple(positions.shape)}; "
                         "int32 or int64 of the same shape fits, the image of each token, -1 for text")
    if columns.ndim != 1 or columns.dtype not in integers:
        raise ValueError(f"grid_positions: columns is {columns.dtype} of shape {tuple(columns.shape)}; int32 or int64 (images,) fits, "
                         "the patches in a row of each")
    images = columns.shape[0]
    need_range("grid_positions", "index", index, torch.iinfo(index.dtype).min, images - 1, "negative for text, for "
                                                                                           f"columns has {images} "
                                                                                           "images")
    need_range("grid_positions", "columns", columns, 1, torch.iinfo(columns.dtype).max, "the patches in a row")
    text = (index < 0) | (index >= images)
    # text is behind the last image
    image = torch.where(text, images, index.long())
    first = positions.new_full((images + 1,), torch.iinfo(positions.dtype).max)
    first = first.scatter_reduce(0, image.flatten(), positions.flatten(), "amin")          # a minimum of integers: the order is nothing
    start = torch.where(text, positions, first[image])
    patch = positions - start
    width = torch.nn.functional.pad(columns.to(positions.dtype).clamp(min=1), (0, 1), value=1)[image]
    return torch.stack((start + patch // width, start + patch % width), -1)


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
        raise ValueError(f"{op}: k has shape {tuple(k.shape)} and q {tuple(q.shape)}; ({batch}, heads, {tokens}, {dim}) with at least one head fits")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"{op}: k is {k.dtype} on {k.device} and q {q.dtype} on {q.device}; equal ones fit")
    for name, weight in weights.items():
        if weight is not None and (weight.shape != (dim,) or weight.device != q.device or
                                   weight.dtype not in _DTYPES and not weight.dtype == q.dtype == torch.float64):
            raise ValueError(f"{op}: {name} is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}; float16, bfloat16 or float32 "
                             f"(float64 for float64) of shape ({dim},) on {q.device} or None fits")
    half = tables["cos"].shape[-1] if tables["cos"].ndim else 0
    for name, table in tables.items():
        if table.shape not in ((tokens, half), (1, tokens, half), (batch, tokens, half)) or not 1 <= half <= dim // 2:
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)} and q {tuple(q.shape)}; ({tokens}, R/2), (1, {tokens}, R/2) or "
                             f"({batch}, {tokens}, R/2) with one R/2 of 1 to {dim // 2} for cos and sin fits; of a table that holds each half twice "
                             f"pass {name}[..., :R // 2]")
        if table.dtype not in (torch.float32, q.dtype) or table.device != q.device:
            raise ValueError(f"{op}: {name} is {table.dtype} on {table.device} and q {q.dtype} on {q.device}; float32 or q's dtype on the same "
                             "device fits")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, which {op} does not compute; a tensor without one fits; pass {name}.detach()")


def _dense_rows(x: Tensor) -> Tensor:
    """A copy only where the elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """Dense (B, H, S, D), in memory (B, S, H, D) where x's heads are closer together than its tokens."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2) if x.stride(1) < x.stride(2) else x.new_empty(x.shape)


@triton.jit
def _load(x_ptr, at, inside, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Rows at `at` in float32, 0 where there is nothing: the halves that turn with each other, and the rest, the first half where there is none."""
    cols = tl.arange(0, BLOCK)[None, :]
    x1 = tl.load(x_ptr + at + cols, mask=inside & (cols < HALF), other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + (HALF + cols), mask=inside & (cols < HALF), other=0.0).to(tl.float32)
    rest = x1
    if REST:
        cols = tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.load(x_ptr + at + (2 * HALF + cols), mask=inside & (cols < REST), other=0.0).to(tl.float32)
    return x1, x2, rest


@triton.jit
def _store(x_ptr, at, inside, x1, x2, rest, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
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
def _angle(cos_ptr, sin_ptr, b, s, stride_cb, stride_cs, stride_nb, stride_ns, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of a token, (1, BLOCK) float32."""
    cols = tl.arange(0, BLOCK)[None, :]
    cos = tl.load(cos_ptr + b * stride_cb + s * stride_cs + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * stride_nb + s * stride_ns + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _turn(x_ptr, weight_ptr, out_ptr, cos, sin, eps, stride_xh, stride_oh, HEADS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
          REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
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
        _store(out_ptr, head * stride_oh, inside, x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest, HALF, REST, BLOCK, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens"])
def _qk_norm_rotary_fwd(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, eps, stride_cb, stride_cs,
                        stride_nb, stride_ns, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_oqb, stride_oqh, stride_oqs,
                        stride_okb, stride_okh, stride_oks, H: tl.constexpr, K: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                        HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
                        BLOCK_REST: tl.constexpr):
    b, s = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    cos, sin = _angle(cos_ptr, sin_ptr, b, s, stride_cb, stride_cs, stride_nb, stride_ns, HALF, BLOCK)
    _turn(q_ptr + b * stride_qb + s * stride_qs, q_weight_ptr, q_out_ptr + b * stride_oqb + s * stride_oqs, cos, sin, eps, stride_qh, stride_oqh,
          H, Q_NORM, HALF, REST, BLOCK_H, BLOCK, BLOCK_REST)
    _turn(k_ptr + b * stride_kb + s * stride_ks, k_weight_ptr, k_out_ptr + b * stride_okb + s * stride_oks, cos, sin, eps, stride_kh, stride_okh,
          K, K_NORM, HALF, REST, BLOCK_K, BLOCK, BLOCK_REST)


@triton.jit
def _turn_back(dout_ptr, x_ptr, weight_ptr, dx_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps, stride_cb, stride_cs, stride_nb, stride_ns,
               stride_gb, stride_gh, stride_gs, stride_xb, stride_xh, stride_xs, stride_db, stride_dh, stride_ds, HEADS: tl.constexpr,
               NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Gradients of the heads of the tokens from `first` to `last`, and of the weight, summed over them, a row of `parts`."""
    if NORM:
        w1, w2, w_rest = _load(weight_ptr, 0, True, HALF, REST, BLOCK, BLOCK_REST)
        a1, a2 = tl.zeros([BLOCK_H, BLOCK], tl.float32), tl.zeros([BLOCK_H, BLOCK], tl.float32)
        a_rest = tl.zeros([BLOCK_H, BLOCK_REST], tl.float32)
    for token in range(first, last):
        b, s = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
        cos, sin = _angle(cos_ptr, sin_ptr, b, s, stride_cb, stride_cs, stride_nb, stride_ns, HALF, BLOCK)
        for start in range(0, HEADS, BLOCK_H):
            head = (start + tl.arange(0, BLOCK_H))[:, None]
            inside, head = head < HEADS, head.to(tl.int64)
            g1, g2, g_rest = _load(dout_ptr + b * stride_gb + s * stride_gs, head * stride_gh, inside, HALF, REST, BLOCK, BLOCK_REST)
            d1, d2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
            if NORM:
                x1, x2, x_rest = _load(x_ptr + b * stride_xb + s * stride_xs, head * stride_xh, inside, HALF, REST, BLOCK, BLOCK_REST)
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
            _store(dx_ptr + b * stride_db + s * stride_ds, head * stride_dh, inside, d1, d2, g_rest, HALF, REST, BLOCK, BLOCK_REST)
    if NORM:
        a1, a2, a_rest = tl.sum(a1, 0)[None, :], tl.sum(a2, 0)[None, :], tl.sum(a_rest, 0)[None, :]
        _store(parts_ptr, 0, True, a1, a2, a_rest, HALF, REST, BLOCK, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "count", "rows"])
def _qk_norm_rotary_bwd(dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, parts_ptr, tokens, count,
                        rows, eps, stride_cb, stride_cs, stride_nb, stride_ns, stride_gqb, stride_gqh, stride_gqs, stride_gkb, stride_gkh, stride_gks,
                        stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_dqb, stride_dqh, stride_dqs, stride_dkb, stride_dkh,
                        stride_dks, H: tl.constexpr, K: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HALF: tl.constexpr,
                        REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr):
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, count)
    parts_ptr += tl.program_id(0) * (2 * HALF + REST)
    _turn_back(dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps, stride_cb, stride_cs, stride_nb,
               stride_ns, stride_gqb, stride_gqh, stride_gqs, stride_qb, stride_qh, stride_qs, stride_dqb, stride_dqh, stride_dqs, H, Q_NORM, HALF,
               REST, BLOCK_H, BLOCK, BLOCK_REST)
    parts_ptr += Q_NORM * tl.num_programs(0) * (2 * HALF + REST)
    _turn_back(dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, parts_ptr, cos_ptr, sin_ptr, first, last, tokens, eps, stride_cb, stride_cs, stride_nb,
               stride_ns, stride_gkb, stride_gkh, stride_gks, stride_kb, stride_kh, stride_ks, stride_dkb, stride_dkh, stride_dks, K, K_NORM, HALF,
               REST, BLOCK_K, BLOCK, BLOCK_REST)


def launch_config(heads: int, kv_heads: int, dim: int, half: int, tile: int, warp: int) -> tuple[dict, int]:
    """Return the constexprs of a program's tiles of at most `tile` elements, and its warps, one for `warp` of them."""
    rest = dim - 2 * half
    block, block_rest = triton.next_power_of_2(half), triton.next_power_of_2(max(1, rest))
    row = triton.next_power_of_2(2 * block + (block_rest if rest else 0))
    block_h, block_k = (min(triton.next_power_of_2(max(1, n)), max(1, tile // row)) for n in (heads, kv_heads))
    sizes = {"H": heads, "K": kv_heads, "HALF": half, "REST": rest}
    return sizes | {"BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK": block, "BLOCK_REST": block_rest}, max(1, max(block_h, block_k) * row // warp)


def _forward_kernel(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor]:
    outputs, (batch, heads, tokens, dim) = (_empty_like(q), _empty_like(k)), q.shape
    if batch * tokens:
        q, k, cos, sin = (_dense_rows(x) for x in (q, k, cos, sin))
        constants, warps = launch_config(heads, k.shape[1], dim, cos.shape[-1], *FORWARD)
        strides = [n for x in (cos, sin) for n in x.stride()[:2]] + [n for x in (q, k, *outputs) for n in x.stride()[:3]]
        _qk_norm_rotary_fwd[(batch * tokens,)](q, k, *_or(q, q_weight, k_weight), cos, sin, *outputs, tokens, eps, *strides, **constants,
                                               Q_NORM=q_weight is not None, K_NORM=k_weight is not None, num_warps=warps)
    return outputs


def _backward_kernel(dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, q_weight: Tensor | None,
                     k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, *dweights = _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps)
    batch, tokens, half = cos.shape
    if batch * tokens == 0:
        return dq, dk, *(x.zero_() for x in dweights)
    heads, kv_heads = (0 if x is None else x.shape[1] for x in (dq_out, dk_out))
    given = dk_out if dq_out is None else dq_out
    cos, sin = _dense_rows(cos), _dense_rows(sin)
    constants, warps = launch_config(heads, kv_heads, given.shape[-1], half, *BACKWARD)
    rows = triton.cdiv(batch * tokens, PROGRAMS)
    programs = triton.cdiv(batch * tokens, rows)
    norms = q_weight is not None, k_weight is not None
    parts = cos.new_empty(sum(norms), programs, given.shape[-1], dtype=torch.float32)
    tensors = _or(given, dq_out, dk_out, q, k)
    strides = [n for x in (cos, sin) for n in x.stride()[:2]]
    strides += [n for x in (*tensors, *(given if x.ndim == 1 else x for x in (dq, dk))) for n in x.stride()[:3]]
    _qk_norm_rotary_bwd[(programs,)](*tensors, *_or(given, q_weight, k_weight), cos, sin, dq, dk, parts, tokens, batch * tokens, rows, eps, *strides,
                                     **constants, Q_NORM=norms[0], K_NORM=norms[1], num_warps=warps)
    for dweight, total in zip((x for x, norm in zip(dweights, norms) if norm), parts.sum(1)):
        dweight.copy_(total)
    return dq, dk, *dweights


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Pointers that no program follows still have to point at something; weights (D,) are made contiguous."""
    return [stand_in if x is None else _dense_rows(x) for x in tensors]


def _forward_cpu(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
                 eps: float) -> tuple[Tensor, Tensor]:
    def turned(x, weight):
        n = _wide(x) if weight is None else _wide(x) * _rstd(x, eps) * weight
        return _empty_like(x).copy_(_rotate(n, _wide(cos), _wide(sin)))

    return turned(q, q_weight), turned(k, k_weight)


def _backward_cpu(dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, q_weight: Tensor | None,
                  k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, *dweights = _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps)
    for dx, dweight, dout, x, weight in zip((dq, dk), dweights, (dq_out, dk_out), (q, k), (q_weight, k_weight)):
        if dout is None:
            continue
        dn = _rotate(_wide(dout), _wide(cos), -_wide(sin))
        if weight is not None:
            rstd = _rstd(x, eps)
            xhat, dxhat = _wide(x) * rstd, dn * weight
            dweight.copy_((dn * xhat).sum((0, 1, 2), dtype=torch.float64))
            dn = (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)) * rstd
        dx.copy_(dn)
    return dq, dk, *dweights


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rstd(x: Tensor, eps: float) -> Tensor:
    return (_wide(x).square().mean(-1, keepdim=True) + eps).rsqrt()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), -1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)                                        # (..., 1, S, R/2): one for every head
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


def _forward_fake(q, k, q_weight, k_weight, cos, sin, eps):
    return _empty_like(q), _empty_like(k)


def _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps):
    dq, dk = (cos.new_empty(0) if x is None else _empty_like(x) for x in (dq_out, dk_out))
    dq_weight, dk_weight = (cos.new_empty(0 if x is None else x.shape, dtype=None if x is None else x.dtype) for x in (q_weight, k_weight))
    return dq, dk, dq_weight, dk_weight


_forward = register("qk_norm_rotary", kernel=_forward_kernel, cpu=_forward_cpu, fake=_forward_fake)
_backward = register("qk_norm_rotary_backward", kernel=_backward_kernel, cpu=_backward_cpu, fake=_backward_fake)


def _save(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(None if q_weight is None else q, None if k_weight is None else k, q_weight, k_weight, cos, sin)


def _gradients(ctx, dq_out, dk_out):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    q_needed, k_needed = (ctx.needs_input_grad[i] or ctx.needs_input_grad[i + 2] for i in (0, 1))
    dq_out, q, q_weight = (_dense_rows(dq_out), q, q_weight) if q_needed else (None, None, None)
    dk_out, k, k_weight = (_dense_rows(dk_out), k, k_weight) if k_needed else (None, None, None)
    gradients = _backward(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, ctx.eps)
    return *(g if x is not None else None for g, x in zip(gradients, (dq_out, dk_out, q_weight, k_weight))), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
