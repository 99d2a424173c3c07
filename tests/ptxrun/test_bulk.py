"""The copy engine (TMA) of ptxrun: boxes at a tensor's edge, swizzles, the way back, and who may read when."""
import contextlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import ptxrun
from ptxrun import Deadlock, Hazard, Race
from ptxrun.tensor_map import TensorMap
from tests.ptxrun.hand_written import aligned, run_kernel

LOAD = """
    ld.param.u64 %d1, [p1]; mov.b64 %d0, map; mov.b32 %r9, 1024; mov.b32 %r8, 0; mov.b32 %r15, -1;
    setp.eq.u32 %p0, %me, 0; @%p0 mbarrier.init.shared::cta.b64 [%r9], 1; bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {bytes};
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r8], [%d0, {{{column}, {row}}}], [%r9];
$wait:
    {wait}
    shl.b32 %r1, %me, 4; cvt.u64.u32 %d2, %r1; add.s64 %d1, %d1, %d2;
    ld.shared.v2.b64 {{%d4, %d5}}, [%r1]; st.global.v2.b64 [%d1], {{%d4, %d5}};
"""
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra $wait;"


def loaded(column=0, row=0, swizzle=128, wait=WAIT, bytes=1024, schedule="late", races=True):
    """A box of 8 rows of 64 elements of a (12, 64) tensor, as it lies in shared memory."""
    x, out = np.arange(12 * 64, dtype=np.uint16).reshape(12, 64), np.zeros(64 * 8, np.uint16)
    box = TensorMap(x.ctypes.data, (64, 12), (2, 128), (64, 8), 2, swizzle)
    run_kernel(LOAD.format(bytes=bytes, column=column, row=row, wait=wait), [x, out], threads=64, shared=1040,
               schedule=schedule, races=races,
               parameters=[(".param .align 64 .b8 map[128]", box.encode().ljust(128, b"\0"))])
    return x, out.reshape(8, 64)


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_a_box_is_swizzled_and_zero_behind_the_tensors_edge(schedule):
    x, out = loaded(row=6, schedule=schedule)
    padded = np.concatenate([x[6:], np.zeros((2, 64), np.uint16)])
    for row in range(8):
        for chunk in range(8):
            assert out[row, (chunk ^ row) * 8:][:8].tolist() == padded[row, chunk * 8:][:8].tolist()


def test_a_box_may_begin_before_the_tensor():
    x, out = loaded(column=-8, row=-2, swizzle=16)
    expected = np.zeros((8, 64), np.uint16)
    expected[2:, 8:] = x[:6, :56]
    assert np.array_equal(out, expected)


def test_reading_a_box_that_was_not_waited_for_is_a_race():
    with pytest.raises(Race, match="the copy engine for the mbarrier at 1024"):
        loaded(wait="")


@pytest.mark.parametrize("bytes", [512, 2048])
def test_expecting_the_wrong_number_of_bytes_never_completes_the_phase(bytes):
    with pytest.raises(Deadlock, match="an mbarrier"):
        loaded(bytes=bytes)


STORE = """
    ld.param.u64 %d0, [p1]; shl.b32 %r1, %me, 2; st.shared.b32 [%r1], %me; {fence} bar.sync 0;
    mov.b64 %d0, map; mov.b32 %r8, 0; setp.eq.u32 %p0, %me, 0;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d0, {{0, 2}}], [%r8];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
"""


def test_a_box_is_stored_where_the_tensor_is_and_needs_a_fence():
    x = np.zeros((4, 32), np.uint32)
    box = TensorMap(x.ctypes.data, (32, 4), (4, 128), (32, 4), 4, 16).encode().ljust(128, b"\0")
    wait = "cp.async.bulk.wait_group.read 0;"
    run = lambda fence, instead=wait: run_kernel(  # noqa: E731
        STORE.format(fence=fence).replace(wait, instead), [x, x[:1].copy()], threads=128, shared=512, races=True,
        parameters=[(".param .align 64 .b8 map[128]", box)])
    run("fence.proxy.async.shared::cta;")
    assert x[2:].reshape(-1).tolist() == list(range(64)) and not x[:2].any()
    with pytest.raises(Race, match="no fence.proxy.async"):
        run("")
    with pytest.raises(Hazard, match="thread 0 ends, .* before it has waited"):
        run("fence.proxy.async.shared::cta;", instead="")


