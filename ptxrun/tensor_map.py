"""Tensor maps, which tell the copy engine (TMA) where a tensor lies and which box of it a copy moves.

A real map is 128 opaque bytes; ours are 128 bytes that only this emulator reads. `tensormap.replace` changes a field of
them, `encode` makes them for a launch, `decode` reads them when a copy starts.
"""
import struct
from dataclasses import dataclass, replace

import numpy as np

from ptxrun.errors import Misuse, OutOfBounds

BYTES = 128
LAYOUT = struct.Struct("<Q5Q5I5I4I")  # address; byte strides; sizes; box; rank, bytes of an element, swizzle, fill
SWIZZLE = {0: 16, 1: 32, 2: 64, 3: 128}  # tensormap.replace's numbers, and CUtensorMapSwizzle's
ELEMENT = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}  # by elemtype, in bytes


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory, cut into boxes. Dimension 0 is the contiguous one, as in PTX."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes; of dimension 0: the size of an element
    box: tuple[int, ...]
    element: int              # bytes
    swizzle: int              # bytes of a swizzled row; 16: not swizzled
    fill_nan: bool = False    # what lies outside of the tensor: zeros, or NaN

    def encode(self) -> bytes:
        """The map as 128 bytes."""
        pad = lambda values: [*values, *[0] * (5 - len(values))]  # noqa: E731
        return LAYOUT.pack(self.address, *pad(self.strides), *pad(self.sizes), *pad(self.box), len(self.sizes),
                           self.element, self.swizzle, self.fill_nan)

    @classmethod
    def decode(cls, data) -> "TensorMap":
        """A map from its bytes."""
        address, *rest = LAYOUT.unpack(bytes(data[:LAYOUT.size]))
        strides, sizes, box, (rank, element, swizzle, fill) = rest[:5], rest[5:10], rest[10:15], rest[15:]
        if not 1 <= rank <= 5 or element not in (1, 2, 4, 8) or swizzle not in (16, 32, 64, 128):
            raise Misuse(f"these bytes are no tensor map (rank {rank}, elements of {element} bytes)")
        return cls(address, tuple(sizes[:rank]), tuple(strides[:rank]), tuple(box[:rank]), element, swizzle, bool(fill))

    @property
    def bytes(self) -> int:
        """What one copy moves."""
        return int(np.prod(self.box)) * self.element

    def offsets(self, corner):
        """(byte offsets into the tensor, whether inside) of each element of the box at `corner`, rows by columns."""
        offset, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for start, size, stride, extent in list(zip(corner, self.sizes, self.strides, self.box))[::-1]:
            index = start + np.arange(extent)
            offset = (offset[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & (index >= 0) & (index < size)).reshape(-1)
        return offset, inside

    def places(self, start: int):
        """Where in shared memory each element of a box lies that begins at `start`."""
        width = self.box[0] * self.element
        if start % 128:
            raise Misuse(f"a box in shared memory begins at {start}, which is no multiple of 128")
        if self.swizzle > 16 and width > self.swizzle:
            raise Misuse(f"rows of {width} bytes do not fit a swizzle of {self.swizzle}")
        linear = start + np.arange(int(np.prod(self.box)), dtype=np.int64) * self.element
        return linear ^ (linear >> 7 & {16: 0, 32: 1, 64: 3, 128: 7}[self.swizzle]) << 4

    def with_field(self, name: str, value: int, place: int | None) -> "TensorMap":
        """tensormap.replace: one field changed."""
        def put(values, new):
            values = [*values, *[0] * (place + 1 - len(values))]
            return (*values[:place], new, *values[place + 1:])
        if name == "global_address":
            return replace(self, address=value)
        if name == "rank":
            return self._ranked(value + 1)
        if name == "box_dim":
            return replace(self, box=put(self.box, value))
        if name == "global_dim":
            return replace(self, sizes=put(self.sizes, value))
        if name == "global_stride":
            return replace(self, strides=(self.element, *self.strides[1:place + 1], value, *self.strides[place + 2:]))
        if name == "elemtype":
            return replace(self, element=ELEMENT[value], strides=(ELEMENT[value], *self.strides[1:]))
        if name == "swizzle_mode":
            return replace(self, swizzle=SWIZZLE[value])
        if name == "fill_mode":
            return replace(self, fill_nan=bool(value))
        if name in ("element_stride", "interleave_layout") and value == (name == "element_stride"):
            return self
        raise OutOfBounds(f"tensormap.replace of {name} with {value} is not emulated")

    def _ranked(self, rank: int) -> "TensorMap":
        cut = lambda values: (*values, *[0] * rank)[:rank]  # noqa: E731
        return replace(self, sizes=cut(self.sizes), strides=cut(self.strides), box=cut(self.box))
