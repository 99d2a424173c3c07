"""Timing of contenders that do the same work: each proves correct first, then they run in turn, with a cold L2 cache.

A contender is a list of phases over one state (build the mask, run forward, run backward) and a check of that state.
Each in turn, ours first, is checked and gets a few numbers of its own, so that a run that is cut keeps what it has;
then every round runs every phase of every contender once, so that a drifting clock hits all alike. What a time means,
and how the host's is kept out of it, is told in benchmarks/timing.py.
"""
import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Sample, chosen, make_timer


class LeftOut(Exception):
    """A contender cannot take part here; its text says why."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more: no later number would mean anything."""

    contender: str | None = None  # whose phase it was lost in


@dataclass(frozen=True)
class Contender:
    """Phases that run in order on one state dict, and a check of the state after them, which raises AssertionError.

    With `wall` the phases are timed as a user waits for them, the host's time included.
    """

    name: str
    phases: dict[str, Callable[[dict], object]]
    check: Callable[[dict], None]
    wall: bool = False

    def __post_init__(self):
        if not callable(self.check):
            raise ValueError(
                f"Contender: check of {self.name} is {self.check}; a function of the state that asserts "
                "the results fits; "
                "no number is recorded without one"
            )


@dataclass
class Result:
    """What `measure` found: milliseconds per phase as {p20, p50, p80, repetitions}, or why there are none.

    That is the error that stopped the contender, or why it was left out. `timing` says what each phase's milliseconds
    are (benchmarks/timing.py), `host_us` holds the host's own median, and `interleaved` says whether the numbers come
    from rounds with the others or from the contender's first ones alone.
    """

    name: str
    checked: bool = False
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: str | None = None
    left_out: str | None = None
    timing: dict[str, str] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    interleaved: bool = False

    def take(self, rounds: list[dict[str, Sample]]) -> None:
        """Set the numbers from the contender's rounds: {phase: Sample} each."""
        for phase in rounds[0]:
            samples, self.timing[phase] = chosen([r[phase] for r in rounds])
            self.milliseconds[phase] = quantiles(s.milliseconds for s in samples)
            self.host_us[phase] = quantiles(s.host_us for s in samples)["p50"]


