"""Forward attention kernel: one program per tile of queries, three loops over the keys that the tile can see.

    keys  [min lo ........ max lo ............. min hi ........ max hi)
             left edge        mask-free core        right edge

Only the two edges compare key numbers with lo and hi. The core is plain flash attention (arXiv:2205.14135,
arXiv:2307.08691) with the softmax in base 2. Empty rows are left out of the bounds, so that padding never costs a tile
its core; their output is 0 and their LSE -inf. The tile's bounds are read from the mask itself: no block list, no host
synchronisation. Where lo and hi alone do not tell the mask, the program walks runs of visible tiles (see `tiles.py`).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv, loads_by_tma, lookup, multiprocessors, next_power_of_2, since_triton
from tfkernels._library import INTERPRET, result_like
from tfkernels.attention.triton.parts import empty_parts, key_splits, merge, part_of
from tfkernels.attention.triton.rows import (
    LOG2E,
    LOWEST,
    add_sink,
    attend_row,
    finished,
    finite_rows,
    next_of,
    program_again,
    tanh,
)
from tfkernels.attention.triton.tiles import FAR, SCALAR_ARGUMENTS, alive, next_run, tile_bounds, walks_runs

CONFIGS = {  # (architecture, bytes per element, padded head dim)
    (80, 2, 32): Config(128, 64, 4, 3), (80, 2, 64): Config(128, 64, 8, 3),
    (80, 2, 128): Config(128, 32, 8, 3), (80, 2, 256): Config(64, 32, 8, 2),
    (80, 2, 512): Config(64, 16, 8, 2), (80, 2, 512, "heavy"): Config(32, 32, 8, 2),
    (80, 4, 32): Config(64, 16, 4, 2, 255), (80, 4, 64): Config(32, 32, 4, 2, 255),
    (80, 4, 128): Config(32, 16, 8, 2, 255), (80, 4, 256): Config(16, 16, 8, 2, 255),
    (90, 2, 32): Config(128, 128, 8, 3), (90, 2, 64): Config(128, 128, 8, 3),
    (90, 2, 128): Config(128, 64, 8, 3),
    (90, 2, 256): since_triton((3, 7), Config(128, 32, 8, 3), before=Config(128, 32, 8, 2)),
    (90, 2, 512): Config(32, 32, 8, 3),
    (90, 4, 32): Config(64, 16, 4, 2, 255), (90, 4, 64): Config(32, 32, 8, 2, 255),
    (90, 4, 128): Config(32, 16, 8, 2, 255), (90, 4, 256): Config(16, 16, 8, 2, 255),
    (100, 2, 32): Config(128, 64, 4, 3), (100, 2, 64): Config(128, 64, 4, 3),
    (100, 2, 128): Config(128, 64, 8, 2), (100, 2, 256): Config(64, 32, 8, 2, 255),
    (100, 2, 512): Config(32, 32, 8, 2),
    (100, 4, 32): since_triton((3, 7), Config(64, 32, 4, 2, 255), before=Config(64, 16, 4, 2, 255)),
    (100, 4, 64): Config(32, 32, 8, 2, 255),
    (100, 4, 128): Config(32, 16, 8, 2, 255), (100, 4, 256): Config(16, 16, 8, 2, 255),
    (80, 2, 32, "heavy"): Config(128, 64, 8, 3), (90, 2, 32, "heavy"): Config(128, 64, 8, 3),
    (80, 2, 64, "heavy"): Config(128, 32, 8, 3), (80, 2, 128, "heavy"): Config(128, 32, 8, 2, 255),
    (90, 2, 64, "heavy"): Config(128, 64, 8, 3), (90, 2, 128, "heavy"): Config(128, 32, 8, 3),
    (90, 2, 256, "heavy"): Config(128, 16, 8, 2),
    (90, 4, 64, "heavy"): Config(32, 16, 4, 2, 255), (90, 4, 256, "heavy"): Config(16, 16, 8, 2, 255),
    (100, 4, 64, "heavy"): Config(32, 16, 4, 2, 255),
    (100, 2, 32, "heavy"): Config(128, 64, 8, 3), (100, 2, 64, "heavy"): Config(128, 64, 8, 3),
    (100, 2, 128, "heavy"): Config(128, 32, 8, 3), (100, 2, 256, "heavy"): Config(64, 32, 8, 2, 255),
}
SPLIT_KEYS = 16 if INTERPRET else 512  # fewest keys worth a part of their own
MAX_SPLIT_DIM = 256  # wider heads in parts would spill on sm_80, and so would masks of two sides


@triton.jit
def row_bounds(lo_ptr, hi_ptr, rows, sq, sk):
    """Load a tile's lo and hi, and the keys it needs: (lo, hi, min lo, max lo, min hi, max hi), empty rows left out."""
    lo = tl.maximum(tl.load(lo_ptr + rows, mask=rows < sq, other=0), 0)
    hi = tl.minimum(tl.load(hi_ptr + rows, mask=rows < sq, other=0), sk)
    some = lo < hi
    first, last = tl.min(tl.where(some, lo, FAR)), tl.max(tl.where(some, hi, 0))
    core_first, core_last = tl.max(tl.where(some, lo, 0)), tl.min(tl.where(some, hi, FAR))
    return lo, hi, tl.minimum(first, last), core_first, core_last, last


