"""ptxrun's counts, against numbers worked out by hand: sectors, bank conflicts, kinds of instructions, products."""
import pytest

from ptxrun.traffic import kind_of, products_of
from tests.ptxrun.hand_written import aligned, run_kernel

POINTER = "ld.param.u64 %d0, [p0]; mul.wide.u32 %offset, %me, {stride}; add.s64 %d0, %d0, %offset;"


def counted(body, *, words=512, threads=32, shared=4096):
    """The counts of a body that may use one array, p0."""
    return run_kernel(body, [aligned(words)], threads=threads, shared=shared, count=True).kernels["kernel"]


@pytest.mark.parametrize("stride,sectors", [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_a_warp_moves_each_sector_that_it_touches_once_for_each_instruction(stride, sectors):
    load = "ld.global.b32 %r0, [%d0];"
    found = counted(POINTER.format(stride=stride) + load + load)
    assert found.moved["load"] == 2 * 32 * sectors
    assert found.least("load") == 32 * sectors
    assert found.requested["load"] == 2 * 4 * (32 if stride else 1)


def test_two_warps_on_the_same_sectors_move_them_twice():
    found = counted("ld.param.u64 %d0, [p0]; st.global.b32 [%d0], %me;", threads=64)
    assert (found.moved["store"], found.least("store"), found.requested["store"]) == (64, 32, 8)


@pytest.mark.parametrize("width,stride,passes,least", [
    ("b32", 4, 1, 1), ("b32", 8, 2, 1), ("b32", 128, 32, 1), ("b32", 0, 1, 1),
    ("b64", 8, 2, 2), ("b64", 16, 4, 2), ("v4.b32", 16, 4, 4), ("v4.b32", 32, 8, 4)])
def test_words_in_one_bank_take_a_pass_each_and_wide_accesses_go_by_parts_of_a_warp(width, stride, passes, least):
    target = {"b32": "%r1", "b64": "%d1", "v4.b32": "{%r1, %r2, %r3, %r4}"}[width]
    found = counted(f"mul.lo.u32 %r0, %me, {stride}; ld.shared.{width} {target}, [%r0];")
    assert (found.shared_passes, found.shared_least) == (passes, least)


@pytest.mark.parametrize("pitch,passes", [(16, 4), (32, 8), (128, 32)])
def test_a_matrix_whose_rows_lie_in_the_same_banks_takes_a_pass_for_each(pitch, passes):
    found = counted(f"mul.lo.u32 %r0, %me, {pitch};"
                    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];")
    assert (found.shared_passes, found.shared_least) == (passes, 4)


@pytest.mark.parametrize("opcode,kind", [
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor core"), ("ex2.approx.ftz.f32", "special"),
    ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "tensor core"), ("fma.rn.f32", "float"),
    ("wgmma.wait_group.sync.aligned", "wait"), ("cp.async.wait_group", "wait"), ("bar.sync", "wait"),
    ("cp.async.cg.shared.global", "global"), ("ld.global.v4.b32", "global"), ("st.shared.b32", "shared"),
    ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"), ("ld.param.u64", "move"), ("cvt.rn.bf16x2.f32", "move"),
    ("shfl.sync.bfly.b32", "shuffle"), ("setp.lt.s32", "integer"), ("mad.lo.s32", "integer"), ("bra.uni", "branch")])
def test_an_opcode_has_one_kind(opcode, kind):
    assert kind_of(opcode) == kind


def test_products_are_those_of_a_warp():
    assert products_of("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 2 * 16 * 8 * 16
    assert products_of("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 2 * 16 * 128 * 16
    assert products_of("ldmatrix.sync.aligned.m8n8.x4.shared.b16") == products_of("add.f32") == 0


def test_instructions_are_counted_by_warps_also_where_threads_part():
    found = counted("""setp.lt.u32 %p0, %me, 8; @%p0 bra $few; add.f32 %r0, %r1, %r2; bra $end;
        $few: ex2.approx.f32 %r0, %r1; $end: xor.b32 %r3, %r0, %r1;""", threads=64)
    assert (found.instructions["special"], found.instructions["float"]) == (1, 2)
