"""The whole schedule of a CUDA machine, rehearsed with stubs: order, shares of the time, cuts, losses, kills, and what
lies in the files after each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environment, gpu, gpu_steps, outcomes
from benchmarks.gpu import BENCHMARKS, SANITIZERS, Call

ROOT = Path(gpu.__file__).parents[1]
NAMES = [step.name for step in BENCHMARKS]
STUB = """
import json, os, sys, time
from pathlib import Path
name, arguments = sys.argv[1], sys.argv[2:]
path = Path(arguments[arguments.index("--out") + 1]) / f"{name}.json"
def save(rows, notes=(), lost=None):
    part = path.with_suffix(".part")
    report = {"benchmark": name, "arguments": arguments, "rows": rows, "notes": list(notes), "lost": lost}
    part.write_text(json.dumps(report))
    part.replace(path)
ours = {"contender": "tfkernels", "milliseconds": {"forward": {"p50": 1.0}}, "error": None, "left_out": None}
print(f"this is {name}", flush=True)
save([ours])
path.with_name(f"{name}_d64.png").write_bytes(b"a plot")
if name == "decode":
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)
if name == "norm":
    save([ours, {**ours, "milliseconds": {}, "error": "out of memory"}])
    raise SystemExit(1)
if name == "rotary":
    begun = [ours, {**ours, "contender": "theirs", "milliseconds": {}, "error": "an illegal memory access"}]
    if "--without" not in arguments:
        save(begun, lost={"case": 3, "contender": "theirs"})
        raise SystemExit(1)
    if arguments[arguments.index("--skip") + 1] == "3":
        save(begun, lost={"case": 4, "contender": "tfkernels"})
        raise SystemExit(1)
    save([*begun, ours, ours])
    raise SystemExit(0)
if name == "patchify":
    path.unlink()
    raise OSError("no such thing")
save([ours, {**ours, "contender": "flash-attn", "milliseconds": {}, "left_out": "not installed"}])
"""
SUITE = (
    "from benchmarks import outcomes\ndef test_good(): pass\ndef test_bad(): assert 3 == 4, 'three is not four'\n"
    "def test_loses(): outcomes.device_error = lambda: 'CUDA error: an illegal memory access'\ndef test_after(): pass\n"
)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Stubs in the place of everything that needs a device; what began, with the time it got."""
    began, run_step = [], gpu_steps.run_step

    def step(command, log, seconds, look=lambda: None, **variables):
        began.append((command, round(seconds, 1), variables))
        return run_step(command, log, min(seconds, 1.5) if "decode" in command else seconds, look, **variables)

    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "test_some.py").write_text(SUITE)
    monkeypatch.setattr(gpu, "environment", lambda device, commit=None: environment.environment("cpu", commit))
    monkeypatch.setattr(
        gpu_steps, "benchmark_command", lambda name, out: [sys.executable, "-c", STUB, name, "--out", str(out)]
    )
    monkeypatch.setattr(gpu_steps, "TEST_PATHS", (str(suite),))
    monkeypatch.setattr(gpu_steps, "run_step", step)
    monkeypatch.setattr(gpu_steps, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: None)
    (tmp_path / "out").mkdir()
    return tmp_path / "out", began


def names_of(began):
    return [
        next((name for name in ("pytest", *NAMES, "memcheck", "racecheck") if name in command), "?")
        for command, _, _ in began
    ]


