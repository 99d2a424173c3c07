"""Arithmetic, bits, comparisons and conversions of ptxrun against Python's integers and exact fractions."""
from fractions import Fraction

import numpy as np
import pytest

from ptxrun import UnknownInstruction
from tests.ptxrun.hand_written import per_thread

random = np.random.default_rng(0)
A, B, C = (random.integers(0, 1 << 32, 32, np.uint32) for _ in range(3))
A[:4], B[:4] = [0, 1, 0x7FFFFFFF, 0x80000000], [3, 0xFFFFFFFF, 2, 7]
SMALL = (B & 31).astype(np.uint32)


def signed(x, bits=32):
    return int(x) - (1 << bits) * (int(x) >> bits - 1)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add.s32 %r15, %r0, %r1": lambda a, b, c: a + b,
    "sub.s32 %r15, %r0, %r1": lambda a, b, c: a - b,
    "mul.lo.s32 %r15, %r0, %r1": lambda a, b, c: a * b,
    "mad.lo.s32 %r15, %r0, %r1, %r2": lambda a, b, c: a * b + c,
    "mul.hi.s32 %r15, %r0, %r1": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r15, %r0, %r1": lambda a, b, c: int(a) * int(b) >> 32,
    "div.s32 %r15, %r0, %r1": lambda a, b, c: truncated(signed(a), signed(b)),
    "rem.s32 %r15, %r0, %r1": lambda a, b, c: signed(a) - truncated(signed(a), signed(b)) * signed(b),
    "div.u32 %r15, %r0, %r1": lambda a, b, c: int(a) // int(b),
    "rem.u32 %r15, %r0, %r1": lambda a, b, c: int(a) % int(b),
    "min.s32 %r15, %r0, %r1": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r15, %r0, %r1": lambda a, b, c: max(a, b),
    "max.relu.s32 %r15, %r0, %r1": lambda a, b, c: max(signed(a), signed(b), 0),
    "neg.s32 %r15, %r0": lambda a, b, c: -a,
    "abs.s32 %r15, %r0": lambda a, b, c: abs(signed(a)),
    "xor.b32 %r15, %r0, %r1": lambda a, b, c: a ^ b,
    "not.b32 %r15, %r0": lambda a, b, c: ~a,
    "shl.b32 %r15, %r0, %r1": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r15, %r0, %r1": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %r15, %r0, %r1": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r15, %r0, %r1, %r2": lambda a, b, c: ((b << 32 | a) << c % 32) >> 32,
    "shf.r.wrap.b32 %r15, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) >> c % 32,
    "lop3.b32 %r15, %r0, %r1, %r2, 0xE8": lambda a, b, c: a & b | a & c | b & c,
    "lop3.b32 %r15, %r0, %r1, %r2, 0x96": lambda a, b, c: a ^ b ^ c,
    "popc.b32 %r15, %r0": lambda a, b, c: a.bit_count(),
    "clz.b32 %r15, %r0": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r15, %r0": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfe.u32 %r15, %r0, 5, 9": lambda a, b, c: a >> 5 & 0x1FF,
    "bfe.s32 %r15, %r0, 5, 9": lambda a, b, c: signed(a << 18 & 0xFFFFFFFF) >> 23,
    "bfe.s32 %r15, %r0, 28, 9": lambda a, b, c: signed(a) >> 28,
    "bfi.b32 %r15, %r0, %r1, 8, 8": lambda a, b, c: b & ~0xFF00 | (a & 0xFF) << 8,
    "bfi.b32 %r15, %r0, %r1, 28, 9": lambda a, b, c: b & 0x0FFFFFFF | a << 28,
    "bfi.b32 %r15, %r0, %r1, 40, 3": lambda a, b, c: b,
    "bfi.b32 %r15, %r0, %r1, 0, 32": lambda a, b, c: a,
    "bfi.b32 %r15, %r0, %r1, 5, 0": lambda a, b, c: b,
    "prmt.b32 %r15, %r0, %r1, 0x7041": lambda a, b, c: int.from_bytes(
        bytes((a | b << 32).to_bytes(8, "little")[i] for i in (1, 4, 0, 7)), "little"),
    "max.s16x2 %r15, %r0, %r1": lambda a, b, c: sum(
        (max(signed(a >> s & 0xFFFF, 16), signed(b >> s & 0xFFFF, 16)) & 0xFFFF) << s for s in (0, 16)),
}
SHIFTS = ("shl", "shr")


