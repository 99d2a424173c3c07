"""From parts to packed rows: Text and Image in, one `Sequence` of tokens, patches, spans and targets out.

A document is BOS, its parts in order (an image is BOI, its patches in raster order, EOI), and EOS. Text that begins with BOS, as
a chat template's does, gets no second one; other names of special tokens in a text are plain characters: see `Text`.
Several documents share a row; they do not see each other and their positions start at 0.
Text loss stands on every token that follows text, EOI or BOS in the same document, never where the input is BOI or a patch
(arXiv:2408.11039, footnote 8). The EOS of an image without any text is no target: its caption was left out for guidance, and the
model must not learn that nothing can be said about an image.

What follows an image reads it as it is noised (the paper), or clean: `with_clean_copies` lays an image out as BOI, noised patches, clean
patches, EOI. Nothing else sees the noised patches; the clean ones take their positions, time 0 and no loss. So all that follows has the
position and the context that it has in sampling, where only the finished image stands before it.
"""
import functools
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels import TransfusionMask


@dataclass(frozen=True)
class Text:
    """A run of text; `loss=False` for text the model reads but is not trained to write (questions, instructions).

    Text is characters: "<boi>", "</s>" and other names of special tokens in it are spelled out, and decoding gives them
    back. Special tokens are read in what a chat template wrote, but for BOI and EOI, which only an image has: in text
    that begins with BOS, where the tokenizer has a template, and in text of which `special=True` says that it is a
    template's or a piece of it. A BOS at the beginning of a text is always one.
    """

    text: str
    loss: bool = True
    special: bool = False

    def token_ids(self, tokenizer, config) -> tuple[int, ...]:
        """Return its tokens."""
        images, template = (config.boi_token_id, config.eoi_token_id), bool(tokenizer.chat_template)
        return _token_ids(tokenizer, len(tokenizer), self.text, self.special, template, images)


@dataclass(frozen=True, eq=False)
class Image:
    """An image or its VAE latent, (channels, height, width), values around [-1, 1]."""

    latent: Tensor


Part = Text | Image


class ImageLayout(NamedTuple):
    """Which patches are whose, for N images of P patches in all, one image behind the other.

    image: (P,) the image each patch belongs to.
    offsets: (N + 1,) int32, the patches of image n are the rows offsets[n] to offsets[n + 1].
    columns: (N,) int32, how many patches make a row.
    grids: N x (rows, columns) of patches, on the host.
    """

    image: Tensor
    offsets: Tensor
    columns: Tensor
    grids: tuple

    @classmethod
    def of(cls, grids: list[tuple[int, int]], device=None) -> "ImageLayout":
        """Lay out images of these grids."""
        counts = torch.tensor([rows * columns for rows, columns in grids], dtype=torch.int64)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        columns = torch.tensor([columns for _, columns in grids], dtype=torch.int32)
        return cls(torch.repeat_interleave(torch.arange(len(grids)), counts), offsets, columns, tuple(grids)).to(device)

    def to(self, device) -> "ImageLayout":
        """Return the same layout on `device`."""
        return ImageLayout(*(x.to(device, non_blocking=True) for x in self[:3]), self.grids)

    def by_grid(self) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """Images of one grid together: (grid, their numbers (n,), their patches' rows (n * rows * columns,)) for each grid there is."""
        if len(set(self.grids)) == 1:  # nothing to sort out, and nothing to carry to the device
            return [(self.grids[0], *(torch.arange(count, device=self.image.device) for count in (len(self.grids), len(self.image))))]
        ends, found = 0, {}
        for number, (rows, columns) in enumerate(self.grids):
            numbers, patches = found.setdefault((rows, columns), ([], []))
            numbers.append(number)
            patches += range(ends, ends + rows * columns)
            ends += rows * columns
        return [(grid, *(torch.tensor(x).to(self.image.device, non_blocking=True) for x in members)) for grid, members in found.items()]