def test_the_whole_schedule_runs_in_order_gives_the_benchmarks_two_thirds_and_outlives_every_kind_of_end(stage, capsys):
    out, began = stage
    result = gpu.run(Call(out, 3000.0, commit="abc"))
    assert names_of(began) == ["pytest", *[n for name in NAMES for n in [name] * (3 if name == "rotary" else 1)]]
    assert NAMES == [
        "tune",
        "attention",
        "decode",
        "norm",
        "rotary",
        "patchify",
        "diffusion_loss",
        "image_chain",
        "cross_entropy",
        "train_step",
        "sample",
    ]
    times = {name: seconds for name, (_, seconds, _) in reversed(list(zip(names_of(began), began)))}
    assert 900 < times["pytest"] < 1000.1 and all(
        times[name] > 0.9 * (3000 - 4) * 2 / 3 * step.weight / sum(s.weight for s in BENCHMARKS)
        for name, step in zip(NAMES, BENCHMARKS)
    )
    assert (
        result["tests"]["counts"] == {"passed": 2, "failed": 2, "error": 0, "skipped": 0, "xfailed": 0, "xpassed": 0}
        and not result["tests"]["cut"]
    )
    reasons = " ".join(test["reason"] for test in result["tests"]["failing"].values())
    assert "three is not four" in reasons and "the device was lost in this test" in reasons
    ends = {
        name: (step["status"], step["cut"], len((step["report"] or {"rows": []})["rows"]))
        for name, step in result["benchmarks"].items()
    }
    assert ends == {name: (0, False, 2) for name in NAMES} | {
        "decode": (-signal.SIGKILL, True, 1),
        "norm": (1, False, 2),
        "rotary": (0, False, 4),
        "patchify": (1, False, 0),
    }
    goes_on = [
        command[command.index("--skip") :] for command, _, _ in began if "rotary" in command and "--skip" in command
    ]
    assert goes_on == [["--skip", "3", "--without", "theirs"], ["--skip", "5", "--without", "theirs"]]
    assert "no such thing" in result["benchmarks"]["patchify"]["tail"]
    missing = "compute-sanitizer is not installed"
    assert {tool: step["left_out"] for tool, step in result["sanitizers"].items()} == {
        "memcheck": missing,
        "racecheck": missing,
    }
    assert json.loads((out / "gpu.json").read_text()) == result and not gpu.passed(result)
    plots = [f"{name}_d64.png" for name in NAMES]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["benchmarks.log", "gpu.json", "tests.jsonl", "tests.log", *plots]
    )
    assert "this is sample" in (out / "benchmarks.log").read_text()
    said = gpu.summary(result)
    assert (
        "test_bad: AssertionError: three is not four" in said
        and "decode: cut after" in said
        and "1 with numbers, 0 with errors, 1 left out" in said
    )
    assert "norm: ended" in capsys.readouterr().out  # as it comes


def test_tests_run_one_thread_each_and_compile_each_kernel_once(stage, monkeypatch):
    out, began = stage
    monkeypatch.setattr(
        gpu_steps,
        "run_step",
        lambda *given, **variables: began.append((*given[:1], given[2], variables)) or {"status": 0, "cut": False},
    )
    gpu_steps.run_tests(out, 100.0, 1)
    ((command, _, variables),) = began
    assert (
        variables["OMP_NUM_THREADS"] == "1"
        and variables["TRITON_CACHE_MANAGER"] == "benchmarks.compile_once:WaitingCacheManager"
    )
    assert (
        "benchmarks.outcomes" in command
        and str(out / "tests.jsonl") in command
        and ("-n" in command) == bool(gpu_steps.importlib.util.find_spec("xdist"))
    )


def test_without_xdist_the_tests_start_again_behind_the_one_that_lost_the_device(stage, monkeypatch):
    out, began = stage
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None)
    (Path(gpu_steps.TEST_PATHS[0]) / "test_more.py").write_text(
        "import os\ndef test_dies(): os._exit(3)\ndef test_last(): pass\n"
    )
    found = gpu_steps.run_tests(out, 200.0, 1)
    assert len(began) == 3 and not found["cut"] and found["counts"]["passed"] == 3 and found["counts"]["failed"] == 3
    assert "its process ended in this test, status 3" in str(found["failing"])


