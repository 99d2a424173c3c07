"""How long a phase keeps the device, with the host's own time beside it and not in it.

Events around a phase measure the host wherever the device waits for the next launch, and the Python of one operator
takes longer than most kernels. So the device is first given work that outlasts the enqueuing: it writes a buffer larger
than any L2 and then spins. A sample counts as "queued" if the event in front of the phase has not been reached when the
whole phase is enqueued; one that the device did reach, because the phase waits for the device inside or launches more
than the queue holds, is "host-bound" and says so. What a user waits for, such as a whole training step, is timed as
"wall": its phases back to back behind an idle device, the host's time included.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_BYTES = 2**29
QUEUED, HOST_BOUND, WALL = "queued", "host-bound", "wall"
FIRST_SPIN, LONGEST_SPIN = 2.0, 50.0  # milliseconds
HEADROOM = 2.0  # times the longest host time that was seen
TRIES = 5  # longer and longer spins that a phase gets before it counts as one that waits for the device inside
CALIBRATION_CYCLES = 10_000_000


class Sample(NamedTuple):
    """One run of one phase."""

    milliseconds: float
    host_us: float  # until the host had enqueued it, or with `wall` until it had returned
    timing: str


class CpuTimer:
    """Wall time, for a device that works while the host waits."""

    def run(self, name: str, phases: dict[str, Callable], state: dict, wall: bool) -> dict[str, Sample]:
        """Run every phase once: {phase: Sample}."""
        found = {}
        for phase, function in phases.items():
            start = time.perf_counter()
            function(state)
            seconds = time.perf_counter() - start
            found[phase] = Sample(1e3 * seconds, 1e6 * seconds, WALL)
        return found


class CudaTimer:
    """Events around each phase.

    `cuda` offers what torch.cuda does of Event, synchronize and _sleep; `flush` empties the device's L2.
    """

    def __init__(self, flush: Callable[[], object], cuda=torch.cuda, clock: Callable[[], float] = time.perf_counter):
        self.flush, self.cuda, self.clock = flush, cuda, clock
        self.spins: dict[tuple[str, str], float] = {}
        self.host: dict[tuple[str, str], float] = {}
        self.failed: dict[tuple[str, str], int] = {}
        for _ in range(2):  # the first starts the clocks
            start, stop = self._event(), self._event()
            start.record()
            cuda._sleep(CALIBRATION_CYCLES)
            stop.record()
            stop.synchronize()
        self.cycles = CALIBRATION_CYCLES / start.elapsed_time(stop)  # per millisecond

    def run(self, name: str, phases: dict[str, Callable], state: dict, wall: bool) -> dict[str, Sample]:
        """Run every phase once: {phase: Sample}."""
        if wall:
            return self._wall(phases, state)
        return {phase: self._sample((name, phase), function, state) for phase, function in phases.items()}

    def _sample(self, key: tuple[str, str], function: Callable, state: dict) -> Sample:
        spin, start, stop = self.spins.get(key, FIRST_SPIN), self._event(), self._event()
        self.cuda.synchronize()
        self.flush()
        if spin:
            self.cuda._sleep(int(spin * self.cycles))
        start.record()
        begin = self.clock()
        function(state)
        host = 1e3 * (self.clock() - begin)
        stop.record()
        queued = not start.query()
        stop.synchronize()
        self._learn(key, spin, host, queued)
        return Sample(start.elapsed_time(stop), 1e3 * host, QUEUED if queued else HOST_BOUND)

    def _learn(self, key: tuple[str, str], spin: float, host: float, queued: bool) -> None:
        """Choose the next spin: from the longest host time, longer after a miss, none where no spin has sufficed."""
        if queued:
            self.failed[key] = 0
            self.host[key] = max(host, 0.9 * self.host.get(key, 0.0))  # one slow call is forgotten
            self.spins[key] = min(LONGEST_SPIN, 0.2 + HEADROOM * self.host[key])
        elif spin:
            self.failed[key] = self.failed.get(key, 0) + 1
            self.spins[key] = 0.0 if self.failed[key] >= TRIES else min(LONGEST_SPIN, 2.5 * spin)

    def _wall(self, phases: dict[str, Callable], state: dict) -> dict[str, Sample]:
        self.flush()
        self.cuda.synchronize()
        events, host = [self._event() for _ in range(len(phases) + 1)], []
        events[0].record()
        for function, event in zip(phases.values(), events[1:]):
            begin = self.clock()
            function(state)
            event.record()
            host.append(1e6 * (self.clock() - begin))
        events[-1].synchronize()
        return {phase: Sample(a.elapsed_time(b), us, WALL) for phase, a, b, us in zip(phases, events, events[1:], host)}

    def _event(self):
        return self.cuda.Event(enable_timing=True)


def make_timer(device: str) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return (
        CudaTimer(torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_) if device == "cuda" else CpuTimer()
    )


def chosen(samples: list[Sample]) -> tuple[list[Sample], str]:
    """The samples that count and what they are: the queued ones where at least half are, else all, "host-bound"."""
    if samples and samples[0].timing == WALL:
        return samples, WALL
    queued = [s for s in samples if s.timing == QUEUED]
    return (queued, QUEUED) if 2 * len(queued) >= len(samples) > 0 else (samples, HOST_BOUND)


def remark(timing: dict[str, str]) -> str:
    """For a printed line: the phases whose times hold the host's."""
    phases = [phase for phase, kind in timing.items() if kind == HOST_BOUND]
    return f", {HOST_BOUND}: {', '.join(phases)}" if phases else ""