@triton.jit
def sees_keys(lo_ptr, hi_ptr, rows, sq, first, last):
    """Whether each row has keys in [first, last); read anew, for registers are short in the loops."""
    lo = tl.load(lo_ptr + rows, mask=rows < sq, other=0)
    hi = tl.load(hi_ptr + rows, mask=rows < sq, other=0)
    return tl.maximum(lo, first) < tl.minimum(hi, last)


@triton.jit
def _place(program, tiles, heads, splits, SPLIT: tl.constexpr):
    """A program's batch row, head, tile of queries and part of their keys; the parts of a tile are neighbours.

    Causal rows grow longer: the long ones start first.
    """
    split = 0
    if SPLIT:
        split = program % splits
        program //= splits
    head = program // tiles
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), tiles - 1 - program % tiles, split


@triton.jit
def _part_of_tile(lo_ptr, hi_ptr, rows, sq, sk, split, splits, BLOCK_N: tl.constexpr):
    """The keys of one part of those that a tile of queries needs."""
    _, _, first, _, _, last = row_bounds(lo_ptr, hi_ptr, rows, sq, sk)
    return part_of(first, last, split, splits, BLOCK_N)


@triton.jit
def core(first, core_first, core_last, last, BLOCK: tl.constexpr):
    """Return [start, stop): the whole tiles that lie within [core_first, core_last), counted from `first` by BLOCK."""
    start = tl.minimum(first + tl.cdiv(tl.maximum(core_first - first, 0), BLOCK) * BLOCK, last)
    stop = start + tl.maximum(tl.minimum(core_last, last) - start, 0) // BLOCK * BLOCK
    return start, stop


