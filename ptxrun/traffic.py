"""What a kernel does, counted: instructions by kind, bytes of global memory, conflicts of shared memory's banks.

Counts are exact for the compiled code and the given input. Time does not follow from them.
"""
import functools
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32   # bytes, the least that global memory moves
BANKS = 32    # of 4 bytes

KINDS = {
    "tensor core": ("mma", "wgmma"), "special": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"),
    "shuffle": ("shfl", "vote", "redux", "elect", "activemask"),
    "wait": ("bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol", "setmaxnreg"),
    "branch": ("bra", "brx", "ret", "exit"), "move": ("cvt", "mov", "selp", "cvta", "prmt"),
    "shared": ("ldmatrix", "stmatrix"),
}
KIND_OF = {base: kind for kind, bases in KINDS.items() for base in bases}
NAMES = (*KINDS, "float", "integer", "global")
ARITHMETIC = ("add", "sub", "mul", "fma", "div", "min", "max", "neg", "abs", "setp")
MEMORY = ("ld", "st", "atom", "red", "cp")
SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")
WAITS = ("commit_group", "wait_group", "wait_all", "fence")


@functools.cache
def kind_of(opcode: str) -> str:
    """Which of NAMES an opcode counts as: "global" for copies from global to shared memory, "move" for parameters."""
    base, *rest = opcode.split(".")
    if base in ARITHMETIC:
        return "float" if rest[-1][0] == "f" or "bf16" in rest[-1] else "integer"
    if any(part in WAITS for part in rest):
        return "wait"
    if base in MEMORY:
        return "global" if "global" in rest else "move" if "param" in rest else "shared"
    return KIND_OF.get(base, "integer")


@functools.cache
def products_of(opcode: str) -> int:
    """Multiplications and additions of the tensor cores that a warp's part of one instruction stands for."""
    shape = SHAPE.search(opcode)
    m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
    return 2 * m * n * k // (4 if opcode.startswith("wgmma") else 1)  # a wgmma is of four warps


@dataclass
class Traffic:
    """The counts of one kernel, summed over its launches."""

    launches: int = 0
    instructions: Counter = field(default_factory=Counter)  # of warps, by kind
    products: int = 0                                       # multiplications and additions of the tensor cores
    threads: int = 0                                        # thread instructions
    requested: Counter = field(default_factory=Counter)     # different bytes that each warp asks for, by load or store
    moved: Counter = field(default_factory=Counter)         # 32 for each sector that an instruction of a warp touches
    touched: dict = field(default_factory=dict, repr=False)  # numbers of different sectors, by load or store
    shared_passes: int = 0                                  # of shared memory, with conflicts
    shared_least: int = 0                                   # without any

    def of_instructions(self, run, at):
        """A straight run, by the threads `at`."""
        warps = -(-at.stop // 32) - at.start // 32
        for instruction in [one for one, _ in run.steps] or [run.ender]:
            self.instructions[kind_of(instruction.opcode)] += warps
            self.products += warps * products_of(instruction.opcode)
            self.threads += at.stop - at.start

    def of_global(self, kind: str, threads, addresses, size: int):
        """Threads access `size` bytes at each of `addresses`."""
        warps = threads // 32
        self.requested[kind] += size * len(_different(warps, addresses)[0])
        sectors = addresses[:, None] // SECTOR + np.arange(-(-size // SECTOR))
        self.moved[kind] += SECTOR * len(_different(warps[:, None], sectors)[0])
        self.touched.setdefault(kind, set()).update(np.unique(sectors).tolist())

    def of_shared(self, threads, addresses, size: int):
        """Threads access `size` bytes of shared memory; 8 and 16 bytes go by half and quarter warps."""
        self._passes(threads // (32 if size <= 4 else 128 // size), addresses, size)

    def of_matrix(self, addresses):
        """ldmatrix and stmatrix: each matrix is eight rows of 16 bytes, in one pass where the banks differ."""
        self._passes(np.repeat(np.arange(len(addresses) // 8), 8), addresses, 16)

    def _passes(self, together, addresses, size: int):
        """Accesses of one number in `together` share a pass as far as their words lie in different banks."""
        words = addresses[:, None] // 4 + np.arange(-(-size // 4))
        group, word = _different(together[:, None], words)
        depth = np.bincount(group * BANKS + word % BANKS, minlength=(group.max() + 1) * BANKS).reshape(-1, BANKS)
        self.shared_passes += int(depth.max(1).sum())
        self.shared_least += int(depth.any(1).sum())

    def least(self, kind: str) -> int:
        """Bytes of the sectors that are touched at all: what has to move once."""
        return SECTOR * len(self.touched.get(kind, ()))


def _different(groups, values) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs of a group's number and one of its values."""
    count = int(groups.max(initial=0)) + 1
    values, groups = np.divmod(np.unique(values * count + groups), count)
    return groups, values
