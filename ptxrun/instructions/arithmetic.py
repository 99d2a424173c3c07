"""Integer and floating-point arithmetic.

Sums, products and fused multiply-adds are rounded once, as PTX defines them. Approximate instructions (ex2.approx,
rsqrt.approx, div.full) are numpy's, which err less than the hardware's.
"""
import numpy as np

from ptxrun.numbers import (
    DTYPES,
    SIGNED,
    UNSIGNED,
    bf16_to_f32,
    canonical,
    flush,
    fma32,
    halves,
    is_float,
    pack,
    quotient,
    round_to,
    size,
)

FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
         "min": np.fmin, "max": np.fmax}
PROPAGATING = {"min": np.minimum, "max": np.maximum}  # .NaN
INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
           "div": quotient, "rem": lambda a, b: a - quotient(a, b) * b}
APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rcp": lambda x: x.dtype.type(1) / x, "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x)}


def arithmetic(o):
    """add, sub, mul, mad, fma, div, rem, min, max, neg, abs of any type."""
    if o.has("relu") and o.type != "s32" or o.has("ftz") and o.type != "f32":
        raise o.unknown("this modifier of this type")
    if o.type in ("f16x2", "bf16x2", "s16x2", "u16x2"):
        return _packed(o)
    if o.type == "bf16":
        return _bf16(o)
    return _floating(o) if is_float(o.type) else _integer(o)


def apply(operation, reads, write):
    """The function that writes `operation` of what is read."""
    if len(reads) == 1:
        a, = reads
        return lambda at: write(at, operation(a(at)))
    if len(reads) == 2:
        a, b = reads
        return lambda at: write(at, operation(a(at), b(at)))
    if len(reads) == 3:
        a, b, c = reads
        return lambda at: write(at, operation(a(at), b(at), c(at)))
    a, b, c, d = reads
    return lambda at: write(at, operation(a(at), b(at), c(at), d(at)))


def _float_operation(o):
    """The numpy function of a floating-point opcode on float32, or wider values."""
    base = o.parts[0]
    if base == "fma":
        return lambda a, b, c: np.multiply(a, b, dtype=np.float64) + c
    return PROPAGATING[base] if o.has("NaN") else FLOAT[base]


def _floating(o):
    reads = [o.read(i) for i in range(1, len(o.texts))]
    operation = _float_operation(o)
    if o.parts[0] == "fma":
        if o.type == "f64":
            raise o.unknown("float64 is not fused")
        operation = fma32 if o.type == "f32" else lambda a, b, c: round_to(
            np.multiply(a, b, dtype=np.float64) + c, "f16")
    if o.has("ftz"):
        rounded = operation
        operation = lambda *x: flush(rounded(*(flush(value) for value in x)))  # noqa: E731
    if o.type == "f32" and o.parts[0] not in ("neg", "abs"):
        computed = operation
        operation = lambda *x: canonical(computed(*x))  # noqa: E731
    return apply(operation, reads, o.write())


def _bf16(o):
    operation, kind = _float_operation(o), "b16"

    def rounded(*bits):
        return round_to(operation(*(bf16_to_f32(x).astype(np.float64) for x in bits)), "bf16")
    return apply(rounded, [o.read(i, kind) for i in range(1, len(o.texts))], o.write(0, kind))


def _packed(o):
    kind = o.type
    whole = kind in ("s16x2", "u16x2")
    operation = INTEGER[o.parts[0]] if whole else _float_operation(o)
    widen = (lambda x: x) if whole else (lambda x: x.astype(np.float64))

    def rounded(*pairs):
        parts = [halves(x, kind) for x in pairs]
        return pack(*(operation(*(widen(part[i]) for part in parts)) for i in range(2)), kind)
    return apply(rounded, [o.read(i, "b32") for i in range(1, len(o.texts))], o.write(0, "b32"))


def _integer(o):
    base, kind = o.parts[0], o.type
    if base in ("mul", "mad"):
        return _product(o)
    # Sums wrap around, so the sign does not matter to them; numpy's unsigned sums say nothing of it.
    kind = f"u{kind[1:]}" if base in ("add", "sub") else kind
    operation = INTEGER[base]
    if o.has("relu"):
        plain = operation
        operation = lambda a, b: np.maximum(plain(a, b), a.dtype.type(0))  # noqa: E731
    return apply(operation, [o.read(i, kind) for i in range(1, len(o.texts))], o.write(0, kind))


def _product(o):
    """mul and mad: the lower half, the upper half, or all bits of the product."""
    kind, bits = o.type, 8 * size(o.type)
    a, b = o.read(1), o.read(2)
    family = SIGNED if kind[0] == "s" else UNSIGNED
    if o.has("lo"):
        a, b, result, product = o.read(1, f"u{bits}"), o.read(2, f"u{bits}"), f"u{bits}", np.multiply
    elif o.has("wide"):
        wide, result = family[bits // 4], f"{kind[0]}{2 * bits}"
        product = lambda x, y: np.multiply(x, y, dtype=wide)  # noqa: E731
    elif o.has("hi"):
        result, product = kind, _upper_half(kind)
    else:
        raise o.unknown()
    if o.parts[0] == "mul":
        return apply(product, [a, b], o.write(0, result))
    return apply(lambda x, y, z: product(x, y) + z, [a, b, o.read(3, result)], o.write(0, result))


def _upper_half(kind: str):
    dtype = DTYPES[kind]
    if size(kind) < 8:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size(kind)]
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide(8 * size(kind))).astype(dtype)

    def product(a, b):
        exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return np.asarray(exact >> 64).astype(dtype)
    return product


def approximate(o):
    """ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh."""
    operation = APPROXIMATE[o.parts[0]]
    if o.type not in ("f32", "f64"):
        raise o.unknown()
    if o.has("ftz"):
        plain = operation
        operation = lambda x: flush(plain(flush(x)))  # noqa: E731
    return apply(lambda x: operation(np.asarray(x)), [o.read(1)], o.write())