def test_three_calls_fill_one_file_and_a_further_one_loses_nothing(stage):
    out, began = stage
    (Path(gpu_steps.TEST_PATHS[0]) / "test_some.py").write_text("def test_bad(): assert False\n")
    for number, part in enumerate(("tests", "kernels", "models", "kernels")):
        earlier = json.loads((out / "gpu.json").read_text()) if number else None
        result = gpu.run(Call(out, 1000.0, part=part, commit="abc", quick=part == "models"), earlier)
    kernels, models = NAMES[:6], NAMES[6:]
    assert list(dict.fromkeys(names_of(began)[:-8])) == ["pytest", *kernels, *models] and set(
        names_of(began)[-8:]
    ) == set(kernels)
    assert began[0][1] > 980 and result["tests"]["counts"]["failed"] == 1 and result["benchmarks"].keys() == set(NAMES)
    assert [call["part"] for call in result["calls"]] == ["tests", "kernels", "models", "kernels"]
    assert (out / "attention_d64.png").read_bytes() == b"a plot" and not (out / "running").exists()
    assert result["benchmarks"]["attention"]["earlier"]["report"]["rows"]
    assert all(
        ("--quick" in result["benchmarks"][name]["report"]["arguments"]) == (name in models)
        for name in ("attention", "sample")
    )
    given = result["benchmarks"]["attention"]["report"]["arguments"]
    assert given[given.index("--commit") + 1] == "abc" and 0 < float(
        given[given.index("--seconds") + 1]
    ) < 1000 * 250 / (560 - 90)


def test_a_kill_in_the_middle_leaves_what_was_measured(tmp_path):
    """The program itself, killed by its machine while a benchmark hangs."""
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys; from pathlib import Path; from benchmarks import environment, gpu, gpu_steps\nSTUB = {STUB!r}\n"
        "gpu.environment = lambda device, commit=None: environment.environment('cpu', commit)\n"
        "gpu_steps.POLL_SECONDS = 0.1\n"
        "gpu_steps.benchmark_command = lambda name, out: [sys.executable, '-c', STUB, name, '--out', str(out)]\n"
        "gpu.run(gpu.Call(Path(sys.argv[1]), 1000.0, part='kernels'))\n"
    )
    for number, sent in enumerate((signal.SIGINT, signal.SIGKILL)):
        out = tmp_path / str(number)
        out.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(script), str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        try:
            deadline, found = time.monotonic() + 120, {}
            while time.monotonic() < deadline and not (found.get("decode") or {}).get("report"):
                time.sleep(0.1)
                found = json.loads((out / "gpu.json").read_text())["benchmarks"] if (out / "gpu.json").exists() else {}
        finally:
            process.send_signal(sent)
            process.communicate(timeout=60)
        found = json.loads((out / "gpu.json").read_text())["benchmarks"]
        assert [len(found[name]["report"]["rows"]) for name in ("tune", "attention", "decode")] == [2, 2, 1]
        assert found["decode"]["cut"] and found["tune"]["status"] == 0 and "norm" not in found
        assert found["decode"]["tail"] == ("still running" if sent == signal.SIGKILL else gpu.STOPPED)


def test_tests_that_passed_run_again_where_the_commit_does_not_say_which_code_they_passed_on(stage, monkeypatch):
    out, _ = stage
    monkeypatch.setattr(gpu_steps, "run_tests", lambda out, *_: {"status": 0, "cut": False, "tail": ""})
    for commit, kept in (("abc", True), ("abc with local changes", False), (None, False)):
        (out / "tests.jsonl").write_text('{"test": "a.py::test_a", "outcome": "passed"}\n')
        earlier = {"environment": {"commit": commit}, "calls": [], "tests": None, "sanitizers": {}, "benchmarks": {}}
        gpu.run(Call(out, 100.0, part="tests"), earlier)
        assert (out / "tests.jsonl").exists() == kept


def test_what_breaks_before_its_process_and_what_finds_no_time_is_recorded(stage, monkeypatch):
    out, _ = stage

    def breaks(*_):
        raise OSError("no such program")

    monkeypatch.setattr(gpu_steps, "run_tests", breaks)
    result = gpu.run(Call(out, 1000.0, part="tests"))
    assert result["tests"]["tail"] == "OSError: no such program" and not gpu.passed(result)
    late = gpu.run(Call(out, 3.0))
    assert (
        late["benchmarks"]["attention"]["cut"]
        and late["tests"]["tail"] == "the time was over before it began"
        and not gpu.passed(late)
    )
    assert {step["left_out"] for step in late["sanitizers"].values()} == {
        "no time was left for it; --sanitize keeps some"
    }


