"""The command line that all benchmarks share."""
import subprocess
import sys

import pytest

from benchmarks import command_line, environment, gpu, tune
from tests.conftest import DEVICE


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a CUDA device")
@pytest.mark.parametrize("module", ["gpu", "attention"])
def test_without_cuda_one_line_says_so_and_the_status_is_1(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=gpu.steps.ROOT,
    )
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and "no CUDA device" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_benchmarks_own_options_choose_its_cases():
    cases = tune.cases(False, kernels=["dq"], head_dims=[64, 128], lengths=None)
    assert [case[:3] for case in cases] == [(8192, 64, "dq"), (8192, 128, "dq"), (1024, 64, "dq"), (1024, 128, "dq")]
    assert [case[:3] for case in tune.cases(True, ["fwd"], [64], None)] == [(8192, 64, "fwd")]


def test_own_options_reach_the_cases_and_what_failed_is_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "environment", lambda device, commit: environment.environment("cpu", commit))
    seen, ended = [], []

    def measure_case(case, report, device):
        seen.append((case, device))
        if case == 3:
            raise ValueError("no such shape")

    def run(*arguments):
        return command_line.run_command(
            "some", "Some words.\nMore.", ["--out", str(tmp_path), *arguments], settings={},
            cases=lambda quick, some_numbers: some_numbers[:1] if quick else some_numbers, measure_case=measure_case,
            options={"some-numbers": {"nargs": "+", "type": int}}, finish=lambda report, out: ended.append(out))

    assert run("--some-numbers", "1", "2") == 0 and run("--quick", "--some-numbers", "4", "5") == 0
    assert seen == [(1, "cuda"), (2, "cuda"), (4, "cuda")] and ended == [tmp_path] * 2
    assert run("--some-numbers", "3") == 1 and "3 failed: ValueError: no such shape" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]
