"""Batches of packed rows: batch `step` is rows step * rows to (step + 1) * rows, read ahead by worker processes.

Which records a row holds was planned; how each is shown is a hash (`choices`). So a batch is a function of (mixture,
seed, step): a run goes on from its step alone, with any number of workers, and a rank takes its part of a step's rows.

A record that cannot be read any more is left out of its row, which stays as it is otherwise, and is counted with its
reason; a rising share of them stops the run.
"""
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfusion.data.arrays import ABOUT, Arrays, fingerprint, write_arrays
from transfusion.data.batches import noise_limits
from transfusion.data.choices import LATENT, choose, hashed, source_key
from transfusion.data.documents import Documents, Encoded
from transfusion.data.mixture import Mixture, MixtureSettings
from transfusion.data.plan import Stream, make_plan
from transfusion.data.read_ahead import read_ahead
from transfusion.data.sources.record import DataError, Source
from transfusion.locks import locked
from transfusion.sequence import Sequence as PackedSequence
from transfusion.sequence import lay_out

VERSION = 1
CHANGED = "changed record"
STORED = -1
OPEN_PLANS = 2


class Failure(NamedTuple):
    """A record that could not be read: where it stands, why, and the kind of the reason."""

    where: str
    reason: str
    kind: str


class Batch(NamedTuple):
    """What a step trains on.

    sequence: packed rows. limit: (N,) the largest noise time of each image.
    pixels: (n,) uint8, pictures that an autoencoder is to encode, one behind the other; see `pictures`. Empty where the
        model draws pixels, which the sequence holds.
    shapes: (channels, height, width) of each of them. noises: a seed for the latent of each.
    picture: (N,) which of them each image of the sequence is; STORED, -1, where the sequence holds its latent already.
    documents: how many documents were planned. failures: those that could not be read.
    """

    sequence: PackedSequence
    limit: Tensor
    pixels: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    noises: tuple[int, ...]
    picture: Tensor
    documents: int
    failures: tuple[Failure, ...]

    def pictures(self) -> list[Tensor]:
        """Pictures (channels, height, width) in [-1, 1] whose latents are still to come."""
        pieces = self.pixels.split([math.prod(shape) for shape in self.shapes])
        return [piece.view(shape).float() / 127.5 - 1 for piece, shape in zip(pieces, self.shapes)]

    def with_latents(self, latents: Sequence[Tensor], patch_size: int) -> PackedSequence:
        """Return the sequence with the latents (channels, h, w) of `pictures`, in order, in their images' places."""
        patches = [torch.nn.functional.pixel_unshuffle(latent, patch_size).flatten(1).T for latent in latents]
        sizes = [rows * columns for rows, columns in self.sequence.layout.grids]
        stored = self.sequence.patches.split(sizes)
        chosen = [stored[n] if i == STORED else patches[i] for n, i in enumerate(self.picture.tolist())]
        if [len(x) for x in chosen] != sizes:
            raise ValueError(f"with_latents: latents have {[len(x) for x in chosen]} patches and their images {sizes}; "
                             "latents of `pictures`, in order, fit")
        return replace(self.sequence, patches=torch.cat([self.sequence.patches[:0], *chosen]))


class PlannedRows:
    """The rows of plan after plan, numbered through. Plans are made when a row is asked for that none holds, and kept.

    Files are open of the `OPEN_PLANS` that were opened last: long runs have thousands of plans.

    Args:
        streams: of the mixture's sources; see `transfusion.data.plan`.
        directory: where plans lie; its name says what they are of.
        key: of the streams and of all that is among `options`.
        options: of `make_plan`.
    """

    def __init__(self, streams: Sequence[Stream], directory: Path, key: str, **options):
        self.streams, self.directory, self.key, self.options = streams, Path(directory), key, options
        self._plans: list[Arrays] = []
        self._firsts = [0]                             # the number of each plan's first row, and of the next plan's
        self._open: list[int] = []                     # plans whose files are

    def __getstate__(self) -> dict:
        return {**vars(self), "streams": None, "_plans": [], "_firsts": [0], "_open": []}

    def ensure(self, rows: int) -> None:
        """Plan until there are so many rows."""
        while self._firsts[-1] < rows:
            self._open_next(make=True)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, records and passes of a row's documents; a copy in another process reads plans and makes none."""
        while self._firsts[-1] <= number:
            self._open_next(make=self.streams is not None)
        at = int(np.searchsorted(self._firsts, number, side="right")) - 1
        plan, row = self._plans[at], number - self._firsts[at]
        if at not in self._open:
            self._open.append(at)
            for other in self._open[:-OPEN_PLANS]:
                self._plans[other].forget()
            self._open = self._open[-OPEN_PLANS:]
        piece = slice(*plan["offsets"][row:row + 2].tolist())
        return plan["sources"][piece], plan["records"][piece], plan["passes"][piece]

    def report(self, number: int = 0) -> dict:
        """What plan `number` says of itself, as `PlanReport`."""
        while len(self._plans) <= number:
            self._open_next(make=True)
        return self._plans[number].about()["report"]

    def _open_next(self, make: bool) -> None:
        number, first = len(self._plans), self._firsts[-1]
        arrays, key = Arrays(self.directory / str(number)), f"{self.key}-{number}"
        if not arrays.stand(key):
            if not make:
                raise ValueError(f"PlannedRows: {arrays.directory / ABOUT} is missing or of another mixture; a plan "
                                 "is made before its rows are read, and stays as long as a run reads it")
            with locked(arrays.directory, wait=True):
                if not arrays.stand(key):
                    plan = make_plan(self.streams, number=number, first_row=first, **self.options)
                    write_arrays(arrays.directory, key, {"report": vars(plan.report)}, offsets=plan.offsets,
                                 sources=plan.sources, records=plan.records, passes=plan.passes)
        self._plans.append(arrays)
        self._firsts.append(first + arrays.about()["report"]["rows"])