def test_sanitizers_come_last_and_have_time_of_their_own_only_where_they_are_asked_for(stage, monkeypatch):
    out, began = stage
    tool = out.parent / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $@; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: str(tool))
    result = gpu.run(Call(out, 2000.0, part="models", sanitize=True))
    assert (
        names_of(began)[-2:] == ["memcheck", "racecheck"]
        and began[0][1] < 2000 * 50 / (540 + 180)
        and not gpu.passed(result)
    )
    step = result["sanitizers"]["racecheck"]
    assert (
        step["status"] == 9
        and "1 --tool racecheck --error-exitcode 9" in step["tail"]
        and "benchmarks.sanitize" in step["tail"]
    )
    good = {"status": 0, "cut": False}
    assert not gpu.passed({"tests": good, "sanitizers": {"racecheck": step}, "benchmarks": {}})
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: None)
    assert gpu.passed(
        {"tests": good, "sanitizers": {"racecheck": gpu_steps.run_sanitizer("racecheck", out, 10)}, "benchmarks": {}}
    )
    assert [step.name for step in SANITIZERS] == ["memcheck", "racecheck"]


def test_a_step_that_takes_too_long_is_ended_with_its_children_and_called_cut(tmp_path):
    begin = time.monotonic()
    step = gpu_steps.run_step(["bash", "-c", "echo begun; sleep 60 & echo child $!; setsid bash -c 'sleep 61 & "
                               "echo child $!; wait' & wait"], tmp_path / "log", 2.0)
    assert step["cut"] and step["status"] < 0 and "begun" in step["tail"] and time.monotonic() - begin < 20
    children = [int(said.split()[0]) for said in step["tail"].split("child ")[1:]]
    time.sleep(0.2)
    states = [Path(f"/proc/{child}/stat").read_text().split()[2] if Path(f"/proc/{child}").exists() else "gone"
              for child in children]
    assert len(states) == 2 and {*states} <= {"gone", "Z"}


def test_the_callers_own_path_of_packages_is_kept(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"]
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    step = gpu_steps.run_step(command, tmp_path / "log", 60)
    assert step["status"] == 0 and step["tail"].strip() == f"{ROOT}{os.pathsep}/somewhere/else"
    monkeypatch.delenv("PYTHONPATH")
    step = gpu_steps.run_step(command, tmp_path / "log", 60)
    assert step["tail"].strip() == str(ROOT)  # its own output alone, and no empty entry


def test_workers_are_as_many_as_cores_and_memories_bear(monkeypatch):
    monkeypatch.setattr(gpu_steps.os, "sched_getaffinity", lambda pid: set(range(16)))
    pages = {"SC_PHYS_PAGES": 2**25, "SC_PAGE_SIZE": 4096}  # 128 GiB
    monkeypatch.setattr(gpu_steps.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    for free, workers in ((78 * 2**30, 15), (24 * 2**30, 6), (2**30, 1)):
        monkeypatch.setattr(gpu.torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert gpu_steps.default_workers() == workers


def test_results_of_another_commit_are_not_added_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device, commit=None: {"commit": commit})
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": {"commit": "abc"}}))
    assert gpu.main(["--out", str(tmp_path), "--commit", "def"]) == 1
    assert "holds results of commit abc, this is def; give another --out" in capsys.readouterr().out


def test_every_benchmark_of_the_schedule_is_there_and_takes_its_options(capsys):
    for step in BENCHMARKS:
        module = __import__(f"benchmarks.{step.name}", fromlist=["main"])
        with pytest.raises(SystemExit) as ended:
            module.main(["--help"])
        said = capsys.readouterr().out
        options = ("--out", "--seconds", "--quick", "--commit", "--skip", "--without")
        assert ended.value.code == 0 and all(option in said for option in options), step.name
        assert ("--cpu" in said) == (step.name != "tune")
    assert outcomes.LEFT_OUT == "spill"
