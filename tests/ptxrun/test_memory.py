"""Loads, stores and atomics of ptxrun: vectors, bounds, alignment, races between blocks and threads."""
import functools

import numpy as np
import pytest

from ptxrun import Misaligned, OutOfBounds, Race, UnknownInstruction
from tests.ptxrun.hand_written import per_thread, run_kernel

POINTERS = "ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];"


def test_vectors_are_loaded_and_stored_in_order():
    x, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    run_kernel(POINTERS + """
        mul.wide.u32 %offset, %me, 16; add.s64 %d0, %d0, %offset; add.s64 %d1, %d1, %offset;
        ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0];
        st.global.v2.b32 [%d1], {%r3, %r2}; st.global.v2.b32 [%d1+8], {%r1, %r0};""", [x, out])
    assert out.reshape(-1, 4)[:, ::-1].tolist() == x.reshape(-1, 4).tolist()


def test_narrow_loads_fill_a_wider_register():
    x, out = np.full(4, 0x80, np.uint8), np.zeros(32, np.uint32)
    for kind, expected in (("u8", 0x80), ("s8", 0xFFFFFF80)):
        run_kernel(POINTERS + f"""
            ld.global.{kind} %r0, [%d0]; mul.wide.u32 %offset, %me, 4; add.s64 %d1, %d1, %offset;
            st.global.b32 [%d1], %r0;""", [x, out])
        assert set(out.tolist()) == {expected}


def test_inactive_threads_touch_no_memory_and_keep_their_registers():
    x = np.arange(8, dtype=np.uint32)
    body = """ld.param.u64 %d0, [p0]; mul.wide.u32 %offset, %me, 4; add.s64 %d0, %d0, %offset;
        mov.b32 %r15, 99; setp.lt.u32 %p0, %me, 8; @%p0 ld.global.b32 %r15, [%d0];"""
    out = per_thread(body.replace("p0]", "p0]"), x.repeat(4))
    assert out[:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert set(out[8:].tolist()) == {99}


@pytest.mark.parametrize("text,error,message", [
    ("ld.global.b32 %r0, [%d0+128]", OutOfBounds, "ending 4 bytes behind p0, which has 128"),
    ("st.global.b64 [%d0+-8], %d2", OutOfBounds, "8 bytes before p0"),
    ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0+8]", Misaligned, "no multiple of 16"),
    ("st.shared.b32 [%r9+64], %r0", OutOfBounds, "shared memory, which has 64"),
    ("ld.shared.b64 %d2, [%r9+4]", Misaligned, "no multiple of 8"),
    ("ld.local.b32 %r0, [%r9]", UnknownInstruction, "ld.local.b32"),
])
def test_accesses_out_of_bounds_or_misaligned_are_errors_that_say_where(text, error, message):
    aligned = np.zeros(160, np.uint8)
    x = aligned[-aligned.ctypes.data % 16:][:128]
    with pytest.raises(error, match=message) as found:
        run_kernel(f".loc 1 7 3 // kernel.py:7:3\n ld.param.u64 %d0, [p0]; mov.b32 %r9, 0;\n{text};", [x], shared=64)
    assert text in str(found.value) and "kernel.py:7:3" in str(found.value)


def test_atomics_add_up_in_global_and_in_shared_memory():
    out = np.zeros(2, np.float32)
    run_kernel("""ld.param.u64 %d0, [p0]; mov.b32 %r0, 0f3F800000; mov.b32 %r9, 0; st.shared.b32 [%r9], 0;
        red.global.add.f32 [%d0], %r0; atom.shared.add.u32 %r1, [%r9], 2; bar.sync 0; ld.shared.b32 %r2, [%r9];
        cvt.rn.f32.u32 %r3, %r2; st.global.b32 [%d0+4], %r3;""", [out], threads=64, blocks=3, shared=16)
    assert out.tolist() == [192, 128]


def test_compare_and_swap_changes_what_it_expects_alone():
    out = np.array([5, 0], np.uint32)
    run_kernel("""ld.param.u64 %d0, [p0]; setp.eq.u32 %p0, %me, 0;
        @%p0 atom.global.acq_rel.gpu.cas.b32 %r0, [%d0], 5, 8; @%p0 atom.global.cas.b32 %r1, [%d0], 5, 9;
        @%p0 st.global.b32 [%d0+4], %r1;""", [out])
    assert out.tolist() == [8, 8]