@pytest.mark.parametrize("text", INTEGER)
def test_integer_instructions_follow_their_definition(text):
    b = SMALL + np.uint32(2) * (SMALL > 28) if text.startswith(SHIFTS) else np.maximum(B, 1).astype(np.uint32)
    found = per_thread(text + ";", A, b, C)
    expected = [INTEGER[text](int(x), int(y), int(z)) & 0xFFFFFFFF for x, y, z in zip(A, b, C)]
    assert found.tolist() == expected


def test_wide_products_keep_all_bits():
    found = per_thread("mul.wide.s32 %d15, %r0, %r1;", A, B, result=np.int64)
    assert found.tolist() == [signed(a) * signed(b) for a, b in zip(A, B)]
    found = per_thread("mad.wide.u32 %d15, %r0, %r1, %d0;", A, B, np.uint64(5), result=np.uint64)
    assert found.tolist() == [(int(a) * int(b) + 5) % 2**64 for a, b in zip(A, B)]


def test_a_fused_sum_is_rounded_once():
    """The exact sum lies just under a tie, on which a sum in float64 would end: rounding that again goes up."""
    a, b, c = np.float32(2**-12 * (1 + 2**-23)), np.float32(2**-12 * (1 - 2**-23)), np.float32(1 + 2**-23)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    assert Fraction(1) + Fraction(1, 2**23) < exact < Fraction(1) + Fraction(3, 2**24)
    found = per_thread("fma.rn.f32 %r15, %r0, %r1, %r2;", a, b, c, result=np.float32)
    assert set(found.tolist()) == {1 + 2.0**-23}


def test_floats_round_flush_and_pass_nan_as_the_modifiers_say():
    tiny, nan = np.float32(1e-39), np.float32(np.nan)
    assert per_thread("add.f32 %r15, %r0, 0f00000000;", tiny, result=np.float32)[0] == tiny
    assert per_thread("add.ftz.f32 %r15, %r0, 0f00000000;", tiny, result=np.float32)[0] == 0
    assert per_thread("max.f32 %r15, %r0, 0f3F800000;", nan, result=np.float32)[0] == 1
    assert np.isnan(per_thread("max.NaN.f32 %r15, %r0, 0f3F800000;", nan, result=np.float32)[0])
    assert per_thread("ex2.approx.ftz.f32 %r15, %r0;", np.float32(5), result=np.float32)[0] == 32
    assert per_thread("abs.f32 %r15, %r0;", np.float32(-2.5), result=np.float32)[0] == 2.5


def test_arithmetic_gives_one_nan_whichever_went_in():
    a, b = (np.uint32(bits).view(np.float32) for bits in (0xFFC0_0001, 0x7FC0_0002))
    for text in ("add.f32 %r15, %r0, %r1;", "mul.f32 %r15, %r1, %r0;", "fma.rn.f32 %r15, %r0, %r1, %r1;"):
        assert per_thread(text, a, b)[0] == 0x7FFFFFFF


def bf16(x):
    return np.float32(x).view(np.uint32) >> np.uint32(16)


def test_packed_bfloat16_products_are_rounded_once():
    """257 * 3 + 1 = 772 lies between 768 and 776... as bfloat16 of 8 bits; the other half is computed beside it."""
    pair = lambda low, high: bf16(low) | bf16(high) << np.uint32(16)  # noqa: E731
    found = per_thread("fma.rn.bf16x2 %r15, %r0, %r1, %r2;", pair(192, 1.5), pair(4, 2), pair(5, -1))[0]
    assert found == pair(772, 2)


@pytest.mark.parametrize("how,expected", [
    ("lt", [1, 0, 0, 0]), ("ge", [0, 1, 1, 0]), ("ltu", [1, 0, 0, 1]), ("neu", [1, 0, 1, 1]), ("ne", [1, 0, 1, 0]),
    ("eq", [0, 1, 0, 0]), ("nan", [0, 0, 0, 1]), ("num", [1, 1, 1, 0])])
def test_comparisons_say_what_they_make_of_nan(how, expected):
    a, b = np.zeros((2, 32), np.float32)
    a[:4], b[:4] = [1, 2, 3, np.nan], [2, 2, 1, 1]
    body = f"setp.{how}.f32 %p0|%p1, %r0, %r1; selp.b32 %r15, 1, 0, %p0; @%p1 add.s32 %r15, %r15, 2;"
    assert per_thread(body, a, b)[:4].tolist() == [1 if e else 2 for e in expected]


