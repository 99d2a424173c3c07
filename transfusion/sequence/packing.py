"""From documents to packed rows: one `Sequence` holds all that a forward pass needs.

Several documents share a row; they do not see each other and their positions start at 0.
"""
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tfkernels import TransfusionMask
from transfusion.device import moved
from transfusion.sequence.encoding import Document
from transfusion.sequence.layout import ImageLayout, Modality


@dataclass(frozen=True, eq=False)
class Sequence:
    """B packed rows of S tokens with N images of P patches in all: what a forward pass needs, made on the host once.

    Places are flat indices into B * S (see `transfusion.sequence.layout`).
    """

    tokens: Tensor         # (B, S) ids; EOI's id stands where a patch goes
    positions: Tensor      # (B, S) from 0 in each document; a clean copy has those of its noised one
    documents: Tensor      # (B, S) number of the document in its row, -1 for padding
    spans: Tensor          # (B, M, 2) images, padded with start == end
    hidden: Tensor         # (B, H, 2) those of them that only their own tokens see, padded alike
    target_places: Tensor  # (T,) places of the tokens whose next token is a text target
    text_targets: Tensor   # (T,) these next tokens
    patches: Tensor        # (P, patch_dim) clean
    modality: Modality     # which tokens are text, which are patches and of which image
    image_first: Tensor    # (N,) bool: the image stands before any text of its document
    drawn: Tensor          # (N,) bool: it has a time and a diffusion loss; one only read, or a clean copy, is at time 0
    layout: ImageLayout    # of the patches
    left_out: int = 0      # documents that were drawn for it and are longer than a row

    def to(self, device) -> "Sequence":
        """Return the same sequence on `device`."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: moved(x, device) if isinstance(x, Tensor) else x.to(device)
                                for name, x in kept.items() if hasattr(x, "to")})

    def own(self, x: Tensor) -> Tensor:
        """Return what this process computes of whole rows (B, S, ...): all; a `Share` has some tokens of each."""
        return x

    def image_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and the places in them to which patches are embedded: the token embeddings x (B, S, C)."""
        return x.flatten(0, 1), self.patch_places

    def placed(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return token embeddings x with the patches that were embedded to `rows`."""
        return rows.view_as(x)

    def read_by_images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and the places in them where image heads read hidden states x (B * S, C)."""
        return x, self.patch_places

    def mask(self) -> TransfusionMask:
        """Return who sees whom."""
        return self._mask(self.spans)

    def causal_mask(self) -> TransfusionMask:
        """Return the same with images like text: a patch sees the patches before it."""
        return self._mask(self.spans[:, :0])

    def _mask(self, spans: Tensor) -> TransfusionMask:
        hidden = self.hidden if self.hidden.shape[1] else None
        return TransfusionMask.from_spans(spans, self.documents.shape[1], documents=self.documents, hidden=hidden)

    @property
    def image_ids(self) -> Tensor:
        """(B, S) int32, the image that each token belongs to, -1 for text."""
        return self.modality.image_ids

    @property
    def patch_places(self) -> Tensor:
        """(P,) the places of patches."""
        return self.modality.patch_places

    @property
    def timed(self) -> Tensor:
        """(N,) bool: the image has a time."""
        return self.drawn

    @property
    def image_count(self) -> int:
        """N."""
        return len(self.layout.grids)


class Bidirectional:
    """Patches see their whole image (arXiv:2408.11039, section 3.2)."""

    def mask(self, sequence: Sequence) -> TransfusionMask:
        """Return who sees whom among packed rows."""
        return sequence.mask()

    def seen(self, order: Tensor, patches: int) -> Tensor:
        """Of tokens `order` (n,) that are fed together, an image of `patches` first: how many of them each sees."""
        return torch.where(order < patches, patches, order + 1)


class Causal:
    """Patches see the patches before them, as text does (arXiv:2408.11039, table 5)."""

    def mask(self, sequence: Sequence) -> TransfusionMask:
        """As `Bidirectional.mask`."""
        return sequence.causal_mask()

    def seen(self, order: Tensor, patches: int) -> Tensor:
        """As `Bidirectional.seen`."""
        return order + 1


IMAGE_ATTENTION = {"bidirectional": Bidirectional(), "causal": Causal()}


def pack(documents: list[Document], seq_len: int, patch_dim: int, *, rows: int | None = None) -> Sequence:
    """Pack documents into rows of `seq_len` tokens, first fit; where `rows` is given, what does not fit is left out."""
    longest = max((len(d.tokens) for d in documents), default=0)
    if longest > seq_len:
        raise ValueError(f"pack: a document has {longest} tokens and seq_len is {seq_len}; "
                         "documents no longer than a row fit; raise seq_len or shorten it")
    packed: list[list[Document]] = [[] for _ in range(rows or 0)]
    free = [seq_len] * len(packed)
    for document in documents:
        at = next((i for i, room in enumerate(free) if room >= len(document.tokens)), None)
        if at is None and rows is None:
            packed.append([])
            free.append(seq_len)
            at = len(free) - 1
        if at is not None:
            packed[at].append(document)
            free[at] -= len(document.tokens)
    return lay_out(packed, seq_len, patch_dim)


def lay_out(rows: list[list[Document]], seq_len: int, patch_dim: int, *, left: bool = False) -> Sequence:
    """Write rows of documents into one `Sequence`; padding stands right, or left for prompts, which so end together."""
    tokens, positions, owner = ([[fill] * seq_len for _ in rows] for fill in (0, 0, -1))
    spans, hidden, target_places, targets, patches, patch_places, first, drawn, grids = ([] for _ in range(9))
    for b, documents in enumerate(rows):
        at = seq_len - sum(len(d.tokens) for d in documents) if left else 0
        spans.append([])
        hidden.append([])
        for number, document in enumerate(documents):
            length = len(document.tokens)
            tokens[b][at:at + length] = document.tokens
            positions[b][at:at + length] = document.positions()
            owner[b][at:at + length] = [number] * length
            heads = [i for i in range(length - 1) if document.targets[i + 1]]
            target_places += [b * seq_len + at + i for i in heads]
            targets += [document.tokens[i + 1] for i in heads]
            for n, (start, x, grid, image_first) in enumerate(document.images):
                spans[b].append((at + start, at + start + len(x)))
                hidden[b] += spans[b][-1:] if n in document.hidden else []
                patches.append(x)
                patch_places += range(b * seq_len + at + start, b * seq_len + at + start + len(x))
                grids.append(grid)
                first.append(image_first)
                drawn.append(n - 1 not in document.hidden and n not in document.read)
            at += length
    layout, patch_places = ImageLayout.of(grids), torch.tensor(patch_places, dtype=torch.int64)
    image_ids = torch.full((len(rows) * seq_len,), -1, dtype=torch.int32)
    image_ids = image_ids.index_copy(0, patch_places, layout.image_ids.int())
    return Sequence(
        *(torch.tensor(x, dtype=torch.int64).view(len(rows), seq_len) for x in (tokens, positions, owner)),
        _pad(spans), _pad(hidden),
        torch.tensor(target_places, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64),
        torch.cat([torch.zeros(0, patch_dim), *patches]),
        Modality(image_ids.view(len(rows), seq_len), (image_ids < 0).nonzero()[:, 0], patch_places),
        torch.tensor(first, dtype=torch.bool), torch.tensor(drawn, dtype=torch.bool), layout)


def _pad(spans: list[list[tuple[int, int]]]) -> Tensor:
    """Spans of each row as one tensor (B, M, 2), padded with (0, 0)."""
    width = max(map(len, spans), default=0)
    padded = [row + [(0, 0)] * (width - len(row)) for row in spans]
    return torch.tensor(padded, dtype=torch.int64).view(len(spans), width, 2)
