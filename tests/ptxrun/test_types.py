"""Each instruction of ptxrun in each type that it has, against Python's integers and exact fractions."""
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxrun.hand_written import per_thread

random = np.random.default_rng(3)
LETTER = {16: "h", 32: "r", 64: "d"}
EDGES = (0, 1, 2, -1, -2)  # and the smallest and largest numbers of a type
INTEGERS = [f"{sign}{bits}" for bits in (16, 32, 64) for sign in "su"]


def values(kind: str):
    """32 pairs of numbers of a type, as unsigned bits: its edges, and random ones."""
    bits = int(kind[1:])
    edges = [*EDGES, 1 << bits - 1, (1 << bits - 1) - 1, 5]
    a = edges + [int(x) for x in random.integers(0, 1 << 63, 24)]
    b = [int(x) for x in random.integers(0, 1 << 63, 24)] + edges
    return [np.array([x % (1 << bits) for x in some], f"u{bits // 8}") for some in (a, b)]


def as_type(bits_of, kind: str) -> int:
    """The number that bits stand for."""
    number, bits = int(bits_of), int(kind[1:])
    return number - (1 << bits) if kind[0] == "s" and number >> bits - 1 else number


def operands(count: int, bits: int) -> str:
    """Registers of a width: the result, then the inputs."""
    return ", ".join(f"%{LETTER[bits]}{i}" for i in (15, *range(count)))