def test_a_block_that_reads_what_another_writes_is_a_race():
    body = """ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; mul.wide.u32 %offset, %r0, 4;
        add.s64 %d1, %d0, %offset; setp.eq.u32 %p0, %me, 0; @%p0 ld.global.b32 %r1, [%d0];
        add.s32 %r1, %r1, 1; @%p0 st.global.b32 [%d1], %r1;"""
    run_kernel(body, [np.zeros(4, np.uint32)], blocks=1, races=True)
    with pytest.raises(Race, match="block 1 reads byte 0 of p0, which block 0 writes"):
        run_kernel(body, [np.zeros(4, np.uint32)], blocks=2, races=True)


def test_blocks_may_write_the_same_value_but_not_different_ones():
    body = "ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; {} st.global.b32 [%d0], %r0;"
    run_kernel(body.format("mov.b32 %r0, 7;"), [np.zeros(1, np.uint32)], blocks=2, races=True)
    with pytest.raises(Race, match="writes"):
        run_kernel(body.format(""), [np.zeros(1, np.uint32)], blocks=2, races=True)


def test_threads_that_store_different_values_in_one_place_race():
    body = "ld.param.u64 %d0, [p0]; st.global.b32 [%d0], {};"
    run_kernel(body.format("7"), [np.zeros(1, np.uint32)], races=True)
    with pytest.raises(Race, match="different values in one place of global memory"):
        run_kernel(body.format("%me"), [np.zeros(1, np.uint32)], races=True)


IN_TURN = """ld.param.u64 %d0, [p0]; setp.eq.u32 %p0, %me, {first}; setp.eq.u32 %p1, %me, {second};
    @%p0 st.global.b32 [%d0], 5; {between} @%p1 {access};"""


@pytest.mark.parametrize("second", [1, 33])
@pytest.mark.parametrize("access,what", [
    ("st.global.b32 [%d0], 6", "writes another value to byte 0 of p0, which thread 0"),
    ("ld.global.b32 %r1, [%d0]", "reads byte 0 of p0, which thread 0"),
    ("cp.async.ca.shared.global [%r9], [%d0], 4", "reads byte 0 of p0, which thread 0")])
def test_threads_of_a_block_are_ordered_by_a_barrier_alone(access, what, second):
    run = functools.partial(run_kernel, threads=64, shared=16, races=True)
    between = {"": "mov.b32 %r9, 0;", "a barrier": "mov.b32 %r9, 0; bar.sync 0;"}
    texts = {name: IN_TURN.format(first=0, second=second, between=text, access=access)
             for name, text in between.items()}
    run(texts["a barrier"], [np.zeros(1, np.uint32)])
    with pytest.raises(Race, match=f"thread {second} {what} of its block writes"):
        run(texts[""], [np.zeros(1, np.uint32)])
    run(IN_TURN.format(first=0, second=0, between=between[""], access=access), [np.zeros(1, np.uint32)])


def test_lanes_are_ordered_by_their_warps_barrier_and_the_same_value_needs_no_order():
    def body(between, value):
        return IN_TURN.format(first=0, second=1, between=between, access=f"st.global.b32 [%d0], {value}")

    run_kernel(body("bar.warp.sync -1;", 6), [np.zeros(1, np.uint32)], races=True)
    run_kernel(body("", 5), [np.zeros(1, np.uint32)], races=True)


def test_blocks_may_reduce_into_one_place_and_not_read_or_store_it_then():
    body = """ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 1; setp.eq.u32 %p1, %me, 0;
        @%p1 red.global.add.u32 [%d0], 1; """
    out = np.zeros(1, np.uint32)
    run_kernel(body, [out], blocks=3, races=True)
    assert out.tolist() == [3]
    for access, what in (("ld.global.b32 %r1, [%d0]", "reads byte 0 of p0, which a reduction"),
                         ("st.global.b32 [%d0], 9", "writes byte 0 of p0, which a reduction")):
        with pytest.raises(Race, match=f"block 1 {what} writes"):
            run_kernel(f"{body} @%p0 {access};", [np.zeros(1, np.uint32)], blocks=2, races=True)
    with pytest.raises(Race, match="block 1 reduces into byte 0 of p0, which block 0 reads"):
        run_kernel("""ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 1;
            @!%p0 ld.global.b32 %r1, [%d0]; @%p0 red.global.add.u32 [%d0], 1;""", [np.zeros(1, np.uint32)],
                   blocks=2, races=True)
