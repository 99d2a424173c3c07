"""Bits, predicates and selection: and, or, xor, not, shifts, bit fields, byte permutation, setp, selp, mov."""
import re

import numpy as np

from ptxrun.instructions.arithmetic import apply
from ptxrun.numbers import DTYPES, UNSIGNED, bf16_to_f32, flush, is_float, size
from ptxrun.ptx import members

COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def bitwise(o):
    """and, or, xor, not of bits or of predicates."""
    operation = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[o.parts[0]]
    return apply(operation, [o.read(i) for i in range(1, len(o.texts))], o.write())


def shift(o):
    """shl and shr: an amount beyond the width gives zeros, or copies of the sign."""
    kind = o.type.replace("b", "u")
    bits, dtype, right = 8 * size(kind), DTYPES[kind], o.parts[0] == "shr"
    fill = bits - 1 if kind[0] == "s" and right else None
    move = np.right_shift if right else np.left_shift

    def shifted(x, amount):
        inside = move(x, np.minimum(amount, bits - 1).astype(dtype))
        return inside if fill is not None else np.where(amount < bits, inside, dtype(0))
    return apply(shifted, [o.read(1, kind), o.read(2, "u32")], o.write(0, kind))


def funnel_shift(o):
    """shf.l and shf.r of a pair of registers."""
    left, wrap = o.has("l"), o.has("wrap")

    def shifted(low, high, amount):
        amount = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        pair = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
        return (pair << amount >> np.uint64(32) if left else pair >> amount).astype(np.uint32)
    return apply(shifted, [o.read(i, "u32") for i in (1, 2, 3)], o.write(0, "u32"))


def extract(o):
    """bfe: a bit field, its sign extended for signed types."""
    bits, signed = 8 * size(o.type), o.type[0] == "s"
    wide = np.int64 if signed else np.uint64

    def field(x, start, length):
        start, length = (np.asarray(v & np.uint32(255)).astype(np.int64) for v in (start, length))
        x = np.asarray(x).astype(wide)
        length = np.minimum(length, np.maximum(bits - start, 0)) if not signed else length
        drop = np.clip(64 - start - length, 0, 63)
        inside = (x << drop.astype(wide)) >> np.clip(64 - length, 0, 63).astype(wide)
        inside = np.where(start + length > bits, x >> np.minimum(start, bits - 1).astype(wide), inside)
        return np.where(length == 0, wide(0), inside).astype(DTYPES[o.type])
    return apply(field, [o.read(1), o.read(2, "u32"), o.read(3, "u32")], o.write())


def insert(o):
    """bfi: the lower bits of the first operand as a field of the second one; what lies beyond the width is cut off."""
    bits, dtype = 8 * size(o.type), DTYPES[o.type]

    def inserted(field, x, start, length):
        start, length = (np.asarray(v & np.uint32(255)) for v in (start, length))
        ones = np.where(length < bits, (dtype(1) << np.minimum(length, bits - 1).astype(dtype)) - dtype(1), ~dtype(0))
        mask = np.where(start < bits, ones << np.minimum(start, bits - 1).astype(dtype), dtype(0))
        return x & ~mask | field << np.minimum(start, bits - 1).astype(dtype) & mask
    reads = [o.read(1), o.read(2), o.read(3, "u32"), o.read(4, "u32")]
    return apply(inserted, reads, o.write())


def permute(o):
    """prmt: each nibble of the selector takes one of eight bytes, or eight copies of its sign."""
    def permuted(a, b, selector):
        pair = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
        result = np.uint32(0)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = pair >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(nibble & np.uint32(8), sign, byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * i)
        return result
    return apply(permuted, [o.read(i, "b32") for i in (1, 2, 3)], o.write(0, "b32"))


def lookup(o):
    """lop3: any function of three bits, as a table of eight."""
    table = o.constant(4)

    def result(a, b, c):
        found = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                found = found | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return found
    return apply(result, [o.read(i, "b32") for i in (1, 2, 3)], o.write(0, "b32"))


