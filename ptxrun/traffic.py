"""What a kernel does, counted: instructions by kind, bytes of global memory, conflicts of shared memory's banks.

Counts are exact for the compiled code and the given input. Time does not follow from them.
"""
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32   # bytes, the least that global memory moves
BANKS = 32    # of 4 bytes

KINDS = {
    "tensor core": ("mma", "wgmma"), "float": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"),
    "memory": ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix"),
    "warp": ("shfl", "vote", "redux", "elect", "activemask"),
    "wait": ("bar", "barrier", "mbarrier", "fence"), "branch": ("bra", "brx", "ret", "exit"),
    "convert": ("cvt",), "move": ("mov", "selp", "cvta", "prmt"),
}
KIND_OF = {base: kind for kind, bases in KINDS.items() for base in bases}
ARITHMETIC = ("add", "sub", "mul", "fma", "div", "min", "max", "neg", "abs", "setp")


def kind_of(instruction) -> str:
    """Which kind an instruction counts as."""
    base = instruction.parts[0]
    if base in ARITHMETIC:
        return "float" if instruction.parts[-1][0] == "f" or "bf16" in instruction.parts[-1] else "integer"
    return KIND_OF.get(base, "integer")


@dataclass
class Traffic:
    """The counts of one kernel, summed over its launches."""

    launches: int = 0
    instructions: Counter = field(default_factory=Counter)  # of warps, by kind
    threads: int = 0                                        # thread instructions
    requested: Counter = field(default_factory=Counter)     # bytes that threads ask global memory for, by load or store
    moved: Counter = field(default_factory=Counter)         # 32 for each sector that an instruction of a warp touches
    touched: dict = field(default_factory=dict)             # numbers of different sectors, by load or store
    shared_passes: int = 0                                  # of shared memory, with conflicts
    shared_least: int = 0                                   # without any

    def of_instructions(self, run, at):
        """A straight run, by the threads `at`."""
        warps = (at.stop - at.start + 31) // 32
        for instruction in [one for one, _ in run.steps] or [run.ender]:
            self.instructions[kind_of(instruction)] += warps
            self.threads += at.stop - at.start

    def of_global(self, kind: str, threads, addresses, size: int):
        """Threads access `size` bytes at each of `addresses`."""
        self.requested[kind] += len(addresses) * size
        spread = addresses[:, None] // SECTOR + np.arange(-(-size // SECTOR))
        warp = np.broadcast_to(threads[:, None] // 32, spread.shape)
        self.moved[kind] += SECTOR * len(np.unique(np.stack([warp.reshape(-1), spread.reshape(-1)]), axis=1).T)
        self.touched.setdefault(kind, set()).update(np.unique(spread).tolist())

    def of_shared(self, kind: str, threads, addresses, size: int):
        """Threads access `size` bytes of shared memory; 8 and 16 bytes go by half and quarter warps."""
        self._passes(threads // (32 if size <= 4 else 128 // size), addresses, size)

    def of_matrix(self, kind: str, threads, addresses, count: int):
        """ldmatrix and stmatrix: each matrix is eight rows of 16 bytes, in one pass where the banks differ."""
        self._passes(np.repeat(np.arange(len(addresses) // 8), 8), addresses, 16)

    def _passes(self, together, addresses, size: int):
        words = addresses[:, None] // 4 + np.arange(-(-size // 4))
        pairs = np.stack([np.broadcast_to(together[:, None], words.shape).reshape(-1), words.reshape(-1)])
        different = np.unique(pairs, axis=1)
        groups, group = np.unique(different[0], return_inverse=True)
        depth = np.zeros((len(groups), BANKS), np.int64)
        np.add.at(depth, (group, different[1] % BANKS), 1)
        self.shared_passes += int(depth.max(1).sum())
        self.shared_least += len(groups)

    def least(self, kind: str) -> int:
        """Bytes of the sectors that are touched at all: what has to move once."""
        return SECTOR * len(self.touched.get(kind, ()))
