"""Everything a CUDA machine can prove, in one run and one file: the whole test suite, compute-sanitizer on the attention kernels, then every benchmark.

    python -m benchmarks.gpu --out DIR [--quick] [--seconds 530]

Each step runs in its own process and gets what is left of the time; one that is cut is recorded as cut. DIR/gpu.json is
complete after every step. The exit status is 0 where every test and every step passed; without compute-sanitizer its steps are left out and say so.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import environment

# each is `python -m benchmarks.<name> --out DIR --seconds S` and writes DIR/<name>.json
BENCHMARKS = ("attention", "decode", "norm", "rotary", "patchify", "diffusion_loss", "image_chain", "cross_entropy", "train_step", "sample")
TESTS_SHARE = 0.6            # of the whole time at most; the benchmarks get the rest
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 90       # for each at most
STOP_SECONDS = 60            # what a benchmark needs to finish the configuration it is in
ROOT = Path(__file__).parent.parent
_OUTCOME = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:(?P<first>[A-Z]+) )?(?P<test>\S+\.py::.+?)(?: (?P<last>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)?$")
_REASON = re.compile(r"^(FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - (.*))?$")
_OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")


def run_step(command: list[str], log: Path, seconds: float) -> dict:
    """Run `command` for at most `seconds`, its output in `log`; end it with its children where it takes longer."""
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "400"})
        try:
            status, cut = process.wait(timeout=max(1.0, seconds)), False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status, cut = process.wait(), True
    return {"status": status, "cut": cut, "seconds": round(time.monotonic() - begin, 1), "log": log.name, "tail": log.read_text(errors="replace")[-1500:]}


def read_tests(text: str) -> dict:
    """Return counts, failing tests with their reasons, and files that could not be imported, from pytest's verbose output, whole or cut."""
    outcomes, reasons, collection = {}, {}, {}
    for line in text.splitlines():
        reason = _REASON.match(line)
        if reason and "::" not in reason[2]:
            collection[reason[2]] = reason[3] or ""
        elif reason and "::" in reason[2] and reason[3]:
            reasons[reason[2]] = reason[3]
        found = _OUTCOME.match(line)
        outcome = found and (found["last"] or found["first"])
        if outcome in _OUTCOMES and not (reason and reason[3]):
            outcomes[found["test"]] = outcome
    counts = {name.lower(): sum(o == name for o in outcomes.values()) for name in _OUTCOMES}
    failing = {test: reasons.get(test, "") for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")}
    return {"counts": counts, "failing": failing, "not_collected": collection}


def run_tests(out: Path, seconds: float, workers: int) -> dict:
    """Run the whole suite; the project's own pytest options need plugins that this machine may lack, so they are replaced."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers",
               "--continue-on-collection-errors"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command += ["--benchmark-disable"]
    step = run_step(command, out / "tests.log", seconds)
    return {**step, **read_tests((out / "tests.log").read_text(errors="replace"))}


def run_sanitizer(tool: str, out: Path, seconds: float) -> dict:
    """Run `benchmarks.sanitize` under a tool of compute-sanitizer, every tensor in an allocation of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"status": None, "cut": False, "left_out": "compute-sanitizer is not installed", "tail": ""}
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize"]
    return run_step(command, out / f"{tool}.log", min(seconds, SANITIZER_SECONDS))


def run_benchmark(name: str, out: Path, seconds: float, quick: bool, commit: str | None) -> dict:
    """Run one benchmark and take in the file it wrote, as far as it came."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), "--seconds", str(max(1.0, seconds - STOP_SECONDS))]
    command += ["--quick"] * quick + (["--commit", commit] if commit else [])
    step = run_step(command, out / f"{name}.log", seconds)
    return {**step, "report": json.loads(path.read_text()) if path.exists() else None}


def run(out: Path, *, seconds: float, quick: bool, commit: str | None, workers: int) -> dict:
    """Run every step, writing DIR/gpu.json after each; a step that breaks is recorded and the next one runs."""
    begin = time.monotonic()
    result = {"environment": environment("cuda", commit), "seconds": seconds, "tests": None, "sanitizers": {}, "benchmarks": {}}

    def step(store, key, function, share):
        left = seconds - (time.monotonic() - begin)
        if left < 5:
            store[key] = {"status": None, "cut": True, "seconds": 0.0, "tail": "the time was over before it began"}
        else:
            try:
                store[key] = function(left * share)
            except Exception as error:
                store[key] = {"status": None, "cut": False, "tail": f"{type(error).__name__}: {error}"}
        save(result, out / "gpu.json")

    step(result, "tests", lambda left: run_tests(out, left, workers), TESTS_SHARE)
    for tool in SANITIZERS:
        step(result["sanitizers"], tool, lambda left, tool=tool: run_sanitizer(tool, out, left), 1.0)
    for number, name in enumerate(BENCHMARKS):
        step(result["benchmarks"], name, lambda left, name=name: run_benchmark(name, out, left, quick, commit), 1 / (len(BENCHMARKS) - number))
    return result


def save(result: dict, path: Path) -> None:
    """Write the file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def passed(result: dict) -> bool:
    """Whether every test and step ended well: a cut step did not."""
    steps = (result["tests"], *result["sanitizers"].values(), *result["benchmarks"].values())
    return all(step["status"] == 0 and not step["cut"] for step in steps if not step.get("left_out"))


def summary(result: dict) -> str:
    """A few lines: the device, the tests, and how each benchmark ended."""
    where, tests = result["environment"], result["tests"]
    lines = [f"{where['device']}, torch {where['versions']['torch']}, triton {where['versions']['triton']}, commit {where['commit']}"]
    lines.append(f"tests: {_ending(tests)}, " + ", ".join(f"{n} {name}" for name, n in tests.get("counts", {}).items() if n))
    lines += [f"  {test}: {reason[:120]}" for test, reason in tests.get("failing", {}).items()]
    lines += [f"  not collected: {name}: {reason[:120]}" for name, reason in tests.get("not_collected", {}).items()]
    if tests["status"] not in (0, 1) and not tests.get("failing"):
        lines.append("  " + tests["tail"][-300:])
    lines += [f"{tool}: {step.get('left_out') or _ending(step)}" for tool, step in result["sanitizers"].items()]
    for name, step in result["benchmarks"].items():
        report = step.get("report") or {"rows": []}
        lines.append(f"benchmark {name}: {_ending(step)}, {len(report['rows'])} rows, {sum(bool(r.get('error')) for r in report['rows'])} with errors")
    return "\n".join(lines)


def _ending(step: dict) -> str:
    return f"{'cut' if step['cut'] else 'ended'} after {step.get('seconds', 0)} s, status {step['status']}"


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print the summary; 1 where there is no CUDA device, a test failed or a step did not finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the benchmarks' short grids")
    parser.add_argument("--seconds", type=float, default=530.0, help="for everything together")
    parser.add_argument("--workers", type=int, default=4, help="test processes, where pytest-xdist is installed")
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; run it on a machine with one (python -m benchmarks.attention --cpu needs none)")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.out.resolve(), seconds=options.seconds, quick=options.quick, commit=options.commit, workers=options.workers)
    print(summary(result))
    return 0 if passed(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
