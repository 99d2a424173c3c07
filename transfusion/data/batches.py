"""Batches of documents (lists of `Text` and `Image`) that a data set draws, packed into rows.

The batch of a step is a pure function of (seed, step): a resumed run sees what an uninterrupted one would have seen.
"""
import bisect
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.data.dataset import Arrangement, Dataset, DatasetSettings
from transfusion.sequence import Document, Sequence, encode, lay_out, with_clean_copies
from transfusion.settings import check

PROBED = 500  # documents that tell how long they are


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random generator of one training step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Drawn(NamedTuple):
    """What a step trains on: packed rows, (N,) the largest noise time of each image, and numbers for the log."""

    sequence: Sequence
    limit: Tensor
    notes: dict[str, float]


class Lengths(NamedTuple):
    """Of `PROBED` documents: tokens of the longest that fits in a row, and the share of those that do not."""

    longest: int
    left_out: float


def document_lengths(dataset: Dataset, settings: DatasetSettings, tokenizer, config, seq_len: int) -> Lengths:
    """Draw documents, always the same ones, to learn their lengths; the same data set is asked once.

    Raises:
        ValueError: every document is longer than a row.
    """
    names = "boi_token_id", "eoi_token_id", "image_channels", "patch_size"
    kind = tuple((name, getattr(config, name)) for name in names)
    return _document_lengths(dataset.document, settings, tokenizer, kind, seq_len)


@functools.lru_cache(maxsize=16)
def _document_lengths(document: Callable, settings: DatasetSettings, tokenizer, kind: tuple, seq_len: int) -> Lengths:
    config, generator = SimpleNamespace(**dict(kind)), torch.Generator().manual_seed(0)
    lengths = [len(_draw(document, settings, tokenizer, config, generator).tokens) for _ in range(PROBED)]
    if min(lengths) > seq_len:
        shortest = min(lengths)
        raise ValueError(f"draw_batch: seq_len is {seq_len} and the shortest of {PROBED} documents has {shortest} "
                         "tokens; raise seq_len")
    fits = [length for length in lengths if length <= seq_len]
    return Lengths(max(fits), (PROBED - len(fits)) / PROBED)


def _draw(document: Callable, settings: DatasetSettings, tokenizer, config, generator: torch.Generator) -> Document:
    drawn = encode(document(generator, settings), tokenizer, config)
    return with_clean_copies(drawn) if settings.context == "clean" else drawn


def draw_batch(dataset: Dataset, settings: DatasetSettings, tokenizer, config, rows: int, seq_len: int,
               generator: torch.Generator) -> tuple[Sequence, Tensor]:
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
    return sequence, noise_limits(sequence, settings)


def noise_limits(sequence: Sequence, settings: Arrangement) -> Tensor:
    """(N,) the noise limit of images that stand before their caption; 1 of the others, and of all with clean copies."""
    limit = settings.noise_limit if settings.context == "noised" else 1.0
    return torch.where(sequence.image_first & _captioned(sequence), limit, 1.0)


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
    """Return (N,), whether text other than EOS follows the image in its document, at once or behind further images.

    EOI stands behind the last patch. Where text follows at once, at least one token stands between it and EOS, so that
    the position two behind EOI is of the same document of the same row. There the first patch of a next image stands.
    """
    found = []
    for documents, row in zip(sequence.documents.tolist(), sequence.spans.tolist()):
        documents, behind, following = [*documents, -1, -1], None, []
        for start, stop in reversed([(start, stop) for start, stop in row if stop > start]):
            goes_on = documents[stop] == documents[stop + 2]
            following.append(following[-1] if goes_on and behind == stop + 2 else goes_on)
            behind = start
        found += reversed(following)
    return torch.tensor(found, dtype=torch.bool)
