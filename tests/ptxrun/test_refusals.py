"""What ptxrun does not emulate is refused by name: no modifier, predicate or malformed operand is passed over."""
import numpy as np
import pytest

from ptxrun import UnknownInstruction, unknown_instructions
from ptxrun.instructions import CONTROL, TABLE
from tests.ptxrun.hand_written import kernel_text, per_thread

ZERO = np.zeros(32, np.uint32)

MODIFIERS = [
    "fma.rn.relu.f32 %r15, %r0, %r0, %r0",
    "min.relu.s16x2 %r15, %r0, %r0",
    "fma.rn.ftz.f16x2 %r15, %r0, %r0, %r0",
    "cvt.rn.satfinite.f16x2.f32 %r15, %r0, %r0",
    "cvt.rn.tf32.f32 %r15, %r0",
    "cvt.rna.relu.tf32.f32 %r15, %r0",
    "cvt.rn.sat.f32.s32 %r15, %r0",
    "cvt.rzi.relu.s32.f32 %r15, %r0",
    "atom.shared.dec.u32 %r15, [%r0], %r0",
    "mbarrier.arrive.noComplete.shared::cta.b64 %d0, [%r0], 1",
    "mbarrier.try_wait.shared::cluster.b64 %p0, [%r0], %d0",
    "bar.red.popc.u32 %r15, 0, %p0",
    "barrier.cluster.arrive",
    "setmaxnreg.most.sync.aligned.u32 40",
    "wgmma.mma_async.sync.aligned.f32.bf16.bf16 {%r1}, %d0, %d1, 0, 1, 1, 0, 0",
]
PREDICATES = [
    "bar.sync 0", "bar.arrive 0, 64", "bar.warp.sync -1", "setmaxnreg.dec.sync.aligned.u32 40",
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0", "fence.proxy.async.shared::cta",
    "shfl.sync.idx.b32 %r15, %r0, 0, 31, -1", "vote.sync.ballot.b32 %r15, %p0, -1", "redux.sync.add.s32 %r15, %r0, -1",
    "elect.sync %r15|%p1, -1", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r15}, [%r0]",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], {%r15}", "cp.async.commit_group", "cp.async.wait_group 0",
    "cp.async.wait_all", "wgmma.fence.sync.aligned",
    "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned 0"]
MALFORMED = ["atom.shared.b32 %r15, [%r0], %r0", "add.s128 %r15, %r0, %r0",
             "mbarrier.arrive.shared::cta.b64 _"]


@pytest.mark.parametrize("text", [*MODIFIERS, *MALFORMED])
def test_a_modifier_or_an_operand_that_would_be_passed_over_is_refused(text):
    with pytest.raises(UnknownInstruction, match=f"not emulated.*{text.split()[0]}"):
        per_thread(text + ";", ZERO, shared=64)


@pytest.mark.parametrize("text", PREDICATES)
def test_a_predicate_of_what_all_threads_execute_is_refused(text):
    with pytest.raises(UnknownInstruction, match=f"predicate.*{text.split()[0]}"):
        per_thread(f"setp.eq.u32 %p0, %lane, 0; @%p0 {text};", ZERO, shared=64)


def test_what_is_refused_is_known_without_running_it():
    assert unknown_instructions(kernel_text("add.s32 %r1, %r0, 1; bar.sync 0;")) == []
    found = unknown_instructions(kernel_text("dp4a.u32.u32 %r1, %r0, %r0, %r0; @%p0 bar.sync 0;"))
    assert len(found) == 2 and "dp4a" in found[0] and "a predicate" in found[1]


def test_an_instruction_that_no_thread_comes_to_is_no_error():
    assert per_thread("bra $end; dp4a.u32.u32 %r1, %r0, %r0, %r0; $end: mov.b32 %r15, 3;")[0] == 3


def test_no_instruction_is_both_decoded_and_executed_by_the_machine():
    assert {name.split(".")[0] for name in TABLE} & CONTROL.keys() == {"bar", "mbarrier"}  # bar.warp; init and arrive
