"""wgmma: products of a warpgroup of four warps, which read shared memory while the threads go on.

A product is done some time between wgmma.commit_group and the wgmma.wait_group that waits for its group. Until then
its registers are in flight: a thread may neither read nor write them, but for another product that adds to the same
sums.
"""
import re

import numpy as np

from ptxrun.errors import Hazard, Misuse, OutOfBounds
from ptxrun.instructions.matrix import elements, left_fragment
from ptxrun.ptx import members

WARPGROUP = 128
SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}     # a descriptor's last two bits to the width of a swizzled row
SWIZZLE_MASK = {16: 0, 128: 7, 64: 3, 32: 1}      # which bits of the row number are mixed into the 16-byte chunk's


def swizzled(addresses, width: int):
    """Mix the number of a row into the number of its 16-byte chunk, as a swizzle of `width` bytes does."""
    return addresses ^ (addresses >> 7 & SWIZZLE_MASK[width]) << 4


def descriptor_addresses(descriptor: int, rows: int, columns: int, *, columns_contiguous: bool):
    """Addresses of a (rows, columns) matrix of 16-bit elements; columns run along k, rows along m or n.

    A matrix consists of 8-row atoms of the swizzle's width. Where columns are contiguous, the descriptor's stride leads
    from 8 rows to the next 8, and the leading offset from one atom to the next along the columns. Otherwise the two
    change places: an atom is 8 columns of contiguous rows.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    width = SWIZZLE_BYTES[descriptor >> 62 & 3]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if width == 16:
        if not columns_contiguous:
            row, column = column, row
        found = start + row // 8 * stride + column // 8 * leading + row % 8 * 16 + column % 8 * 2
        return found
    if columns_contiguous:
        found = start + row // 8 * stride + row % 8 * width + column * 2 % width + column * 2 // width * leading
    else:
        atom = width // 2
        found = start + row // atom * leading + column // 8 * stride + column % 8 * width + row % atom * 2
    return swizzled(found, width)


class Products:
    """The products that warpgroups have issued: open, committed, and the registers that they hold."""

    def __init__(self):
        self.open, self.groups, self.in_flight = {}, {}, {}
        self.unfenced = {}  # by warp: sets of registers that threads have touched since wgmma.fence, by where

    def touch(self, warps: range, where: int, names: frozenset):
        """Threads read or write registers, by other instructions than wgmma."""
        for warp in warps:
            if warp in self.unfenced:
                self.unfenced[warp][where] = names

    def fence(self, warps: range):
        """wgmma.fence: products that follow see the registers as they are, and are the only ones to change them."""
        self.unfenced |= {warp: {} for warp in warps}

    def issue(self, unit: int, work, sums: tuple, inputs: tuple):
        """A product of the warpgroup that begins at thread `unit`."""
        self.open.setdefault(unit, []).append((work, sums, inputs))
        self._note(unit)

    def commit(self, unit: int, at_once: bool):
        """Close a group of products; `at_once`: do them now, and everything before them."""
        self.groups.setdefault(unit, []).append(self.open.pop(unit, []))
        if at_once:
            for group in self.groups[unit]:
                self._do(group)

    def wait(self, unit: int, still_pending: int):
        """Do all groups but the last `still_pending`, and let their registers go."""
        groups = self.groups.setdefault(unit, [])
        while len(groups) > still_pending:
            self._do(groups.pop(0))
        self._note(unit)

    @staticmethod
    def _do(group):
        for i, (work, sums, inputs) in enumerate(group):
            if work is not None:
                work()
                group[i] = None, sums, inputs

    def _note(self, unit: int):
        """Which registers are in flight, and for sums, as which list of sums."""
        products = [p for group in self.groups.get(unit, []) for p in group] + self.open.get(unit, [])
        held = {name: sums for _, sums, _ in products for name in sums}
        held |= {name: None for _, _, inputs in products for name in inputs}
        self.in_flight.pop(unit, None)
        if held:
            self.in_flight[unit] = held

    def check_fence(self, warps: range, names: frozenset, instruction):
        """A wgmma.fence is wanted before the first product, and between other uses of a register and a product's."""
        for warp in warps:
            if warp not in self.unfenced:
                raise Hazard(f"no wgmma.fence of warp {warp} comes before its first product").at(instruction)
            for touched in self.unfenced[warp].values():
                if names & touched:
                    raise Hazard(f"no wgmma.fence of warp {warp} comes between the last use of "
                                 f"{min(names & touched)} and a product with it").at(instruction)

    def check(self, unit: int, sums: tuple, inputs: tuple, instruction):
        """A product may add to sums in flight if all of them are the same; it may not read its inputs from them."""
        held = self.in_flight.get(unit, {})
        for name in sums:
            if name in held and held[name] != sums:
                raise Hazard(f"{name} is in flight in another product").at(instruction)
        for name in inputs:
            if held.get(name) is not None:
                raise Hazard(f"{name} is read while a product in flight writes it").at(instruction)


