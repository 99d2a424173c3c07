"""Which tiles of a mask with holes to visit: bounds of every tile, made on the device, and the runs read off them.

Some masks need both sides to be told: hidden copies, shared prefixes, block diffusion. Within a program's range of
tiles one may then still be dead (no pair visible), full (every pair visible) or partial. Which it is follows from four
integers per tile of the other side, [min low, max low, min high, max high]. Empty items are left out of the outer two
and counted against the inner two.

A program looks at WINDOW tiles at a time. It takes the next partial tiles and the full ones behind them as one run, so
that the inner loops stay plain and pipelined, and full tiles compare nothing. Where a loop within that loop would spill
(float32, large head dims), the program goes tile by tile: it passes over the dead ones and compares in all others.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import cdiv
from tfkernels._library import made_once

# Sizes, and integers that are read one by one. Triton would compile anew where a number is 1 or a multiple of 16 and
# where a pointer is aligned; the integers of a mask begin wherever a row's length puts them. No load is wider for it.
SCALAR_ARGUMENTS = ["lo_ptr", "hi_ptr", "since_ptr", "until_ptr", "bounds_ptr", "table_ptr", "sinks_ptr", "heads",
                    "kv_heads", "group", "sq", "sk", "offset", "splits", "batch", "pages", "items", "stride_mask_rows",
                    "stride_mask_columns", "stride_table"]
FAR = tl.constexpr(2**31 - 1)
WINDOW = tl.constexpr(64)  # tiles a program looks at in one go
TILES = 16                 # tiles of one program of _tile_bounds


@triton.jit(do_not_specialize=["low_ptr", "high_ptr", "stride_mask", "length", "tiles"])
def _tile_bounds(low_ptr, high_ptr, bounds_ptr, stride_mask, length, tiles, SIZE: tl.constexpr, TILES: tl.constexpr):
    programs = tl.cdiv(tiles, TILES)  # of one batch row
    b = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs * TILES + tl.arange(0, TILES)
    items = tile[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    low = tl.load(low_ptr + b * stride_mask + items, mask=items < length, other=0)
    high = tl.load(high_ptr + b * stride_mask + items, mask=items < length, other=0)
    some = low < high
    bounds_ptr += b * 4 * tiles + tile
    inside = tile < tiles
    tl.store(bounds_ptr, tl.min(tl.where(some, low, FAR), 1), mask=inside)
    tl.store(bounds_ptr + tiles, tl.max(tl.where(some, low, FAR), 1), mask=inside)
    tl.store(bounds_ptr + 2 * tiles, tl.min(tl.where(some, high, 0), 1), mask=inside)
    tl.store(bounds_ptr + 3 * tiles, tl.max(tl.where(some, high, 0), 1), mask=inside)


def tile_bounds(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Return (B, 4, tiles) int32 of (B, length) intervals: each tile's min low, max low, min high and max high.

    They are made once for a mask and a size of tiles, whatever layers and steps ask for them.
    """
    return made_once(_made_bounds, low, high, size=size)


def _made_bounds(low: Tensor, high: Tensor, size: int) -> Tensor:
    batch, length = low.shape
    tiles = cdiv(length, size)
    bounds = torch.empty(batch, 4, tiles, dtype=torch.int32, device=low.device)
    _tile_bounds[(cdiv(tiles, TILES) * batch,)](low, high, bounds, low.stride(0), length, tiles, SIZE=size, TILES=TILES,
                                                num_warps=4)
    return bounds


@triton.constexpr_function
def walks_runs(key_dim, value_dim, largest, dtype):
    """Whether a kernel takes tiles run by run or one by one; above head dim `largest`, runs would make it spill."""
    return max(key_dim, value_dim) <= largest and dtype.primitive_bitwidth == 16


@triton.jit
def alive(bounds_ptr, tile, tiles, start, end):
    """Whether some pair of `tile` and the items [start, end) may be visible."""
    return (tl.load(bounds_ptr + tile) < end) & (tl.load(bounds_ptr + 3 * tiles + tile) > start)


@triton.jit
def next_run(bounds_ptr, at, stop, tiles, start, end, core_first, core_last, SIZE: tl.constexpr):
    """Return tiles (a, b, c) from `at` on: partial in [a, b) and full in [b, c).

    The program is that of the items [start, end) of the other side.

    A full tile lies within [core_first, core_last) as well, which every item of the program sees. Nothing lives in [at,
    a).
    """
    tile = at + tl.arange(0, WINDOW)
    inside = tile < stop
    first = tl.load(bounds_ptr + tile, mask=inside, other=FAR)
    inner_first = tl.load(bounds_ptr + tiles + tile, mask=inside, other=FAR)
    inner_last = tl.load(bounds_ptr + 2 * tiles + tile, mask=inside, other=0)
    last = tl.load(bounds_ptr + 3 * tiles + tile, mask=inside, other=0)
    live = (first < end) & (last > start)
    full = live & (inner_first <= start) & (inner_last >= end) & (tile * SIZE >= core_first) & (
        tile * SIZE + SIZE <= core_last
    )
    limit = tl.minimum(at + WINDOW, stop)
    a = tl.min(tl.where(live, tile, limit))
    b = tl.min(tl.where((tile >= a) & (full | (live == 0)), tile, limit))
    c = tl.min(tl.where((tile >= b) & (full == 0), tile, limit))
    return a, tl.maximum(a, b), tl.maximum(a, c)
