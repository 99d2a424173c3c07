"""The plugin that keeps every test's outcome, seen on small suites: what a kill leaves, what a lost device costs, and
what is not run again."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import outcomes

ROOT = Path(outcomes.__file__).parents[1]
SUITE = """\
import os, time, pytest
from benchmarks import outcomes

def test_nothing_of_this_spills(): assert False
def test_good(): pass
def test_bad(): assert 3 == 4, "three is not four"
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_whose_fixture_breaks(broken): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected_to_fail(): assert False
def test_loses_the_device(): outcomes.device_error = lambda: "CUDA error: an illegal memory access"
def test_after_the_loss(): pass
def test_dies(): os._exit(3)
def test_last(): pass
"""
HANGS = "import time\ndef test_hangs(): time.sleep(300)\ndef test_after_it(): pass\n"


def command(suite, path, *more):
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.outcomes",
        "--outcomes",
        str(path),
        "--rootdir",
        str(suite),
        "-c",
        "/dev/null",
        "--continue-on-collection-errors",
        *more,
        str(suite),
    ]


def run(suite, path, *more):
    outcomes.add(path, run=0)
    done = subprocess.run(command(suite, path, *more), capture_output=True, text=True, cwd=ROOT, timeout=300)
    return {name.split("::")[-1]: event for name, event in last_of(path).items()}, done


def last_of(path):
    return {
        event["test"]: event
        for event in outcomes.events(path)
        if event.get("outcome", "begun") != "begun" and "test" in event
    }


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "test_some.py").write_text(SUITE)
    (tmp_path / "suite" / "test_lacks.py").write_text("import a_package_that_nobody_has\n")
    return tmp_path / "suite"


def test_under_xdist_a_lost_device_and_a_dead_worker_cost_their_own_tests_alone(suite, tmp_path):
    pytest.importorskip("xdist")
    found, done = run(suite, tmp_path / "tests.jsonl", "-n", "1", "--max-worker-restart", "100")
    assert {name: event["outcome"] for name, event in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_whose_fixture_breaks": "error",
        "test_skipped": "skipped",
        "test_expected_to_fail": "xfailed",
        "test_loses_the_device": "failed",
        "test_after_the_loss": "passed",
        "test_dies": "failed",
        "test_last": "passed",
    }, done.stdout
    assert (
        "the device was lost in this test: CUDA error: an illegal memory access"
        in found["test_loses_the_device"]["reason"]
    )
    assert "crashed while running" in found["test_dies"]["reason"] and found["test_bad"]["reason"].startswith(
        "AssertionError: three is not four"
    )
    assert "no fixture" in found["test_whose_fixture_breaks"]["reason"] and found["test_skipped"]["reason"].endswith(
        "not here"
    )
    whole = outcomes.read(tmp_path / "tests.jsonl")
    assert whole["collected"] == 9 and whole["counts"] == {
        "passed": 3,
        "failed": 3,
        "error": 1,
        "skipped": 1,
        "xfailed": 1,
        "xpassed": 0,
    }
    assert "a_package_that_nobody_has" in str(whole["not_collected"]) and not whole["begun"]


def test_a_further_run_leaves_out_what_has_passed_and_runs_again_what_has_failed(tmp_path):
    suite, path = tmp_path / "suite", tmp_path / "tests.jsonl"
    suite.mkdir()
    (suite / "test_few.py").write_text(
        "import os\ndef test_good(): pass\ndef test_bad(): assert 'MENDED' in os.environ\n"
    )
    assert run(suite, path)[1].returncode == 1
    done = subprocess.run(
        command(suite, path), capture_output=True, text=True, cwd=ROOT
    )  # no new "run" line: all have ended
    assert done.returncode == 5 and "2 deselected" in done.stdout
    outcomes.add(path, run=1)
    done = subprocess.run(
        command(suite, path), capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MENDED": "1"}
    )
    assert done.returncode == 0 and "1 passed, 1 deselected" in done.stdout
    assert outcomes.read(path)["counts"]["passed"] == 2 and not outcomes.read(path)["failing"]


def test_a_test_that_hangs_ends_its_process(tmp_path):
    suite, path = tmp_path / "suite", tmp_path / "tests.jsonl"
    suite.mkdir()
    (suite / "test_hang.py").write_text(HANGS)
    found, done = run(suite, path, "--test-seconds", "5")
    assert (
        done.returncode not in (0, outcomes.LOST)
        and "in test_hangs" in done.stderr
        and outcomes.read(path)["begun"] == ["test_hang.py::test_hangs"]
    )
    pytest.importorskip("xdist")
    found, done = run(suite, path, "--test-seconds", "5", "-n", "1")
    assert found["test_hangs"]["outcome"] == "failed" and found["test_after_it"]["outcome"] == "passed"


def test_a_kill_leaves_the_reasons_and_the_test_that_had_begun(tmp_path):
    suite, path = tmp_path / "suite", tmp_path / "tests.jsonl"
    suite.mkdir()
    (suite / "test_kill.py").write_text("def test_bad(): assert 3 == 4, 'three is not four'\n" + HANGS)
    process = subprocess.Popen(command(suite, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (path.exists() and "test_hangs" in path.read_text()):
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    found = outcomes.read(path)
    assert found["begun"] == ["test_kill.py::test_hangs"]
    (reason,) = (test["reason"] for test in found["failing"].values())
    assert reason.startswith("AssertionError: three is not four")


def test_a_line_that_was_cut_is_passed_over(tmp_path):
    path = tmp_path / "tests.jsonl"
    outcomes.add(path, test="a.py::test_a", outcome="passed")
    path.write_text(path.read_text() + json.dumps({"test": "a.py::test_b", "outcome": "failed"})[:20])
    assert outcomes.read(path)["counts"]["passed"] == 1 and outcomes.finished(path) == {"a.py::test_a"}


def test_attentions_tests_come_first():
    names = [
        "tests/test_layout.py::a",
        "tests/tfkernels/norm/test_norm.py::b",
        "tests/tfkernels/attention/test_attention.py::c",
        "tests/tfkernels/mask/test_mask.py::d",
        "tests/transfusion/model/test_transfusion.py::e",
    ]
    assert all((ROOT / name.split("::")[0]).is_file() for name in names)
    assert [name[-1] for name in sorted(names, key=outcomes.place)] == ["c", "d", "b", "a", "e"]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.name)
def test_every_test_that_compiles_for_a_gpu_that_is_not_there_is_known_by_its_name(path):
    tree = ast.parse(path.read_text())
    compiling = {"resources", "compiled"} & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for test in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
        used = {
            node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        taken = {argument.arg for argument in test.args.args}
        if (
            "resources" in compiling
            and "resources" in used
            or path.name == "test_resources.py"
            and "result_of" in taken
        ):
            assert outcomes.LEFT_OUT in test.name, f"{path.name}: {test.name} compiles offline"
