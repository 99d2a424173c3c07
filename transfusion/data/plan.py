"""Which records share which packed row, decided from lengths alone before anything is read.

A source is read as one endless stream: pass after pass, each record once a pass, in an order that depends on (seed,
source, pass). Plan `number` takes the next piece of each stream, as much as its weight says, mixes the pieces evenly,
packs them into rows and groups rows of about equal attention area into steps. A plan is a function of (seed, number)
and of the first row's number, so the only state of a run is its step. Documents are never split; what is longer than a
row is left out and counted.

Packing: a pool of documents waits. A row takes them in turn until little of it is free, then the longest that fits.
"""
import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from transfusion.data.choices import MIX, ORDER, STEPS, Choice, choose, hashed, uniform

POOL = 1024                    # documents that wait for a row
IN_TURN = 0.3                  # a row takes documents in turn until this share of it is free, then those that fit best
WINDOW = 16                    # steps whose rows are exchanged to balance them
SMALLEST, LARGEST = 2**16, 2**20
"""Samples of a plan, about: less fill their last rows badly, more take long and much memory to plan."""


@dataclass(frozen=True, eq=False)
class Stream:
    """What a plan knows of a source: the lengths of its records in every form.

    key: of the source, in hashes.
    records: (n,) numbers of the records that may be used.
    starts: (n + 1,) lengths[starts[i]:starts[i + 1]] are those of record i with each of its captions.
    lengths: tokens of documents.
    bare: (n,) tokens without a caption, 0 where none can be left out.
    extra: (n,) pairs of tokens that see each other inside images, beyond the causal ones.
    weight: its share of the mixture, in tokens or samples; None: as much as there is of it.
    passes: how often it is read in an epoch, or, where there are weights, at most.
    """

    key: int
    records: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bare: np.ndarray
    extra: np.ndarray
    weight: float | None = None
    passes: float = 1.0
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    flip: float = 0.0

    def choose(self, seed: int, passes: np.ndarray, at: np.ndarray) -> Choice:
        """How records `at` (m,), places in `records`, are shown in these passes."""
        captions = self.starts[at + 1] - self.starts[at]
        choice = choose(seed, self.key, passes, self.records[at], captions, caption_first=self.caption_first,
                        caption_dropout=self.caption_dropout, flip=self.flip)
        return choice._replace(dropped=choice.dropped & (self.bare[at] > 0))

    def chosen_lengths(self, seed: int, passes: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Tokens (m,) of records `at` as they are shown in these passes."""
        choice = self.choose(seed, passes, at)
        return np.where(choice.dropped, self.bare[at], self.lengths[self.starts[at] + choice.caption])

    def expected_lengths(self) -> np.ndarray:
        """Mean tokens (n,) of each record over its choices."""
        sums = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        means = (sums[self.starts[1:]] - sums[self.starts[:-1]]) / (self.starts[1:] - self.starts[:-1])
        share = self.caption_first * self.caption_dropout * (self.bare > 0)
        return (1 - share) * means + share * self.bare


class Plan(NamedTuple):
    """Rows of samples: row i holds those from offsets[i] to offsets[i + 1], each a record in one pass over its source.

    offsets (R + 1,) int64, sources (M,) uint16, records (M,) int64, passes (M,) int32; `report` is for people.
    """

    offsets: np.ndarray
    sources: np.ndarray
    records: np.ndarray
    passes: np.ndarray
    report: "PlanReport"


@dataclass(frozen=True)
class PlanReport:
    """What a plan holds: `samples`, `tokens` and `too_long`, documents longer than a row, per source.

    fill: share of the rows' tokens that are used.
    slowest, slowest_before: the largest attention area of a step's rows over their mean, on average; before balancing.
    """

    rows: int
    samples: list[int]
    tokens: list[int]
    too_long: list[int]
    fill: float
    slowest: float
    slowest_before: float

    shares: list[float] = field(init=False)

    def __post_init__(self):
        total = max(sum(self.tokens), 1)
        object.__setattr__(self, "shares", [tokens / total for tokens in self.tokens])


def passes_in_epoch(streams: Sequence[Stream], by: str) -> list[float]:
    """How often each source is read in an epoch of the mixture.

    Without weights as often as its `passes` says. With weights an epoch ends when the first source has been read that
    often, and no record of another is lost: the next epoch goes on where this one stopped.

    Args:
        by: "tokens" or "samples": what weights are shares of.

    Raises:
        ValueError: weights that are all 0, are given for some sources only, or sources that are all empty.
    """
    sizes = [_size(stream, by) for stream in streams]
    given = [stream.weight for stream in streams]
    if all(weight is None for weight in given):
        if not any(sizes):
            raise ValueError(f"plan: none of {len(streams)} sources has a record that can be used; at least one fits")
        return [stream.passes if size else 0.0 for stream, size in zip(streams, sizes)]
    if any(weight is None for weight in given):
        raise ValueError(f"plan: weights are {given}; a weight for every source fits, or none at all")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise ValueError(f"plan: weights are {given}; numbers of at least 0 fit, one of them above 0")
    if empty := [i for i, (weight, size) in enumerate(zip(given, sizes)) if weight and not size]:
        raise ValueError(f"plan: source {empty[0]} has weight {given[empty[0]]} and no record that can be used; "
                         "weight 0 fits it")
    total = min(stream.passes * size / stream.weight for stream, size in zip(streams, sizes) if stream.weight)
    passes = [total * stream.weight / size if size else 0.0 for stream, size in zip(streams, sizes)]
    return [round(p) if abs(p - round(p)) < 1e-9 else p for p in passes]


def epochs_in_plan(streams: Sequence[Stream], by: str) -> float:
    """How many epochs one plan covers: a whole number of small ones, or a piece 1/n of a large one."""
    samples = sum(p * len(stream.records) for p, stream in zip(passes_in_epoch(streams, by), streams))
    if samples > LARGEST:
        return 1 / math.ceil(samples / LARGEST)
    return max(1, math.ceil(SMALLEST / max(samples, 1)))


def make_plan(streams: Sequence[Stream], *, seed: int, number: int, seq_len: int, step_rows: int, first_row: int = 0,
              by: str = "tokens", epochs: float | None = None) -> Plan:
    """Plan the rows of piece `number` of the streams.

    Args:
        seq_len: tokens in a row.
        step_rows: rows in a step, over all ranks; they are balanced.
        first_row: how many rows the plans before this one have, so that steps begin where rows are counted from.
        by: what weights are shares of, "tokens" or "samples".
        epochs: how many epochs of the mixture the piece covers; as `epochs_in_plan` says.

    Raises:
        ValueError: weights that do not fit (`passes_in_epoch`), or no document is as short as a row.
    """
    if by not in ("tokens", "samples"):
        raise ValueError(f"plan: by is {by!r}; 'tokens' or 'samples' fits")
    epochs = epochs_in_plan(streams, by) if epochs is None else epochs
    each = [p * epochs for p in passes_in_epoch(streams, by)]
    pieces = [_piece(stream, seed, number * p, (number + 1) * p, by) for stream, p in zip(streams, each)]
    sources, passes, at = _mix(pieces, streams, seed, number)

    lengths, areas = _measure(streams, sources, passes, at, seed)
    fits = lengths <= seq_len
    too_long = np.bincount(sources[~fits], minlength=len(streams)).tolist()
    if not len(lengths):
        raise ValueError(f"plan: epochs is {epochs}, a piece in which no record begins; a larger one fits")
    if not fits.any():
        raise ValueError(f"plan: seq_len is {seq_len} and the shortest of {len(lengths):,} documents has "
                         f"{lengths.min():,} tokens; raise seq_len")
    sources, passes, at, lengths, areas = (x[fits] for x in (sources, passes, at, lengths, areas))

    order, offsets = pack_lengths(lengths, seq_len)
    row_areas = np.add.reduceat(areas[order], offsets[:-1])
    before = slowest_over_mean(row_areas, step_rows, first_row)
    rows = balance(row_areas, step_rows, first_row, seed, number)
    order, offsets = _reorder(order, offsets, rows)

    counts = np.bincount(sources, minlength=len(streams))
    tokens = np.bincount(sources, weights=lengths, minlength=len(streams))
    fill, after = float(lengths.sum() / (len(rows) * seq_len)), slowest_over_mean(row_areas[rows], step_rows, first_row)
    report = PlanReport(len(rows), counts.tolist(), [int(x) for x in tokens], too_long, fill, after, before)
    sources, passes, at = sources[order], passes[order], at[order]
    records = np.empty(len(at), dtype=np.int64)
    for i, stream in enumerate(streams):
        records[sources == i] = stream.records[at[sources == i]]
    return Plan(offsets, sources, records, passes, report)


def pack_lengths(lengths: np.ndarray, seq_len: int, pool: int = POOL) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents of these lengths (m,) into rows; return their numbers row by row, and the rows' offsets (R + 1,).

    A document is in one of the rows that begin before `pool` others behind it have been packed: nothing waits forever.
    """
    count, packed, offsets = len(lengths), np.empty(len(lengths), dtype=np.int32), [0]
    taken = bytearray(count)
    waiting: list[int] = []                            # length * 2^32 + number, ascending
    upcoming = done = oldest = 0
    while done < count:
        if 4 * len(waiting) <= 3 * pool and upcoming < count:
            block = np.arange(upcoming, min(upcoming + pool - len(waiting), count), dtype=np.int64)
            waiting += (lengths[block].astype(np.int64) << 32 | block).tolist()
            waiting.sort()
            upcoming = int(block[-1]) + 1
        room = seq_len
        while waiting:
            oldest = taken.find(0, oldest)
            size = int(lengths[oldest])
            if size <= room and (room == seq_len or room - size >= IN_TURN * seq_len):
                at = bisect.bisect_left(waiting, size << 32 | oldest)
            elif (at := bisect.bisect_left(waiting, (room + 1) << 32) - 1) >= 0:
                at = bisect.bisect_left(waiting, waiting[at] >> 32 << 32)  # of equal lengths the one that waits longest
            else:
                break
            found = waiting.pop(at)
            taken[found & 0xFFFFFFFF] = True
            packed[done] = found & 0xFFFFFFFF
            done += 1
            room -= found >> 32
        offsets.append(done)
    return packed, np.array(offsets, dtype=np.int64)


def balance(areas: np.ndarray, step_rows: int, first_row: int, seed: int, number: int) -> np.ndarray:
    """Order rows of these attention areas (R,) so that a step's are about equal; rows move to nearby steps only."""
    rows, begin = np.arange(len(areas)), (-first_row) % step_rows
    steps = (len(areas) - begin) // step_rows
    for first in range(0, steps, WINDOW):
        count = min(WINDOW, steps - first)
        piece = slice(begin + first * step_rows, begin + (first + count) * step_rows)
        by_area = rows[piece][np.argsort(areas[piece], kind="stable")].reshape(count, step_rows)
        shuffled = np.argsort(hashed(seed, STEPS, number, first + np.arange(count)), kind="stable")
        rows[piece] = by_area[shuffled].reshape(-1)
    return rows


def slowest_over_mean(areas: np.ndarray, step_rows: int, first_row: int = 0) -> float:
    """Mean over whole steps of the largest of their rows' areas (R,) over the step's mean; 1 is perfect."""
    begin = (-first_row) % step_rows
    steps = (len(areas) - begin) // step_rows
    if steps <= 0:
        return float("nan")
    whole = areas[begin:begin + steps * step_rows].reshape(steps, step_rows).astype(np.float64)
    return float((whole.max(1) / whole.mean(1)).mean())


def _size(stream: Stream, by: str) -> float:
    return float(stream.expected_lengths().sum()) if by == "tokens" else float(len(stream.records))


def _piece(stream: Stream, seed: int, start: float, stop: float, by: str) -> tuple[np.ndarray, np.ndarray]:
    """(passes, places in `records`) of the stream between two points, measured in passes."""
    start, stop = (round(x) if abs(x - round(x)) < 1e-9 else x for x in (start, stop))
    if stop <= start or not len(stream.records):
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    first, whole, last = math.floor(start), math.ceil(start), math.floor(stop)
    expected = stream.expected_lengths() if by == "tokens" and (start != first or stop != last) else None

    def cut(order: np.ndarray, share: float) -> int:
        if expected is None:
            return round(share * len(order))
        sums = np.cumsum(expected[order])
        return int(np.searchsorted(sums, share * sums[-1]))

    found = []
    if whole > first:                                  # the rest of a pass that an earlier plan began
        order = _orders(stream, seed, first, first + 1)[0]
        found.append((first, order[cut(order, start - first):cut(order, stop - first) if stop < whole else len(order)]))
    block = max(1, 2**18 // len(stream.records))       # passes over small sources, many at once
    for begin in range(whole, last, block):
        orders = _orders(stream, seed, begin, min(begin + block, last))
        found.append((np.repeat(np.arange(begin, begin + len(orders)), orders.shape[1]), orders.reshape(-1)))
    if last >= whole and stop > last:
        order = _orders(stream, seed, last, last + 1)[0]
        found.append((last, order[:cut(order, stop - last)]))
    passes = [np.broadcast_to(np.asarray(number, dtype=np.int32), order.shape) for number, order in found]
    return np.concatenate(passes), np.concatenate([order for _, order in found])


def _orders(stream: Stream, seed: int, first: int, stop: int) -> np.ndarray:
    """(passes, n) int32: the order of the records in each pass."""
    numbers = np.arange(first, stop)[:, None]
    return np.argsort(hashed(seed, ORDER, stream.key, numbers, stream.records), axis=1, kind="stable").astype(np.int32)


def _mix(pieces: list, streams: Sequence[Stream], seed: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, passes and places of all pieces, each spread evenly over the whole and in its own order."""
    sources = np.repeat(np.arange(len(pieces), dtype=np.uint16), [len(at) for _, at in pieces])
    when = np.concatenate([_spread(len(at), seed, MIX, stream.key, number) for (_, at), stream in zip(pieces, streams)])
    order = np.argsort(when, kind="stable").astype(np.int32)
    del when
    passes, at = (np.concatenate([piece[i] for piece in pieces])[order] for i in (0, 1))
    return sources[order], passes, at


def _spread(count: int, *words: int) -> np.ndarray:
    """Numbers (count,) in [0, 1), ascending, one in each `count`-th part."""
    return (np.arange(count) + uniform(*words, np.arange(count))) / max(count, 1)


def _measure(streams: Sequence[Stream], sources: np.ndarray, passes: np.ndarray, at: np.ndarray,
             seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (m,) int32 and visible pairs of tokens (m,) int64 of each sample."""
    lengths, areas = np.empty(len(at), dtype=np.int32), np.empty(len(at), dtype=np.int64)
    for i, stream in enumerate(streams):
        mine = np.flatnonzero(sources == i)
        for some in np.array_split(mine, max(1, len(mine) // 2**16)):  # hashes of all at once would be large
            tokens = stream.chosen_lengths(seed, passes[some], at[some]).astype(np.int64)
            lengths[some] = tokens
            areas[some] = tokens * (tokens + 1) // 2 + stream.extra[at[some]]
    return lengths, areas


def _reorder(order: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed samples and offsets with the rows in another order."""
    sizes = np.diff(offsets)[rows]
    moved = np.concatenate([[0], np.cumsum(sizes)])
    where = np.repeat(offsets[rows] - moved[:-1], sizes) + np.arange(moved[-1])
    return order[where], moved
