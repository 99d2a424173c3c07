"""The kernels' own tests on their compiled code, without a GPU: all dtypes, rows and masks, on several Tritons.

    python -m benchmarks.emulate [--triton VERSION ...] [--architecture sm_90 ...] [--schedule late ...] [--minutes M]

Each configuration (Triton, architecture, schedule) is one run of pytest with `ptxrun.plugin` and `--races`, which
leaves a line for each test in build/emulate/COMMIT/CONFIGURATION.jsonl as the test ends. So a run may be stopped at
any time, and the same command goes on where it was; `--minutes` stops each configuration by itself. Of each test one
case comes before the second case of any, so that a short run has seen every test. Another Triton than the installed one
is put into build/triton/VERSION by pip, once; a folder that holds one may be named instead.

What has been run so far is written to benchmarks/results/emulate.md, with every failure.
"""
import argparse
import collections
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ptxrun.plugin import collected, lines

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SOURCES = ("tfkernels", "ptxrun", "tests/tfkernels", "tests/conftest.py")
LEFT_OUT = ("test_arguments.py", "test_library.py", "test_names.py", "test_resources.py", "integrations")  # no numbers
SCHEDULES = ("late", "early", "random-0", "random-1", "random-2", "random-3")
LIMIT = 60  # seconds of the processor for a test
PAGE = """# The kernels on their compiled code

Written by `python -m benchmarks.emulate` on {date}, of commit {commit}, with torch {torch}. Races were looked
for in every run. A test that takes more than {limit} seconds of the processor is stopped, and counts as that. What is
not reached is left for the next call of the same command; a schedule without a line has not begun.

| Triton | architecture | schedule | passed | failed | stopped | skipped | not reached | launches | kernels | minutes |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Configuration(NamedTuple):
    """One run of the tests."""

    triton: str  # a version
    folder: Path | None  # where it is, None for the installed one
    architecture: str
    schedule: str  # "random-3": of the seed 3

    def file(self, commit: str) -> Path:
        """Where its tests are recorded."""
        return BUILD / "emulate" / commit / f"{self.triton}-{self.architecture}-{self.schedule}.jsonl"

    def command(self, commit: str) -> list[str]:
        """The run of pytest."""
        schedule, _, seed = self.schedule.partition("-")
        ignored = [f"--ignore=tests/tfkernels/{name}" for name in LEFT_OUT]
        return [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "ptxrun.plugin",
                "--emulate", self.architecture, "--races", "--schedule", schedule, "--seed", seed or "0",
                "--limit", str(LIMIT), "--results", str(self.file(commit)), *ignored, "tests/tfkernels"]

    def run(self, commit: str, minutes: float | None) -> None:
        """Run what is left of it, for some minutes."""
        path = [str(self.folder)] if self.folder else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
                                    "OMP_NUM_THREADS": "1"}
        print(f"Triton {self.triton}, {self.architecture}, {self.schedule}", flush=True)
        try:
            subprocess.run(self.command(commit), cwd=ROOT, env=environment, timeout=minutes and 60 * minutes)
        except subprocess.TimeoutExpired:
            print(f"stopped after {minutes:g} minutes; the same command goes on", flush=True)

    def row(self, commit: str) -> str:
        """Its line of the page."""
        tests = lines(self.file(commit))
        count = collections.Counter(outcome(test) for test in tests)
        launches = sum((collections.Counter(test["launches"]) for test in tests), collections.Counter())
        left = collected(self.file(commit)) - len(tests)
        cells = [self.triton, self.architecture, self.schedule, count["passed"], count["failed"], count["stopped"],
                 count["skipped"], left, launches.total(), len(launches),
                 f"{sum(test['seconds'] for test in tests) / 60:.0f}"]
        return f"| {' | '.join(map(str, cells))} |\n"


def outcome(test: dict) -> str:
    """A test's outcome, where one that took too long is no other skip."""
    return "stopped" if "longer than" in test.get("why", "") else test["outcome"]


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def folder_of(version: str) -> Path | None:
    """The folder of a Triton, put there if it is not."""
    if version == triton.__version__:
        return None
    if Path(version).is_dir():
        return Path(version).resolve()
    folder = BUILD / "triton" / version
    if not (folder / "triton").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps",
                        "--target", str(folder), f"triton=={version}"], check=True)
    return folder


def version_in(folder: Path) -> str:
    """The version of the Triton in a folder."""
    return next(folder.glob("triton-*.dist-info")).name.removeprefix("triton-").removesuffix(".dist-info")


def page(configurations: list[Configuration], commit: str) -> str:
    """The table of what has been run, and each failure."""
    text = PAGE.format(date=datetime.date.today(), commit=commit, torch=torch.__version__, limit=LIMIT)
    ran = [one for one in configurations if one.file(commit).exists()]
    text += "".join(one.row(commit) for one in ran)
    failures = collections.defaultdict(list)
    for one in ran:
        for test in lines(one.file(commit)):
            if test["outcome"] == "failed":
                first = test["why"].partition("\n")[0][:300].replace("|", "\\|")
                failures[test["test"], first].append(f"{one.triton} {one.architecture} {one.schedule}")
    text += f"\nTests that failed: {len(failures)}.\n"
    for (test, why), where in sorted(failures.items()):
        text += f"\n- `{test}` on {', '.join(where)}: {why}\n"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run every configuration for a while and write the page. Returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", nargs="+", default=[triton.__version__, "3.7.1", "3.6.0"],
                        help="versions, or folders that hold one")
    parser.add_argument("--architecture", nargs="+", default=["sm_90", "sm_80"])
    parser.add_argument("--schedule", nargs="+", default=list(SCHEDULES), help="early, late, random-SEED")
    parser.add_argument("--minutes", type=float, help="of each configuration; as long as it takes by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "emulate.md")
    given = parser.parse_args(arguments)
    commit = output("git", "log", "-1", "--format=%h", "--", *SOURCES)
    if output("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES):
        parser.error(f"{', '.join(SOURCES)} have changes that are in no commit; commit them, so that results have one")
    folders = [folder_of(version) for version in dict.fromkeys(given.triton)]
    versions = [version_in(folder) if folder else triton.__version__ for folder in folders]
    configurations = [Configuration(version, folder, architecture, schedule) for schedule in given.schedule
                      for version, folder in zip(versions, folders) for architecture in given.architecture]
    for one in configurations:
        one.run(commit, given.minutes)
        given.out.write_text(page(configurations, commit))
    print(given.out.read_text())
    return any(test["outcome"] == "failed" for one in configurations for test in lines(one.file(commit)))


if __name__ == "__main__":
    sys.exit(main())
