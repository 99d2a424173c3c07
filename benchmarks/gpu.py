"""Everything a CUDA machine can prove: the tests, every benchmark, and compute-sanitizer where time is left.

    python -m benchmarks.gpu --out DIR --seconds 570                     everything, the tests for a third of the time

or in three commands, one behind the other, into the same DIR (docs/gpu.md):

    python -m benchmarks.gpu --out DIR --seconds 440 --part tests        attention's first
    python -m benchmarks.gpu --out DIR --seconds 580 --part kernels
    python -m benchmarks.gpu --out DIR --seconds 580 --part models

Each step runs in its own process and gets its share of what is left; one that is cut is recorded as cut. DIR/gpu.json
holds all results and is written anew every few seconds, so that a kill at any moment leaves what was measured; beside
it lie DIR/tests.jsonl, a line for each test as it ends, and what the steps printed: DIR/tests.log and
DIR/benchmarks.log. A further call for the same commit adds to them, and runs no test again that has passed, unless
there are changes in no commit. The exit
status is 0 where every test and every step passed; what was left out says why.
"""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import BEGAN
from benchmarks import gpu_steps as steps
from benchmarks.command_line import common_parser
from benchmarks.environment import environment
from benchmarks.gpu_steps import Step
from benchmarks.gpu_summary import line_of, passed, summary

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


def run(call: Call, result: dict | None = None, began: float | None = None) -> dict:
    """Run the steps asked for, writing DIR/gpu.json all along; a step that breaks is recorded and the next one runs.

    The call's seconds count from `began` on time.monotonic(), by default from now.
    """
    begin, path = time.monotonic() if began is None else began, call.out / "gpu.json"
    if result is None or call.part in (None, "tests") and not certain(result["environment"]["commit"]):
        (call.out / "tests.jsonl").unlink(missing_ok=True)
    result = result or {"environment": environment("cuda", call.commit), "calls": [], "tests": None,
                        "sanitizers": {}, "benchmarks": {}}
    asked = {"part": call.part, "seconds": call.seconds, "quick": call.quick, "workers": call.workers}
    result["calls"].append({**asked, "began": time.time()})

    chosen = schedule(call, result)
    weights = [0 if step in SANITIZERS and not call.sanitize else step.weight for step, _ in chosen]
    for number, (step, store) in enumerate(chosen):
        left = call.seconds - END_SECONDS - (time.monotonic() - begin)
        share = left * weights[number] / sum(weights[number:]) if weights[number] else min(left, step.weight)
        try:
            run_and_record(step, store, call, share, lambda: save(result, path))
        except KeyboardInterrupt:
            store[step.name] |= {"tail": STOPPED}
            break
        finally:
            save(result, path)
            print(line_of(step.name, store[step.name]), flush=True)
    return result


def schedule(call: Call, result: dict) -> list[tuple[Step, dict]]:
    """The steps asked for in their order, each with the place in `result` where its record goes."""
    everything = [(TESTS, result)]
    everything += [(step, result["benchmarks"]) for step in BENCHMARKS]
    everything += [(step, result["sanitizers"]) for step in SANITIZERS]
    return [(step, store) for step, store in everything if call.part in (None, step.part)]


def run_and_record(step: Step, store: dict, call: Call, seconds: float, save: Callable[[], None]) -> None:
    """Run one step; its record is in `store` from the beginning and saved whenever the step has news."""
    earlier = store.get(step.name)
    before = {"earlier": earlier} if earlier and step is not TESTS and not earlier.get("left_out") else {}

    def look(found: dict) -> None:
        store[step.name] = {"status": None, "cut": True, "tail": "still running", **found, **before}
        save()

    look({})
    try:
        store[step.name] = {**run_one(step, call, seconds, look), **before}
    except Exception as error:
        store[step.name] = {"status": None, "cut": False, "tail": f"{type(error).__name__}: {error}", **before}


def certain(commit: str | None) -> bool:
    """Whether the same name means the same code, so that a test that has passed need not run again."""
    return bool(commit) and "local changes" not in commit


def run_one(step: Step, call: Call, seconds: float, look: Callable[[dict], None]) -> dict:
    """Run one step, if its time is worth beginning."""
    if step in SANITIZERS and not call.sanitize and seconds < step.weight:
        return steps.left_out("no time was left for it; --sanitize keeps some")
    if seconds < 5:
        return {"status": None, "cut": True, "seconds": 0.0, "tail": "the time was over before it began"}
    if step is TESTS:
        return steps.run_tests(call.out, seconds, call.workers, look)
    if step in SANITIZERS:
        return steps.run_sanitizer(step.name, call.out, seconds)
    return steps.run_benchmark(step, call.out, seconds, call.quick, call.commit, look)


def save(result: dict, path: Path) -> None:
    """Write the file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print the summary; 1 where there is no CUDA device, a test failed or a step did not finish."""
    parser = common_parser(__doc__.splitlines()[0], "the benchmarks' short grids", seconds=570.0)
    parser.add_argument("--part", choices=PARTS, help="one of the three parts; by default all of them")
    parser.add_argument("--workers", type=int, help="test processes, with pytest-xdist; by default what fits")
    parser.add_argument("--sanitize", action="store_true", help="keep time for compute-sanitizer, else what is left")
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
    call = Call(options.out.resolve(), options.seconds, options.quick, options.commit,
                options.workers or steps.default_workers(), options.part, options.sanitize)
    if call.part in (None, "tests"):
        print(f"benchmarks.gpu: {call.workers} test processes; --workers N asks for others", flush=True)
    result = run(call, result, BEGAN)
    print(summary(result))
    return 0 if passed(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
