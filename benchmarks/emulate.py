"""The kernels' compiled code without a GPU: every kernel, row of the launch tables, dtype and kind of mask, on three
Tritons.

    python -m benchmarks.emulate [--triton VERSION ...] [--architecture sm_90 ...] [--schedule late ...] [--minutes M]

What is run are the calls of tests/tfkernels/emulated/families.py, held to their operators' rule of accuracy. Each
configuration (schedule, dtype, architecture, Triton) is one run of pytest with `ptxrun.plugin` and `--races`, which
leaves a line for each family in build/emulate/COMMIT/CONFIGURATION.jsonl as it ends. So a run may be stopped at any
time, and the same command goes on where it was; `--minutes` stops each configuration by itself. Another Triton than the
installed one is put into build/triton/VERSION by pip, once; a folder that holds one may be named instead.

What has been run so far is written to benchmarks/results/emulate.md, with every failure. A configuration that the
last change of the sources has not been run in keeps the line of the commit where it was, and one that the page has
whole and without a failure at that change is not run again, even where build/ is empty.
"""
import argparse
import collections
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ptxrun import fences_copies
from ptxrun.plugin import collected, lines
from tests.tfkernels.emulated.rows import rows

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SOURCES = ("tfkernels", "ptxrun", "tests/tfkernels", "tests/conftest.py", "tests/launches.py")
TESTS = "tests/tfkernels/emulated/test_every_dtype.py"
DTYPES = ("bfloat16", "float32", "float16")
# Races are found in whatever order things happen, and numbers of every dtype come with the first schedule.
SCHEDULES = {"late": DTYPES, "early": DTYPES[:1], "random-0": DTYPES[:1], "random-1": DTYPES[:1]}
PAGE = """# The kernels on their compiled code

Written by `python -m benchmarks.emulate` on {date}, with torch {torch}. Races were looked for in every run; on
Triton before 3.7, which leaves it out, not for the proxy fence behind cp.async. The commit is the last one that changed
{sources};
today that is {commit}. A test is a family of calls of tests/tfkernels/emulated/families.py; kernels and rows of the
launch tables are those that a test that passed has launched, a row beside how many the dtype has on the architecture.
Minutes are of the clock, beside other work, compiling included. What is not reached is left for the next call of the
same command; a configuration without a line has not begun.

| schedule | dtype | GPU | Triton | commit | passed | failed | not reached | kernels | rows | launches | minutes |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


class Configuration(NamedTuple):
    """One run of the tests."""

    schedule: str  # "random-3": of the seed 3
    dtype: str
    architecture: str
    triton: str  # a version
    folder: Path | None  # where it is, None for the installed one

    def __str__(self):
        return f"{self.schedule}, {self.dtype}, {self.architecture}, Triton {self.triton}"

    def file(self, commit: str) -> Path:
        """Where its tests are recorded."""
        return BUILD / "emulate" / commit / f"{'-'.join(self[:4])}.jsonl"

    def latest(self, commit: str) -> str | None:
        """The commit whose records of it are the newest; `commit` where it has some, None where none has."""
        files = [self.file(commit), *sorted(BUILD.glob(f"emulate/*/{self.file(commit).name}"),
                                            key=lambda file: file.stat().st_mtime, reverse=True)]
        return next((file.parent.name for file in files if file.exists()), None)

    def command(self, commit: str) -> list[str]:
        """The run of pytest."""
        schedule, _, seed = self.schedule.partition("-")
        return [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "ptxrun.plugin",
                "--emulate", self.architecture, "--races", *([] if fences_copies(self.triton) else ["--copies-fenced"]),
                "--schedule", schedule, "--seed", seed or "0",
                "--results", str(self.file(commit)), "-k", f"torch.{self.dtype}", TESTS]

    def run(self, commit: str, minutes: float | None) -> None:
        """Run what is left of it, for some minutes."""
        path = [str(self.folder)] if self.folder else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
                                    "OMP_NUM_THREADS": "1"}
        print(self, flush=True)
        try:
            subprocess.run(self.command(commit), cwd=ROOT, env=environment, timeout=minutes and 60 * minutes)
        except subprocess.TimeoutExpired:
            print(f"stopped after {minutes:g} minutes; the same command goes on", flush=True)

    def row(self, commit: str) -> str:
        """Its line of the page."""
        tests = lines(self.file(commit))
        passed = [test for test in tests if test["outcome"] == "passed"]
        launches = sum((collections.Counter(test["launches"]) for test in passed), collections.Counter())
        found = {row for test in passed for row in test["rows"]}
        every = {f"{one.kernel} {one.named}"  # two keys of a table may have one row
                 for one in rows(int(self.architecture.removeprefix("sm_")), getattr(torch, self.dtype))}
        left = collected(self.file(commit)) - len(tests)
        failed = sum(test["outcome"] == "failed" for test in tests)
        cells = [*self[:4], commit, len(passed), failed, left, len(launches), f"{len(found)} of {len(every)}",
                 launches.total(), f"{sum(test['seconds'] for test in tests) / 60:.1f}"]
        return f"| {' | '.join(map(str, cells))} |\n"


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
    return re.search(r"__version__ = ['\"](.+)['\"]", (folder / "triton" / "__init__.py").read_text())[1]


def clean_lines(text: str) -> dict[tuple[str, ...], str]:
    """The lines of a page of whole runs without a failure, by schedule, dtype, architecture and Triton."""
    cells = {line: tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines(keepends=True)
             if line.startswith("|")}
    return {one[:4]: line for line, one in cells.items() if one[6:8] == ("0", "0")}


def _place(key: tuple[str, ...]) -> tuple:
    """Where a configuration's line stands in the page: as it runs by default, the newest Triton first."""
    schedule, dtype, architecture, version = key
    known = list(SCHEDULES).index(schedule) if schedule in SCHEDULES else len(SCHEDULES)
    return (known, schedule, DTYPES.index(dtype), -int(architecture.removeprefix("sm_")),
            [-int(number) for number in re.findall(r"\d+", version)])


