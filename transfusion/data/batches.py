"""Data sets: things that draw documents (lists of Text and Image) from a random generator, and the batches made of them.

A data set has `texts()` (for its tokenizer), `image_shape` (C, H, W) and `document(generator, settings)`. The batch of a step is
a pure function of (seed, step): a resumed run sees what an uninterrupted one would have seen.
"""
import bisect
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from transfusion.recipes.emoji import large_emoji, lively_emoji, small_emoji
from transfusion.sequence import Document, Image, Part, Sequence, Text, encode, lay_out, with_clean_copies
from transfusion.settings import OneOf, Range, Share, check

DATASETS: dict[str, Callable] = {}
"""Data sets by name: calls that take a split, "train" or "held-out"."""
CONTEXTS = {"noised": lambda document: document, "clean": with_clean_copies}
PROBED = 500  # documents that tell how long they are
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DataSettings:
    """What documents look like."""

    name: Annotated[str, OneOf(DATASETS)] = "digits"
    """the data set; see DATASETS in transfusion/data/batches.py"""
    latents: Path | None = None
    """a cache of its latents that `transfusion vae encode` wrote: what is drawn in place of pictures; the checkpoint carries their autoencoder"""
    caption_first: Share = 0.8
    """share of pairs whose caption stands before the image (the paper: 0.8)"""
    caption_dropout: Share = 0.1
    """share of caption-first pairs whose caption is left out, so that guidance has an unconditional model"""
    story: Share = 0.0
    """share of documents that hold two pairs, joined by "and" """
    noise_limit: Share = 0.5
    """largest noise time of an image that stands before its caption (the paper: 0.5); with context clean, where captions read no noise, there is none"""
    context: Annotated[str, OneOf(CONTEXTS)] = "noised"
    """what later tokens read of an image: noised, the patches it is drawn from (the paper), or clean, a copy that makes it twice as long (BAGEL)"""
    jitter: Annotated[float, Range(0, 6)] = 0.0
    """half of the images to be read are turned, shifted and scaled at random: 1 is up to 15 degrees, 1/16 of the side and 15 %; images to be drawn never"""


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 (UCI, CC BY 4.0), with captions in words; 1,437 to train on and 360 held out."""

    image_shape = (1, 8, 8)

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        chosen = order[360:] if split == "train" else order[:360]
        self.images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 8 - 1
        self.labels = torch.tensor(labels)[chosen]

    @staticmethod
    def caption(label: int) -> str:
        """Return the words for a digit, e.g. "a handwritten seven"."""
        return f"a handwritten {DIGIT_NAMES[label]}"

    def texts(self) -> list[str]:
        """Every text that documents are made of."""
        return [prefix + self.caption(label) for label in range(10) for prefix in ("", " and ")]

    def document(self, generator: torch.Generator, settings: DataSettings) -> list[Part]:
        """Draw one document: a pair in either order, a lone image, or two pairs joined by "and"."""
        kind, order, drop = torch.rand(3, generator=generator).tolist()
        chosen = torch.randint(len(self.labels), (2,), generator=generator).tolist()
        pairs = [(Text(self.caption(int(self.labels[i]))), Image(self.images[i])) for i in chosen]
        if kind < settings.story:
            (first, image), (second, other) = pairs
            return [first, image, Text(f" and {second.text}"), other]
        text, image = pairs[0]
        if order >= settings.caption_first:
            return [Image(jitter(image.latent, settings.jitter * (drop < 0.5), generator)), text]
        return [image] if drop < settings.caption_dropout else [text, image]


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn, shift and scale a (C, H, W) image whose background is -1, bilinearly, by random amounts that grow with `strength`."""
    angle, scale, *shift = (strength * (2 * torch.rand(4, generator=generator) - 1)).tolist()
    cos, sin, zoom = math.cos(math.radians(15 * angle)), math.sin(math.radians(15 * angle)), 1 + 0.15 * scale
    matrix = torch.tensor([[zoom * cos, -zoom * sin, shift[0] / 8], [zoom * sin, zoom * cos, shift[1] / 8]])
    grid = torch.nn.functional.affine_grid(matrix[None], (1, *image.shape), align_corners=False)
    return torch.nn.functional.grid_sample(image[None] + 1, grid, align_corners=False)[0] - 1


DATASETS.update({"digits": Digits, "emoji": small_emoji, "emoji-lively": lively_emoji, "emoji-64": large_emoji})


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random generator of one training step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Lengths(NamedTuple):
    """Of `PROBED` documents: tokens of the longest that fits in a row, and the share of those that do not."""

    longest: int
    left_out: float


def document_lengths(dataset, settings: DataSettings, tokenizer, config, seq_len: int) -> Lengths:
    """Draw documents, always the same ones, to learn their lengths; the same data set is asked once.

    Raises:
        ValueError: every document is longer than a row.
    """
    names = "boi_token_id", "eoi_token_id", "image_channels", "patch_size"
    kind = tuple((name, getattr(config, name)) for name in names)
    return _document_lengths(dataset.document, settings, tokenizer, kind, seq_len)


