"""Launch configurations: one table per kernel, keyed by (architecture, bytes per element, padded head dim).

A table is data, written by an offline tuner and gated by `tests/tfkernels/test_resources.py`, which compiles every row
for its architecture and requires zero spills and shared memory within the card's limit, on every Triton it is run with:
a row that fits some of them alone names the first (`since_triton`). Nothing is tuned at call time.
"""
import functools
from typing import NamedTuple

import torch
import triton

from tfkernels._library import INTERPRET

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
ARCHITECTURES = (80, 90, 100)
BASE = {120: 80}  # whose rows an architecture takes where a table has none of its own
# bytes a block may use; the 80 rows also fit the 99 KiB of sm_86, sm_89 and sm_120
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# For kernels that sum over the lanes of a warp by butterflies. Fused, each lane would add its own exact product to the
# other's rounded one, and lanes that share a row would hold sums that differ in their last bit.
ROUNDED_PRODUCTS = {"enable_fp_fusion": False}


class Config(NamedTuple):
    """Tile of `block_m` queries by `block_n` keys, and the warps and pipeline stages that work on it.

    max_registers: registers of a thread at most. Without it ptxas aims at an occupancy of its own and would rather
    spill than pass it.
    by_tma: the copy engine of sm_90 (TMA) loads the tiles that a loop walks, where their layout allows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    by_tma: bool = False

    def __str__(self) -> str:
        return str(tuple(x for x in self[:5] if x is not None)) + self.by_tma * " by TMA"

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch is told beside the tile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` may be called in kernels too, and takes 3 us of the host for it."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n, of n > 0."""
    return 1 << (n - 1).bit_length()


def since_triton(version: tuple[int, int], config: Config, *, before: Config) -> Config:
    """Return a table's row where it depends on the compiler: `config` spills on Tritons older than `version`."""
    return config if version <= TRITON else before


def loads_by_tma(config: Config, *tensors: torch.Tensor) -> bool:
    """Return whether a launch with `config` loads `tensors` (..., rows, columns) by TMA: where all of them begin at and
    step by multiples of 16 bytes, and rows do not overlap.

    Such kernels make their tensors' descriptors themselves, in memory that Triton asks its allocator for.
    """
    fits = config.by_tma and all(
        x.data_ptr() % 16 == 0 and x.stride(-2) >= x.shape[-1]
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]) for x in tensors)
    if fits:
        triton.set_allocator(_allocated)
    return fits


def _allocated(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # aligned to 512 bytes


INTERPRETER = Config(32, 16, 4, 1)  # small and unequal, so that short test sequences cross many tile edges


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the table architecture whose rows `device` can run."""
    return table_architecture(torch.cuda.get_device_capability(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; few in the interpreter, so that some tests share and some do not.
    """
    return 4 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def table_architecture(capability: tuple[int, int]) -> int:
    """Return the table architecture of a compute capability: 90 and 100 for the data-centre cards of their families.

    Every other card takes the 80 rows, which fit the 99 KiB of its blocks; sm_120 all but those that spill there.
    """
    return {9: 90, 10: 100, 12: 120}.get(capability[0], 80)


def lookup(table: dict, tensor: torch.Tensor, head_dim: int, *, heavy: bool = False) -> Config:
    """Return `table`'s row for `tensor`'s device and dtype and a padded head dim.

    `heavy` asks for the row of a soft cap or of a mask that needs both sides.
    """
    return (INTERPRETER
            if INTERPRET
            else table_row(table, architecture(tensor.device), tensor.element_size(), head_dim, heavy=heavy))


def table_row(table: dict, *key: int, heavy: bool) -> Config:
    """Return the row of (architecture, bytes per element, padded head dim), or its "heavy" row where it has one."""
    keys = [key, (BASE.get(key[0], key[0]), *key[1:])]
    return next(table[k] for k in [(*k, "heavy") for k in keys if heavy] + keys if k in table)
