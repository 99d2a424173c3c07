"""Barriers, mbarriers, cp.async, setmaxnreg and the races of shared memory in ptxrun."""
import numpy as np
import pytest

from ptxrun import Deadlock, Misuse, OutOfBounds, Race
from tests.ptxrun.hand_written import per_thread, run_kernel

STORE = "shl.b32 %r1, %me, 2; st.shared.b32 [%r1], %me;"
READ_ACROSS = "xor.b32 %r2, %r1, 128; ld.shared.b32 %r15, [%r2];"


def test_a_barrier_orders_what_warps_write_and_read():
    found = per_thread(STORE + "bar.sync 0;" + READ_ACROSS, threads=64, shared=256, races=True)
    assert found.tolist() == [t ^ 32 for t in range(64)]


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_without_the_barrier_it_is_a_race_in_every_schedule(schedule):
    with pytest.raises(Race, match="of byte .* by warp . is not ordered after the (write|read) of warp"):
        per_thread(STORE + READ_ACROSS, threads=64, shared=256, races=True, schedule=schedule)


def test_overwriting_what_another_warp_still_reads_is_a_race():
    body = STORE + "bar.sync 0;" + READ_ACROSS + "mov.b32 %r3, 7; {} st.shared.b32 [%r1], %r3;"
    per_thread(body.format("bar.sync 0;"), threads=64, shared=256, races=True)
    with pytest.raises(Race, match="a write of byte .* not ordered after the read of warp"):
        per_thread(body.format(""), threads=64, shared=256, races=True)


ACROSS_LANES = "xor.b32 %r2, %r1, 4; ld.shared.b32 %r15, [%r2];"


@pytest.mark.parametrize("barrier", ["bar.warp.sync 0xffffffff;", "bar.sync 0;"])
def test_a_barrier_orders_what_the_lanes_of_one_warp_write_and_read(barrier):
    assert per_thread(STORE + barrier + ACROSS_LANES, shared=128, races=True).tolist() == [t ^ 1 for t in range(32)]


def test_lanes_of_one_warp_race_where_no_barrier_is_between_them():
    with pytest.raises(Race, match="a read of byte 4 .* by a lane of warp 0 .* another lane's write"):
        per_thread(STORE + ACROSS_LANES, shared=128, races=True)
    body = STORE + "bar.warp.sync 0xffffffff;" + ACROSS_LANES + "mov.b32 %r3, 7; {} st.shared.b32 [%r1], %r3;"
    per_thread(body.format("bar.warp.sync 0xffffffff;"), shared=128, races=True)
    with pytest.raises(Race, match="a write of byte 0 .* by a lane of warp 0 .* another lane's read"):
        per_thread(body.format(""), shared=128, races=True)


def test_a_lane_reads_what_it_wrote_itself_without_a_barrier():
    assert per_thread(STORE + "ld.shared.b32 %r15, [%r1];", shared=128, races=True).tolist() == list(range(32))


def test_reports_are_the_same_each_time():
    reports = set()
    for _ in range(3):
        with pytest.raises(Race) as found:
            per_thread(STORE + READ_ACROSS, threads=64, shared=256, races=True, schedule="random", seed=5)
        reports.add(str(found.value))
    assert len(reports) == 1


def test_named_barriers_join_the_warps_that_come_to_them():
    body = """shr.u32 %r0, %me, 6; setp.eq.u32 %p0, %r0, 0; @%p0 bra $first;
        bar.sync 2, 64; bra $end; $first: bar.sync 1, 64; $end: mov.b32 %r15, 1;"""
    assert per_thread(body, threads=128, schedule="random").sum() == 128


def test_a_barrier_for_too_many_threads_is_a_deadlock_that_names_the_line():
    with pytest.raises(Deadlock, match="(?s)wait for a barrier.*bar.sync 1, 96"):
        per_thread("bar.sync 1, 96; mov.b32 %r15, 0;", threads=64)


def test_threads_that_disagree_about_a_barriers_count_are_an_error():
    body = """setp.lt.u32 %p0, %me, 32; @%p0 bra $first; bar.sync 1, 64; bra $end;
        $first: bar.sync 1, 96; $end: mov.b32 %r15, 1;"""
    with pytest.raises(Misuse, match="come to a barrier for"):
        per_thread(body, threads=64)


MBARRIER = """
    mov.b32 %r9, 256; setp.eq.u32 %p0, %me, 0; @%p0 mbarrier.init.shared::cta.b64 [%r9], {count}; bar.sync 0;
    setp.ge.u32 %p1, %me, 32; @%p1 bra $wait;
    {store} mbarrier.arrive.shared::cta.b64 _, [%r9];
    bra $end;
$wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0;
    @!%p2 bra $wait;
    shl.b32 %r1, %me, 2; xor.b32 %r2, %r1, 128; ld.shared.b32 %r15, [%r2];
$end:
"""


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_a_phase_completes_with_its_last_arrival_and_orders_memory(schedule):
    body = MBARRIER.format(count=32, store=STORE)
    found = per_thread(body, threads=64, shared=320, races=True, schedule=schedule)
    assert found[32:].tolist() == list(range(32))


