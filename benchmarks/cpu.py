"""All that a CPU can time in under ten minutes, ours beside its peers: one table, one plot and the files behind them.

    python -m benchmarks.cpu --out DIR [--quick] [--seconds S]

Runs the benchmarks of `BENCHMARKS` with `--cpu`, one thread each, and then writes DIR/cpu-COMMIT.md and
DIR/cpu-COMMIT.png from their files. A row compares ours with one peer on one problem: milliseconds of forward (the
mask's making included) and of backward (the optimizer included), medians of interleaved rounds of one run, and how
many times as fast ours is in the phases that both have. Every contender has passed its check in that run: the rule of
accuracy, or that all is finite, where its numbers are others (transfusion-pytorch, PyTorch with noise of its own).
"""
import importlib
import importlib.util
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.command_line import common_parser, short_commit
from benchmarks.environment import environment
from benchmarks.report import Report

OURS = "tfkernels"
BENCHMARKS = {  # name: the columns of its rows that say which problem it is
    "attention": ("seq_len", "heads", "kv_heads", "head_dim"),
    "norm": ("op", "tokens", "width"),
    "rotary": ("op", "tokens", "heads", "kv_heads", "dim"),
    "patchify": ("op", "patches", "width"),
    "diffusion_loss": ("op", "patches", "width"),
    "image_chain": ("patches", "width"),
    "cross_entropy": ("rows", "width", "vocabulary"),
    "decode": ("batch", "query_len", "cached", "heads", "kv_heads", "head_dim"),
    "train_step": ("size", "rows", "seq_len"),
    "sample": ("task", "batch", "prompt", "count"),
}
SECONDS, LONGEST = 570.0, 150.0  # of all, and of one benchmark
BACKWARD = ("backward", "optimizer")
ANOTHER = "another"
"""the mask of a row that is a ceiling, no peer"""


class Comparison(NamedTuple):
    """Ours and one peer on one problem: milliseconds of the phases that both have."""

    benchmark: str
    problem: str
    peer: str
    ours: dict[str, float]
    theirs: dict[str, float]

    @property
    def times_as_fast(self) -> float:
        """Above 1 where ours is faster."""
        return sum(self.theirs.values()) / sum(self.ours.values())


def comparisons(name: str, rows: Iterable[dict]) -> Iterator[Comparison]:
    """Each peer of a benchmark that has numbers, beside ours on the same problem."""
    columns, problems = BENCHMARKS[name], {}
    for row in rows:
        if row.get("milliseconds") and all(column in row for column in columns):
            problems.setdefault(tuple(row[column] for column in columns), []).append(row)
    for key, found in problems.items():
        ours = next((_phases(row) for row in found if row["contender"] == OURS), None)
        if ours is None:
            continue
        problem = ", ".join(str(x) if isinstance(x, str) else f"{column} {x:,}" for column, x in zip(columns, key))
        for row in found:
            if row["contender"].startswith((OURS, "device copy")) or row.get("mask") == ANOTHER:
                continue
            theirs = _phases(row)
            both = [phase for phase in ours if phase in theirs]
            yield Comparison(name, problem, row["contender"], {p: ours[p] for p in both}, {p: theirs[p] for p in both})


def _phases(row: dict) -> dict[str, float]:
    """Milliseconds of forward, with what comes before it, and of backward, with what follows."""
    found = {}
    for phase, times in row["milliseconds"].items():
        if phase in ("evaluation", "one step"):  # a part of another phase
            continue
        part = "backward" if phase in BACKWARD else "forward"
        found[part] = found.get(part, 0.0) + times["p50"]
    return found


def table(found: list[Comparison], where: dict) -> str:
    """The Markdown page."""
    commit, torch_version = (where["commit"] or "unknown")[:10], where["versions"]["torch"]
    lines = [f"`python -m benchmarks.cpu`, commit {commit}, {where['device']}, torch {torch_version};",
             "milliseconds of forward and backward, of `train_step` with the optimizer.", "",
             "| benchmark | problem | ours | peer | its ms | times as fast |", "|---|---|---|---|---|---|"]
    for one in found:
        ours, theirs = (" + ".join(f"{x:,.4g}" for x in side.values()) for side in (one.ours, one.theirs))
        lines.append(f"| {one.benchmark} | {one.problem} | {ours} | {one.peer} | {theirs} | {one.times_as_fast:.2f} |")
    return "\n".join(lines) + "\n"


def plot(found: list[Comparison], path: Path) -> None:
    """A bar for each comparison, on a logarithmic axis around 1; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(BENCHMARKS, pyplot.get_cmap("tab10").colors))
    figure, axes = pyplot.subplots(figsize=(10, 0.26 * len(found) + 1.2))
    for place, one in enumerate(found):
        axes.barh(place, one.times_as_fast - 1, left=1, color=colours[one.benchmark])
        axes.text(max(one.times_as_fast, 1) * 1.03, place, f"{one.times_as_fast:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(found)), [f"{one.benchmark}: {one.problem}, against {one.peer}" for one in found],
                    fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast as the peer, one CPU thread (right of the line: ours is faster)")
    axes.set_xlim(right=1.3 * axes.get_xlim()[1])  # for the numbers behind the longest bars
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks and write the page; returns 1 where one of them failed."""
    given = common_parser(__doc__.splitlines()[0], "small problems only", SECONDS).parse_args(arguments)
    torch.set_num_threads(1)  # as each benchmark does: the page says how many
    end, status, found = time.monotonic() + given.seconds, 0, []
    where = environment("cpu", given.commit)
    stem = f"cpu-{short_commit(Report('cpu', {}, where))}"
    for name in BENCHMARKS:
        left = end - time.monotonic()
        print(f"== {name}, {left:.0f} s are left", flush=True)
        options = ["--cpu", "--out", str(given.out), "--seconds", str(min(max(left, 0.0), LONGEST)),
                   "--commit", where["commit"] or ""]
        status |= importlib.import_module(f"benchmarks.{name}").main(options + ["--quick"] * given.quick)
        report = Report.load(given.out / f"{name}-{stem}.json")
        found += comparisons(name, report.rows)
    page = table(found, where)
    (given.out / f"{stem}.md").write_text(page)
    plot(found, given.out / f"{stem}.png")
    print(page)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
