"""cvt: between number formats, with the rounding that the modifiers ask for."""
import numpy as np

from ptxrun.instructions.arithmetic import apply
from ptxrun.numbers import DTYPES, bf16_to_f32, f32_to_bf16, float_to_int, flush, is_float, pack, round_to, size

WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(o):
    """cvt of one value, or of two into a packed pair."""
    target, source = o.parts[-2:]
    if target in ("f16x2", "bf16x2") and source == "f32":
        return _convert_pair(o, target)
    if target == "tf32" and source == "f32" and o.has("rna") and not o.has("relu"):
        return apply(_to_tf32, [o.read(1, "b32")], o.write(0, "b32"))
    if target not in DTYPES or source not in DTYPES or "x2" in target + source or "tf32" in (target, source):
        raise o.unknown()
    if o.has("relu") and target not in ("f16", "bf16") or o.has("sat") and is_float(target) != is_float(source):
        raise o.unknown("this modifier of this type")
    value = _read(o, source)
    if is_float(source):
        return _from_float(o, value, target, source)
    if is_float(target):
        return apply(lambda x: _int_to_float(x, target), [value], o.write(0, target))
    if o.has("sat"):
        limits = np.iinfo(DTYPES[target])
        return apply(lambda x: np.clip(x.astype(object), limits.min, limits.max).astype(DTYPES[target]), [value],
                      o.write_wide(o.texts[0], target))
    return apply(lambda x: x.astype(DTYPES[target]), [value], o.write_wide(o.texts[0], target))


def _read(o, kind: str):
    """Read a source whose register may be wider than its type; bfloat16 as float32."""
    bits = o.read_bits(o.texts[1], size(kind))
    if kind == "bf16":
        return lambda at: bf16_to_f32(bits(at))
    return lambda at: np.asarray(bits(at)).view(DTYPES[kind])


def _from_float(o, value, target: str, source: str):
    """From a float to a float or to an integer."""
    whole = next((WHOLE[part] for part in o.parts if part in WHOLE), None)
    if o.has("ftz") and source == "f32":
        read = value
        value = lambda at: flush(read(at))  # noqa: E731
    if not is_float(target):
        if whole is None:
            raise o.unknown("how to round")
        return apply(lambda x: float_to_int(whole(x), target), [value], o.write_wide(o.texts[0], target))
    if any(o.has(mode) for mode in ("rz", "rm", "rp")):
        raise o.unknown("rounding")
    steps = [whole] if whole else []
    steps += [lambda x: np.maximum(x, x.dtype.type(0))] if o.has("relu") else []
    steps += [lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)] if o.has("sat") else []

    def converted(x):
        for step in steps:
            x = step(x)
        return f32_to_bf16(x) if target == "bf16" and source != "f64" else round_to(x, target)
    return apply(converted, [value], o.write(0, target))


def _int_to_float(x, target: str):
    return x.astype(DTYPES[target]) if target in ("f32", "f64") else round_to(x.astype(np.float64), target)


def _convert_pair(o, target: str):
    """The first operand becomes the upper half."""
    relu = o.has("relu")

    def packed(high, low):
        high, low = ((np.maximum(x, np.float32(0)) if relu else np.asarray(x)).astype(np.float64) for x in (high, low))
        return pack(low, high, target)
    return apply(packed, [o.read(1, "f32"), o.read(2, "f32")], o.write(0, "b32"))


def _to_tf32(bits):
    """Round to nearest, ties away from zero, 13 bits less."""
    return bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)