def page(configurations: list[Configuration], commit: str, before: str = "") -> str:
    """The table of what has been run, and each failure; clean lines of the page before stay where nothing is newer."""
    text = PAGE.format(date=datetime.date.today(), commit=commit, torch=torch.__version__, sources=", ".join(SOURCES))
    ran = [(one, at) for one in configurations if (at := one.latest(commit))]
    table = clean_lines(before) | {one[:4]: one.row(at) for one, at in ran}
    text += "".join(table[key] for key in sorted(table, key=_place))
    failures = collections.defaultdict(list)
    for one, at in ran:
        for test in lines(one.file(at)):
            if test["outcome"] == "failed":
                first = test["why"].partition("\n")[0][:300].replace("|", "\\|")
                failures[test["test"], first].append(f"({one})")
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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES,
                        help="of every schedule; all of them late and bfloat16 otherwise by default")
    parser.add_argument("--schedule", nargs="+", default=list(SCHEDULES), help="early, late, random-SEED")
    parser.add_argument("--minutes", type=float, help="of each configuration; as long as it takes by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "emulate.md")
    given = parser.parse_args(arguments)
    commit = output("git", "log", "-1", "--format=%h", "--", *SOURCES)
    if output("git", "status", "--porcelain", "--untracked-files=no", "--", *SOURCES):
        parser.error(f"{', '.join(SOURCES)} have changes that are in no commit; commit them, so that results have one")
    folders = [folder_of(version) for version in dict.fromkeys(given.triton)]
    versions = [version_in(folder) if folder else triton.__version__ for folder in folders]
    configurations = [Configuration(schedule, dtype, architecture, version, folder) for schedule in given.schedule
                      for dtype in given.dtype or SCHEDULES.get(schedule, DTYPES[:1])
                      for architecture in given.architecture for version, folder in zip(versions, folders)]
    before = given.out.read_text() if given.out.is_file() else ""
    done = {key for key, line in clean_lines(before).items() if f"| {commit} |" in line}
    for one in configurations:
        if one[:4] in done:
            print(f"{one}: whole at {commit}", flush=True)
            continue
        one.run(commit, given.minutes)
        given.out.write_text(page(configurations, commit, before))
    print(given.out.read_text())
    return any(test["outcome"] == "failed" for one in configurations for test in lines(one.file(commit)))


if __name__ == "__main__":
    sys.exit(main())
