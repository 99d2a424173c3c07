"""The steps of benchmarks/gpu.py: how the tests, a benchmark and a sanitizer run, each in a process of its own.

A step returns a record: its exit `status`, whether its time was over (`cut`), the `seconds` it took, the end of what it
printed (`tail`), and what it found: the tests' outcomes, or the benchmark's report.
"""
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import outcomes

STOP_SECONDS = 30  # what a benchmark needs at most to end the contender it is at; a quarter of a short step
POLL_SECONDS = 2
WORKER_BYTES = 4 * 2**30  # of a test process, on the host and on the device
ROOT = Path(__file__).parent.parent
TEST_PATHS = ("tests",)


class Step(NamedTuple):
    """A process of a part; it gets `weight` of the weights of all steps that are still to come."""

    part: str
    name: str
    weight: float
    arguments: tuple[str, ...] = ()


def run_step(
    command: list[str], log: Path, seconds: float, look: Callable[[], object] = lambda: None, **variables: str
) -> dict:
    """Run `command` for at most `seconds`, its output added to `log`, and call `look` meanwhile.

    A process that takes longer is ended, and so are its children in any case.
    """
    begin, begun_at = time.monotonic(), log.stat().st_size if log.exists() else 0
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            process_group=0,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": path,
                "COLUMNS": "400",
                "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", "1"),
                **variables,
            },
        )
        cut = False
        try:
            while process.poll() is None and not cut:
                left = seconds - (time.monotonic() - begin)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.05, min(POLL_SECONDS, left)))
                cut = process.poll() is None and time.monotonic() - begin >= seconds
                look()
        finally:  # also where this program is told to end
            below = descendants(process.pid)  # torchrun's processes lead groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # first: whose children end first may still end with 0
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            status = process.wait()
    text = log.read_bytes()[begun_at:].decode(errors="replace")
    return {
        "status": status,
        "cut": cut,
        "seconds": round(time.monotonic() - begin, 1),
        "log": log.name,
        "tail": text[-1500:],
    }


def descendants(pid: int) -> list[int]:
    """The numbers of the processes that a process started, and that those did."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            number, rest = stat.read_text().split(" ", 1)
            parents[int(number)] = int(rest.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def default_workers() -> int:
    """As many test processes as cores, but one, and memories bear."""
    cores = len(os.sched_getaffinity(0)) - 1
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // WORKER_BYTES
    device = torch.cuda.mem_get_info()[0] // WORKER_BYTES if torch.cuda.is_available() else cores
    return int(max(1, min(cores, host, device)))


def test_command(out: Path, workers: int) -> list[str]:
    """pytest on the suite; the project's own options need plugins that this machine may lack, so they are replaced."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=short",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.outcomes",
        "--rootdir",
        str(ROOT),
        "--outcomes",
        str(out / "tests.jsonl"),
        "-o",
        "addopts=--strict-markers",
        "--continue-on-collection-errors",
    ]
    if importlib.util.find_spec("xdist") is not None:  # also for one worker: one that loses the device is replaced
        command += ["-n", str(workers), "--max-worker-restart", "1000"]
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command += ["--benchmark-disable"]
    return [*command, *TEST_PATHS]


def run_tests(out: Path, seconds: float, workers: int, look: Callable[[dict], object] = lambda found: None) -> dict:
    """Run the tests, one thread in each process.

    Where a test took the whole run with it, the run starts again without those that have ended.
    """
    path, begin = out / "tests.jsonl", time.monotonic()
    variables = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_MANAGER": "benchmarks.compile_once:WaitingCacheManager",
    }
    outcomes.add(path, run=time.time())
    while True:
        step = run_step(
            test_command(out, workers),
            out / "tests.log",
            seconds - (time.monotonic() - begin),
            lambda: look(outcomes.read(path)),
            **variables,
        )
        found = outcomes.read(path)
        if step["cut"] or not found["begun"] and step["status"] != outcomes.LOST:
            break
        for test in found["begun"]:
            outcomes.add(
                path, test=test, outcome="failed", reason=f"its process ended in this test, status {step['status']}"
            )
    step["seconds"] = round(time.monotonic() - begin, 1)
    if step["status"] == 5 and found["counts"]["passed"]:  # pytest had nothing left to run
        step["status"] = 0
    return {**step, **found}


def run_sanitizer(tool: str, out: Path, seconds: float) -> dict:
    """Run `benchmarks.sanitize` under a tool of compute-sanitizer, every tensor in an allocation of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return left_out("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize"]
    return run_step(command, out / "benchmarks.log", seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark_command(name: str, out: Path) -> list[str]:
    """A benchmark without its options on time."""
    return [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out)]


def run_benchmark(
    step: Step,
    out: Path,
    seconds: float,
    quick: bool,
    commit: str | None,
    look: Callable[[dict], object] = lambda report: None,
) -> dict:
    """Run one benchmark and take in the file that it writes, as far as it has come.

    One that lost the device goes on in another process.
    """
    running = out / "running"
    shutil.rmtree(running, ignore_errors=True)
    running.mkdir()

    def report() -> dict | None:
        path = running / f"{step.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    begin, ending, skip, without = time.monotonic(), min(STOP_SECONDS, seconds / 4), 0, []
    command = [*benchmark_command(step.name, running), *step.arguments]
    command += ["--quick"] * (quick and "--quick" not in step.arguments) + (["--commit", commit] if commit else [])
    while True:
        left = seconds - (time.monotonic() - begin)
        rest = [
            "--seconds",
            f"{left - ending:.1f}",
            *(["--skip", str(skip)] if skip else []),
            *(["--without", *without] if without else []),
        ]
        done = run_step(command + rest, out / "benchmarks.log", left, lambda: look({"report": report()}))
        done["report"] = report()
        lost = done["report"] and done["report"].get("lost")
        if done["cut"] or not lost or seconds - (time.monotonic() - begin) < 2 * ending:
            break
        # a peer takes part no more; where it was ours, its case is passed over
        ours = not lost["contender"] or lost["contender"].startswith("tfkernels") or lost["contender"] in without
        skip, without = (lost["case"] + 1, without) if ours else (lost["case"], [*without, lost["contender"]])
    done["seconds"] = round(time.monotonic() - begin, 1)
    for plot in running.glob("*.png"):
        os.replace(plot, out / plot.name)
    shutil.rmtree(running)
    return done


def left_out(why: str) -> dict:
    """The record of a step that did not run for a good reason."""
    return {"status": None, "cut": False, "left_out": why, "tail": ""}