class Modality(NamedTuple):
    """Which tokens of packed rows (B, S) are patches and which are text; padding is text.

    The numbers of both are known on the host, so to take them apart and put them together waits for no device.

    image: (B, S) int32 or int64, the image of each token, -1 for text.
    text_rows: (T,) flat indices into B * S of text.
    image_rows: (P,) flat indices into B * S of patches.
    """

    image: Tensor
    text_rows: Tensor
    image_rows: Tensor

    def to(self, device) -> "Modality":
        """Return the same on `device`."""
        return Modality(*(x.to(device, non_blocking=True) for x in self))

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, ...) -> text (1, T, ...) and patches (1, P, ...)."""
        rows = packed.flatten(0, 1)
        return rows.index_select(0, self.text_rows)[None], rows.index_select(0, self.image_rows)[None]

    def join(self, text: Tensor, patches: Tensor) -> Tensor:
        """Undo `split`."""
        rows = text.new_empty(self.image.numel(), *text.shape[2:])                          # every row is written: each is text or a patch
        rows = rows.index_copy_(0, self.text_rows, text[0]).index_copy_(0, self.image_rows, patches[0])
        return rows.unflatten(0, self.image.shape)


class Document(NamedTuple):
    """One encoded document: ids (S,), whether each is a text target, and its images as (start, patches, grid, image_first).

    hidden: numbers of the images that only their own tokens see; the image after each one is its clean copy.
    """

    tokens: list[int]
    targets: list[bool]
    images: list[tuple[int, Tensor, tuple[int, int], bool]]
    hidden: tuple[int, ...] = ()

    def positions(self) -> list[int]:
        """Each token's position: from 0, a clean copy at those of its noised one."""
        positions = list(range(len(self.tokens)))
        for number in self.hidden:
            start, patches, *_ = self.images[number + 1]
            positions[start:] = [p - len(patches) for p in positions[start:]]
        return positions


@dataclass(frozen=True, eq=False)
class Sequence:
    """B packed rows of S tokens with N images of P patches in all. Everything a forward pass needs, made on the host once."""

    tokens: Tensor        # (B, S) ids; EOI's id stands where a patch goes
    positions: Tensor     # (B, S) from 0 in each document; a clean copy has those of its noised one
    documents: Tensor     # (B, S) number of the document in its row, -1 for padding
    spans: Tensor         # (B, M, 2) images, padded with start == end
    hidden: Tensor        # (B, H, 2) those of them that only their own tokens see, padded alike
    text_rows: Tensor     # (T,) flat indices into B * S whose next token is a target
    text_targets: Tensor  # (T,)
    patches: Tensor       # (P, patch_dim) clean
    modality: Modality    # which tokens are text, which are patches and of which image
    image_first: Tensor   # (N,) bool: the image stands before any text of its document
    drawn: Tensor         # (N,) bool: the image has a time and a diffusion loss; a clean copy has time 0 and none
    layout: ImageLayout   # of the patches
    left_out: int = 0     # documents that were drawn for it and are longer than a row

    def to(self, device) -> "Sequence":
        """Return the same sequence on `device`."""
        others = ("modality", "layout", "left_out")
        names = [f.name for f in fields(self) if f.name not in others]
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **tensors, modality=self.modality.to(device), layout=self.layout.to(device))

    def mask(self) -> TransfusionMask:
        """Return who sees whom."""
        return TransfusionMask.from_spans(self.spans, self.tokens.shape[1], documents=self.documents, hidden=self.hidden if self.hidden.shape[1] else None)

    def causal_mask(self) -> TransfusionMask:
        """Return the same with images like text: a patch sees the patches before it."""
        hidden = self.hidden if self.hidden.shape[1] else None
        return TransfusionMask.from_spans(self.spans[:, :0], self.tokens.shape[1], documents=self.documents, hidden=hidden)

    @property
    def image(self) -> Tensor:
        """(B, S) int32, the image each token belongs to, -1 for text."""
        return self.modality.image

    @property
    def patch_rows(self) -> Tensor:
        """(P,) flat indices into B * S."""
        return self.modality.image_rows

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