@triton.jit
def rows_of(base, stride, limit, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """What `load_rows` takes tiles of BLOCK rows from: a pointer, or with TMA a descriptor of the rows before limit."""
    if TMA:
        return tl.make_tensor_descriptor(base, [tl.maximum(limit, 1), HEAD_DIM], [stride, 1], [BLOCK, D])
    else:
        return base


@triton.jit
def load_rows(base, start, offs, stride, limit, HEAD_DIM: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """Load rows start + offs of a (rows, HEAD_DIM) matrix as a (len(offs), D) tile; 0 outside."""
    if isinstance(base, tl.tensor_descriptor):
        return base.load([start, 0])
    else:
        return _load_by_pointers(base, start, offs, stride, limit, HEAD_DIM, D, BOUNDED)


@triton.jit
def _load_by_pointers(base, start, offs, stride, limit,
                      HEAD_DIM: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    offs_d = tl.arange(0, D)
    pointers = base + tl.cast(start, tl.int64) * stride + offs[:, None] * stride + offs_d[None, :]
    if BOUNDED and HEAD_DIM != D:
        return tl.load(pointers, mask=(start + offs < limit)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    if BOUNDED:
        return tl.load(pointers, mask=(start + offs < limit)[:, None], other=0.0)
    if HEAD_DIM != D:
        return tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def base2_scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """softcap(q k^T * scale) * log2(e)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        return tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def softmax_step(s, total, peak, MASKED: tl.constexpr):
    """One step of the online softmax over base-2 scores: (p, factor for what was summed before, total, peak)."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(peak - shift)
    return p, shrink, total * shrink + tl.sum(p, 1), new_peak


@triton.jit
def _forward_tile(acc, total, peak, q, k_ptr, v_ptr, stride_ks, stride_vs, n, rows, lo, hi, since_ptr, until_ptr, limit,
                  scale, softcap,
                  HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                  BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, n, offs_n, stride_ks, limit, HEAD_DIM, D, MASKED)
    s = base2_scores(q, k, scale, softcap, SOFTCAP, PRECISION)
    if MASKED:
        cols = n + offs_n
        visible = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None])
        if CHECK_COLUMNS:
            since = tl.load(since_ptr + cols, mask=cols < limit, other=FAR)
            until = tl.load(until_ptr + cols, mask=cols < limit, other=0)
            visible &= (since[None, :] <= rows[:, None]) & (rows[:, None] < until[None, :])
            s = tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # -inf is left to rows that see nothing
        s = tl.where(visible, s, float("-inf"))
    p, shrink, total, peak = softmax_step(s, total, peak, MASKED)
    v = load_rows(v_ptr, n, offs_n, stride_vs, limit, HEAD_DIM_V, D_V, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, peak


@triton.jit
def _forward_step(acc, total, peak, q, k_ptr, v_ptr, stride_ks, stride_vs, start, stop, rows, lo, hi, since_ptr,
                  until_ptr, limit, scale, softcap,
                  HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                  BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr):
    for n in range(start, stop, BLOCK_N):
        acc, total, peak = _forward_tile(acc, total, peak, q, k_ptr, v_ptr, stride_ks, stride_vs, n, rows, lo, hi,
                                         since_ptr, until_ptr, limit, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V,
                                         BLOCK_N, MASKED, CHECK_COLUMNS, SOFTCAP, PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_fwd(q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr, bounds_ptr, sinks_ptr, out_ptr, lse_ptr,
                   stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                   stride_ob, stride_oh, stride_os, stride_mask_rows, stride_mask_columns, heads, group, sq, sk, offset,
                   splits, batch, scale, softcap,
                   HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CHECK_COLUMNS: tl.constexpr,
                   SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    tiles = tl.cdiv(sq, BLOCK_M)
    b, h, tile_m, split = _place(tl.program_id(0), tiles, heads, splits, SPLIT)
    start_m = tile_m * BLOCK_M
    k_head, v_head = k_ptr + b * stride_kb + h // group * stride_kh, v_ptr + b * stride_vb + h // group * stride_vh
    offs_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, D_V)
    rows = start_m + offs_m
    key_since, key_until = since_ptr + b * stride_mask_columns, until_ptr + b * stride_mask_columns

    lo, hi, first, core_first, core_last, last = row_bounds(lo_ptr + b * stride_mask_rows,
                                                            hi_ptr + b * stride_mask_rows, rows, sq, sk)
    if SPLIT:
        first, last = _part_of_tile(lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows, rows, sq, sk, split,
                                    splits, BLOCK_N)
    k_head = rows_of(k_head, stride_ks, last, HEAD_DIM, D, BLOCK_N, TMA)
    v_head = rows_of(v_head, stride_vs, last, HEAD_DIM_V, D_V, BLOCK_N, TMA)
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, start_m, offs_m, stride_qs, sq, HEAD_DIM, D, True)
    acc = tl.zeros([BLOCK_M, D_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if CHECK_COLUMNS:
        tiles_n = tl.cdiv(sk, BLOCK_N)
        bounds_ptr += 4 * tiles_n * b * (stride_mask_columns > 0)
        start, end = start_m + offset, tl.minimum(start_m + BLOCK_M, sq) + offset
        at, stop = first // BLOCK_N, tl.cdiv(last, BLOCK_N)
        if walks_runs(D, D_V, 128, q_ptr.dtype.element_ty):
            while at < stop:
                partial, full, at = next_run(bounds_ptr, at, stop, tiles_n, start, end, core_first, core_last, BLOCK_N)
                acc, total, peak = _forward_step(acc, total, peak, q, k_head, v_head, stride_ks, stride_vs,
                                                 partial * BLOCK_N, full * BLOCK_N, rows + offset, lo, hi, key_since,
                                                 key_until, last, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V,
                                                 BLOCK_N, True, True, SOFTCAP, PRECISION)
                acc, total, peak = _forward_step(acc, total, peak, q, k_head, v_head, stride_ks, stride_vs,
                                                 full * BLOCK_N, at * BLOCK_N, rows + offset, lo, hi, key_since,
                                                 key_until, last, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V,
                                                 BLOCK_N, False, False, SOFTCAP, PRECISION)
        else:
            for tile in range(at, stop):
                if alive(bounds_ptr, tile, tiles_n, start, end):
                    acc, total, peak = _forward_tile(acc, total, peak, q, k_head, v_head, stride_ks, stride_vs,
                                                     tile * BLOCK_N, rows + offset, lo, hi, key_since, key_until, last,
                                                     scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, True, True,
                                                     SOFTCAP, PRECISION)
    else:
        core_start, core_stop = core(first, core_first, core_last, last, BLOCK_N)
        for n in range(first, last - core_stop + core_start, BLOCK_N):  # the partial tiles on both sides of the core
            tile = n + tl.where(n >= core_start, core_stop - core_start, 0)
            acc, total, peak = _forward_tile(acc, total, peak, q, k_head, v_head, stride_ks, stride_vs, tile,
                                             rows + offset, lo, hi, key_since, key_until, last, scale, softcap,
                                             HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, True, False, SOFTCAP, PRECISION)
        acc, total, peak = _forward_step(acc, total, peak, q, k_head, v_head, stride_ks, stride_vs, core_start,
                                         core_stop, rows + offset, lo, hi, key_since, key_until, last, scale, softcap,
                                         HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, False, False, SOFTCAP, PRECISION)

    out = acc / total[:, None]                                                             # 0 / 0 is NaN
    good = finite_rows(out)
    if CHECK_COLUMNS:
        good &= peak > LOWEST
    b, h, tile_m, split = _place(program_again(tl.min(good.to(tl.int32)), 2), tiles, heads, splits, SPLIT)
    rows = tile_m * BLOCK_M + offs_m
    seen_first, seen_last = 0, sk
    if SPLIT:
        seen_first, seen_last = _part_of_tile(lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows, rows, sq,
                                              sk, split, splits, BLOCK_N)
    some = sees_keys(lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows, rows, sq, seen_first, seen_last)
    if CHECK_COLUMNS:
        some &= total != 0
    good = (rows < sq) & (good | (some == 0))
    lse = peak + tl.log2(total)
    if sinks_ptr is not None:
        factor, lse = add_sink(lse, sinks_ptr, h)
        out *= factor[:, None]
    out = tl.where(some[:, None], out, 0.0)
    if not SPLIT:
        lse = lse / LOG2E
    lse = tl.where(some, lse, float("-inf"))
    place = b
    if SPLIT:
        place += batch * split  # parts: (splits, B, H, Sq, HEAD_DIM_V)
    tl.store(lse_ptr + (place * heads + h) * sq + rows, lse, mask=good)
    pointers = out_ptr + place * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_os + offs_v[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=good[:, None] & (offs_v < HEAD_DIM_V)[None, :])

    bad = (rows < sq) & (good == 0)
    m = next_of(bad, offs_m, -1, BLOCK_M)
    while m < BLOCK_M:
        b_m, h_m, tile_m, split_m = _place(program_again(m, BLOCK_M), tiles, heads, splits, SPLIT)
        row = (tile_m * BLOCK_M + m).to(tl.int64)
        lo_m, hi_m = lo_ptr + b_m * stride_mask_rows, hi_ptr + b_m * stride_mask_rows
        first_m, last_m = 0, sk
        if SPLIT:
            first_m, last_m = _part_of_tile(lo_m, hi_m, tile_m * BLOCK_M + offs_m, sq, sk, split_m, splits, BLOCK_N)
        row_out, row_lse = attend_row(
            q_ptr + b_m * stride_qb + h_m * stride_qh + row * stride_qs,
            k_ptr + b_m * stride_kb + h_m // group * stride_kh,
            v_ptr + b_m * stride_vb + h_m // group * stride_vh, lo_ptr, 0, 0, stride_ks, 0, stride_vs,
            tl.maximum(tl.load(lo_m + row), first_m), tl.minimum(tl.load(hi_m + row), last_m),
            row + offset, since_ptr + b_m * stride_mask_columns, until_ptr + b_m * stride_mask_columns,
            scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, 0, CHECK_COLUMNS, SOFTCAP)
        place_m = b_m
        if SPLIT:
            place_m += batch * split_m
        else:
            row_out, row_lse = finished(row_out, row_lse, sinks_ptr, h_m)
        tl.store(lse_ptr + (place_m * heads + h_m) * sq + row, row_lse)
        tl.store(out_ptr + place_m * stride_ob + h_m * stride_oh + row * stride_os + offs_v,
                 row_out.to(out_ptr.dtype.element_ty), mask=offs_v < HEAD_DIM_V)
        m = next_of(bad, offs_m, m, BLOCK_M)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x with unit stride in its last dimension and a row stride that int32 holds 128 times; else a copy."""
    *_, rows, columns = 0, *x.stride()
    return x if columns == 1 and 128 * rows < 2**31 else x.contiguous()


def mask_pair(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return two of a mask's (B, S) integers with unit stride and one batch stride; copies where they have others."""
    first, last = rows_contiguous(first), rows_contiguous(last)
    if first.stride(0) == last.stride(0) or first.shape[0] == 1:
        return first, last
    return first.contiguous(), last.contiguous()


def batch_stride(x: Tensor) -> int:
    """Return the batch stride of a mask's (B, S) integers, 0 where one row serves the whole batch."""
    return x.stride(0) if x.shape[0] > 1 else 0


def padded_dim(head_dim: int) -> int:
    """Return the width of the tiles that hold heads of `head_dim`."""
    return max(32, next_power_of_2(head_dim))


def head_dims(q: Tensor, v: Tensor) -> dict[str, int]:
    """Return what kernels are told of the width of queries and keys, and of values."""
    return dict(HEAD_DIM=q.shape[-1], D=padded_dim(q.shape[-1]), HEAD_DIM_V=v.shape[-1], D_V=padded_dim(v.shape[-1]))


def dot_precision(x: Tensor) -> str:
    """Return how float32 is multiplied: exactly ("ieee") unless PyTorch was allowed tf32.

    `allow_tf32`, the older name of that setting, raises once the newer one was set.
    """
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool,
    columns_exact: bool, offset: int, scale: float, softcap: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: (B, H, Sq, D) x (B, K, Sk, D), (B, K, Sk, Dv) -> out (B, H, Sq, Dv), LSE float32."""
    batch, heads, sq, _ = q.shape
    out, lse = result_like(q, v.shape[-1]), q.new_empty(batch, heads, sq, dtype=torch.float32)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (lo, hi), (since, until) = mask_pair(lo, hi), mask_pair(since, until)
    sinks = sinks if sinks is None else sinks.contiguous()
    if out.numel() == 0:
        return out, lse
    dims = head_dims(q, v)
    config = lookup(CONFIGS, q, max(dims["D"], dims["D_V"]), heavy=not rows_exact)
    programs = cdiv(sq, config.block_m) * batch * heads
    # Where a gradient is known to be asked for (not under torch.compile), keys stay whole: the forward of training then
    # does not depend on the device.
    whole = (any(x.requires_grad for x in (q, k, v)) or not rows_exact
             or max(dims["D"], dims["D_V"]) > MAX_SPLIT_DIM)
    splits = 1 if whole else key_splits(programs, multiprocessors(q.device), k.shape[2], SPLIT_KEYS)
    parts, parts_lse = empty_parts(out, splits) if splits > 1 else (out, lse)
    bounds = lo if rows_exact else tile_bounds(since, until, config.block_n)
    _attention_fwd[(programs * splits,)](
        q, k, v, lo, hi, since, until, bounds, None if splits > 1 else sinks, parts, parts_lse, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *parts.stride()[-4:-1],
        batch_stride(lo), batch_stride(since), heads, heads // k.shape[1], sq, k.shape[2], offset, splits, batch, scale,
        softcap, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=splits > 1, CHECK_COLUMNS=not rows_exact,
        SOFTCAP=softcap > 0, PRECISION=dot_precision(q), TMA=loads_by_tma(config, k, v), **dims, **config.options)
    if splits > 1:
        merge(parts, parts_lse, sinks, out, lse, dims["D_V"])
    return out, lse
