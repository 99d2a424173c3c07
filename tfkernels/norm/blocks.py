"""How the CPU goes through tokens: a few of them through all steps, then the next few.

So what one step writes the next one finds in the cache. Most blocks lie within one image, or within text, and share a
row of its table.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 2**16  # of a block in each step, 256 KiB


class Tokens(NamedTuple):
    """Tokens that are computed together, and the row of a table that they have in common, or the row of each."""

    at: slice
    row: int | Tensor

    def of(self, table: Tensor) -> Tensor:
        """Their rows of a table, (C,) or (tokens, C)."""
        return table[self.row]

    def add(self, values: Tensor, total: Tensor) -> None:
        """Add their values (tokens, C) to the float64 sums (rows of a table, C)."""
        if isinstance(self.row, int):
            total[self.row] += values.sum(0)
        else:  # row by row: in float32 the error would grow with the tokens
            total.index_add_(0, self.row, values.double())


def token_blocks(rows: Tensor, width: int) -> Iterator[Tokens]:
    """Tokens of `width` columns whose rows of a table are `rows` (T,), at least 0, a block at a time."""
    size = max(16, NUMBERS // max(1, width))
    blocks = torch.nn.functional.pad(rows, (0, -len(rows) % size), value=-1).view(-1, size)
    least, most = blocks.where(blocks >= 0, blocks[:, :1]).aminmax(dim=1)
    for first, low, high in zip(range(0, len(rows), size), least.tolist(), most.tolist()):
        at = slice(first, first + size)
        yield Tokens(at, low if low == high else rows[at])
