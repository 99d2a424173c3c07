"""pytest --emulate: the results of tests in a file as they end, and tests that take too long."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptxrun.plugin import collected, lines
from tests.conftest import compiles

pytestmark = compiles
ROOT = Path(__file__).parents[2]
TESTS = '''
import time, pytest, torch, triton, triton.language as tl
import ptxrun

@triton.jit
def double(x_ptr, N: tl.constexpr):
    at = x_ptr + tl.arange(0, N)
    tl.store(at, 2 * tl.load(at))

@pytest.mark.parametrize("size", [32, 64])
def test_doubles(size):
    x = torch.ones(size)
    double[(1,)](x, N=size)
    assert ptxrun.active() and x.sum() == 2 * size

def test_reads_beyond_its_tensor():
    double[(1,)](torch.ones(16), N=32)

def test_takes_long():
    while time.process_time() < 60:
        pass
'''


def run(folder, *options):
    """Run the tests of a folder and return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "ptxrun.plugin", "--emulate",
               "sm_90", "--rootdir", str(folder), "--results", str(folder / "results"), *options, str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return found.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tests that have run once."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "test_double.py").write_text(TESTS)
    assert run(folder, "--limit", "5").startswith("1 failed, 2 passed, 1 skipped")
    return folder


def test_every_test_leaves_a_line_and_the_last_case_of_each_comes_first(folder):
    found = lines(folder / "results")
    assert [line["test"].partition("::")[2] for line in found] == [
        "test_doubles[64]", "test_reads_beyond_its_tensor", "test_takes_long", "test_doubles[32]"]
    assert [line["outcome"] for line in found] == ["passed", "failed", "skipped", "passed"]
    assert [line["launches"] for line in found] == [{"double": 1}, {"double": 1}, {}, {"double": 1}]
    assert "OutOfBounds" in found[1]["why"] and "longer than 5 seconds" in found[2]["why"]
    assert collected(folder / "results") == 4


def test_what_has_a_line_is_not_run_again_and_what_a_kill_cut_short_is(folder):
    assert run(folder).startswith("4 deselected")
    text = (folder / "results").read_text()
    cut = text.index(json.dumps(lines(folder / "results")[-1])) + 30
    (folder / "results").write_text(text[:cut])
    assert run(folder).startswith("1 passed, 3 deselected")
    assert len(lines(folder / "results")) == 4


@pytest.mark.parametrize("options,said", [
    (("--emulate", "sm_70"), "--emulate: architecture is 'sm_70'; sm_80, sm_86, sm_89, sm_90 fit"),
    (("--races", "--copies-fenced", "--limit", "3"),
     "--races, --copies-fenced, --limit: nothing is emulated; --emulate sm_90 fits beside it")])
def test_options_that_do_not_fit_are_answered_in_one_line(options, said):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptxrun.plugin", *options, str(Path(__file__))]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {said}" in found.stderr and "Traceback" not in found.stderr
