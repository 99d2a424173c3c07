"""Races between the threads of one block in global memory.

Two threads may store one byte only with the same value, and one may read what another has stored, where what orders
accesses of shared memory (`ptxrun.races`) orders them: barriers and mbarriers. That a thread stores what another has
read before is not looked for.
"""
import numpy as np

from ptxrun.errors import Race
from ptxrun.memory import GlobalMemory
from ptxrun.races import Races

NOBODY = -1


class ThreadRaces:
    """Which thread of a block has written each byte, and when; of ranges that the block writes to."""

    def __init__(self, memory: GlobalMemory, order: Races):
        self.memory, self.order = memory, order
        self.written = {}  # by the range's number: (thread, its warp's clock, its warp's meetings) of each byte

    def read(self, threads, addresses, size: int):
        """Threads read `size` bytes at each address."""
        for owner, mine, bytes_ in self.memory.touched(addresses, size):
            if owner in self.written:
                self._check(owner, threads[mine][:, None], bytes_, True, "reads")

    def write(self, threads, addresses, size: int, values):
        """Threads write `values`, each of `size` bytes, at consecutive places behind each address."""
        for owner, mine, bytes_, changes in self.memory.changed(addresses, size, values):
            if owner not in self.written:
                count = len(self.memory.blocks[owner])
                self.written[owner] = np.full(count, NOBODY), np.zeros(count, np.int64), np.zeros(count, np.int64)
            writing = threads[mine][:, None]
            self._check(owner, writing, bytes_, changes, "writes another value to")
            for kept, value in zip(self.written[owner], (writing, *self.order.now(writing))):
                kept[bytes_] = value

    def _check(self, owner: int, threads, bytes_, concerned, what: str):
        writers, clock, meetings = (kept[bytes_] for kept in self.written[owner])
        bad = concerned & (writers != NOBODY) & ~self.order.before(writers, clock, meetings, threads)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise Race(f"thread {int(threads[row, 0])} {what} byte {int(bytes_[row, column])} of "
                       f"{self.memory.names[owner]}, which thread {int(writers[row, column])} of its block writes, and "
                       "no barrier is between them")
