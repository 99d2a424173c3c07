"""A launch: PTX, a grid, the parameters' bytes, and the memory that they point to."""
import functools
import time
from dataclasses import dataclass, field

from ptxrun.block_races import BlockRaces, orders_blocks
from ptxrun.machine import Machine
from ptxrun.memory import GlobalMemory
from ptxrun.ptx import parse
from ptxrun.schedule import Schedule
from ptxrun.traffic import Traffic

THREADS = 4096  # at once, where blocks run together

parsed = functools.lru_cache(parse)


@functools.lru_cache(8)
def machine(ptx: str, blocks: int, shared_size: int, schedule: Schedule, races: bool, copies_fenced: bool) -> Machine:
    """A machine for a kernel; the last few are kept, since decoding takes as long as a small launch."""
    return Machine(parsed(ptx), blocks, shared_size, schedule, races=races, copies_fenced=copies_fenced)


def unknown_instructions(ptx: str) -> list[str]:
    """What a kernel holds that is not emulated, found by decoding it; nothing is run."""
    return Machine(parse(ptx), 1, 0, Schedule()).unknown


@dataclass
class Emulation:
    """How launches are run, and what they have done."""

    architecture: int
    schedule: Schedule = Schedule()
    races: bool = False
    count: bool = False
    """Count bytes, bank conflicts and instructions by kind, which takes longer."""
    kernels: dict[str, Traffic] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    copies_fenced: bool = False
    """No race is seen where only the proxy fence between cp.async and wgmma or TMA is missing."""

    def launch(self, ptx: str, grid: tuple[int, int, int], parameters: list[bytes], memory: GlobalMemory,
               shared_size: int) -> None:
        """Run every block of a grid. Raises EmulationError where the kernel does what it may not do."""
        began, kernel = time.perf_counter(), parsed(ptx)
        total = grid[0] * grid[1] * grid[2]
        at_once = 1 if self.races or self.schedule.apart else max(1, min(total, THREADS // kernel.threads))
        one = machine(ptx, at_once, shared_size, self.schedule, self.races, self.copies_fenced)
        names = [name for name, *_ in kernel.parameters]
        padding = [bytes(8)] * (len(names) - len(parameters))  # scratch memory that a launch may leave out
        one.parameters = dict(zip(names, [*parameters, *padding]))
        one.global_memory = memory
        one.block_races = BlockRaces(memory) if self.races and not orders_blocks(kernel) else None
        traffic = self.kernels.setdefault(kernel.name, Traffic())
        traffic.launches += 1
        one.traffic = traffic if self.count else None
        for first in range(0, total, at_once):
            one.start(range(first, min(total, first + at_once)), grid)
            one.run()
        self.seconds[kernel.name] = self.seconds.get(kernel.name, 0.0) + time.perf_counter() - began
