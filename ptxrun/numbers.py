"""PTX's number formats in numpy, and arithmetic that rounds as PTX defines it.

bfloat16 has no numpy type: its values travel as float32, its bits as uint16. A float64 that stands for an exact result
is rounded once, by way of "round to odd", so that rounding twice never shows.
"""
import numpy as np

DTYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f16x2": np.uint32, "bf16x2": np.uint32, "s16x2": np.uint32, "u16x2": np.uint32, "tf32": np.uint32,
    "pred": np.bool_,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
FLOATS = ("f16", "f32", "f64", "bf16")


def size(kind: str) -> int:
    """Bytes of a type."""
    return np.dtype(DTYPES[kind]).itemsize


def is_float(kind: str) -> bool:
    """Whether a scalar type is a floating-point one."""
    return kind in FLOATS


def literal(text: str, kind: str):
    """A number as PTX writes it: 0f3F800000, 0d..., 0x1F, -5, 16U."""
    dtype = np.dtype(DTYPES[kind])
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return np.uint32(int(text[2:], 16)).view(np.float32).astype(dtype) if kind == "f64" else _bits(
            int(text[2:], 16), dtype)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return _bits(int(text[2:], 16), dtype)
    number = int(text.rstrip("U"), 0)
    return np.bool_(number != 0) if kind == "pred" else _bits(number, dtype)


def _bits(number: int, dtype: np.dtype):
    return UNSIGNED[dtype.itemsize](number & (1 << 8 * dtype.itemsize) - 1).view(dtype)


def bf16_to_f32(bits):
    """The values of bfloat16 bits, as float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    """Round float32 to bfloat16, nearest and ties to even; the bits, as uint16."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_odd_f32(x):
    """float64 to float32 towards zero, with the last bit set where that lost something: a later rounding is right."""
    x = np.asarray(x, np.float64)
    near = x.astype(np.float32)
    bits = np.where(np.abs(near.astype(np.float64)) > np.abs(x), near.view(np.uint32) - np.uint32(1),
                    near.view(np.uint32))
    return np.where((near != x) & ~np.isnan(x), bits | np.uint32(1), bits).view(np.float32)


def round_to(x, kind: str):
    """Round a float64 result once to `kind`; bfloat16 as bits."""
    return f32_to_bf16(to_odd_f32(x)) if kind == "bf16" else np.asarray(x).astype(DTYPES[kind])


def fma32(a, b, c):
    """a * b + c, rounded once to float32.

    The product is exact in float64. The sum is rounded to 53 bits and then to 24, which differs from rounding once
    only where the 53 bits end in exactly one half of the last of the 24.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    half = (total.view(np.uint64) & np.uint64(0x1FFF_FFFF)) == np.uint64(0x1000_0000)
    if half.any():
        back = total - product
        lost = (product - (total - back)) + (c - back)
        towards = np.where(lost > 0, np.inf, -np.inf)
        total = np.where(half & (lost != 0), np.nextafter(total, towards), total)
    return total.astype(np.float32)


def canonical(x):
    """float32 with the one NaN that arithmetic gives, whichever NaN went in."""
    bad = x != x
    return np.where(bad, NAN, x) if bad.any() else x


def flush(x):
    """What .ftz makes of float32: a subnormal number is a zero of its sign."""
    return np.where(np.abs(x) < np.float32(2.0 ** -126), np.copysign(np.float32(0), x), x)


def halves(x, kind: str):
    """The lower and the upper value of packed pairs: float32 of f16x2 and bf16x2, int32 of s16x2, uint32 of u16x2."""
    x = np.asarray(x)
    if kind == "bf16x2":
        return (x << np.uint32(16)).view(np.float32), (x & np.uint32(0xFFFF0000)).view(np.float32)
    low, high = (part.astype(np.uint16) for part in (x & np.uint32(0xFFFF), x >> np.uint32(16)))
    wide = {"f16x2": (np.float16, np.float32), "s16x2": (np.int16, np.int32), "u16x2": (np.uint16, np.uint32)}[kind]
    return tuple(part.view(wide[0]).astype(wide[1]) for part in (low, high))


def pack(low, high, kind: str):
    """Packed pairs of two results, each rounded to half of `kind`."""
    if kind in ("s16x2", "u16x2"):
        low, high = (np.asarray(x).astype(np.uint16) for x in (low, high))
    else:
        low, high = (np.asarray(round_to(x, kind.removesuffix("x2"))).view(np.uint16) for x in (low, high))
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def float_to_int(x, kind: str):
    """Saturate floats that are whole numbers already to an integer type; NaN becomes 0."""
    x, limits = np.asarray(x, np.float64), np.iinfo(DTYPES[kind])
    inside = (x > float(limits.min)) & (x < float(limits.max))
    whole = np.where(inside, x, 0).astype(DTYPES[kind])
    whole = np.where(x >= float(limits.max), DTYPES[kind](limits.max), whole)
    return np.where(x <= float(limits.min), DTYPES[kind](limits.min), whole)


def quotient(a, b):
    """Integer division towards zero; a division by zero, which PTX leaves open, gives all ones."""
    zero, safe = b == 0, np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // safe)
    whole = a // safe
    whole = whole + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, a.dtype.type(-1), whole)
