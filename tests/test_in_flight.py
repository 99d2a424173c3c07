"""What writes registers of a product in flight is found in machine code, written by hand and by Triton."""
import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.conftest import compiles
from tests.in_flight import overwritten
from tests.resources import disassembled

pytestmark = compiles

LOOP = """
.L_x_1:
        /*0000*/                   {load} ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8], R24 ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0050*/              @!P5 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MOV R40, RZ ;
"""


@pytest.mark.parametrize("load", [
    "LDSM.16.M88.4 R44, [R81+UR8+0xe000]", "LDS.64 R46, [R2]", "IMAD.WIDE R39, R1, R2, R4",
    "SHFL.BFLY PT, R47, R38, 0x2, 0x1f", "F2FP.BF16.F32.PACK_AB R40, R8, R9"])
def test_a_round_that_does_not_wait_overwrites_what_the_one_before_reads(load):
    assert overwritten(LOOP.format(load=load, pending="0x1")) == [load]
    assert overwritten(LOOP.format(load=load, pending="0x0")) == []


@pytest.mark.parametrize("load", [
    "LDSM.16.M88.4 R48, [R40]", "STS.128 [R40+UR5], R44", "ISETP.GE.AND P5, PT, R40, R44, PT",
    "LDGSTS.E.BYPASS.128 [R40], desc[UR4][R44.64]", "LDS R39, [R44]"])
def test_what_reads_them_or_writes_others_does_not(load):
    assert overwritten(LOOP.format(load=load, pending="0x1")) == []


def test_a_wait_for_fewer_groups_than_are_in_flight_leaves_them_all():
    group = "        /*0010*/ HGMMA.64x32x16.F32.BF16 R24, {}, gdesc[UR8], R24, gsb0 ;\n"
    code = (group.format("R40") + group.format("R44") + "        /*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x3 ;\n"
            "        /*0030*/ MOV R40, RZ ;\n")
    assert overwritten(code) == ["MOV R40, RZ"]


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, k, AWAITED: tl.constexpr):
    rows, inner = tl.arange(0, 64), tl.arange(0, 64)
    sums, total = tl.zeros([64, 64], tl.float32), tl.zeros([64], tl.float32)
    for start in range(0, k, 64):
        left = tl.load(x_ptr + rows[:, None] * k + start + inner[None, :]).to(tl.float32) * 1.5
        total += tl.sum(left * left, 1)
        if AWAITED:
            sums = tl.where(rows[:, None] < k, sums, 0.0)
        right = tl.load(y_ptr + rows[None, :] * k + (start + inner)[:, None])
        sums = tl.dot(left.to(right.dtype), right, sums)
    tl.store(out_ptr + rows[:, None] * 64 + rows[None, :], sums * total[:, None])


def machine_code(awaited: bool) -> str:
    """Of a product whose left operand is computed in registers, for sm_90."""
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "k": "i32", "AWAITED": "constexpr"}
    source = ASTSource(_product, signature, {"AWAITED": awaited}, {(i,): [["tt.divisibility", 16]] for i in range(4)})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    return disassembled(built.asm["cubin"])


def test_a_loop_that_reads_its_sums_waits():
    code = machine_code(awaited=True)
    assert "HGMMA" in code and overwritten(code) == []


@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.7.")), reason="other Tritons may wait")
def test_one_that_does_not_is_found():
    assert overwritten(machine_code(awaited=False))
