"""A part of the mutations of `python -m tests.ptxrun.mutations`: what is caught, and that reports are the same."""
import os
import subprocess
import sys

import pytest

from ptxrun.ptx import parse
from tests.conftest import compiles
from tests.ptxrun.mutants import bounds_of_memory, mutations

PTX = """
.visible .entry kernel(.param .u64 p0) .reqntid 32
{
    .reg .pred %p<8>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<2>;
    setp.lt.s32 %p1, %r1, %r2;
    setp.gt.s32 %p2, %r1, 5;
    and.pred %p3, %p1, %p2;
    setp.lt.s32 %p4, %r1, 7;
    @%p3 ld.global.b32 %r3, [%rd1];
    selp.b32 %r5, 16, 0, %p2;
    cp.async.cg.shared.global [%r4], [%rd1], 0x10, %r5;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    xor.b32 %r4, %r4, 32;
    shfl.sync.bfly.b32 %r3, %r3, 8, 31, -1;
    wgmma.fence.sync.aligned;
    @%p4 bra $end;
$end:
    ret;
}
"""


def test_every_site_is_found_once_for_each_kind_that_fits():
    found = {f"{one.kind}: {one.after or one.before}" for one in mutations(PTX)}
    assert found == {
        "bound moved by one: setp.le.s32 %p1, %r1, %r2;", "bound moved by one: setp.ge.s32 %p2, %r1, 5;",
        "bound removed: ld.global.b32 %r3, [%rd1];", "bound removed: cp.async.cg.shared.global [%r4], [%rd1], 0x10;",
        "commit removed: cp.async.commit_group;", "wait removed: cp.async.wait_group 1;",
        "wait for one group less: cp.async.wait_group 2;", "barrier removed: bar.sync 0;",
        "swizzle changed: xor.b32 %r4, %r4, 48;", "shuffle's lane changed: shfl.sync.bfly.b32 %r3, %r3, 4, 31, -1;",
        "fence removed: wgmma.fence.sync.aligned;"}


def test_a_comparison_bounds_memory_only_if_a_load_or_a_store_depends_on_it():
    assert bounds_of_memory(parse(PTX)) == {7, 8}


def test_a_mutation_changes_its_line_alone():
    for one in mutations(PTX):
        changed = [i for i, (a, b) in enumerate(zip(PTX.split("\n"), one.apply(PTX).split("\n")), 1) if a != b]
        assert changed == [one.line]


def reports(seed: str) -> list[str]:
    """What a process of its own says of each mutant, and the table."""
    command = [sys.executable, "-m", "tests.ptxrun.mutations", "--architectures", "sm_90", "--cases", "rotary", "boxes",
               "--most", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@compiles
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux alone")
def test_mutants_are_caught_or_do_what_the_kernel_does_and_reports_are_the_same_in_every_process():
    first = reports("1")
    assert first == reports("2")
    caught, same, otherwise = (int(first[-1].split("|")[i]) for i in (5, 7, 8))
    assert caught >= 14 and otherwise == 0 and caught >= 0.8 * (caught + same)
