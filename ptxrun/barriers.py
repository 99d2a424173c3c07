"""What threads wait for: named barriers, mbarriers in shared memory, the pool of registers that setmaxnreg moves."""
from dataclasses import dataclass, field

from ptxrun.errors import Misuse


@dataclass
class NamedBarrier:
    """`barrier.sync id, count`: opens when `count` threads have come, those of `barrier.arrive` among them."""

    count: int
    arrived: int = 0
    warps: list[int] = field(default_factory=list)  # that have come

    def arrive(self, group, count: int) -> bool:
        """Count a group's threads; whether the barrier opens."""
        if count != self.count:
            raise Misuse(f"{group} come to a barrier for {count} threads where others wait for {self.count}")
        self.arrived += group.high - group.low
        self.warps += group.warps
        if self.arrived > self.count:
            raise Misuse(f"{self.arrived} threads come to a barrier for {self.count}")
        return self.arrived == self.count


@dataclass
class MBarrier:
    """An mbarrier: a phase is complete when all arrivals and all bytes of asynchronous copies are there."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrivals: int, transactions: int) -> bool:
        """Count arrivals, and bytes that are expected (positive) or have come (negative); whether a phase completes."""
        self.pending -= arrivals
        self.bytes += transactions
        if self.pending < 0:
            raise Misuse(f"more arrivals at an mbarrier than its count, {self.count}")
        if self.pending or self.bytes:
            return False
        self.pending = self.count
        self.phase += 1
        return True


class MBarriers:
    """The mbarriers of all blocks, by (block, address)."""

    def __init__(self):
        self.all = {}

    def init(self, key, count: int):
        """mbarrier.init"""
        if not 0 < count < 1 << 20:
            raise Misuse(f"an mbarrier with the count {count}")
        self.all[key] = MBarrier(count, count)

    def invalidate(self, key):
        """mbarrier.inval"""
        self.find(key)
        del self.all[key]

    def find(self, key) -> MBarrier:
        """The mbarrier at an address."""
        if key not in self.all:
            raise Misuse(f"no mbarrier was initialised at {key[1]} of shared memory")
        return self.all[key]

    def passed(self, key, parity: int) -> bool:
        """Whether the phase of a parity is complete."""
        return self.find(key).phase & 1 != parity


class RegisterPool:
    """setmaxnreg: a block's registers, of which warps give some back and others take them."""

    def __init__(self, warps: int, registers_per_thread: int | None):
        """`registers_per_thread`: what the block started with, `.maxnreg`; None: only each number itself is checked."""
        self.held = [registers_per_thread] * warps
        self.free = 0

    @property
    def known(self) -> bool:
        """Whether the block says how many registers it starts with."""
        return self.held[0] is not None

    def check(self, registers: int):
        """Which numbers setmaxnreg takes."""
        if registers % 8 or not 24 <= registers <= 256:
            raise Misuse(f"setmaxnreg to {registers} registers; a multiple of 8 from 24 to 256 fits")

    def release(self, warps, registers: int):
        """setmaxnreg.dec"""
        for warp in warps if self.known else ():
            if registers > self.held[warp]:
                raise Misuse(f"setmaxnreg.dec to {registers} registers of a warp that has {self.held[warp]}")
            self.free += self.held[warp] - registers
            self.held[warp] = registers

    def enough(self, warps, registers: int) -> bool:
        """Whether as many registers are free as warps want on top of theirs."""
        return sum(registers - self.held[warp] for warp in warps) <= self.free

    def take(self, warps, registers: int) -> bool:
        """setmaxnreg.inc: whether the registers were there; where not, the warps wait."""
        if not self.known:
            return True
        if any(registers < self.held[warp] for warp in warps):
            raise Misuse(f"setmaxnreg.inc to {registers} registers of a warp that has {self.held[warps[0]]}")
        if not self.enough(warps, registers):
            return False
        self.free -= sum(registers - self.held[warp] for warp in warps)
        for warp in warps:
            self.held[warp] = registers
        return True
