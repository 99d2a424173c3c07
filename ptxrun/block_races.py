"""Races between blocks in global memory: within one launch nothing orders them.

No block may read what another writes, and two may write one byte only with the same value. A kernel that orders its
blocks itself, by atomics whose result it uses, is left out.
"""
import numpy as np

from ptxrun.errors import Race
from ptxrun.memory import GlobalMemory

MANY = -1


def orders_blocks(kernel) -> bool:
    """Whether a kernel may order its blocks by atomics."""
    return any(instruction.parts[0] == "atom" for instruction in kernel.instructions)


class BlockRaces:
    """Who has read and who has written each byte, by the number of the block plus one."""

    def __init__(self, memory: GlobalMemory):
        self.memory = memory
        self.readers = [np.zeros(len(data), np.int32) for data in memory.blocks]
        self.writers = [np.zeros(len(data), np.int32) for data in memory.blocks]

    def _touched(self, addresses, size: int):
        """(number of the range, which accesses lie in it, their bytes) for each range that is touched."""
        owners = np.searchsorted(self.memory.starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)
            bytes_ = (addresses[mine] - self.memory.starts[owner])[:, None] + np.arange(size)
            if owner >= 0 and int(bytes_.max(initial=0)) < len(self.memory.blocks[owner]):  # the access itself raises
                yield owner, mine, bytes_

    def read(self, blocks, addresses, size: int):
        """Blocks (one number for each access) read `size` bytes at each address."""
        for owner, mine, bytes_ in self._touched(addresses, size):
            number = blocks[mine][:, None].astype(np.int32) + 1
            writer = self.writers[owner][bytes_]
            if np.any((writer != 0) & (writer != number)):
                self._fail(owner, number, bytes_, (writer != 0) & (writer != number), "reads", "writes", writer)
            reader = self.readers[owner][bytes_]
            self.readers[owner][bytes_] = np.where((reader == 0) | (reader == number), number, MANY)

    def write(self, blocks, addresses, size: int, values):
        """Blocks write `values`, each of `size` bytes, at consecutive places behind each address."""
        for i, value in enumerate(values):
            for owner, mine, bytes_ in self._touched(addresses + i * size, size):
                number = blocks[mine][:, None].astype(np.int32) + 1
                new = np.ascontiguousarray(value[mine]).view(np.uint8).reshape(len(mine), size)
                changes = self.memory.blocks[owner][bytes_] != new
                for others, what in ((self.writers[owner][bytes_], "writes"), (self.readers[owner][bytes_], "reads")):
                    bad = changes & (others != 0) & (others != number)
                    if bad.any():
                        self._fail(owner, number, bytes_, bad, "writes", what, others)
                self.writers[owner][bytes_] = number

    def _fail(self, owner: int, number, bytes_, bad, what: str, other: str, others):
        row, column = np.argwhere(bad)[0]
        them = int(others[row, column])
        raise Race(f"block {int(number[row, 0]) - 1} {what} byte {int(bytes_[row, column])} of "
                   f"{self.memory.names[owner]}, which {'several blocks' if them == MANY else f'block {them - 1}'} "
                   f"{other}, and nothing orders them")
