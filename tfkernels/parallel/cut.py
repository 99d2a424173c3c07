"""Which tokens of a row each rank holds, dealt so that every rank has as much attention to compute.

The row is cut into chunks as long as a kernel's tile. The chunk with the most visible pairs goes to the rank that has
the fewest so far, then the next one (longest processing time first: Graham, Bounds on multiprocessing timing anomalies,
1969). Each rank also gets as many chunks as any other, give or take one, so the layers that see one token at a time
are balanced too. A rank therefore holds several runs of the row. Positions and images are those of the tokens it
holds, and `TransfusionMask.select_queries` gives its mask.
"""
import heapq
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tfkernels._arguments import got, need_integer, shown
from tfkernels.mask import TransfusionMask


class Cut:
    """Which tokens of a row each rank holds.

    It is no dataclass, for FSDP makes those anew in every layer that it shards.
    """

    def __init__(self, tokens: Sequence[Tensor]):
        """Take, for each rank, the numbers of its tokens in the row: (T,) int64, ascending, every token at one rank.

        Counts may differ. Checking them waits for the device, once a row.
        """
        if not isinstance(tokens, Sequence) or not all(isinstance(x, Tensor) for x in tokens):
            raise ValueError(f"Cut: tokens is {shown(tokens)}; a list of int64 tensors (T,), one for each rank, fits")
        self.tokens = tuple(tokens)
        if not self.tokens or any(x.ndim != 1 or x.dtype != torch.int64 for x in self.tokens):
            raise ValueError("Cut: tokens does not hold int64 tensors (T,); one for each rank fits")
        together = torch.cat(self.tokens)
        ascends = torch.stack([(x[1:] > x[:-1]).all() for x in self.tokens]).all()
        if not ascends or not torch.equal(together.sort().values, torch.arange(len(together), device=together.device)):
            raise ValueError("Cut: tokens leaves out a token, holds one twice or does not ascend; the numbers of a "
                             "row, each at one rank and in order, fit")

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """S, the number of tokens of the row."""
        return sum(len(x) for x in self.tokens)

    @property
    def longest(self) -> int:
        """Number of tokens of the rank that holds the most."""
        return max(len(x) for x in self.tokens)

    @cached_property
    def places(self) -> Tensor:
        """(S,) where each token of the row stands once the ranks' tokens, padded to `longest`, are put together."""
        places = torch.cat([rank * self.longest + torch.arange(len(x), device=x.device)
                            for rank, x in enumerate(self.tokens)])
        return torch.empty_like(places).index_copy_(0, torch.cat(self.tokens), places)

    def to(self, device) -> "Cut":
        """Return the same cut on `device`, where the tensors are that it takes from; it is not checked again."""
        moved = object.__new__(Cut)
        moved.tokens = tuple(x.to(device, non_blocking=torch.device(device).type != "cpu") for x in self.tokens)
        return moved

    def take(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return a rank's tokens of a whole row's tensor: tokens, positions, image ids, hidden states (B, S, C)."""
        self._need_row("take", "x", x, dim)
        if not 0 <= rank < self.ranks:
            raise ValueError(f"Cut.take: rank is {rank}; 0 to {self.ranks - 1} fits, for the cut has {self.ranks}")
        return x.index_select(dim, self.tokens[rank])

    def join(self, parts, dim: int = 1) -> Tensor:
        """Return a whole row's tensor from those of all ranks, in the order of the ranks; undoes `take`."""
        together = torch.cat(list(parts), dim)
        self._need_row("join", "parts put together", together, dim)
        return together.index_select(dim, torch.cat(self.tokens).argsort())

    def _need_row(self, op: str, name: str, x: Tensor, dim: int) -> None:
        """Refuse what is not a whole row's; on CUDA an index behind its end would lose the device."""
        if not isinstance(x, Tensor) or not -x.ndim <= dim < x.ndim or x.shape[dim] != self.seq_len:
            raise ValueError(f"Cut.{op}: {name} is {got(x)}; a tensor with the row's {self.seq_len} tokens in "
                             f"dimension {dim} fits; say which one has them with dim")


def cut_by_area(mask: TransfusionMask, ranks: int, chunk_len: int = 128) -> Cut:
    """Deal a row's tokens to ranks in chunks, so that each has about as many visible pairs and as many tokens.

    Args:
        mask: the whole row's mask, S queries by S keys. Where it has several batch rows, their areas are summed, for
            they are cut alike.
        ranks: R, number of ranks.
        chunk_len: tokens that stay together. Sixteen chunks a rank or more balance well; 128 is a kernel's tile.

    Returns:
        A Cut, the same on every rank that has the same mask. The areas are read from the device once.

    Raises:
        ValueError: the mask is not square, or the row has fewer chunks than ranks.
    """
    op = "cut_by_area"
    if not isinstance(mask, TransfusionMask):
        raise ValueError(f"{op}: mask is a {type(mask).__name__}; a tfkernels.TransfusionMask fits")
    if mask.query_len != mask.key_len or mask.offset != 0:
        raise ValueError(f"{op}: mask is {mask.query_len} queries from {mask.offset} by {mask.key_len} keys; that of a "
                         "whole row, as many queries as keys, fits")
    ranks, chunk_len = need_integer(op, "ranks", ranks, 1), need_integer(op, "chunk_len", chunk_len, 1)
    tokens = torch.arange(mask.query_len, device=mask.lo.device)
    chunks = tokens.split(chunk_len)
    if len(chunks) < ranks:
        raise ValueError(f"{op}: ranks is {ranks} and the row has {len(chunks)} chunks of {chunk_len} tokens; at least "
                         "a chunk for each rank fits; make chunk_len smaller")
    areas = tokens.new_zeros(len(chunks)).index_add_(0, tokens // chunk_len, mask.visible_keys().sum(0))
    return Cut([torch.cat([chunks[n] for n in held]) for held in _deal(areas.tolist(), ranks)])


def _deal(areas: list[int], ranks: int) -> list[list[int]]:
    """Return the chunks of each rank, ascending: the largest left goes to the rank with the least that has room."""
    least, more = divmod(len(areas), ranks)             # `more` ranks hold a chunk more than the others
    held = [[] for _ in range(ranks)]
    open_ranks = [(0, rank) for rank in range(ranks)]   # a heap of (area so far, rank)
    for chunk in sorted(range(len(areas)), key=lambda n: -areas[n]):
        area, rank = heapq.heappop(open_ranks)
        while len(held[rank]) == least and not more:
            area, rank = heapq.heappop(open_ranks)
        held[rank].append(chunk)
        if len(held[rank]) > least:
            more -= 1
        else:
            heapq.heappush(open_ranks, (area + areas[chunk], rank))
    return [sorted(chunks) for chunks in held]
