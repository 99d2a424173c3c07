"""Work cut finer where whole tiles would leave multiprocessors idle: into how many parts, and what makes them whole.

Keys of a tile of queries are cut into parts that are merged by their log-sum-exp (flash decoding). Query heads that
share a key head are cut into parts whose gradients of that head's keys and values are summed. Both second steps take
the parts in order, so that results are the same bits each time. How many parts there are follows from shapes and from
the number of multiprocessors alone: nothing waits for the device.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import ROUNDED_PRODUCTS, cdiv
from tfkernels.attention.triton.rows import LOWEST, finished
from tfkernels.attention.triton.tiles import SCALAR_ARGUMENTS

MAX_SPLITS = 128
MERGED = tl.constexpr(16)  # parts merged at a time
SUMMED_ROWS = 16           # keys of one program of _attention_bwd_sum


def key_splits(programs: int, room: int, keys: int, fewest: int) -> int:
    """Return into how many parts to cut the keys of `programs` programs where a device has room for `room` at once.

    No part is to have fewer than `fewest` keys.
    """
    return max(1, min(room // programs, keys // fewest, MAX_SPLITS))


def head_splits(programs: int, group: int, room: int) -> int:
    """Return how many programs share the `group` query heads of each tile of keys: as many as divide it and give each
    multiprocessor two, if the `programs` of whole groups would leave some idle."""
    if programs >= room:
        return 1
    return next(splits for splits in range(1, group + 1)
                if group % splits == 0 and (programs * splits >= 2 * room or splits == group))


@triton.jit
def part_of(first, last, split, splits, BLOCK_N: tl.constexpr):
    """The keys of one of `splits` equal parts of [first, last)."""
    part = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    return first + split * part, tl.minimum(first + split * part + part, last)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_merge(parts_ptr, parts_lse_ptr, sinks_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_os, heads,
                     sq, splits, items,
                     HEAD_DIM: tl.constexpr, D: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)                                                   # (b * heads + h) * sq + row
    b, h, row = item // sq // heads, item // sq % heads, item % sq
    offs_d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    total, peak, unknown = 0.0, float("-inf"), 0
    for first in range(0, splits, MERGED):
        split = first + tl.arange(0, MERGED)
        at = split.to(tl.int64) * items + item
        lse = tl.load(parts_lse_ptr + at, mask=split < splits, other=float("-inf"))
        parts = tl.load(parts_ptr + at[:, None] * HEAD_DIM + offs_d[None, :],
                        mask=(split < splits)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, shrink = tl.exp2(lse - shift), tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(parts * weights[:, None], 0)
        peak = new_peak
        unknown |= tl.max((lse != lse).to(tl.int32))                                       # the maximum passes over NaN
    lse = tl.where(tl.abs(peak) < float("inf"), peak + tl.log2(total), peak)
    lse = tl.where(peak == LOWEST, LOWEST, tl.where(unknown > 0, float("nan"), lse))
    out, lse = finished(acc / tl.where(total == 0, 1.0, total), lse, sinks_ptr, h)
    tl.store(lse_ptr + item, lse)
    tl.store(out_ptr + b * stride_ob + h * stride_oh + row * stride_os + offs_d, out.to(out_ptr.dtype.element_ty),
             mask=offs_d < HEAD_DIM)


def empty_parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Return memory for `splits` parts of out (B, H, Sq, Dv) and of its base-2 LSE, both float32."""
    return (torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device),
            torch.empty(splits, *out.shape[:3], dtype=torch.float32, device=out.device))


def merge(parts: Tensor, parts_lse: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, padded_dim: int) -> None:
    """Write out and the natural LSE of what `empty_parts` gave and a kernel filled; the sinks join here."""
    splits, batch, heads, sq, dim = parts.shape
    items = batch * heads * sq
    _attention_merge[(items,)](parts, parts_lse, sinks, out, lse, *out.stride()[:3], heads, sq, splits, items,
                               HEAD_DIM=dim, D=padded_dim, num_warps=4, **ROUNDED_PRODUCTS)


@triton.jit
def store_or_part(result_ptr, part_ptr, x, mask, splits):
    """Store a result in its dtype, or, if it has several parts, one of them in float32.

    Of one dtype, both stores are there and one is masked: under an `if` Triton 3.6 and 3.7 move x's change of layout to
    where it does not reach the other branch, and fail to compile. Of two dtypes the masks would cost registers.
    """
    if result_ptr.dtype.element_ty == part_ptr.dtype.element_ty:
        tl.store(part_ptr, x, mask=tl.where(splits > 1, mask, False))  # the interpreter's `&` takes no scalar here
        tl.store(result_ptr, x, mask=tl.where(splits > 1, False, mask))
    elif splits > 1:
        tl.store(part_ptr, x, mask=mask)
    else:
        tl.store(result_ptr, x.to(result_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _summed(part_ptr, stride_part, splits, mask):
    """Add up the tiles at part_ptr, part_ptr + stride_part, ... in this order."""
    total = tl.load(part_ptr, mask=mask, other=0.0)
    for _ in range(1, splits):
        part_ptr += stride_part
        total += tl.load(part_ptr, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_bwd_sum(parts_ptr, dk_ptr, dv_ptr, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh,
                       stride_dvs, kv_heads, sk, splits,
                       HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                       BLOCK_N: tl.constexpr):
    tiles = tl.cdiv(sk, BLOCK_N)
    pid = tl.program_id(0)
    b, h = (pid // tiles // kv_heads).to(tl.int64), (pid // tiles % kv_heads).to(tl.int64)
    row = (pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)
    offs_d, offs_v = tl.arange(0, D)[None, :], tl.arange(0, D_V)[None, :]
    inside_d, inside_v = (row < sk) & (offs_d < HEAD_DIM), (row < sk) & (offs_v < HEAD_DIM_V)
    stride_part = tl.cast(sk, tl.int64) * (HEAD_DIM + HEAD_DIM_V)
    part = parts_ptr + (b * kv_heads + h) * splits * stride_part + row * (HEAD_DIM + HEAD_DIM_V)
    dk = _summed(part + offs_d, stride_part, splits, inside_d)
    tl.store(dk_ptr + b * stride_dkb + h * stride_dkh + row * stride_dks + offs_d, dk.to(dk_ptr.dtype.element_ty),
             mask=inside_d)
    dv = _summed(part + HEAD_DIM + offs_v, stride_part, splits, inside_v)
    tl.store(dv_ptr + b * stride_dvb + h * stride_dvh + row * stride_dvs + offs_v, dv.to(dv_ptr.dtype.element_ty),
             mask=inside_v)


def empty_head_parts(k: Tensor, v: Tensor, splits: int) -> Tensor:
    """Return memory for the float32 gradients of k and v side by side, `splits` times for each of their heads."""
    batch, kv_heads, sk, dim = k.shape
    return torch.empty(batch, kv_heads * splits, sk, dim + v.shape[3], dtype=torch.float32, device=k.device)


def sum_parts(parts: Tensor, dk: Tensor, dv: Tensor, dims: dict[str, int]) -> None:
    """Write dk and dv, the sums of what `empty_head_parts` gave and a kernel filled."""
    (batch, kv_heads, sk, _), splits = dk.shape, parts.shape[1] // dk.shape[1]
    _attention_bwd_sum[(cdiv(sk, SUMMED_ROWS) * batch * kv_heads,)](
        parts, dk, dv, *dk.stride()[:3], *dv.stride()[:3], kv_heads, sk, splits, BLOCK_N=SUMMED_ROWS, num_warps=4,
        **dims)
