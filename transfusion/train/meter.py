"""A run's clocks: how fast it is, how much memory it takes, what share of its GPU it uses, and when it must stop."""
import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch

from transfusion.train.gpus import gpu_of

FIRST_SAVE = 0.02  # share of a run's time that is left for a save as long as none was measured


class Meter:
    """Measures steps, without a wait for the device: whoever asks has just waited for the step's losses.

    A step is from `begin` to `after`. What lies between two steps, as saves and watchers do, does not count.
    """

    def __init__(self, size: int, unit: str, device: torch.device,
                 operations: Callable[[], float] | None = None, start: int = 0, seen: int | None = None):
        """`size` is of a batch in `unit`; `operations` counts what this process computes for the step drawn last.

        The run goes on from step `start`, before which it has `seen` so many, by default of batches of this size.
        """
        self.size, self.unit, self.device = size, unit, device
        self.start, self.seen = start, start * size if seen is None else seen
        self.count, self.operations = operations, None
        gpu = gpu_of(device)
        self.peak = None if gpu is None else gpu.teraflops * 1e12
        self.began = self.drawing = 0.0

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Begin a step; inside, its batches are drawn."""
        self.began = time.perf_counter()
        yield
        self.drawing = time.perf_counter() - self.began

    def after(self, done: int) -> dict[str, float]:
        """Numbers for the record of the step that has just ended, the last of `done`.

            tokens              seen by the run so far, or pictures
            tokens_per_second   in this step
            data_share          of the step's seconds in which its batches were drawn
            memory              bytes at the peak: on an accelerator, or the resident set of the process
            mfu                 operations that the model's mathematics needs (transfusion/train/estimates.py), as a
                                share of the dense bfloat16 peak of the GPU, where both are known
        """
        seconds = time.perf_counter() - self.began
        found = {self.unit: self.seen + (done - self.start) * self.size,
                 f"{self.unit}_per_second": round(self.size / seconds, 2),
                 "data_share": round(self.drawing / seconds, 4), "memory": peak_memory(self.device)}
        if self.count is not None and self.peak is not None:
            if self.operations is None:  # once: steps of packed rows are alike
                self.operations = self.count()
            found["mfu"] = round(self.operations / seconds / self.peak, 4)
        return found


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: on an accelerator those of tensors, on the CPU the resident set of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TimeLimit:
    """Says when a run must save and stop, so that its save ends before its hours are over."""

    def __init__(self, hours: float | None):
        """The time begins now; None is without end."""
        self.seconds = float("inf") if hours is None else 3600 * hours
        self.began = self.last = time.monotonic()
        self.step, self.save = 0.0, None

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Take steps: what came before is none, and no step takes as long."""
        self.last = time.monotonic()
        yield

    def is_near(self, saved: float = 0.0) -> bool:
        """Whether another step and a save might not fit any more. Ask after each step: this is how steps are timed.

        A step may take as long as the longest so far, with what watchers do; a save 1.5 times as long as the last one,
        or as `saved`, the seconds of one in the background.
        """
        now = time.monotonic()
        self.step, self.last = max(self.step, now - self.last), now
        save = FIRST_SAVE * self.seconds if self.save is None else 1.5 * max(self.save, saved)
        return now - self.began + self.step + save > self.seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time a save; it is no part of a step."""
        began = time.monotonic()
        yield
        self.last = time.monotonic()
        self.save = self.last - began
