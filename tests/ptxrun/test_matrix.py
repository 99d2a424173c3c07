"""The tensor cores' instructions of ptxrun against the PTX manual's figures, written out thread by thread."""
import struct

import numpy as np
import pytest

from ptxrun import Hazard, OutOfBounds, Race
from ptxrun.numbers import f32_to_bf16
from tests.ptxrun.hand_written import run_kernel

random = np.random.default_rng(2)
A = random.integers(-4, 5, (64, 16)).astype(np.float32)
B = random.integers(-4, 5, (16, 8)).astype(np.float32)
BITS = {"f16": lambda x: x.astype(np.float16).view(np.uint16), "bf16": f32_to_bf16}


def pair(matrix, row, column, kind, down=False):
    """Two neighbouring elements as one register, the first one below."""
    other = matrix[row + 1, column] if down else matrix[row, column + 1]
    low, high = (int(BITS[kind](np.float32([x]))[0]) for x in (matrix[row, column], other))
    return low | high << 16


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_product_of_a_warp_is_the_product_of_its_matrices(kind):
    """PTX manual, mma.m16n8k16: groupID = lane / 4, threadID = lane % 4."""
    registers, out = np.zeros((32, 6), np.uint32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        registers[lane, :4] = [pair(A, group + 8 * (i % 2), 2 * thread + 8 * (i // 2), kind) for i in range(4)]
        registers[lane, 4:] = [pair(B, 2 * thread + 8 * i, group, kind, down=True) for i in range(2)]
    run_kernel(f"""ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mul.wide.u32 %offset, %me, 24;
        add.s64 %d0, %d0, %offset; mul.wide.u32 %offset, %me, 16; add.s64 %d1, %d1, %offset;
        ld.global.v2.b32 {{%r0, %r1}}, [%d0]; ld.global.v2.b32 {{%r2, %r3}}, [%d0+8];
        ld.global.v2.b32 {{%r4, %r5}}, [%d0+16]; mov.b32 %r9, 0f3F800000;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r10, %r11, %r12, %r13}}, {{%r0, %r1, %r2, %r3}},
            {{%r4, %r5}}, {{%r9, %r9, %r9, %r9}};
        st.global.v4.b32 [%d1], {{%r10, %r11, %r12, %r13}};""", [registers, out])
    expected = A[:16] @ B + 1
    for lane in range(32):
        group, thread = divmod(lane, 4)
        assert out[lane].tolist() == [expected[group + 8 * (i // 2), 2 * thread + i % 2] for i in range(4)]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_thread_its_pair_and_stmatrix_puts_it_back(transposed):
    x, out = np.arange(256, dtype=np.uint16).reshape(4, 8, 8), np.zeros((32, 4), np.uint32)
    trans = ".trans" if transposed else ""
    back = np.zeros((4, 8, 8), np.uint16)
    run_kernel(f"""ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2];
        mul.wide.u32 %offset, %me, 16; add.s64 %d0, %d0, %offset; add.s64 %d1, %d1, %offset; add.s64 %d2, %d2, %offset;
        shl.b32 %r9, %me, 4; ld.global.v2.b64 {{%d4, %d5}}, [%d0]; st.shared.v2.b64 [%r9], {{%d4, %d5}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%r9];
        st.global.v4.b32 [%d1], {{%r0, %r1, %r2, %r3}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r9], {{%r0, %r1, %r2, %r3}};
        ld.shared.v2.b64 {{%d4, %d5}}, [%r9]; st.global.v2.b64 [%d2], {{%d4, %d5}};""", [x, out, back], shared=512)
    for lane in range(32):
        for i in range(4):
            matrix = x[i].T if transposed else x[i]
            low, high = matrix[lane // 4, 2 * (lane % 4):2 * (lane % 4) + 2]
            assert out[lane, i] == int(low) | int(high) << 16
    assert np.array_equal(back, x)


def swizzled(matrix, width):
    """A (rows, k) matrix in shared memory, rows of `width` bytes: the 16-byte chunk's number is xored with the row's.

    The row that counts is that of 128 bytes, as the address's bits 7 and up."""
    rows, chunks = matrix.shape[0], matrix.shape[1] // 8
    memory = np.zeros(rows * width // 2, np.uint16)
    for row in range(rows):
        for chunk in range(chunks):
            line, place = divmod(row * width + chunk * 16, 128)
            place ^= (line % 8 & {128: 7, 64: 3, 32: 1}[width]) << 4
            memory[(line * 128 + place) // 2:][:8] = matrix[row, chunk * 8:chunk * 8 + 8]
    return memory


PRODUCT = """
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d4, [left]; ld.param.u64 %d5, [right];
    shl.b32 %r0, %me, 2; mov.b32 %r1, 0;
$fill:
    shl.b32 %r2, %r1, 9; add.s32 %r2, %r2, %r0; cvt.u64.u32 %d2, %r2; add.s64 %d3, %d0, %d2;
    {fill} add.s32 %r1, %r1, 1;
    setp.lt.u32 %p0, %r1, {steps}; @%p0 bra $fill;
    cp.async.wait_all; {fence}
    bar.sync 0;
    {before}
    setp.ne.u32 %p1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10, %r11, %r12, %r13}}, %d4, %d5, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    {after}
    mul.wide.u32 %offset, %me, 16; add.s64 %d1, %d1, %offset;
    st.global.v4.b32 [%d1], {{%r10, %r11, %r12, %r13}};
"""


def product(width=128, fence="fence.proxy.async.shared::cta;", wait="wgmma.wait_group.sync.aligned 0;", start=0,
            schedule="late", races=True, before="wgmma.fence.sync.aligned;", after="",
            fill="ld.global.b32 %r3, [%d3]; st.shared.b32 [%r2], %r3;", **options):
    """A (64, 16) by (16, 8), both with k along swizzled rows; the result as a matrix."""
    left, right = (swizzled(f32_to_bf16(np.ascontiguousarray(x)), width) for x in (A, B.T))
    memory = np.concatenate([left, np.zeros(-len(left) % 512, np.uint16), right])
    memory = np.concatenate([memory, np.zeros(-len(memory) % 256, np.uint16)])
    at = 2 * (len(left) + -len(left) % 512)
    code = {128: 1, 64: 2, 32: 3}[width] << 62
    descriptor = lambda where: code | 8 * width // 16 << 32 | 1 << 16 | where // 16  # noqa: E731
    out = np.zeros((128, 4), np.float32)
    body = PRODUCT.format(fence=fence, wait=wait, before=before, after=after, fill=fill, steps=len(memory) * 2 // 512)
    run_kernel(body, [memory, out], threads=128,
               shared=memory.nbytes, schedule=schedule, races=races, **options, parameters=[
                   (".param .u64 left", struct.pack("<Q", descriptor(start))),
                   (".param .u64 right", struct.pack("<Q", descriptor(at)))])
    found = np.zeros((64, 8), np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            found[16 * warp + lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[thread, i]
    return found


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
@pytest.mark.parametrize("width", [128, 64, 32])
def test_a_product_of_a_warpgroup_reads_swizzled_shared_memory(width, schedule):
    assert np.array_equal(product(width, schedule=schedule), A @ B)


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_sums_may_not_be_read_before_they_are_waited_for(schedule):
    for wait in ("", "wgmma.wait_group.sync.aligned 1;"):
        with pytest.raises(Hazard, match="has not been waited for"):
            product(wait=wait, schedule=schedule)


def test_products_need_a_fence_before_the_first_and_behind_other_uses_of_their_registers():
    fence = "wgmma.fence.sync.aligned;"
    with pytest.raises(Hazard, match="no wgmma.fence of warp 0 comes before its first product"):
        product(before="")
    product(before=f"mov.b32 %r10, 0; {fence}")
    with pytest.raises(Hazard, match="between the last use of %r10 and a product"):
        product(before=f"{fence} mov.b32 %r10, 0;")


def test_what_a_warpgroups_products_read_is_written_behind_a_barrier_alone():
    """A warp has waited for its own part of a product; the parts of other warps may still read."""
    overwrite = "mov.b32 %r2, 0; setp.eq.u32 %p2, %me, 0; @%p2 st.shared.b32 [%r2+1024], %me;"
    product(after=f"bar.sync 0; {overwrite}")
    with pytest.raises(Race, match="a write of byte 1024 .* the read of an asynchronous product of warp [123]"):
        product(after=overwrite)


def test_ordinary_stores_need_a_fence_between_the_proxies():
    with pytest.raises(Race, match="no fence.proxy.async follows"):
        product(fence="")


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_the_fence_may_stand_on_either_side_of_the_barrier_but_not_before_the_store(schedule):
    """PTX manual, memory consistency model: a proxy fence along the causality path from the store to the read."""
    fence = "fence.proxy.async.shared::cta;"
    for seed in range(4):
        found = product(fence="", before=f"{fence} wgmma.fence.sync.aligned;", schedule=schedule, seed=seed)
        assert np.array_equal(found, A @ B)
    with pytest.raises(Race, match="no fence.proxy.async follows the store of warp"):
        product(fence="", fill=f"{fence} ld.global.b32 %r3, [%d3]; st.shared.b32 [%r2], %r3;", schedule=schedule)


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_warps_may_store_the_same_matrices_in_one_place_and_no_others(schedule):
    """Where a tile has fewer rows than its warps, several hold the same ones."""
    store = """shl.b32 %r9, %lane, 4; {}
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r9], {{%r0, %r0, %r0, %r0}};"""
    options = dict(threads=64, shared=512, schedule=schedule, races=True)
    run_kernel(store.format("mov.b32 %r0, %lane;"), [], **options)
    with pytest.raises(Race):
        run_kernel(store.format("mov.b32 %r0, %me;"), [], **options)


def test_asynchronous_copies_need_one_as_well_where_it_is_not_said_that_they_do_not():
    """Triton before 3.7 puts none between cp.async and wgmma."""
    copy = "cp.async.ca.shared.global [%r2], [%d3], 4;"
    assert np.array_equal(product(fill=copy), A @ B)
    with pytest.raises(Race, match="no fence.proxy.async follows"):
        product(fill=copy, fence="")
    assert np.array_equal(product(fill=copy, fence="", copies_fenced=True), A @ B)
    with pytest.raises(Race, match="no fence.proxy.async follows"):
        product(fence="", copies_fenced=True)


def test_a_product_beyond_shared_memory_is_an_error():
    with pytest.raises(OutOfBounds, match="wgmma reads shared memory"):
        product(start=8192)