def towards_zero(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": towards_zero, "rem": lambda a, b: a - towards_zero(a, b) * b}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integers_of_every_width_follow_the_definition(name, kind):
    bits = int(kind[1:])
    a, b = values(kind)
    if name in ("div", "rem"):
        b[b == 0] = 3
        b[as_type_all(b, kind) == -1] = 3  # the smallest number over -1 is undefined
    found = per_thread(f"{name}.{kind} {operands(2, bits)};", a, b, result=a.dtype)
    assert found.tolist() == [BINARY[name](as_type(x, kind), as_type(y, kind)) % (1 << bits) for x, y in zip(a, b)]


def as_type_all(bits, kind: str):
    return np.array([as_type(x, kind) for x in bits], object)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs_are_turned_and_taken_away(kind):
    bits = int(kind[1:])
    a, _ = values(kind)
    for name, function in (("neg", lambda x: -x), ("abs", abs)):
        found = per_thread(f"{name}.{kind} {operands(1, bits)};", a, result=a.dtype)
        assert found.tolist() == [function(as_type(x, kind)) % (1 << bits) for x in a]


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products_have_twice_the_bits(kind):
    bits = int(kind[1:])
    a, b = values(kind)
    c = np.arange(32, dtype=f"u{bits // 4}") * 3
    wide, narrow = LETTER[2 * bits], LETTER[bits]
    inputs = f"%{wide}15, %{narrow}0, %{narrow}1"
    found = per_thread(f"mul.wide.{kind} {inputs};", a, b, result=c.dtype)
    assert found.tolist() == [as_type(x, kind) * as_type(y, kind) % (1 << 2 * bits) for x, y in zip(a, b)]
    found = per_thread(f"mad.wide.{kind} {inputs}, %{wide}0;", a, b, c, result=c.dtype)
    assert found.tolist() == [(as_type(x, kind) * as_type(y, kind) + int(z)) % (1 << 2 * bits)
                              for x, y, z in zip(a, b, c)]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_products_have_an_upper_half(kind):
    bits = int(kind[1:])
    a, b = values(kind)
    found = per_thread(f"mul.hi.{kind} {operands(2, bits)};", a, b, result=a.dtype)
    assert found.tolist() == [(as_type(x, kind) * as_type(y, kind) >> bits) % (1 << bits) for x, y in zip(a, b)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits_of_every_width_are_combined_and_shifted(bits):
    a, b = values(f"u{bits}")
    few = (b % (bits + 9)).astype(np.uint32)  # as far as beyond the width
    for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        found = per_thread(f"{name}.b{bits} {operands(2, bits)};", a, b, result=a.dtype)
        assert found.tolist() == [function(int(x), int(y)) for x, y in zip(a, b)]
    assert per_thread(f"not.b{bits} {operands(1, bits)};", a, result=a.dtype).tolist() == (~a).tolist()
    letter = LETTER[bits]
    amount = "%r1" if bits == 32 else "%r0"
    for text, function in ((f"shl.b{bits}", lambda x, n: x << n), (f"shr.u{bits}", lambda x, n: x >> n),
                           (f"shr.s{bits}", lambda x, n: as_type(x, f"s{bits}") >> min(n, bits - 1))):
        found = per_thread(f"{text} %{letter}15, %{letter}0, {amount};", a, few, result=a.dtype)
        assert found.tolist() == [function(int(x), int(n)) % (1 << bits) for x, n in zip(a, few)], text


def test_a_field_of_64_bits_is_inserted():
    a, b = values("u64")
    found = per_thread("bfi.b64 %d15, %d0, %d1, 20, 30;", a, b, result=np.uint64)
    field = (1 << 30) - 1
    assert found.tolist() == [int(y) & ~(field << 20) | (int(x) & field) << 20 for x, y in zip(a, b)]


def test_predicates_are_combined():
    a, b = np.arange(32, dtype=np.uint32) & 1, np.arange(32, dtype=np.uint32) >> 1 & 1
    for text, function in (("and.pred %p2, %p0, %p1", lambda x, y: x & y),
                           ("or.pred %p2, %p0, %p1", lambda x, y: x | y),
                           ("xor.pred %p2, %p0, %p1", lambda x, y: x ^ y),
                           ("not.pred %p2, %p0", lambda x, y: 1 - x), ("mov.pred %p2, %p1", lambda x, y: y)):
        body = f"setp.ne.u32 %p0, %r0, 0; setp.ne.u32 %p1, %r1, 0; {text}; selp.b32 %r15, 1, 0, %p2;"
        assert np.array_equal(per_thread(body, a, b), function(a, b)), text


@pytest.mark.parametrize("kind", INTEGERS)
def test_comparisons_know_the_sign(kind):
    a, b = values(kind)
    b[:6] = a[:6]
    letter = LETTER[int(kind[1:])]
    for how in ("eq", "ne", "lt", "le", "gt", "ge"):
        found = per_thread(f"setp.{how}.{kind} %p0, %{letter}0, %{letter}1; selp.b32 %r15, 1, 0, %p0;", a, b)
        assert found.tolist() == [int(getattr(as_type(x, kind), f"__{how}__")(as_type(y, kind))) for x, y in zip(a, b)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_value_is_chosen_moved_and_compared_by_its_bits(bits):
    a, b = values(f"u{bits}")
    letter = LETTER[bits]
    body = f"setp.lt.u32 %p0, %lane, 7; selp.b{bits} %{letter}2, %{letter}0, %{letter}1, %p0; " \
           f"mov.b{bits} %{letter}15, %{letter}2;"
    assert per_thread(body, a, b, result=a.dtype).tolist() == [*a[:7].tolist(), *b[7:].tolist()]
    b[::2] = a[::2]
    found = per_thread(f"setp.eq.b{bits} %p0, %{letter}0, %{letter}1; selp.b32 %r15, 1, 0, %p0;", a, b)
    assert found.tolist() == [int(x == y) for x, y in zip(a, b)]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_are_cut_off_or_extended_by_their_sign(source, target):
    a, _ = values(source)
    bits = int(target[1:])
    body = f"cvt.{target}.{source} %{LETTER[bits]}15, %{LETTER[int(source[1:])]}0;"
    assert per_thread(body, a, result=f"u{bits // 8}").tolist() == [as_type(x, source) % (1 << bits) for x in a]


FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_of_every_width_round_to_nearest(kind):
    dtype = np.dtype(FLOATS[kind])
    bits = 8 * dtype.itemsize
    a, b = (random.standard_normal(32).astype(dtype) for _ in range(2))
    for name, function in (("add", lambda x, y: x + y), ("sub", lambda x, y: x - y), ("mul", lambda x, y: x * y),
                           ("min", min), ("max", max)):
        rounding = ".rn" if name in ("add", "sub", "mul") else ""
        found = per_thread(f"{name}{rounding}.{kind} {operands(2, bits)};", a, b, result=dtype)
        for x, y, z in zip(a, b, found):
            error = abs(function(Fraction(float(x)), Fraction(float(y))) - Fraction(float(z)))
            assert error <= Fraction(float(np.spacing(np.abs(z)))) / 2
    found = per_thread(f"neg.{kind} {operands(1, bits)};", a, result=dtype)
    assert found.tolist() == (-a).tolist()


APPROXIMATE = {
    "div.full.f32 %r15, %r0, %r1": lambda x, y: x / y, "div.approx.f32 %r15, %r0, %r1": lambda x, y: x / y,
    "div.rn.f32 %r15, %r0, %r1": lambda x, y: x / y, "rcp.approx.ftz.f32 %r15, %r0": lambda x, y: 1 / x,
    "sqrt.approx.ftz.f32 %r15, %r0": lambda x, y: x ** 0.5, "sqrt.rn.f32 %r15, %r0": lambda x, y: x ** 0.5,
    "rsqrt.approx.ftz.f32 %r15, %r0": lambda x, y: x ** -0.5, "lg2.approx.f32 %r15, %r0": lambda x, y: np.log2(x),
    "ex2.approx.f32 %r15, %r0": lambda x, y: 2 ** x, "sin.approx.f32 %r15, %r0": lambda x, y: np.sin(x),
    "cos.approx.f32 %r15, %r0": lambda x, y: np.cos(x), "tanh.approx.f32 %r15, %r0": lambda x, y: np.tanh(x)}


@pytest.mark.parametrize("text", APPROXIMATE)
def test_functions_are_right_to_a_few_last_bits(text):
    a, b = (random.uniform(0.1, 4, 32).astype(np.float32) for _ in range(2))
    exact = APPROXIMATE[text](a.astype(np.float64), b.astype(np.float64))
    found = per_thread(text + ";", a, b, result=np.float32)
    assert (np.abs(found - exact) <= 4 * np.finfo(np.float32).eps * np.maximum(np.abs(exact), 0.25)).all()


@pytest.mark.parametrize("kind,count", [("b8", 1), ("b16", 1), ("b16", 2), ("b32", 1), ("b32", 2), ("b32", 4),
                                        ("b64", 1), ("b64", 2)])
def test_shared_memory_gives_back_vectors_of_every_width(kind, count):
    bits = max(16, int(kind[1:]))
    letter = LETTER[bits]
    registers = [f"%{letter}{i}" for i in range(2, 2 + count)]
    listed, shape = (f"{{{', '.join(registers)}}}", f".v{count}") if count > 1 else (registers[0], "")
    fill = " ".join(f"add.u{bits} {register}, %{letter}0, {7 * i};" for i, register in enumerate(registers))
    clear = " ".join(f"mov.b{bits} {register}, 0;" for register in registers)
    total = f"mov.b{bits} %{letter}15, 0; " + " ".join(
        f"mad.lo.u{bits} %{letter}15, %{letter}15, 3, {register};" for register in registers)
    x = np.arange(32, dtype=f"u{bits // 8}")
    found = per_thread(f"""mul.lo.u32 %r9, %lane, {count * int(kind[1:]) // 8}; {fill}
        st.shared{shape}.{kind} [%r9], {listed}; {clear} ld.shared{shape}.{kind} {listed}, [%r9]; {total}""",
                       x, shared=32 * 16, result=x.dtype)
    expected = 0
    for i in range(count):
        expected = expected * 3 + x + 7 * i
    assert np.array_equal(found, expected)