def count_bits(o):
    """popc, clz and brev."""
    bits = 8 * size(o.type)

    def spread(x):
        return (np.asarray(x)[..., None] >> np.arange(bits, dtype=DTYPES[o.type]) & DTYPES[o.type](1)).astype(np.uint64)
    if o.parts[0] == "popc":
        return apply(lambda x: spread(x).sum(-1), [o.read(1)], o.write(0, "u32"))
    if o.parts[0] == "clz":
        highest = np.arange(1, bits + 1)
        return apply(lambda x: bits - (spread(x) * highest).max(-1).astype(np.int64), [o.read(1)], o.write(0, "u32"))
    places = np.arange(bits, dtype=np.uint64)[::-1]
    return apply(lambda x: (spread(x) << places).sum(-1), [o.read(1)], o.write())


def select(o):
    """selp: one of two by a predicate."""
    return apply(lambda a, b, chosen: np.where(chosen, a, b), [o.read(1), o.read(2), o.read(3, "pred")], o.write())


def comparison(how: str, kind: str):
    """A function of two values for the comparison `how`; for floats those with u are true of NaN, others false."""
    if not is_float(kind):
        return COMPARE[how]
    nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if how in ("nan", "num"):
        return nan if how == "nan" else lambda a, b: ~nan(a, b)
    if how.endswith("u") and how[:-1] in COMPARE:
        plain = COMPARE[how[:-1]]
        return lambda a, b: plain(a, b) | nan(a, b)
    if how == "ne":
        return lambda a, b: (a != b) & ~nan(a, b)
    return COMPARE[how]


def compare(o):
    """setp.how[.combine]: a predicate, and behind `|` its opposite."""
    kind, how = o.type, o.parts[1]
    if how not in COMPARE and how not in ("nan", "num", "equ", "neu", "ltu", "leu", "gtu", "geu"):
        raise o.unknown()
    plain = comparison(how, kind)
    test = (lambda a, b: plain(bf16_to_f32(a), bf16_to_f32(b))) if kind == "bf16" else plain
    if o.has("ftz"):
        test = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
    combine = COMBINE.get(o.parts[2])
    first, _, second = o.texts[0].partition("|")
    write, write_opposite = o.write_text(first, "pred"), o.write_text(second, "pred") if second else None
    a, b, other = o.read(1), o.read(2), o.read(3, "pred") if combine else None

    def run(at):
        holds = test(a(at), b(at))
        opposite = ~holds
        if combine:
            more = other(at)
            holds, opposite = combine(holds, more), combine(opposite, more)
        write(at, holds)
        if write_opposite is not None:
            write_opposite(at, opposite)
    return run


def move(o):
    """mov: a copy, and the parts of a register into several or several into one; cvta of an address is one, too."""
    if o.texts[0].startswith("{"):
        return _unpack(o)
    if o.texts[1].startswith("{"):
        return _pack(o)
    source = o.texts[1]
    if source not in o.registers and re.fullmatch(r"[A-Za-z_]\w*", source) and source != "global_smem":
        addresses = o.machine.parameter_addresses
        if source not in addresses:
            raise o.unknown(f"symbol {source}")
        value = DTYPES[o.type](addresses[source])
        return apply(lambda x: x, [lambda at: value], o.write())
    return apply(lambda x: x, [o.read(1)], o.write())


def _unpack(o):
    names = members(o.texts[0])
    whole = size(o.type)
    part = whole // len(names)
    read = o.read(1, f"b{8 * whole}")
    writes = [o.write_text(name, f"b{8 * part}") for name in names]

    def run(at):
        bits = np.asarray(read(at))
        for i, write in enumerate(writes):
            write(at, (bits >> bits.dtype.type(8 * part * i)).astype(UNSIGNED[part]))
    return run


def _pack(o):
    names = members(o.texts[1])
    whole = size(o.type)
    part = whole // len(names)
    reads = [o.read_text(name, f"b{8 * part}") for name in names]
    write, dtype = o.write(0, f"b{8 * whole}"), UNSIGNED[whole]

    def run(at):
        bits = dtype(0)
        for i, read in enumerate(reads):
            bits = bits | np.asarray(read(at)).astype(dtype) << dtype(8 * part * i)
        write(at, bits)
    return run