def test_comparisons_combine_with_a_predicate():
    body = "setp.gt.s32 %p1, %r1, 0; setp.lt.and.s32 %p0, %r0, 5, %p1; selp.b32 %r15, 7, 9, %p0;"
    assert per_thread(body, np.int32(3), np.int32(1))[0] == 7
    assert per_thread(body, np.int32(3), np.int32(-1))[0] == 9


CONVERSIONS = [
    ("cvt.rni.s32.f32 %r15, %r0;", np.float32(2.5), np.int32, 2),
    ("cvt.rzi.s32.f32 %r15, %r0;", np.float32(-2.5), np.int32, -2),
    ("cvt.rzi.s32.f32 %r15, %r0;", np.float32(1e20), np.int32, 2**31 - 1),
    ("cvt.rzi.u32.f32 %r15, %r0;", np.float32(-3), np.uint32, 0),
    ("cvt.rzi.s64.f32 %d15, %r0;", np.float32(-1e30), np.int64, -2**63),
    ("cvt.rzi.s32.f32 %r15, %r0;", np.float32(np.nan), np.int32, 0),
    ("cvt.rmi.f32.f32 %r15, %r0;", np.float32(-1.5), np.float32, -2),
    ("cvt.rn.f32.s32 %r15, %r0;", np.int32(2**24 + 1), np.float32, 2**24),
    ("cvt.rn.f32.s64 %r15, %d0;", np.int64(-5), np.float32, -5),
    ("cvt.s64.s32 %d15, %r0;", np.int32(-5), np.int64, -5),
    ("cvt.u64.u32 %d15, %r0;", np.int32(-5), np.int64, 2**32 - 5),
    ("cvt.u32.u16 %r15, %h0;", np.uint16(65535), np.uint32, 65535),
    ("cvt.s32.s8 %r15, %r0;", np.int32(0x1FF), np.int32, -1),
    ("cvt.u16.u32 %h15, %r0;", np.uint32(0x12345), np.uint16, 0x2345),
    ("cvt.rn.f16.f32 %h15, %r0;", np.float32(1 + 2**-11), np.float16, 1),
    ("cvt.f32.f16 %r15, %h0;", np.float16(0.1), np.float32, float(np.float16(0.1))),
    ("cvt.rn.bf16.f32 %h15, %r0;", np.float32(1 + 2**-8), np.uint16, 0x3F80),
    ("cvt.rn.bf16.f32 %h15, %r0;", np.float32(1 + 3 * 2**-8), np.uint16, 0x3F82),
    ("cvt.f32.bf16 %r15, %h0;", np.uint16(0x3FC0), np.float32, 1.5),
    ("cvt.rn.bf16x2.f32 %r15, %r0, 0f40000000;", np.float32(1), np.uint32, 0x3F804000),
    ("cvt.rna.tf32.f32 %r15, %r0;", np.float32(1 + 2**-11), np.float32, 1 + 2**-10),
]


@pytest.mark.parametrize("text,value,kind,expected", CONVERSIONS, ids=[f"{c[0]}{c[1]}" for c in CONVERSIONS])
def test_conversions_round_and_saturate(text, value, kind, expected):
    assert per_thread(text, value, result=kind)[0] == expected


def test_moves_take_registers_apart_and_together():
    body = "mov.b64 {%r1, %r2}, %d0; mov.b64 %d15, {%r2, %r1};"
    assert per_thread(body, np.uint64(0x1111_2222_3333_4444), result=np.uint64)[0] == 0x3333_4444_1111_2222


def test_names_of_an_inner_scope_are_its_own():
    body = """
    mov.b32 %r15, 1;
    { .reg .b32 x; mov.b32 x, 5; add.s32 %r15, %r15, x; }
    { .reg .b32 x; mov.b32 x, 7; add.s32 %r15, %r15, x; }"""
    assert per_thread(body)[0] == 13


def test_comparisons_flush_subnormal_numbers_where_they_say_so():
    tiny = np.float32(1e-39)
    for how, expected in (("gt.f32", 1), ("gt.ftz.f32", 0)):
        body = f"setp.{how} %p0, %r0, 0f00000000; selp.b32 %r15, 1, 0, %p0;"
        assert per_thread(body, tiny)[0] == expected


@pytest.mark.parametrize("text", ["dp4a.u32.u32 %r15, %r0, %r0, %r0", "add.rz.f32 %r15, %r0, %r0",
                                  "cvt.rp.f16.f32 %h0, %r0", "mov.b32 %r15, elsewhere",
                                  "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4}"])
def test_an_unknown_instruction_is_an_error_that_names_it(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        per_thread(text + ";", A)