def encode(parts: list[Part], tokenizer, config, *, end: bool = True) -> Document:
    """Turn one document's parts into tokens, targets and patches; `end=False` leaves EOS out (a prompt).

    Raises:
        ValueError: parts that are none, text that is no str or cannot be spelled without special tokens, images that do
            not fit the model (not floating point, not finite, other channels, no or broken patches, a gradient), or BOI
            and EOI that are not tokens of their own.
    """
    if not isinstance(parts, list | tuple):
        raise ValueError(f"encode: parts is a {type(parts).__name__}; a list of Text and Image fits, "
                         "e.g. [Text('a handwritten seven')]")
    if not parts:
        raise ValueError("encode: parts is empty; at least one Text or Image fits, e.g. [Text('a handwritten seven')]")
    boi, eoi, others = config.boi_token_id, config.eoi_token_id, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if boi == eoi or boi in others or eoi in others:
        raise ValueError(f"encode: boi_token_id is {boi} and eoi_token_id {eoi}, BOS and EOS are {others[0]} and "
                         f"{others[1]}; two tokens of their own fit")
    tokens, targets, images, text_seen = [tokenizer.bos_token_id], [False], [], False
    for part in parts:
        if isinstance(part, Text):
            ids = part.token_ids(tokenizer, config)
            if list(ids[:1]) == tokens:  # a second BOS
                ids = ids[1:]
            tokens += ids
            targets += [part.loss] * len(ids)
            text_seen = text_seen or bool(ids)
        elif isinstance(part, Image):
            latent = _host_latent(part, config)
            unshuffled = torch.nn.functional.pixel_unshuffle(latent, config.patch_size)  # tfkernels.patchify, cheaper
            patches = unshuffled.flatten(1).T
            grid = part.latent.shape[1] // config.patch_size, part.latent.shape[2] // config.patch_size
            images.append((len(tokens) + 1, patches, grid, not text_seen))
            tokens += [config.boi_token_id] + [config.eoi_token_id] * (len(patches) + 1)
            targets += [True] + [False] * (len(patches) + 1)
        else:
            raise ValueError(f"encode: a part is a {type(part).__name__}; transfusion.Text or transfusion.Image fits")
    if end:
        tokens.append(tokenizer.eos_token_id)
        targets.append(text_seen)
    return Document(tokens, targets, images)


def with_clean_copies(document: Document) -> Document:
    """Put a clean copy behind the patches of each image with a text target behind it: text, BOI of another image or, where there is text, EOS.

    BAGEL's noised and clean tokens (arXiv:2505.14683, "Generalized Causal Attention") between one BOI and one EOI. EOS alone is reason enough:
    were it read off a noised image only where the document ends, noise would tell the end, and sampling has none.
    """
    tokens, targets, images, hidden = list(document.tokens), list(document.targets), [], []
    for start, patches, grid, image_first in document.images:
        start += len(tokens) - len(document.tokens)                                        # behind the copies so far
        stop = start + len(patches)
        images.append((start, patches, grid, image_first))
        if any(targets[stop:]):
            hidden.append(len(images) - 1)
            images.append((stop, patches, grid, image_first))
            tokens[stop:stop], targets[stop:stop] = tokens[start:stop], [False] * len(patches)
    return Document(tokens, targets, images, tuple(hidden))


def pack(documents: list[Document], seq_len: int, patch_dim: int, *, rows: int | None = None) -> Sequence:
    """Pack documents into rows of `seq_len` tokens, first fit; with `rows`, the documents that do not fit are left out."""
    longest = max((len(d.tokens) for d in documents), default=0)
    if longest > seq_len:
        raise ValueError(f"pack: a document has {longest} tokens and seq_len is {seq_len}; documents no longer than a row fit; raise seq_len or shorten it")
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
    """Write rows of documents into one `Sequence`; padding stands right, or left (prompts, so that all end together)."""
    tokens, positions, owner = ([[fill] * seq_len for _ in rows] for fill in (0, 0, -1))
    spans, hidden, text_rows, targets, patches, patch_rows, first, drawn, grids = [], [], [], [], [], [], [], [], []
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
            text_rows += [b * seq_len + at + i for i in heads]
            targets += [document.tokens[i + 1] for i in heads]
            for n, (start, x, grid, image_first) in enumerate(document.images):
                spans[b].append((at + start, at + start + len(x)))
                hidden[b] += spans[b][-1:] if n in document.hidden else []
                patches.append(x)
                patch_rows += range(b * seq_len + at + start, b * seq_len + at + start + len(x))
                grids.append(grid)
                first.append(image_first)
                drawn.append(n - 1 not in document.hidden)
            at += length
    layout, patch_rows = ImageLayout.of(grids), torch.tensor(patch_rows, dtype=torch.int64)
    image = torch.full((len(rows) * seq_len,), -1, dtype=torch.int32).index_copy(0, patch_rows, layout.image.int())
    return Sequence(
        *(torch.tensor(x, dtype=torch.int64).view(len(rows), seq_len) for x in (tokens, positions, owner)),
        _pad(spans), _pad(hidden),
        torch.tensor(text_rows, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64),
        torch.cat([torch.zeros(0, patch_dim), *patches]), Modality(image.view(len(rows), seq_len), (image < 0).nonzero()[:, 0], patch_rows),
        torch.tensor(first, dtype=torch.bool), torch.tensor(drawn, dtype=torch.bool), layout)