def test_an_mbarrier_is_made_and_ended_before_and_behind_its_uses():
    body = """mov.b32 %r9, 0; setp.eq.u32 %p0, %me, 0; mov.b32 %r15, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r9], 64; {made}
        mbarrier.arrive.shared::cta.b64 _, [%r9]; {used} @%p0 mbarrier.inval.shared::cta.b64 [%r9];"""
    per_thread(body.format(made="bar.sync 0;", used="bar.sync 0;"), threads=64, shared=16, races=True)
    for made, used in (("", "bar.sync 0;"), ("bar.sync 0;", "")):
        with pytest.raises(Race, match="of byte 0 of shared memory"):
            per_thread(body.format(made=made, used=used), threads=64, shared=16, races=True)


def test_blocks_that_run_together_wait_for_their_own_mbarriers():
    found = per_thread(MBARRIER.format(count=32, store=STORE), threads=64, shared=320, blocks=3)
    assert found[32:].tolist() == list(range(32))


def test_an_mbarrier_whose_arrivals_do_not_add_up_is_an_error():
    with pytest.raises(Deadlock, match="an mbarrier"):
        per_thread(MBARRIER.format(count=33, store=STORE), threads=64, shared=320)
    with pytest.raises(Misuse, match="more arrivals"):
        per_thread(MBARRIER.format(count=32, store="mbarrier.arrive.shared::cta.b64 _, [%r9], 3;"), threads=64,
                   shared=320)
    with pytest.raises(Misuse, match="no mbarrier was initialised"):
        per_thread("mov.b32 %r9, 0; mbarrier.arrive.shared::cta.b64 _, [%r9];", shared=320)


COPY = """
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; shl.b32 %r0, %me, 4; cvt.u64.u32 %d2, %r0;
    add.s64 %d0, %d0, %d2; mul.wide.u32 %offset, %me, 4; add.s64 %d1, %d1, %offset;
    cp.async.cg.shared.global [%r0], [%d0], 0x10, {size};
    cp.async.commit_group;
    {wait}
    {barrier}
    xor.b32 %r0, %r0, {across}; ld.shared.b32 %r1, [%r0+12]; st.global.b32 [%d1], %r1;
"""


def copied(size=16, wait="cp.async.wait_group 0;", barrier="", across=0, threads=32, **options):
    buffer = np.zeros(4 * threads + 4, np.uint32)
    first = -buffer.ctypes.data % 16 // 4
    x, out = buffer[first:first + 4 * threads], np.zeros(threads, np.uint32)
    x[:] = np.arange(4 * threads)
    run_kernel(COPY.format(size=size, wait=wait, barrier=barrier, across=across), [x, out], threads=threads,
               shared=16 * threads, **options)
    return out


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_a_copy_is_there_when_it_was_waited_for(schedule):
    assert copied(schedule=schedule, races=True).tolist() == list(range(3, 128, 4))


def test_a_copy_that_nobody_waits_for_is_late_and_a_race():
    assert set(copied(wait="cp.async.wait_group 1;").tolist()) == {0xFFFFFFFF}
    with pytest.raises(Race, match="an asynchronous copy of warp 0"):
        copied(wait="", races=True)


def test_another_warps_copy_needs_a_barrier_as_well():
    copied(barrier="bar.sync 0;", across=512, threads=64, races=True)
    with pytest.raises(Race, match="an asynchronous copy of warp"):
        copied(across=512, threads=64, races=True)


def test_what_a_copy_does_not_read_becomes_zero():
    assert set(copied(size=0).tolist()) == {0}
    assert copied(size=14)[1] == 7


def test_a_copy_beyond_its_tensor_is_an_error_unless_it_reads_nothing():
    with pytest.raises(OutOfBounds, match="cp.async"):
        run_kernel("""ld.param.u64 %d0, [p0]; mov.b32 %r0, 0; add.s64 %d0, %d0, 4096;
            cp.async.ca.shared.global [%r0], [%d0], 4;""", [np.zeros(4, np.uint32)], shared=16)
    run_kernel("""ld.param.u64 %d0, [p0]; mov.b32 %r0, 0; add.s64 %d0, %d0, 4096;
        cp.async.ca.shared.global [%r0], [%d0], 4, 0;""", [np.zeros(4, np.uint32)], shared=16)


REGISTERS = """
    setp.ge.u32 %p0, %me, 128; @%p0 bra $more;
    setmaxnreg.dec.sync.aligned.u32 {less}; bra $end;
$more: setmaxnreg.inc.sync.aligned.u32 {more};
$end: mov.b32 %r15, 1;
"""


def test_registers_are_taken_from_those_given_back():
    body = REGISTERS.format(less=40, more=216)
    for schedule in ("late", "random"):
        assert per_thread(body, threads=256, header=".maxnreg 128", schedule=schedule).sum() == 256


@pytest.mark.parametrize("less,more,error,message", [
    (40, 224, Deadlock, "registers"), (44, 200, Misuse, "multiple of 8"), (136, 200, Misuse, "warp that has 128")])
def test_more_registers_than_there_are_and_wrong_numbers_are_errors(less, more, error, message):
    with pytest.raises(error, match=message):
        per_thread(REGISTERS.format(less=less, more=more), threads=256, header=".maxnreg 128")
