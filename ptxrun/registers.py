"""The registers of all threads: a row of bits for each name, read and written through typed views of it."""
import numpy as np

from ptxrun.errors import UnknownInstruction
from ptxrun.numbers import DTYPES, UNSIGNED, size

POISON = 0x7FC0_DEAD_7FC0_DEAD  # NaN to float32; what nobody wrote shows up as one


class Registers:
    """One row per register, one column per thread."""

    def __init__(self, kinds: dict[str, str], threads: int):
        """`kinds`: the type that each name was declared with."""
        self.kinds = kinds
        self.rows = {name: self._row(kind, threads) for name, kind in kinds.items()}
        self._views = {}

    @staticmethod
    def _row(kind: str, threads: int):
        if kind == "pred":
            return np.zeros(threads, bool)
        if kind not in DTYPES:
            raise UnknownInstruction(f"registers of type .{kind}")
        return np.empty(threads, UNSIGNED[max(2, size(kind))])

    def __contains__(self, name: str) -> bool:
        return name in self.kinds

    def width(self, name: str) -> int:
        """Bytes of a register."""
        return self.rows[name].itemsize

    def view(self, name: str, dtype) -> np.ndarray:
        """The row of a register as numbers of a type of its size."""
        key = name, np.dtype(dtype)
        if key not in self._views:
            row = self.rows[name]
            if row.dtype != key[1] and (row.dtype == bool or row.itemsize != key[1].itemsize):
                raise UnknownInstruction(f"register {name}, a .{self.kinds[name]}, read or written as {key[1]}")
            self._views[key] = row.view(key[1])
        return self._views[key]

    def poison(self):
        """Forget all values, as a new block of threads finds them."""
        for row in self.rows.values():
            row.fill(False if row.dtype == bool else POISON & (1 << 8 * row.itemsize) - 1)