@functools.lru_cache(maxsize=16)
def _document_lengths(document: Callable, settings: DataSettings, tokenizer, kind: tuple, seq_len: int) -> Lengths:
    config, generator = SimpleNamespace(**dict(kind)), torch.Generator().manual_seed(0)
    lengths = [len(_draw(document, settings, tokenizer, config, generator).tokens) for _ in range(PROBED)]
    if min(lengths) > seq_len:
        shortest = min(lengths)
        raise ValueError(f"draw_batch: seq_len is {seq_len} and the shortest of {PROBED} documents has {shortest} "
                         "tokens; raise seq_len")
    fits = [length for length in lengths if length <= seq_len]
    return Lengths(max(fits), (PROBED - len(fits)) / PROBED)


def _draw(document: Callable, settings: DataSettings, tokenizer, config, generator: torch.Generator) -> Document:
    return CONTEXTS[settings.context](encode(document(generator, settings), tokenizer, config))


def draw_batch(dataset, settings: DataSettings, tokenizer, config, rows: int, seq_len: int, generator: torch.Generator) -> tuple[Sequence, Tensor]:
    """Draw documents until the longest might not fit any more; return them packed, and each image's noise limit (N,).

    Every document that is drawn is trained on, so that long ones and short ones are trained on as often as the data set
    draws them (`fill_rows`). Only those longer than a row are left out: `left_out` of the sequence says how many.

    Raises:
        ValueError: settings that do not exist, or every document is longer than a row.
    """
    check("draw_batch", settings, "settings.")
    longest = document_lengths(dataset, settings, tokenizer, config, seq_len).longest
    draw = functools.partial(_draw, dataset.document, settings, tokenizer, config, generator)
    packed, left_out = fill_rows(draw, rows, seq_len, longest)
    sequence = replace(lay_out(packed, seq_len, config.patch_dim), left_out=left_out)
    limit = settings.noise_limit if settings.context == "noised" else 1.0
    return sequence, torch.where(sequence.image_first & _captioned(sequence), limit, 1.0)


def fill_rows(draw: Callable[[], Document], rows: int, seq_len: int, longest: int) -> tuple[list[list[Document]], int]:
    """Pack what `draw` gives into rows as long as one of them has room for `longest` tokens, if need be packed anew.

    Whether to draw again is decided before the next document is seen, and what is drawn is used. So, by Wald's
    identity, a batch holds in expectation the share of each kind of document times the number of documents: to throw
    away what does not fit would favour the short ones. A document of more than `longest` tokens that fits no more,
    rarer than one in `PROBED`, begins the rows anew: it has no second chance, the others have.

    Returns:
        The rows, and how many documents were left out because they are longer than a row.
    """
    packed, free, left_out = [[] for _ in range(rows)], [seq_len] * rows, 0
    while True:
        if max(free) < longest:
            packed, free = _pack_anew(packed, free, seq_len, longest)
        if max(free) < longest:
            return packed, left_out
        document = draw()
        size = len(document.tokens)
        if size > seq_len:
            left_out += 1
            continue
        if size > max(free):
            packed, free = [[] for _ in range(rows)], [seq_len] * rows
        longest = max(longest, size)
        at = min((room, i) for i, room in enumerate(free) if room >= size)[1]             # the row that it fills best
        packed[at].append(document)
        free[at] -= size


def _pack_anew(packed: list, free: list[int], seq_len: int, longest: int) -> tuple[list[list[Document]], list[int]]:
    """Pack documents best-fit decreasing where that may make room for `longest` tokens; where they fit worse, not."""
    if sum(free) < longest:
        return packed, free
    rooms, anew = [(seq_len, i) for i in range(len(packed))], [[] for _ in packed]
    for document in sorted(itertools.chain(*packed), key=lambda document: -len(document.tokens)):
        at = bisect.bisect_left(rooms, (len(document.tokens), 0))
        if at == len(rooms):
            return packed, free
        room, i = rooms.pop(at)
        anew[i].append(document)
        bisect.insort(rooms, (room - len(document.tokens), i))
    return anew, [room for room, _ in sorted(rooms, key=lambda room: room[1])]


def _captioned(sequence: Sequence) -> Tensor:
    """(N,) whether text other than EOS follows the image in its document: its EOI position is a text target that is not the document's end."""
    ends = [b * sequence.tokens.shape[1] + int(stop) for b, row in enumerate(sequence.spans) for start, stop in row.tolist() if stop > start]
    flat = torch.nn.functional.pad(sequence.documents.flatten(), (0, 2), value=-1)
    ends = torch.tensor(ends, dtype=torch.int64)
    return flat[ends] == flat[ends + 2]  # EOI, then at least one token before EOS
