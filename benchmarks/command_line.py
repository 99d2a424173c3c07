"""The one command line of all benchmarks: `python -m benchmarks.NAME --out DIR [--quick] [--seconds S] [--cpu]`."""
import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import BEGAN
from benchmarks.environment import clocks, environment
from benchmarks.report import Report


def run_command(
    name: str,
    documentation: str,
    arguments: list[str] | None,
    *,
    settings: dict,
    cases: Callable[..., Iterable],
    measure_case: Callable[[object, Report, str], None],
    cpu_cases: Callable[[bool], Iterable] | None = None,
    options: dict[str, dict] | None = None,
    quick: str = "the first cases only",
    finish: Callable[[Report, Path], None] = lambda report, out: None,
) -> int:
    """Run a benchmark's cases until they end or `--seconds` are over; its file is complete after each row.

    The file is DIR/NAME.json, or with `--cpu` DIR/NAME-cpu-COMMIT.json, so that results of several commits may lie
    beside each other.

    Args:
        name: of the benchmark and its file.
        documentation: the benchmark's docstring; its first line is the description.
        arguments: of the command line; None takes those of the process.
        settings: recorded in the file.
        cases: the cases on CUDA, of whether the run is quick and, by name, of the benchmark's own options.
        measure_case: measures a case and adds its rows to the report; it also gets the device.
        cpu_cases: the cases on the CPU, of whether the run is quick; None where the benchmark needs CUDA.
        options: the benchmark's own options, `argparse`'s settings by name ("head-dims").
        quick: what `--quick` chooses.
        finish: what is left to do with the report and DIR after the last case on CUDA.

    Returns 1 where a case, or a contender of ours, failed.
    """
    parser = make_parser(documentation.splitlines()[0], quick, cpu=cpu_cases is not None)
    own = {parser.add_argument(f"--{option}", **given).dest for option, given in (options or {}).items()}
    given = parser.parse_args(arguments)
    device = "cpu" if given.cpu else "cuda"
    if device == "cuda" and lacks_device(name, cpu_cases is not None):
        return 1
    if device == "cpu":
        torch.set_num_threads(1)  # on a shared machine a second thread measures how long the other waits for a core
        chosen = cpu_cases(given.quick)
    else:
        chosen = cases(given.quick, **{option: getattr(given, option) for option in own})
    report = Report(name, {"quick": given.quick, **settings}, environment(device, given.commit))
    report.obey(given)
    path = given.out / (f"{name}.json" if device == "cuda" else f"{name}-cpu-{short_commit(report)}.json")
    spent = time.monotonic() - BEGAN if arguments is None else 0.0
    status = report.run(chosen, lambda case: measure_case(case, report, device), path, given.seconds - spent)
    report.environment["clocks_after"] = clocks()
    report.save(path)
    if device == "cuda":
        finish(report, given.out)
    return status or int(any(row.get("error") for row in report.rows if row["contender"].startswith("tfkernels")))


def lacks_device(name: str, cpu: bool) -> bool:
    """Whether there is no CUDA device, which is said; `cpu` says whether there is anything without one."""
    if torch.cuda.is_available():
        return False
    advice = "pass --cpu for what can be measured without one" if cpu else "run it on a machine with one"
    print(f"benchmarks.{name}: no CUDA device; {advice}")
    return True


def short_commit(report: Report) -> str:
    """Ten digits of the commit that was measured."""
    return (report.environment["commit"] or "unknown")[:10]


def make_parser(description: str, quick: str, cpu: bool = True) -> argparse.ArgumentParser:
    """The options of every benchmark; `quick` says what that one does, `cpu` whether there is anything without CUDA."""
    parser = common_parser(description, quick)
    parser.set_defaults(cpu=False)
    parser.add_argument("--skip", type=int, default=0, help="go on in the file that is there, behind so many cases")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME",
                        help="go on in the file that is there, without these contenders")
    if cpu:
        parser.add_argument("--cpu", action="store_true", help="small cases on the CPU, with one thread")
    return parser


def common_parser(description: str, quick: str, seconds: float | None = math.inf, out: Path | None = None,
                  timed: str = "after so many from the command's start, nothing new begins") -> argparse.ArgumentParser:
    """The options that a benchmark and the run of them all share; without `out` the folder must be given.

    `timed` says what `--seconds` does; there is none where `seconds` is None.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out, required=out is None, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help=quick)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help=timed)
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    return parser
