"""Cached attention: few queries against a long cache, split over the keys so that every multiprocessor has work.

A program takes the queries of all heads that share a key head, so that grouped-query attention reads the cache once,
and one of `splits` equal parts of the keys they see. A second kernel merges the parts (see `parts.py`). The cache may
be paged: key j of row b then lies in page block_table[b, j // page_size] at j % page_size (arXiv:2309.06180).

Bytes that must move: the visible keys and values once, 4 * D bytes per token and key head in bfloat16. The parts add (D
+ 1) * 4 bytes for each query, head and split.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv, lookup, multiprocessors
from tfkernels._library import INTERPRET, result_like
from tfkernels.attention.triton.forward import (
    base2_scores,
    batch_stride,
    dot_precision,
    head_dims,
    mask_pair,
    row_bounds,
    rows_contiguous,
    softmax_step,
)
from tfkernels.attention.triton.parts import empty_parts, key_splits, merge, part_of
from tfkernels.attention.triton.rows import (
    LOG2E,
    LOWEST,
    add_sink,
    attend_row,
    finished,
    finite_rows,
    next_of,
    page_of,
    program_again,
)
from tfkernels.attention.triton.tiles import FAR, SCALAR_ARGUMENTS

MAX_QUERIES = 16  # longer runs of queries fill the multiprocessors by themselves
SPLIT_KEYS = 16 if INTERPRET else 256  # fewest keys worth a part of their own

# (architecture, bytes per element, padded head dim): 16 rows (queries x heads of a key head), "wide" 64 of them
CONFIGS = {
    (80, 2, 32): Config(16, 128, 4, 3, 255), (80, 2, 64): Config(16, 128, 4, 3, 255),
    (80, 2, 128): Config(16, 64, 4, 3, 255), (80, 2, 256): Config(16, 32, 4, 3, 255),
    (80, 2, 512): Config(16, 16, 4, 2, 255),
    (80, 4, 32): Config(16, 64, 4, 2, 255), (80, 4, 64): Config(16, 32, 4, 2, 255),
    (80, 4, 128): Config(16, 16, 4, 2, 255), (80, 4, 256): Config(16, 16, 4, 2, 255),
    (90, 2, 32): Config(16, 128, 2, 3, 255), (90, 2, 64): Config(16, 128, 4, 3, 255),
    (90, 2, 128): Config(16, 64, 4, 3, 255), (90, 2, 256): Config(16, 32, 4, 3, 255),
    (90, 2, 512): Config(16, 32, 4, 2, 255),
    (90, 4, 32): Config(16, 64, 8, 2, 255), (90, 4, 64): Config(16, 32, 8, 2, 255),
    (90, 4, 128): Config(16, 16, 8, 2, 255), (90, 4, 256): Config(16, 16, 8, 2, 255),
    (100, 2, 32): Config(16, 128, 2, 3, 255), (100, 2, 64): Config(16, 128, 4, 3, 255),
    (100, 2, 128): Config(16, 64, 4, 3, 255), (100, 2, 256): Config(16, 32, 4, 3, 255),
    (100, 2, 512): Config(16, 32, 4, 2, 255),
    (100, 4, 32): Config(16, 64, 4, 2, 255), (100, 4, 64): Config(16, 32, 8, 2, 255),
    (100, 4, 128): Config(16, 16, 4, 2, 255), (100, 4, 256): Config(16, 16, 8, 2, 255),
}
WIDE_CONFIGS = {
    (80, 2, 32): Config(64, 64, 4, 3, 255), (80, 2, 64): Config(64, 64, 4, 3, 255),
    (80, 2, 128): Config(64, 32, 4, 3, 255), (80, 2, 256): Config(64, 16, 8, 2, 255),
    (80, 2, 512): Config(32, 16, 8, 2, 255),
    (80, 4, 32): Config(32, 32, 4, 2, 255), (80, 4, 64): Config(32, 32, 4, 2, 255),
    (80, 4, 128): Config(32, 16, 8, 2, 255), (80, 4, 256): Config(16, 16, 4, 2, 255),
    (90, 2, 32): Config(64, 64, 4, 3, 255), (90, 2, 64): Config(64, 64, 4, 3, 255),
    (90, 2, 128): Config(64, 64, 8, 3, 255), (90, 2, 256): Config(64, 32, 8, 2, 255),
    (90, 2, 512): Config(32, 16, 8, 2, 255),
    (90, 4, 32): Config(32, 32, 4, 2, 255), (90, 4, 64): Config(32, 32, 8, 2, 255),
    (90, 4, 128): Config(32, 16, 8, 2, 255), (90, 4, 256): Config(16, 16, 8, 2, 255),
    (100, 2, 32): Config(64, 64, 4, 3, 255), (100, 2, 64): Config(64, 64, 4, 3, 255),
    (100, 2, 128): Config(64, 64, 8, 3, 255), (100, 2, 256): Config(64, 32, 8, 2, 255),
    (100, 2, 512): Config(32, 32, 8, 2, 255),
    (100, 4, 32): Config(32, 32, 4, 2, 255), (100, 4, 64): Config(32, 32, 8, 2, 255),
    (100, 4, 128): Config(32, 16, 8, 2, 255), (100, 4, 256): Config(16, 16, 8, 2, 255),
    (120, 2, 64): Config(64, 32, 4, 3, 255),
}


@triton.jit
def _place(program, tiles, splits, kv_heads):
    """A program's batch row, key head, part of the keys and tile of queries; the parts of a tile are neighbours."""
    head = program // (splits * tiles)
    return (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64), program % splits, program // splits % tiles


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_decode(q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr, table_ptr, sinks_ptr, out_ptr,
                      lse_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
                      stride_vs, stride_ob, stride_oh, stride_os, stride_mask_rows, stride_mask_columns, stride_table,
                      kv_heads, group, sq, sk, offset, splits, batch, pages, scale, softcap,
                      HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr,
                      CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    b, h, split, tile = _place(tl.program_id(0), tl.cdiv(sq * group, BLOCK_M), splits, kv_heads)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, D), tl.arange(0, D_V)
    item = tile * BLOCK_M + offs_m  # query * group + head of the group
    rows, heads = item // group, h * group + item % group
    inside_m, inside_d, inside_v = (rows < sq)[:, None], (offs_d < HEAD_DIM)[None, :], (offs_v < HEAD_DIM_V)[None, :]
    k_head, v_head = k_ptr + h * stride_kh, v_ptr + h * stride_vh
    if PAGE_SIZE == 0:
        k_head += b * stride_kb
        v_head += b * stride_vb

    lo, hi, first, _, _, last = row_bounds(lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows, rows, sq, sk)
    first, last = part_of(first, last, split, splits, BLOCK_N)
    q = tl.load(q_ptr + b * stride_qb + heads[:, None] * stride_qh + rows[:, None].to(tl.int64) * stride_qs
                + offs_d[None, :], mask=inside_m & inside_d, other=0.0)
    acc = tl.zeros([BLOCK_M, D_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in range(first, last, BLOCK_N):
        cols = n + offs_n
        inside = cols < last
        at = cols.to(tl.int64)
        k_at, v_at = at * stride_ks, at * stride_vs
        if PAGE_SIZE > 0:
            page = page_of(table_ptr + b * stride_table, at // PAGE_SIZE, inside, pages)
            k_at, v_at = page * stride_kb + at % PAGE_SIZE * stride_ks, page * stride_vb + at % PAGE_SIZE * stride_vs
        k = tl.load(k_head + k_at[:, None] + offs_d[None, :], mask=inside[:, None] & inside_d, other=0.0)
        s = base2_scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        visible = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None]) & inside[None, :]
        if CHECK_COLUMNS:
            since = tl.load(since_ptr + b * stride_mask_columns + cols, mask=inside, other=FAR)
            until = tl.load(until_ptr + b * stride_mask_columns + cols, mask=inside, other=0)
            visible &= (since[None, :] <= rows[:, None] + offset) & (rows[:, None] + offset < until[None, :])
        s = tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # -inf is left to rows that see nothing
        p, shrink, total, peak = softmax_step(tl.where(visible, s, float("-inf")), total, peak, True)
        v = tl.load(v_head + v_at[:, None] + offs_v[None, :], mask=inside[:, None] & inside_v, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    out = acc / total[:, None]                                                             # 0 / 0 is NaN
    good = finite_rows(out) & (peak > LOWEST)
    b, h, split, tile = _place(program_again(tl.min(good.to(tl.int32)), 2), tl.cdiv(sq * group, BLOCK_M), splits,
                               kv_heads)
    item = tile * BLOCK_M + offs_m
    rows, heads = item // group, h * group + item % group
    some = total != 0
    bad = (rows < sq) & some & (good == 0)
    good = (rows < sq) & (bad == 0)
    lse = peak + tl.log2(total)
    if sinks_ptr is not None:
        factor, lse = add_sink(lse, sinks_ptr, heads)
        out *= factor[:, None]
    out = tl.where(some[:, None], out, 0.0)
    lse = tl.where(some, lse, float("-inf"))
    if not SPLIT:
        lse = lse / LOG2E
    at = ((split * batch + b) * kv_heads * group + heads) * sq + rows
    tl.store(lse_ptr + at, lse, mask=good)
    # parts: (splits, B, H, Sq, HEAD_DIM_V)
    out_at = at * HEAD_DIM_V if SPLIT else b * stride_ob + heads * stride_oh + rows.to(tl.int64) * stride_os
    tl.store(out_ptr + out_at[:, None] + offs_v[None, :], out.to(out_ptr.dtype.element_ty),
             mask=good[:, None] & (offs_v < HEAD_DIM_V)[None, :])

    m = next_of(bad, offs_m, -1, BLOCK_M)
    while m < BLOCK_M:
        b_m, h_m, split_m, tile_m = _place(program_again(m, BLOCK_M), tl.cdiv(sq * group, BLOCK_M), splits, kv_heads)
        row, head = ((tile_m * BLOCK_M + m) // group).to(tl.int64), h_m * group + (tile_m * BLOCK_M + m) % group
        lo_m, hi_m = lo_ptr + b_m * stride_mask_rows, hi_ptr + b_m * stride_mask_rows
        _, _, first_m, _, _, last_m = row_bounds(lo_m, hi_m, (tile_m * BLOCK_M + offs_m) // group, sq, sk)
        first_m, last_m = part_of(first_m, last_m, split_m, splits, BLOCK_N)
        page_b = b_m * (PAGE_SIZE == 0)
        row_out, row_lse = attend_row(
            q_ptr + b_m * stride_qb + head * stride_qh + row * stride_qs, k_ptr + page_b * stride_kb + h_m * stride_kh,
            v_ptr + page_b * stride_vb + h_m * stride_vh, table_ptr + b_m * stride_table, pages, stride_kb, stride_ks,
            stride_vb, stride_vs,
            tl.maximum(tl.load(lo_m + row), first_m), tl.minimum(tl.load(hi_m + row), last_m),
            row + offset, since_ptr + b_m * stride_mask_columns, until_ptr + b_m * stride_mask_columns,
            scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, PAGE_SIZE, CHECK_COLUMNS, SOFTCAP)
        at_m = ((split_m * batch + b_m) * kv_heads * group + head) * sq + row
        if SPLIT:
            out_m = out_ptr + at_m * HEAD_DIM_V
        else:
            row_out, row_lse = finished(row_out, row_lse, sinks_ptr, head)
            out_m = out_ptr + b_m * stride_ob + head * stride_oh + row * stride_os
        tl.store(lse_ptr + at_m, row_lse)
        tl.store(out_m + offs_v, row_out.to(out_ptr.dtype.element_ty), mask=offs_v < HEAD_DIM_V)
        m = next_of(bad, offs_m, m, BLOCK_M)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor,
    rows_exact: bool, offset: int, scale: float, softcap: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the decode kernel and, where the keys were split, the merge: out (B, H, Sq, Dv), LSE (B, H, Sq) float32.

    k is (B, K, Sk, D) and v (B, K, Sk, Dv), or with `block_table` (B, T) pages (P, page_size, K, D or Dv) of which row
    b uses those its table names.
    """
    batch, heads, sq, _ = q.shape
    out, lse = result_like(q, v.shape[-1]), q.new_empty(batch, heads, sq, dtype=torch.float32)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (lo, hi), (since, until) = mask_pair(lo, hi), mask_pair(since, until)
    sinks = sinks if sinks is None else sinks.contiguous()
    paged = block_table is not None
    if paged:
        block_table, page_size, kv_heads, sk = (rows_contiguous(block_table), *k.shape[1:3],
                                                block_table.shape[1] * k.shape[1])
        strides = [stride for x in (k, v) for stride in (x.stride(0), x.stride(2), x.stride(1))]
    else:
        page_size, kv_heads, sk = 0, *k.shape[1:3]
        strides = [*k.stride()[:3], *v.stride()[:3]]
    if out.numel() == 0:
        return out, lse
    group = heads // kv_heads
    dims = head_dims(q, v)
    config = lookup(CONFIGS if sq * group <= 16 else WIDE_CONFIGS, q, max(dims["D"], dims["D_V"]))
    tiles = cdiv(sq * group, config.block_m)
    splits = key_splits(tiles * batch * kv_heads, 2 * multiprocessors(q.device), sk, SPLIT_KEYS)
    parts, parts_lse = empty_parts(out, splits) if splits > 1 else (out, lse)
    _attention_decode[(tiles * splits * batch * kv_heads,)](
        q, k, v, lo, hi, since, until, block_table if paged else lo, None if splits > 1 else sinks, parts, parts_lse,
        *q.stride()[:3], *strides, *out.stride()[:3],
        batch_stride(lo), batch_stride(since), block_table.stride(0) if paged else 0, kv_heads, group, sq, sk, offset,
        splits, batch,
        k.shape[0], scale, softcap,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAGE_SIZE=page_size, SPLIT=splits > 1,
        CHECK_COLUMNS=not rows_exact, SOFTCAP=softcap > 0, PRECISION=dot_precision(q), **dims, **config.options)
    if splits > 1:
        merge(parts, parts_lse, sinks, out, lse, dims["D_V"])
    return out, lse


def paged_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor,
    rows_exact: bool, offset: int, scale: float, softcap: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_decode` for pages: the operator's form, whose block table is always there."""
    return attention_decode(q, k, v, block_table, lo, hi, since, until, rows_exact, offset, scale, softcap, sinks)
