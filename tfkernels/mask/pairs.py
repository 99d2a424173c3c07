"""Masks that other libraries say pair by pair, read back into integers: the hull of each row and of each column.

Where a mask is the meeting of one run of keys per query and one run of queries per key at all, the hulls, which are the
smallest such runs, meet in it too. They never hide a visible pair, so they are exact where each row of their meeting
has as many pairs as the mask. Rows are looked at in blocks: memory is O(S), time is O(Sq * Sk).
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._arguments import got
from tfkernels.mask.counting import visible_keys

PAIRS = 2**22                                                       # looked at together
_FAR = 2**31 - 1


class Hulls(NamedTuple):
    """The runs that hold what each query sees and what sees each key, and how many keys each query sees."""

    lo: Tensor                                                      # (B, Sq) int32
    hi: Tensor
    since: Tensor                                                   # (B, Sk) int32
    until: Tensor
    seen: Tensor                                                    # (B, Sq) int64
    rows_exact: Tensor                                              # (), whether lo and hi alone say it all
    columns_exact: Tensor

    def missed(self) -> Tensor:
        """Return (B, Sq) where the runs show a query more keys than it sees."""
        return visible_keys(self.lo, self.hi, self.since, self.until, False, 0) != self.seen


def hulls(blocks: Iterable[Tensor]) -> Hulls:
    """Read the blocks (B, R, Sk) of a bool mask, one below the other."""
    rows, columns, start = [], None, 0
    for visible in blocks:
        rows.append(_hull(visible))
        since, until, count = _hull(visible.mT)
        since, until = torch.where(count > 0, since + start, _FAR), torch.where(count > 0, until + start, 0)
        columns = (since, until, count) if columns is None else (
            torch.minimum(columns[0], since), torch.maximum(columns[1], until), columns[2] + count)
        start += visible.shape[1]
    lo, hi, seen = (torch.cat(x, 1) for x in zip(*rows))                                   # (B, Sq)
    since, until, seen_by = columns                                                        # (B, Sk)
    since = since.clamp(max=start)
    exact = ((count == (stop - first).clamp(min=0)).all() for first, stop, count in
             ((lo, hi, seen), (since, until, seen_by)))
    return Hulls(lo.int(), hi.int(), since.int(), until.int(), seen, *exact)


def exact_hulls(op: str, rows_of: Callable[[int, int], Tensor], batch: int, query_len: int, key_len: int,
                name: Callable[[int, int, int], str]) -> Hulls:
    """Read a mask whose queries [start, stop) `rows_of` returns as (B, R, Sk) bool; refuse what no hulls say, with the
    first pair (batch row, query, key) that they would add, which `name` names."""
    step = max(1, PAIRS // max(1, batch * key_len))
    found = hulls(rows_of(start, min(start + step, query_len)) for start in range(0, max(1, query_len), step))
    missed = found.missed()
    if bool(missed.any()):
        b, i = missed.nonzero()[0].tolist()
        keys = torch.arange(key_len, device=missed.device)
        shown = (found.lo[b, i] <= keys) & (keys < found.hi[b, i]) & (found.since[b] <= i) & (i < found.until[b])
        j = int((shown & ~rows_of(i, i + 1)[b, 0]).nonzero()[0])
        raise ValueError(f"{op}: {name(b, i, j)} is hidden between pairs of its row and between pairs of its column "
                         "that are visible: rows with holes that no column explains; one run of keys per query and one "
                         "run of queries per key fit; use SDPA or FlexAttention for this mask")
    return found


def block_mask_rows(op: str, block_mask) -> Callable[[int, int], Tensor]:
    """Return what gives the queries [start, stop) of a FlexAttention BlockMask, (B, stop - start, Sk) bool.

    As in FlexAttention, tiles that are not listed are hidden, full ones are visible, and mask_mod says the rest.
    """
    from torch.nn.attention.flex_attention import create_mask

    query_len, key_len = block_mask.seq_lengths
    height, width = block_mask.BLOCK_SIZE
    batch, heads, _ = block_mask.kv_num_blocks.shape
    device = block_mask.kv_num_blocks.device
    partial, full = (_tiles(counts, indices, -(-key_len // width)) for counts, indices in (
        (block_mask.kv_num_blocks, block_mask.kv_indices), (block_mask.full_kv_num_blocks,
                                                            block_mask.full_kv_indices)))
    if partial.shape[2] * height < query_len:
        raise ValueError(f"{op}: block_mask lists {partial.shape[2]} rows of tiles of {height} for {query_len} "
                         "queries; a whole BlockMask fits; take queries(start, stop) of the mask made of it")

    def rows_of(start: int, stop: int) -> Tensor:
        listed, whole = (x[:, :, torch.arange(start, stop, device=device) // height].repeat_interleave(width, 3)
                         [..., :key_len] if x is not None else None for x in (partial, full))
        rule = create_mask(lambda b, h, i, j: block_mask.mask_mod(b, h, i + start, j), batch, heads, stop - start,
                           key_len, device=device)
        visible = rule & listed if whole is None else rule & listed | whole
        if heads > 1 and bool((differs := visible != visible[:, :1]).any()):
            b, h, i, j = differs.nonzero()[0].tolist()
            raise ValueError(f"{op}: block_mask[{b}, {h}, {i + start}, {j}] is {bool(visible[b, h, i, j])}, unlike "
                             "that of head 0; one mask for all heads fits; use FlexAttention for this mask")
        return visible[:, 0]

    return rows_of


def need_block_mask(op: str, block_mask) -> None:
    """Refuse what is no BlockMask."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise ValueError(f"{op}: block_mask is {got(block_mask)}; a torch.nn.attention.flex_attention.BlockMask fits; "
                         "for a bool tensor take from_dense")


def _tiles(counts: Tensor | None, indices: Tensor | None, across: int) -> Tensor | None:
    """The listed tiles as (B, H, row tiles, key tiles) bool."""
    if counts is None:
        return None
    chosen = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    found = torch.zeros(*counts.shape, max(across, indices.shape[-1]), dtype=torch.int32, device=counts.device)
    return found.scatter_add_(3, indices.long(), chosen.int())[..., :across] > 0


def _hull(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's first True, last True + 1 (0 and 0 without one) and number of True, all (B, R) of (B, R, C)."""
    count = visible.sum(-1)
    if visible.shape[-1] == 0:
        return count, count, count
    first, last = (visible.view(torch.uint8).argmax(-1),
                   visible.shape[-1] - visible.view(torch.uint8).flip(-1).argmax(-1))
    return torch.where(count > 0, first, 0), torch.where(count > 0, last, 0), count