def quantiles(samples: Iterable[float]) -> dict[str, float]:
    """Return p20, p50 and p80 by linear interpolation, and the number of samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("quantiles: samples is empty; at least one fits")

    def at(q: float) -> float:
        below, part = divmod(q * (len(ordered) - 1), 1)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        return low + part * (high - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8), "repetitions": len(ordered)}


def measure(
    contenders: list[Contender],
    *,
    device: str,
    seconds: float = 1.0,
    warmup: int = 3,
    least: int = 5,
    most: int = 100,
    record: Callable[[Result], object] | None = None,
    until: float = math.inf,
    without: Iterable[str] = (),
    timer=None,
) -> list[Result]:
    """Check every contender, then time those that passed in interleaved rounds of about `seconds` in all.

    With `record` each contender is timed alone as soon as it has passed, and `record` gets what is known of it; after
    `until`, a time of time.monotonic(), no other contender begins and the rounds end. Those named in `without` are
    left out.
    """
    race = _Race(contenders, device, timer or make_timer(device), until)
    try:
        for contender in contenders:
            race.start(contender, warmup, frozenset(without))
            if record:
                race.alone(contender, least, seconds / len(contenders))
                record(race.results[contender.name])
        if not record or time.monotonic() <= until:
            race.together(seconds, least, most)
    except DeviceLost:
        if record:
            for result in race.results.values():
                record(result)
        raise
    return list(race.results.values())


class _Race:
    """The contenders' results and states, and the rounds that they run."""

    def __init__(self, contenders: list[Contender], device: str, timer, until: float):
        self.device, self.timer, self.until = device, timer, until
        self.results = {c.name: Result(c.name) for c in contenders}
        self.states: dict[str, dict] = {}
        self.running: list[Contender] = []

    def start(self, contender: Contender, warmup: int, without: frozenset[str]) -> None:
        """Check a contender and warm it up."""
        result = self.results[contender.name]
        if contender.name in without:
            result.left_out = "it lost the device in another case"
        elif time.monotonic() > self.until:
            result.left_out = "the time was over"
        if result.left_out:
            return
        with _Guard(result, self.device):
            self.states[contender.name] = _checked_state(contender, result, self.device)
        if contender.name in self.states:
            self.rounds([contender], warmup)
        if contender.name in self.states:
            self.running.append(contender)

    def alone(self, contender: Contender, least: int, seconds: float) -> None:
        """Give a contender that runs its first numbers."""
        if contender in self.running:
            for samples in self.rounds([contender], least, seconds).values():
                self.results[contender.name].take(samples)

    def together(self, seconds: float, least: int, most: int) -> None:
        """Interleave all that run, in rounds of about `seconds` in all."""
        begin = time.perf_counter()
        found = self.rounds(self.running, 1)
        count = max(least, min(most, math.ceil(seconds / max(time.perf_counter() - begin, 1e-9))))
        rest = self.rounds(self.running, count - 1)
        for name, samples in found.items():
            if self.results[name].error is None:
                self.results[name].take(samples + rest.get(name, []))
                self.results[name].interleaved = True

    def rounds(
        self, contenders: list[Contender], count: int, seconds: float = math.inf
    ) -> dict[str, list[dict[str, Sample]]]:
        """Run every phase of every contender that has no error `count` times: {name: [{phase: Sample}, ...]}.

        After `seconds`, or when the time is over, no other round begins; an error costs a contender all its numbers.
        """
        found, begin = {c.name: [] for c in contenders}, time.monotonic()
        for number in range(count):
            if number and (time.monotonic() > self.until or time.monotonic() - begin > seconds):
                break
            for contender in contenders:
                if contender.name in self.states:
                    self.run(contender, found[contender.name])
        return {name: samples for name, samples in found.items() if samples and name in self.states}

    def run(self, contender: Contender, found: list[dict[str, Sample]]) -> None:
        """Run a contender once, adding to `found`."""
        result, state = self.results[contender.name], self.states[contender.name]
        try:
            with _Guard(result, self.device):
                found.append(self.timer.run(contender.name, contender.phases, state, contender.wall))
        finally:
            if result.error is not None:
                del self.states[contender.name]
                result.milliseconds, result.timing, result.host_us = {}, {}, {}


def present(makers: dict[str, Callable[[], object]]) -> tuple[dict[str, object], list[Result]]:
    """Call every maker: what they made by name, and a Result for each that made nothing.

    One whose package is missing, or whose maker raised LeftOut, is left out, with the reason; any other exception is an
    error.
    """
    made, others = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        except LeftOut as why:
            others.append(Result(name, left_out=str(why)))
        except ImportError as error:
            others.append(Result(name, left_out=f"not installed: {error}"))
        except DeviceLost:
            raise
        except Exception as error:
            others.append(Result(name, error=f"{type(error).__name__}: {str(error).strip()[:500]}"))
    return made, others


def device_answers() -> bool:
    """Whether the CUDA device, if this process uses one, still does what it is told."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Guard:
    """Turn a contender's exception into its `error`, and stop everything where the device itself is gone."""

    def __init__(self, result: Result, device: str):
        self.result, self.device = result, device

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not issubclass(kind, Exception):
            return False
        if issubclass(kind, LeftOut):
            self.result.left_out = str(error)
            return True
        self.result.error = f"{kind.__name__}: {str(error).strip()[:500]}"
        self.result.checked = self.result.checked and kind is not AssertionError
        if self.device == "cuda":
            if not device_answers():
                gone = DeviceLost(f"{self.result.name}: {self.result.error}")
                gone.contender = self.result.name
                raise gone from error
            gc.collect()
            torch.cuda.empty_cache()
        return True


def _checked_state(contender: Contender, result: Result, device: str) -> dict:
    for _ in range(2):  # the first run compiles, and its memory is not the contender's
        state = {}
        if device == "cuda":
            gc.collect()  # what others left in cycles is not this one's memory
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for phase in contender.phases.values():
            phase(state)
        if device == "cuda":
            torch.cuda.synchronize()
            result.peak_bytes = torch.cuda.max_memory_allocated() - before
    contender.check(state)
    result.checked = True
    return state