def _pad(spans: list[list[tuple[int, int]]]) -> Tensor:
    """Spans of each row as one tensor (B, M, 2), padded with (0, 0)."""
    width = max(map(len, spans), default=0)
    return torch.tensor([row + [(0, 0)] * (width - len(row)) for row in spans], dtype=torch.int64).view(len(spans), width, 2)


@functools.lru_cache(maxsize=2**16)
def _token_ids(tokenizer, size: int, text: str, special: bool, template: bool, images: tuple) -> tuple[int, ...]:
    """Tokens of a text: special tokens are spelled out or, in a chat template's text, read, but for `images`: BOI, EOI.

    `size`, the tokenizer's, keeps apart what it made before tokens were added and what it makes after.
    """
    if not isinstance(text, str):
        raise ValueError(f"Text: text is a {type(text).__name__}; a str fits")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Text: text is {text[:60]!r}, which is no Unicode text ({error.reason}); "
                         "what UTF-8 can write fits") from None
    bos = tokenizer.bos_token
    begins = bool(bos) and text.startswith(bos)
    if special or begins and template:
        found = _ids(tokenizer, text, split=False)
        spelled = {i: _spelled(tokenizer, tokenizer.convert_ids_to_tokens(i), images) for i in images if i in found}
        return tuple(i for one in found for i in spelled.get(one, (one,)))
    if begins:
        return tokenizer.bos_token_id, *_spelled(tokenizer, text[len(bos):], images)
    return _spelled(tokenizer, text, images)


def _spelled(tokenizer, text: str, images: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of a text in which no special token is read."""
    ids = _ids(tokenizer, text, split=True)
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, *images} - {tokenizer.unk_token_id}
    if found := control.intersection(ids):
        raise ValueError(f"Text: text is {text[:60]!r}, in which this tokenizer reads "
                         f"{tokenizer.convert_ids_to_tokens(min(found))!r} as a special token even where it is told to "
                         "spell it; text without it fits")
    return ids


def _ids(tokenizer, text: str, *, split: bool) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))


def _host_latent(image: Image, config) -> Tensor:
    """The image's latent as (channels, height, width) float32 on the host; on the way it is checked."""
    x, size, channels = image.latent, config.patch_size, config.image_channels
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise ValueError(f"Image: latent is a {kind}; a floating-point tensor ({channels}, height, width) fits")
    shape = tuple(x.shape)
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"Image: latent has shape {shape}; ({channels}, height, width) fits this model")
    if min(shape[1:]) < size or shape[1] % size or shape[2] % size:
        raise ValueError(f"Image: latent is {shape[1]}x{shape[2]} and the patch size {size}; multiples of the patch "
                         "size fit; resize or crop the image")
    if not x.is_floating_point():
        raise ValueError(f"Image: latent is of {x.dtype}; floating point around [-1, 1] fits; of bytes, "
                         "latent.float() / 127.5 - 1")
    if x.requires_grad:
        raise ValueError("Image: latent requires a gradient, which nothing computes; a tensor without one fits; "
                         "pass latent.detach()")
    if x.is_meta:
        raise ValueError("Image: latent is on the meta device and has no values; a tensor with values fits")
    x = x.to("cpu", torch.float32)
    if not x.isfinite().all():
        raise ValueError("Image: latent has values that are NaN or infinite; finite numbers around [-1, 1] fit")
    return x
