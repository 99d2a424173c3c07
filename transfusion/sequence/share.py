"""Packed rows that several ranks share: what each of them computes of a row that is too long for one.

    tokens    T of each row's S, dealt by the pairs that attention sees (`tfkernels.parallel.cut_by_area`). All layers
              between embedding and text loss run on these alone; attention meets the others' keys and values.
    images    whole ones, dealt by their patches, for a U-Net or a loss needs all patches of an image. Their rank makes
              the noise, embeds the patches and sends each to the rank of its token; behind the last layer hidden states
              come back the same way to the image head.

Everything is done by one rank and nothing twice, so gradients and losses, as sums and counts, are those of one process
when they are summed over ranks. Rows of one batch are cut alike: a rank's work is that of all its rows together, so it
is their summed area that must be even, and tensors stay rectangular.
"""
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tfkernels import TransfusionMask
from tfkernels.parallel import Cut, SharedMask, cut_by_area, exchange, gathered_attention, ring_attention
from transfusion.device import moved
from transfusion.sequence.layout import ImageLayout, Modality
from transfusion.sequence.packing import Sequence

CONTEXT_ATTENTION = {"gathered": gathered_attention, "ring": ring_attention}
CHUNK_LEN, CHUNKS = 128, 16  # tokens of a chunk that a kernel likes, and chunks of a rank that balance well


class Context(NamedTuple):
    """Ranks that share rows, and how they attend to each other's tokens.

    group: their process group; None for all processes.
    attention: of `CONTEXT_ATTENTION`: a layer's keys and values gathered on every rank, or passed around in a ring.
    """

    group: object = None
    attention: Callable[..., Tensor] = gathered_attention

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)


class Route(NamedTuple):
    """Which patches change ranks between image layers and tokens.

    rows: (P,) the patches of this rank's images in the order in which they are sent: by the rank of their token.
    places: (R,) where the patches that arrive belong among this rank's tokens: by the rank of their image.
    sent, received: how many go to each rank and come from it.
    """

    rows: Tensor
    places: Tensor
    sent: tuple
    received: tuple

    def to(self, device) -> "Route":
        """Return the same on `device`."""
        return self._replace(rows=moved(self.rows, device), places=moved(self.places, device))


@dataclass(frozen=True, eq=False)
class Share(Sequence):
    """One rank's share of packed rows: a `Sequence` in which

    - `tokens` (B, T), `modality`, `target_places` and `text_targets` are of the rank's tokens,
    - `patches` and `layout` are of the rank's images, others having no patches, and `drawn` is False for others,
    - `positions`, `documents`, `spans`, `hidden` and `whole_image_ids` are those of whole rows.
    """

    whole_image_ids: Tensor = None  # (B, S) the image of each token of the rows
    timed: Tensor = None            # (N,) bool: the image has a time, whichever rank draws it
    cut: Cut = None
    route: Route = None
    context: Context = Context()

    @property
    def image_ids(self) -> Tensor:
        """(B, S) as `positions` are, of whole rows; `modality.image_ids` are those of the rank's tokens."""
        return self.whole_image_ids

    @property
    def image_count(self) -> int:
        """How many images are this rank's."""
        return sum(rows > 0 for rows, _ in self.layout.grids)

    def own(self, x: Tensor) -> Tensor:
        """(B, S, ...) of whole rows -> (B, T, ...) of the rank's tokens."""
        return self.cut.take(x, self.context.rank)

    def image_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Sequence.image_rows`: rows for the patches of this rank's images alone."""
        return x.new_zeros(len(self.patches), x.shape[-1]), torch.arange(len(self.patches), device=x.device)

    def placed(self, x: Tensor, rows: Tensor) -> Tensor:
        """As `Sequence.placed`: patches go to the ranks of their tokens."""
        arrived = exchange(rows[self.route.rows], self.route.sent, self.route.received, self.context.group)
        return x.flatten(0, 1).index_copy(0, self.route.places, arrived.to(x.dtype)).view_as(x)

    def read_by_images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Sequence.read_by_images`: hidden states of patches come to the rank of their image."""
        arrived = exchange(x[self.route.places], self.route.received, self.route.sent, self.context.group)
        return arrived[self.route.rows.argsort()], torch.arange(len(arrived), device=x.device)

    def _mask(self, spans: Tensor) -> SharedMask:
        return SharedMask(super()._mask(spans), self.cut, self.context.group, self.context.attention)


def share(sequence: Sequence, mask: TransfusionMask, context: Context) -> Share:
    """Return this rank's share of packed rows that all ranks of `context` have; on the host it waits for no device.

    `mask` is the rows' mask in the layers that see most.
    """
    rank, ranks, length = context.rank, context.ranks, sequence.tokens.shape[1]
    cut = cut_by_area(mask, ranks, max(1, min(CHUNK_LEN, length // (CHUNKS * ranks))))
    holder, number = torch.empty(2, length, dtype=torch.int64, device=sequence.tokens.device)
    for r, tokens in enumerate(cut.tokens):  # which rank has a token, and as which of its tokens
        holder[tokens], number[tokens] = r, torch.arange(len(tokens), device=tokens.device)

    def held(places: Tensor) -> tuple[Tensor, Tensor]:
        """Which places are this rank's, and where those are among its tokens."""
        row, token = places // length, places % length
        is_held = holder[token] == rank
        return is_held, (row * len(cut.tokens[rank]) + number[token])[is_held]

    owner = torch.tensor(_dealt([rows * columns for rows, columns in sequence.layout.grids], ranks),
                         dtype=torch.int64, device=holder.device)
    image_ids = cut.take(sequence.image_ids, rank)
    is_text = image_ids.flatten() < 0
    is_target, target_places = held(sequence.target_places)
    is_own = owner[sequence.layout.image_ids] == rank
    grids = [grid if r == rank else (0, 0) for grid, r in zip(sequence.layout.grids, owner.tolist())]
    return Share(
        cut.take(sequence.tokens, rank), sequence.positions, sequence.documents, sequence.spans, sequence.hidden,
        target_places, sequence.text_targets[is_target], sequence.patches[is_own],
        Modality(image_ids, is_text.nonzero()[:, 0], (~is_text).nonzero()[:, 0]), sequence.image_first,
        sequence.drawn & (owner == rank),
        ImageLayout.of(grids, holder.device)._replace(columns=sequence.layout.columns), sequence.left_out,
        whole_image_ids=sequence.image_ids, timed=sequence.drawn, cut=cut, context=context,
        route=_route(owner[sequence.layout.image_ids], holder[sequence.patch_places % length],
                     held(sequence.patch_places)[1], rank, ranks))


def _route(owners: Tensor, holders: Tensor, held_places: Tensor, rank: int, ranks: int) -> Route:
    """Return the route of patches whose images and whose tokens these ranks (P,) have."""
    to, source = holders[owners == rank], owners[holders == rank]
    return Route(to.argsort(stable=True), held_places[source.argsort(stable=True)],
                 tuple(to.bincount(minlength=ranks).tolist()), tuple(source.bincount(minlength=ranks).tolist()))


def _dealt(sizes: list[int], ranks: int) -> list[int]:
    """Return the rank of each image: the largest one left goes to the rank with the fewest patches."""
    owner, loads = [0] * len(sizes), [(0, rank) for rank in range(ranks)]
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        load, owner[n] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[n], owner[n]))
    return owner
