"""Races between blocks in global memory: within one launch nothing orders them.

No block may read what another writes, and two may write one byte only with the same value, or by reductions (red); what
is reduced into, nobody may read or store in the same launch. A kernel that orders its blocks itself, by atomics whose
result it uses, is left out.
"""
import numpy as np

from ptxrun.errors import Race
from ptxrun.memory import GlobalMemory

MANY = -1     # in place of a reader
REDUCED = -2  # in place of a writer: blocks add to it, and so on


def orders_blocks(kernel) -> bool:
    """Whether a kernel may order its blocks by atomics."""
    return any(instruction.parts[0] == "atom" for instruction in kernel.instructions)


class BlockRaces:
    """Who has read and who has written each byte, by the number of the block plus one."""

    def __init__(self, memory: GlobalMemory):
        self.memory = memory
        self.readers = [np.zeros(len(data), np.int32) for data in memory.blocks]
        self.writers = [np.zeros(len(data), np.int32) for data in memory.blocks]

    def read(self, blocks, addresses, size: int):
        """Blocks (one number for each access) read `size` bytes at each address."""
        for owner, mine, bytes_ in self.memory.touched(addresses, size):
            number = blocks[mine][:, None].astype(np.int32) + 1
            writer = self.writers[owner][bytes_]
            if np.any((writer != 0) & (writer != number)):
                self._fail(owner, number, bytes_, (writer != 0) & (writer != number), "reads", "writes", writer)
            reader = self.readers[owner][bytes_]
            self.readers[owner][bytes_] = np.where((reader == 0) | (reader == number), number, MANY)

    def write(self, blocks, addresses, size: int, values):
        """Blocks write `values`, each of `size` bytes, at consecutive places behind each address."""
        for owner, mine, bytes_, changes in self.memory.changed(addresses, size, values):
            number = blocks[mine][:, None].astype(np.int32) + 1
            for others, what in ((self.writers[owner][bytes_], "writes"), (self.readers[owner][bytes_], "reads")):
                bad = changes & (others != 0) & (others != number)
                if bad.any():
                    self._fail(owner, number, bytes_, bad, "writes", what, others)
            self.writers[owner][bytes_] = number

    def reduce(self, blocks, addresses, size: int):
        """Blocks reduce into `size` bytes at each address, in whatever order."""
        for owner, mine, bytes_ in self.memory.touched(addresses, size):
            number = blocks[mine][:, None].astype(np.int32) + 1
            writer, reader = self.writers[owner][bytes_], self.readers[owner][bytes_]
            for others, what in ((np.where(writer == REDUCED, 0, writer), "writes"), (reader, "reads")):
                bad = (others != 0) & (others != number)
                if bad.any():
                    self._fail(owner, number, bytes_, bad, "reduces into", what, others)
            self.writers[owner][bytes_] = np.where(writer == number, number, REDUCED)

    def _fail(self, owner: int, number, bytes_, bad, what: str, other: str, others):
        row, column = np.argwhere(bad)[0]
        them = int(others[row, column])
        who = {MANY: "several blocks", REDUCED: "a reduction"}.get(them, f"block {them - 1}")
        raise Race(f"block {int(number[row, 0]) - 1} {what} byte {int(bytes_[row, column])} of "
                   f"{self.memory.names[owner]}, which {who} {other}, and nothing orders them")
