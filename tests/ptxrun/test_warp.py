"""Shuffles, votes, reductions, divergence and reconvergence of ptxrun."""
import numpy as np
import pytest

from ptxrun import Misuse
from ptxrun.flow import flow_order
from tests.ptxrun.hand_written import per_thread

X = np.random.default_rng(1).integers(0, 1 << 32, 64, np.uint32)


@pytest.mark.parametrize("mode,b,c,source", [
    ("bfly", 5, 31, lambda lane: lane ^ 5),
    ("idx", 3, 31, lambda lane: 3),
    ("up", 2, 0, lambda lane: lane - 2 if lane >= 2 else lane),
    ("down", 7, 31, lambda lane: lane + 7 if lane + 7 < 32 else lane),
    ("idx", 1, 0x1C1F, lambda lane: lane // 4 * 4 + 1),
    ("down", 2, 0x181F, lambda lane: lane + 2 if lane % 8 + 2 < 8 else lane),
    ("up", 1, 0x1800, lambda lane: lane - 1 if lane % 8 else lane),
])
def test_a_shuffle_reads_the_lane_that_its_mode_names(mode, b, c, source):
    found = per_thread(f"shfl.sync.{mode}.b32 %r15, %r0, {b}, {c}, -1;", X, threads=64)
    assert found.tolist() == [X[warp * 32 + source(lane)] for warp in range(2) for lane in range(32)]


def test_a_shuffle_says_whether_the_lane_was_within_bounds():
    found = per_thread("shfl.sync.up.b32 %r1|%p0, %r0, 3, 0, 0xffffffff; selp.b32 %r15, 1, 0, %p0;", X[:32])
    assert found.tolist() == [0] * 3 + [1] * 29


def test_votes_and_reductions_are_those_of_the_warp():
    ballot = per_thread("setp.gt.u32 %p0, %r0, 5; vote.sync.ballot.b32 %r15, %p0, -1;", np.arange(32, dtype=np.uint32))
    assert set(ballot.tolist()) == {0xFFFFFFC0}
    every = per_thread("setp.gt.u32 %p0, %r0, 5; vote.sync.any.pred %p1, %p0, -1; vote.sync.all.pred %p2, %p0, -1;"
                       "selp.b32 %r15, 2, 0, %p1; @%p2 add.s32 %r15, %r15, 1;", np.arange(64, dtype=np.uint32),
                       threads=64)
    assert every.tolist() == [2] * 32 + [3] * 32
    least = per_thread("redux.sync.min.s32 %r15, %r0, -1;", X, threads=64, result=np.int32)
    assert least.tolist() == np.repeat(X.view(np.int32).reshape(2, 32).min(1), 32).tolist()


def test_elect_chooses_one_lane_of_each_warp():
    found = per_thread("elect.sync _|%p0, -1; selp.b32 %r15, 1, 0, %p0;", threads=64)
    assert found.reshape(2, 32).sum(1).tolist() == [1, 1]


LOOP = """
    and.b32 %r1, %me, 7; mov.b32 %r15, 0;
$loop:
    setp.eq.s32 %p0, %r1, 0;
    @%p0 bra $done;
    add.s32 %r15, %r15, %r1; sub.s32 %r1, %r1, 1;
    bra $loop;
$done:
    shfl.sync.bfly.b32 %r2, %r15, 1, 31, -1;
    add.s32 %r15, %r15, %r2;"""


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_threads_that_part_meet_again_before_a_collective(schedule):
    found = per_thread(LOOP, threads=64, schedule=schedule)
    triangle = [n * (n + 1) // 2 for n in range(8)]
    assert found.tolist() == [triangle[t % 8] + triangle[(t ^ 1) % 8] for t in range(64)]


# A loop that ends in a barrier. Half of its threads go round by a way that stands behind the loop, as LLVM lays out the
# long division of what does not fit 32 bits.
MEETING_BEFORE_A_WAY = """
    and.b32 %r1, %me, 1; mov.b32 %r15, 0; mov.b32 %r2, 0;
    bra.uni $head;
$even:
    add.s32 %r15, %r15, 1;
$meet:
    bar.sync 0;
    add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, 3;
    @!%p1 bra $done;
$head:
    setp.eq.s32 %p0, %r1, 0;
    @%p0 bra $even;
    add.s32 %r15, %r15, 10;
    bra.uni $meet;
$done:
    shfl.sync.idx.b32 %r15, %r15, 1, 31, -1;"""


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_threads_that_part_meet_where_their_ways_do_wherever_that_stands_in_the_text(schedule):
    assert per_thread(MEETING_BEFORE_A_WAY, threads=64, schedule=schedule).tolist() == [30] * 64


def test_control_flows_through_a_loop_before_what_follows_it_and_its_ways_before_their_meeting():
    ways = {0: [5], 1: [2], 2: [9, 5], 5: [1, 7], 7: [2], 9: [10, 12], 10: [9], 12: []}
    rank = flow_order(ways)
    assert sorted(rank.values()) == list(range(8))
    assert rank[0] < rank[5] < min(rank[1], rank[7]) and max(rank[1], rank[7]) < rank[2] < rank[9] < rank[10] < rank[12]


def test_part_of_a_warp_at_a_collective_is_an_error():
    body = """setp.lt.u32 %p0, %me, 8; @%p0 bra $less; shfl.sync.bfly.b32 %r15, %me, 1, 31, -1;
    $less: mov.b32 %r15, 0;"""
    with pytest.raises(Misuse, match="part of a warp"):
        per_thread(body)
