"""FlexAttention's BlockMask from a mask's integers: tile bounds in place of create_block_mask's S x S evaluation."""
import torch
from torch import Tensor

_FAR = 2**31 - 1


def block_mask(mask, block_size: int):
    """Return a `TransfusionMask`'s BlockMask: the tiles that its rows and columns leave visible, full ones apart."""
    from torch.nn.attention.flex_attention import BlockMask

    lo, hi, key_since, key_until, offset, rows_exact = (mask.lo, mask.hi, mask.key_since, mask.key_until, mask.offset,
                                                        mask.rows_exact)

    def visible(b, h, i, j):
        b = b % lo.shape[0]
        seen = (lo[b, i] <= j) & (j < hi[b, i])
        return seen if rows_exact else seen & (key_since[b, j] <= i + offset) & (i + offset < key_until[b, j])

    some, full = _meets(lo, hi, mask.key_len, 0, block_size)
    if not rows_exact:
        some_columns, full_columns = _meets(key_since, key_until, mask.query_len, offset, block_size)
        some, full = some & some_columns.mT, full & full_columns.mT
    parts = [_kv_blocks(kind[:, None]) for kind in (some & ~full, full)]
    return BlockMask.from_kv_blocks(*parts[0], *parts[1], BLOCK_SIZE=block_size, mask_mod=visible,
                                    seq_lengths=(mask.query_len, mask.key_len))


def _meets(low: Tensor, high: Tensor, across_len: int, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the tiles (B, rows, across) that some row's [low, high) may meet, and those that every row's covers."""
    empty = low >= high
    first = _tiles(torch.where(empty, _FAR, low), size, _FAR).amin(-1)[..., None]
    last = _tiles(torch.where(empty, 0, high), size, 0).amax(-1)[..., None]
    core_first = _tiles(torch.where(empty, _FAR, low), size, -1).amax(-1)[..., None]
    core_last = _tiles(torch.where(empty, -1, high), size, _FAR).amin(-1)[..., None]
    start = torch.arange(0, across_len, size, device=low.device)
    stop = (start + size).clamp(max=across_len)
    some = (first < stop + offset) & (last > start + offset)
    full = some & (core_first <= start + offset) & (core_last >= stop + offset) & (start + size <= across_len)
    return some, full


def _kv_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


def _tiles(x: Tensor, size: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % size), value=fill).unflatten(1, (-1, size))