def wgmma(o):
    """wgmma.fence, mma_async, commit_group, wait_group."""
    action = o.parts[1]
    if action == "fence":
        return lambda at: o.machine.products.fence(range(at.start // 32, at.stop // 32))
    if action == "commit_group":
        return _commit(o)
    if action == "wait_group":
        return _wait(o)
    return _issue(o)


def units(machine, at, unit_size=WARPGROUP):
    """The first thread of each warpgroup of `at`; where warps run apart, of each warp."""
    size = unit_size if machine.threads.joined else 32
    if at.start % size or at.stop % size:
        raise Misuse(f"threads {at.start} to {at.stop - 1}, part of a warpgroup, come to wgmma")
    return range(at.start, at.stop, size), size


def _commit(o):
    machine = o.machine

    def run(at):
        starts, size = units(machine, at)
        for unit in starts:
            if machine.races:
                machine.races.close_products(range(unit // 32, (unit + size) // 32))
            machine.products.commit(unit, machine.schedule.at_once(machine.coin))
    return run


def _wait(o):
    machine, still_pending = o.machine, o.constant(0)

    def run(at):
        starts, size = units(machine, at)
        for unit in starts:
            if machine.races:
                machine.races.wait_products(range(unit // 32, (unit + size) // 32), still_pending)
            machine.products.wait(unit, still_pending)
    return run


class Product:
    """One wgmma.mma_async: D = A B [+ D], A from registers or shared memory, B from shared memory."""

    def __init__(self, o):
        self.machine = o.machine
        shape = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", o.parts[4])
        if shape is None:
            raise o.unknown("a shape")
        self.m, self.n, self.k = map(int, shape.groups())
        result, self.kind, right = o.parts[5:8]
        if result != "f32" or self.kind != right or self.kind not in ("bf16", "f16", "tf32"):
            raise o.unknown()
        self.from_registers = o.texts[1].startswith("{")
        flags = [int(text, 0) for text in o.texts[4:]]
        self.sign = flags[0] * flags[1]
        transposed = flags[2:] + [0] * 2
        self.a_by_k = self.from_registers or not transposed[0]
        self.b_by_k = not transposed[0 if self.from_registers else 1]
        if self.kind == "tf32" and not (self.a_by_k and self.b_by_k):
            raise o.unknown("a transposed tf32 matrix")
        self.sums = tuple(members(o.texts[0]))
        self.inputs = tuple(members(o.texts[1])) if self.from_registers else ()
        self.names = frozenset(self.sums + self.inputs)
        self.rows = [o.registers.view(name, np.float32) for name in self.sums]

    def addresses(self, descriptor: int, rows: int, by_k: bool, base: int):
        """The bytes of shared memory that hold a matrix, one address for each 16 bits, checked."""
        columns = self.k * (2 if self.kind == "tf32" else 1)
        found = descriptor_addresses(descriptor, rows, columns, columns_contiguous=by_k)
        if int(found.max()) + 2 > self.machine.shared.size:
            raise OutOfBounds(f"wgmma reads shared memory at {int(found.max())}, which has {self.machine.shared.size}")
        return found + base

    def matrix(self, places):
        """The elements at `places`."""
        return elements(np.ascontiguousarray(self.machine.shared.words[2][places // 2]).view(np.uint32), self.kind)

    def perform(self, at, left, right_places, add: bool):
        """Compute and write the sums of the threads `at`, a warpgroup or one warp of it."""
        warps = (at.stop - at.start) // 32
        if self.from_registers:
            A = left_fragment(left, self.kind).reshape(16 * warps, -1)
        else:
            A = self.matrix(left)
            if warps == 1:
                first = at.start // 32 % 4 * 16
                A = A[first:first + 16]
        D = A @ self.matrix(right_places).T * np.float32(self.sign)
        parts = D.reshape(warps, 2, 8, self.n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)  # n block, half, pair; thread
        for row, value in zip(self.rows, parts.reshape(self.n // 2, -1)):
            row[at] = value + row[at] if add else value


def _issue(o):
    product, machine = Product(o), o.machine
    left = o.read_list(1, "b32") if product.from_registers else o.read(1, "b64")
    right, adds = o.read(2, "b64"), o.read(3, "pred")

    def one(at):
        """The product of one warpgroup."""
        base = int(machine.shared.base[at.start])
        pick = lambda read: np.ravel(read(at))[0]  # noqa: E731
        right_places = product.addresses(int(pick(right)), product.n, product.b_by_k, base)
        if product.from_registers:
            operand, places = [np.array(read(at)) for read in left], [right_places]
        else:
            operand = product.addresses(int(pick(left)), product.m, product.a_by_k, base)
            places = [operand, right_places]
        if machine.races:
            warps = range(at.start // 32, at.stop // 32)
            for some in places:
                machine.races.product_reads(warps, np.unique(np.stack([some, some + 1])))
        add = bool(pick(adds))
        machine.products.issue(at.start, lambda: product.perform(at, operand, right_places, add), product.sums,
                               product.inputs)

    def run(at):
        starts, size = units(machine, at)
        for unit in starts:
            machine.products.check(unit, product.sums, product.inputs, o.instruction)
            machine.products.check_fence(range(unit // 32, (unit + size) // 32), product.names, o.instruction)
            one(slice(unit, unit + size))
    return run
