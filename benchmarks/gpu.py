"""Everything a CUDA machine can prove: the tests, every benchmark, and compute-sanitizer where time is left.

    python -m benchmarks.gpu --out DIR --seconds 570                     everything, the tests for a third of the time

or in three commands, one behind the other, into the same DIR (docs/gpu.md):

    python -m benchmarks.gpu --out DIR --seconds 570 --part tests        attention's first
    python -m benchmarks.gpu --out DIR --seconds 570 --part kernels
    python -m benchmarks.gpu --out DIR --seconds 570 --part models

Each step runs in its own process and gets its share of what is left; one that is cut is recorded as cut. DIR/gpu.json
holds all results and is written anew every few seconds, so that a kill at any moment leaves what was measured; beside
it lie DIR/tests.jsonl, a line for each test as it ends, and what the steps printed: DIR/tests.log and
DIR/benchmarks.log. A further call for the same commit adds to them, and runs no test again that has passed. The exit
status is 0 where every test and every step passed; what was left out says why.
"""

import argparse
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
from benchmarks.harness import environment


class Step(NamedTuple):
    """A process of a part; it gets `weight` of the weights of all steps that are still to come."""

    part: str
    name: str
    weight: float
    arguments: tuple[str, ...] = ()


# each is `python -m benchmarks.<name> --out DIR --seconds S` and writes DIR/<name>.json;
# attention's grid begins with its quick cases
BENCHMARKS = (
    Step("kernels", "tune", 90, ("--quick",)),
    Step("kernels", "attention", 250),
    Step("kernels", "decode", 70),
    Step("kernels", "norm", 60),
    Step("kernels", "rotary", 50),
    Step("kernels", "patchify", 40),
    Step("models", "diffusion_loss", 50),
    Step("models", "image_chain", 40),
    Step("models", "cross_entropy", 70),
    Step("models", "train_step", 190),
    Step("models", "sample", 190),
)
TESTS = Step("tests", "tests", sum(step.weight for step in BENCHMARKS) / 2)  # a third of the whole
SANITIZERS = tuple(Step("models", tool, 90) for tool in ("memcheck", "racecheck"))
PARTS = ("tests", "kernels", "models")
END_SECONDS = 4  # to write the last file
STOP_SECONDS = 30  # what a benchmark needs at most to end the contender it is at; a quarter of a short step
POLL_SECONDS = 2
WORKER_BYTES = 4 * 2**30  # of a test process, on the host and on the device
ROOT = Path(__file__).parent.parent
TEST_PATHS = ("tests",)
STOPPED = "stopped from outside"


class Call(NamedTuple):
    """What one call of the program asks for."""

    out: Path
    seconds: float
    quick: bool = False
    commit: str | None = None
    workers: int = 1
    part: str | None = None  # every part
    sanitize: bool = False


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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    text = log.read_bytes()[begun_at:].decode(errors="replace")
    return {
        "status": status,
        "cut": cut,
        "seconds": round(time.monotonic() - begin, 1),
        "log": log.name,
        "tail": text[-1500:],
    }


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
    shutil.rmtree(running)
    return done


def left_out(why: str) -> dict:
    """The record of a step that did not run for a good reason."""
    return {"status": None, "cut": False, "left_out": why, "tail": ""}


def run(call: Call, result: dict | None = None) -> dict:
    """Run the steps asked for, writing DIR/gpu.json all along; a step that breaks is recorded and the next one runs."""
    begin, path = time.monotonic(), call.out / "gpu.json"
    if result is None or call.part in (None, "tests") and not certain(result["environment"]["commit"]):
        (call.out / "tests.jsonl").unlink(missing_ok=True)
    if result is None:
        result = {
            "environment": environment("cuda", call.commit),
            "calls": [],
            "tests": None,
            "sanitizers": {},
            "benchmarks": {},
        }
    result["calls"].append(
        {"part": call.part, "seconds": call.seconds, "quick": call.quick, "workers": call.workers, "began": time.time()}
    )
    # the steps asked for, and where the record of each goes
    steps = (
        [(TESTS, result)]
        + [(step, result["benchmarks"]) for step in BENCHMARKS]
        + [(step, result["sanitizers"]) for step in SANITIZERS]
    )
    steps = [(step, store) for step, store in steps if call.part in (None, step.part)]
    weights = [0 if step in SANITIZERS and not call.sanitize else step.weight for step, _ in steps]

    for number, (step, store) in enumerate(steps):
        earlier, left = store.get(step.name), call.seconds - END_SECONDS - (time.monotonic() - begin)
        before = {"earlier": earlier} if earlier and step is not TESTS and not earlier.get("left_out") else {}
        share = left * weights[number] / sum(weights[number:]) if weights[number] else min(left, step.weight)

        def look(found: dict, step=step, store=store, before=before) -> None:
            store[step.name] = {"status": None, "cut": True, "tail": "still running", **found, **before}
            save(result, path)

        look({})
        try:
            store[step.name] = {**run_one(step, call, share, look), **before}
        except KeyboardInterrupt:
            store[step.name] |= {"tail": STOPPED}
            break
        except Exception as error:
            store[step.name] = {"status": None, "cut": False, "tail": f"{type(error).__name__}: {error}", **before}
        finally:
            save(result, path)
            print(line_of(step.name, store[step.name]), flush=True)
    return result