@dataclass(frozen=True)
class Shares:
    """What `choose` is told of a source."""

    key: int
    caption_first: float
    caption_dropout: float
    flip: float


class PackedRows(Dataset):
    """Batches by step; what worker processes hold. It pickles in a few kilobytes and keeps nothing of what it read.

    Args:
        sources, shares: of the mixture.
        documents: how records become documents.
        planned: rows.
        rows: in a batch, on this rank. rank, ranks: which of a step's batches these are.
        settings: of the mixture, which say the noise limit.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[Shares], documents: Documents, planned: PlannedRows,
                 *, seed: int, seq_len: int, rows: int, settings: MixtureSettings, rank: int = 0, ranks: int = 1):
        self.sources, self.shares, self.documents, self.planned = sources, shares, documents, planned
        self.seed, self.seq_len, self.rows, self.rank, self.ranks = seed, seq_len, rows, rank, ranks
        self.settings = settings

    def __getitem__(self, step: int) -> Batch:
        first = (step * self.ranks + self.rank) * self.rows
        read = [self.read_row(row) for row in range(first, first + self.rows)]
        packed = [[one.document for one in row if isinstance(one, Encoded)] for row in read]
        kind = self.documents.kind
        sequence = lay_out(packed, self.seq_len, kind.image_channels * kind.patch_size**2)
        encoded = [one for row in read for one in row if isinstance(one, Encoded)]
        pictures, picture = _numbered(encoded, kind.factor > 1)
        pixels = torch.cat([torch.zeros(0, dtype=torch.uint8), *(one.flatten() for one in pictures)])
        failures = tuple(one for row in read for one in row if isinstance(one, Failure))
        shapes = tuple(tuple(x.shape) for x in pictures)
        limit, documents = noise_limits(sequence, self.settings), sum(map(len, read))
        noises = tuple(noise for one in encoded for noise in one.noises)
        return Batch(sequence, limit, pixels, shapes, noises, picture, documents, failures)

    def read_row(self, number: int) -> list[Encoded | Failure]:
        """The documents of a row, or why one could not be made."""
        read, room = [], self.seq_len
        for source, record, passes in zip(*self.planned.row(number)):
            one = self.read(int(source), int(record), int(passes))
            if isinstance(one, Encoded) and len(one.document.tokens) > room:
                one = Failure(f"{self.sources[source].name}, record {record}", "it is longer than when it was counted: "
                              "a picture changed; delete the cache, and it is counted anew", CHANGED)
            room -= len(one.document.tokens) if isinstance(one, Encoded) else 0
            read.append(one)
        return read

    def read(self, source: int, number: int, passes: int) -> Encoded | Failure:
        """One document as it is shown in this pass over its source, or why it could not be made."""
        where, share = f"{self.sources[source].name}, record {number}", self.shares[source]
        try:
            record = self.sources[source][number]
            where = record.where
            choice = choose(self.seed, share.key, passes, number, max(1, len(record.captions)), flip=share.flip,
                            caption_first=share.caption_first, caption_dropout=share.caption_dropout)
            parts = self.documents.parts(record, bool(choice.image_first), bool(choice.dropped), int(choice.caption))
            noise = int(hashed(self.seed, LATENT, share.key, passes, number))
            return self.documents.encode(parts, bool(choice.flipped), noise)
        except DataError as error:
            return Failure(error.where, error.reason, error.kind)
        except ValueError as error:
            return Failure(where, " ".join(str(error).split()), "document that cannot be encoded")


class FailureWatch:
    """Counts records that cannot be read, and stops a run in which they are many.

    Of the last `window` documents, once there were `first` of them, at most `share` may fail.
    """

    def __init__(self, window: int = 1000, first: int = 200, share: float = 0.05):
        self.window, self.first, self.share = window, first, share
        self.documents = 0
        self._recent: deque[tuple[int, tuple[Failure, ...]]] = deque()

    def add(self, documents: int, failures: tuple[Failure, ...]) -> None:
        """Take note of a batch.

        Raises:
            ValueError: too many documents failed.
        """
        self.documents += documents
        self._recent.append((documents, failures))
        while sum(count for count, _ in self._recent) - self._recent[0][0] >= self.window:
            self._recent.popleft()
        recent = sum(count for count, _ in self._recent)
        failed = [failure for _, failures in self._recent for failure in failures]
        if self.documents >= self.first and len(failed) > self.share * recent:
            kind, count = Counter(failure.kind for failure in failed).most_common(1)[0]
            example = next(failure for failure in failed if failure.kind == kind)
            raise ValueError(f"data: {len(failed):,} of the last {recent:,} documents could not be read, {count:,} of "
                             f"them for: {kind} ({example.where}: {example.reason}); at most {100 * self.share:g} % "
                             "may fail; put the files back, or check the data with `transfusion data check`")


class Loader:
    """Batches of the steps from `start` to `stop`, read ahead by worker processes.

        for step, batch in enumerate(loader, start): ...

    waited: seconds that the last batch was waited for. failures: a `FailureWatch`. A worker that is killed is a
    ValueError where the next batch is asked for.

    Args:
        rows: the batches.
        start, stop: steps.
        workers: processes; 0 reads in this one.
        prefetch: batches that each of them has ready.
    """

    def __init__(self, rows: PackedRows, start: int, stop: int, workers: int = 2, prefetch: int = 2):
        self.rows, self.start, self.stop, self.workers, self.prefetch = rows, start, stop, workers, prefetch
        self.waited = 0.0
        self.failures = FailureWatch()

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        batches = read_ahead("data", self.rows, _Steps(self.rows, self.start, self.stop), self.workers,
                             prefetch=self.prefetch, advice="--resume goes on; fewer --data.workers take less")
        with contextlib.closing(batches):
            while (batch := self._next(batches)) is not None:
                self.failures.add(batch.documents, batch.failures)
                yield batch

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """Wait for a batch; None behind the last one."""
        began = time.perf_counter()
        try:
            return next(batches, None)
        finally:
            self.waited = time.perf_counter() - began


class _Steps:
    """Steps in order; the rows of each are planned before a worker is asked for it."""

    def __init__(self, rows: PackedRows, start: int, stop: int):
        self.rows, self.start, self.stop = rows, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.stop):
            self.rows.planned.ensure((step + 1) * self.rows.rows * self.rows.ranks)
            yield step


def packed_rows(mixture: Mixture, *, rows: int, seq_len: int, split: str = "train", rank: int = 0, ranks: int = 1,
                epochs: float | None = None) -> PackedRows:
    """Return the batches of a mixture's split.

    Args:
        rows: packed rows in a batch, on each of `ranks`.
        seq_len: tokens in a row.
        epochs: of the mixture in one plan; see `make_plan`.
    """
    settings, streams = mixture.settings, mixture.streams(split)
    options = dict(seed=settings.seed, seq_len=seq_len, step_rows=rows * ranks, by=settings.weights, epochs=epochs)
    amounts = [(entry.weight, entry.epochs) for entry in settings.sources]
    counted = [str(lengths.arrays.about()["key"]) for lengths in mixture.lengths]
    key = fingerprint(VERSION, mixture.names, counted, mixture.shares(), amounts, settings.held_out, split, options)
    planned = PlannedRows(streams, mixture.cache / f"plan-{split}-{key}", key, **options)
    shares = [Shares(source_key(name), **share) for name, share in zip(mixture.names, mixture.shares())]
    return PackedRows(mixture.sources, shares, mixture.documents, planned, seed=settings.seed, seq_len=seq_len,
                      rows=rows, settings=settings, rank=rank, ranks=ranks)


def _numbered(documents: list[Encoded], latents: bool) -> tuple[list[Tensor], Tensor]:
    """All pictures, and (N,) which of them each image is; a clean copy is the one before it.

    `latents`: whether the model draws latents; images that no picture is left to encode for are then STORED.
    """
    pictures, numbers = [], []
    for document, own, _ in documents:
        copies = {n + 1 for n in document.hidden}
        shown = np.cumsum([n not in copies for n in range(len(document.images))], dtype=np.int64) - 1
        numbers += (len(pictures) + shown).tolist() if own else [STORED] * len(document.images) * latents
        pictures += own
    return pictures, torch.tensor(numbers, dtype=torch.int64)