@pytest.mark.parametrize("guard,waits", [("@%p0", True), ("@!%p0", False)])
def test_a_thread_commits_and_waits_for_what_it_stored_itself(guard, waits):
    x = np.zeros((4, 32), np.uint32)
    box = TensorMap(x.ctypes.data, (32, 4), (4, 128), (32, 4), 4, 16).encode().ljust(128, b"\0")
    body = STORE.format(fence="fence.proxy.async.shared::cta;").replace("cp.async.bulk.c", f"{guard} cp.async.bulk.c")
    body = body.replace("cp.async.bulk.w", f"{guard} cp.async.bulk.w")
    with contextlib.nullcontext() if waits else pytest.raises(Hazard, match="thread 0 ends"):
        run_kernel(body, [x, x[:1].copy()], threads=128, shared=512, races=True,
                   parameters=[(".param .align 64 .b8 map[128]", box)])


@triton.jit
def _described(x_ptr, out_ptr, rows, stride, start):
    x = tl.make_tensor_descriptor(x_ptr, [rows, 40], [stride, 1], [16, 64])
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :], x.load([start, 0]))


def test_a_kernel_describes_a_tensor_itself():
    """By tensormap.replace in shared memory; what lies outside of the sizes that it names is 0."""
    x, out = torch.randn(30, 48).half(), torch.full((16, 64), 3.0).half()
    with ptxrun.emulate("sm_90", races=True):
        _described[(1,)](x, out, 20, 48, 9)
    assert torch.equal(out[:11, :40], x[9:20, :40]) and not out[11:].any() and not out[:, 40:].any()


def stored(value, **options):
    """Threads store `value` to shared memory, and one of each block stores a box of it: two rows of 128 bytes."""
    x = aligned(128).reshape(4, 32)
    box = TensorMap(x.ctypes.data, (32, 4), (4, 128), (32, 4), 4, 16).encode().ljust(128, b"\0")
    body = STORE.format(fence="fence.proxy.async.shared::cta;").replace(
        "st.shared.b32 [%r1], %me;", f"mov.u32 %r3, {value}; st.shared.b32 [%r1], %r3;")
    return run_kernel(body, [x, x[:1].copy()], threads=128, shared=512, **options,
                      parameters=[(".param .align 64 .b8 map[128]", box)])


def test_blocks_whose_boxes_meet_race_unless_they_store_the_same():
    stored("%tid.x", blocks=2, races=True)
    with pytest.raises(Race, match="block 1 writes byte 256 of p0, which block 0 writes"):
        stored("%ctaid.x", blocks=2, races=True)


def test_what_the_copy_engine_moves_is_counted():
    found = stored("%tid.x", count=True).kernels["kernel"]
    assert found.moved["store"] == found.least("store") == found.requested["store"] == 256


def test_a_map_made_field_by_field_is_the_map():
    box = TensorMap(0, (0,) * 5, (2, 0, 0, 0, 0), (0,) * 5, 2, 16)
    for name, value, place in (("global_address", 4096, None), ("rank", 1, None), ("box_dim", 64, 0),
                               ("box_dim", 8, 1), ("global_dim", 64, 0), ("global_dim", 12, 1),
                               ("global_stride", 128, 0), ("element_stride", 1, 0), ("elemtype", 10, None),
                               ("interleave_layout", 0, None), ("swizzle_mode", 3, None), ("fill_mode", 0, None)):
        box = TensorMap.decode(box.with_field(name, value, place).encode())
    assert box == TensorMap(4096, (64, 12), (2, 128), (64, 8), 2, 128)
