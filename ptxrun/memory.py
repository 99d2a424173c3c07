"""Global memory, the tensors of a launch at their addresses, and the shared memory of each block.

Every access is checked: it lies inside of one tensor, or of the block's shared memory, and its address is a multiple of
its size.
"""
import bisect

import numpy as np

from ptxrun.errors import Misaligned, OutOfBounds
from ptxrun.numbers import UNSIGNED


def check_alignment(addresses, total: int, where: str):
    """A vector access is as aligned as all of it is long."""
    wrong = addresses % total != 0
    if np.any(wrong):
        first = int(np.ravel(addresses)[np.argmax(wrong)])
        raise Misaligned(f"{where} of {total} bytes at {first:#x}, which is no multiple of {total}")


class GlobalMemory:
    """Ranges of bytes by address; each has the name of the argument that it came with."""

    def __init__(self):
        self.starts, self.blocks, self.names = [], [], []

    def add(self, start: int, data: np.ndarray, name: str = "memory"):
        """Make `data` (bytes) readable and writable at `start`. Ranges that overlap become one, as views of one storage
        do; they must be the same memory."""
        at = bisect.bisect_left(self.starts, start)
        self.starts.insert(at, start)
        self.blocks.insert(at, data.reshape(-1).view(np.uint8))
        self.names.insert(at, name)

    def find(self, low: int, high: int, what: str) -> tuple[int, np.ndarray]:
        """The start and the bytes of the range that holds [low, high)."""
        at = bisect.bisect_right(self.starts, low) - 1
        if at >= 0 and high <= self.starts[at] + len(self.blocks[at]):
            return self.starts[at], self.blocks[at]
        raise OutOfBounds(f"{what} of {high - low} bytes at {low:#x}, {self._nearest(low, high)}")

    def _nearest(self, low: int, high: int) -> str:
        """Where an address lies that is inside of no range."""
        if not self.starts:
            return "and the launch has no tensors"
        distance = [max(start - low, high - start - len(block), 0) for start, block in zip(self.starts, self.blocks)]
        at = int(np.argmin(distance))
        start, size, name = self.starts[at], len(self.blocks[at]), self.names[at]
        if low < start:
            return f"{start - low} bytes before {name}"
        return f"ending {high - start - size} bytes behind {name}, which has {size}"

    def parts(self, addresses, total: int, what: str):
        """Yield (selection of addresses, their offsets, bytes) for each range that they lie in."""
        check_alignment(addresses, total, what)
        low, high = int(addresses.min()), int(addresses.max()) + total
        at = bisect.bisect_right(self.starts, low) - 1
        if at >= 0 and high <= self.starts[at] + len(self.blocks[at]):
            yield slice(None), addresses - self.starts[at], self.blocks[at]
            return
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            some = addresses[mine]
            for extreme in (int(some.min()), int(some.max())):
                start, data = self.find(extreme, extreme + total, what)
            yield mine, some - start, data

    def touched(self, addresses, size: int):
        """Yield (number of the range, which accesses lie in it, their bytes) for each range that holds some of them.

        What lies outside of one is left out: the access itself is an error.
        """
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)
            bytes_ = (addresses[mine] - self.starts[owner])[:, None] + np.arange(size)
            if owner >= 0 and int(bytes_.max(initial=0)) < len(self.blocks[owner]):
                yield owner, mine, bytes_

    def changed(self, addresses, size: int, values):
        """As `touched` for `values` at consecutive places, and which bytes would then hold something else."""
        for i, value in enumerate(values):
            for owner, mine, bytes_ in self.touched(addresses + i * size, size):
                new = np.ascontiguousarray(value[mine]).view(np.uint8).reshape(len(mine), size)
                yield owner, mine, bytes_, self.blocks[owner][bytes_] != new

    def load(self, addresses, size: int, count: int, what: str = "a load") -> list[np.ndarray]:
        """`count` numbers of `size` bytes at each address."""
        found = [np.empty(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for chosen, offsets, data in self.parts(addresses, size * count, what) if len(addresses) else ():
            words, at = _words(data, size), offsets // size
            for i, part in enumerate(found):
                part[chosen] = words[at + i]
        return found

    def store(self, addresses, size: int, values, what: str = "a store"):
        """Store `values`, an array for each of the numbers at an address."""
        for chosen, offsets, data in self.parts(addresses, size * len(values), what) if len(addresses) else ():
            words, at = _words(data, size), offsets // size
            for i, value in enumerate(values):
                words[at + i] = value[chosen]


def _words(data: np.ndarray, size: int) -> np.ndarray:
    return data[:len(data) // size * size].view(UNSIGNED[size])


class SharedMemory:
    """The shared memory of several blocks, one behind the other; what nobody wrote is NaN."""

    def __init__(self, size: int, blocks: int, threads_per_block: int):
        self.size, self.pitch = size, -(-max(size, 16) // 1024) * 1024
        self.bytes = np.empty(self.pitch * blocks, np.uint8)
        self.words = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.pitch, threads_per_block)
        self.poison()

    def poison(self):
        """Forget what a block before left."""
        self.bytes.fill(0xFF)

    def places(self, addresses, bases, total: int, what: str):
        """Check addresses inside of a block; return them as offsets into `bytes`."""
        check_alignment(addresses, total, f"{what} of shared memory")
        if len(addresses) and (int(addresses.max()) + total > self.size or int(addresses.min()) < 0):
            at = int(addresses.max()) if int(addresses.max()) + total > self.size else int(addresses.min())
            raise OutOfBounds(f"{what} of {total} bytes at {at} of shared memory, which has {self.size}")
        return addresses + bases

    def load(self, places, size: int, count: int) -> list[np.ndarray]:
        """`count` numbers of `size` bytes at each place."""
        words, at = self.words[size], places // size
        return [words[at + i] for i in range(count)]

    def store(self, places, size: int, values):
        """Store `values`, an array for each of the numbers at a place."""
        words, at = self.words[size], places // size
        for i, value in enumerate(values):
            words[at + i] = value