def certain(commit: str | None) -> bool:
    """Whether the same name means the same code, so that a test that has passed need not run again."""
    return bool(commit) and "local changes" not in commit


def run_one(step: Step, call: Call, seconds: float, look: Callable[[dict], None]) -> dict:
    """Run one step, if its time is worth beginning."""
    if step in SANITIZERS and not call.sanitize and seconds < step.weight:
        return left_out("no time was left for it; --sanitize keeps some")
    if seconds < 5:
        return {"status": None, "cut": True, "seconds": 0.0, "tail": "the time was over before it began"}
    if step is TESTS:
        return run_tests(call.out, seconds, call.workers, look)
    if step in SANITIZERS:
        return run_sanitizer(step.name, call.out, seconds)
    return run_benchmark(step, call.out, seconds, call.quick, call.commit, look)


def save(result: dict, path: Path) -> None:
    """Write the file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def passed(result: dict) -> bool:
    """Whether every test and step ended well: a cut step did not."""
    steps = [step for step in (result["tests"], *result["sanitizers"].values(), *result["benchmarks"].values()) if step]
    return all(step["status"] == 0 and not step["cut"] for step in steps if not step.get("left_out"))


def summary(result: dict) -> str:
    """A few lines: the device, the tests with what failed, and how each step ended."""
    where, tests = result["environment"], result["tests"] or {}
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton"))
    lines = [f"{where['device']}, {versions}, commit {where['commit']}"]
    lines += [line_of("tests", tests)] * bool(tests)
    lines += [f"  {test}: {found['reason'][:120]}" for test, found in list(tests.get("failing", {}).items())[:40]]
    lines += [f"  not collected: {name}: {reason[:120]}" for name, reason in tests.get("not_collected", {}).items()]
    lines += [f"  had begun: {test}" for test in tests.get("begun", ())]
    if tests and tests["status"] not in (0, 1) and not tests.get("failing"):
        lines.append("  " + tests["tail"][-300:])
    return "\n".join(
        lines + [line_of(name, step) for store in ("benchmarks", "sanitizers") for name, step in result[store].items()]
    )


def line_of(name: str, step: dict) -> str:
    """How a step ended, in a line."""
    if step.get("left_out"):
        return f"{name}: left out, {step['left_out']}"
    ending = f"{name}: {'cut' if step['cut'] else 'ended'} after {step.get('seconds', 0)} s, status {step['status']}"
    if "counts" in step:
        done = sum(step["counts"].values())
        return f"{ending}, {done} tests ended, " + ", ".join(
            f"{n} {outcome}" for outcome, n in step["counts"].items() if n
        )
    if "report" not in step:
        return ending if step["status"] == 0 else f"{ending}: {step['tail'].strip()[-200:]}"
    rows = (step["report"] or {"rows": []})["rows"]
    return (
        f"{ending}, {len(rows)} rows, {sum(bool(r.get('milliseconds')) for r in rows)} with numbers, "
        f"{sum(bool(r.get('error')) for r in rows)} with errors, {sum(bool(r.get('left_out')) for r in rows)} left out"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print the summary; 1 where there is no CUDA device, a test failed or a step did not finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, help="one of the three parts; everything where it is not given")
    parser.add_argument("--quick", action="store_true", help="the benchmarks' short grids")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument(
        "--workers", type=int, help="test processes, with pytest-xdist; else as many as the machine bears"
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="keep time for compute-sanitizer, which else has the rest"
    )
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; run it on a machine with one (benchmarks.attention --cpu needs none)")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    earlier = options.out / "gpu.json"
    result = json.loads(earlier.read_text()) if earlier.exists() else None
    commit = environment("cuda", options.commit)["commit"]
    if result and result["environment"]["commit"] != commit:
        before = result["environment"]["commit"]
        print(f"benchmarks.gpu: {earlier} holds results of commit {before}, this is {commit}; give another --out")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workers = options.workers or default_workers()
    result = run(
        Call(
            options.out.resolve(),
            options.seconds,
            options.quick,
            options.commit,
            workers,
            options.part,
            options.sanitize,
        ),
        result,
    )
    print(summary(result))
    return 0 if passed(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
