"""All results of an evaluation in one table: `transfusion eval report --out DIR`.

It reads DIR/results and writes DIR/report.md, DIR/report.json and DIR/report.png. Results of LLaVA-1.5's twelve
benchmarks stand in its paper's order, too, beside its published numbers.
"""
import dataclasses
import json
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from transfusion.eval.results import FOLDER, Result, read_results  # noqa: E402
from transfusion.files import check_writable, write_text, written  # noqa: E402
from transfusion.settings import check  # noqa: E402


class Column(NamedTuple):
    """A benchmark of the table of LLaVA-1.5: lmms-eval's metric is shown, times `factor` where it is a share of 1."""

    title: str
    task: str
    metric: str
    factor: float
    published: float


COLUMNS = (
    Column("VQAv2", "vqav2", "exact_match", 100, 78.5),
    Column("GQA", "gqa", "exact_match", 100, 62.0),
    Column("VizWiz", "vizwiz", "exact_match", 100, 50.0),
    Column("SciQA-IMG", "scienceqa_img", "exact_match", 100, 66.8),
    Column("TextVQA", "textvqa", "exact_match", 100, 58.2),
    Column("POPE", "pope", "pope_f1_score", 100, 85.9),
    Column("MME", "mme", "mme_perception_score", 1, 1510.7),
    Column("MMBench", "mmbench", "accuracy", 1, 64.3),
    Column("MMBench-CN", "mmbench_cn", "accuracy", 1, 58.3),
    Column("SEED-Bench", "seedbench", "seed_all", 100, 58.6),
    Column("LLaVA-Wild", "llava_wild", "gpt_eval_llava_all", 1, 65.4),
    Column("MM-Vet", "mmvet", "gpt_eval_score", 1, 31.1),
)
LLAVA = "LLaVA-1.5 7B (published)"
SOURCE = ("LLaVA-1.5 7B: arXiv:2310.03744 and docs/MODEL_ZOO.md of haotian-liu/LLaVA; POPE is the mean F1 of its three "
          "parts, MME the perception score, SEED-Bench all questions; GPT-4 of 2023 judged LLaVA-Wild and MM-Vet; "
          "a star: see the note of the result")
HEAD = ("task", "metric", "value", "n", "model", "weights", "library", "prompts", "resize", "judge", "seed", "seconds",
        "note")
WIDTHS = (13, 26, 18, 8, 18, 11, 15, 24, 24, 14, 7, 10, 28)
"""of the picture's columns, in characters"""


@dataclass(frozen=True)
class ReportSettings:
    """Put all results of a directory into one table: Markdown, JSON and a picture."""

    out: Path
    """directory with results/, as the other commands of `transfusion eval` write it"""


def report(settings: ReportSettings) -> dict:
    """Run `transfusion eval report`: write the table and return what is in report.json.

    Raises:
        ValueError: a directory without results, or with a damaged one.
    """
    check("eval report", settings)
    results = read_results(settings.out)
    if not results:
        raise ValueError(f"eval report: out is {str(settings.out)!r}, which holds no {FOLDER}/*.json; a directory that "
                         "another command of `transfusion eval` wrote into fits")
    check_writable("eval report", settings.out)
    tables = {"Results": (HEAD, [row(result) for result in results.values()])}
    llava, head = llava_rows(results), ("model", *(column.title for column in COLUMNS))
    if llava:
        tables["The benchmarks of LLaVA-1.5"] = (head, llava)
    held = {"results": {name: dataclasses.asdict(result) for name, result in results.items()},
            "llava": [dict(zip(head, cells)) for cells in llava], "source": SOURCE}
    write_text(settings.out / "report.json", json.dumps(held, indent=2, ensure_ascii=False) + "\n")
    write_text(settings.out / "report.md", markdown(tables))
    _draw(settings.out / "report.png", tables)
    print(markdown(tables))
    print(f"report.md, report.json and report.png in {settings.out}")
    return held


def row(result: Result) -> tuple[str, ...]:
    """The cells of a result, as `HEAD` names them."""
    error = "" if result.standard_error is None else f" ± {result.standard_error:.2g}"
    return (result.task, result.metric, "no score" if result.value is None else f"{result.value:.5g}{error}",
            str(result.n), result.model or "-", (result.weights_hash or "-")[:8], f"{result.library} {result.version}",
            result.prompts or "-", result.resize or "-", result.judge or "none",
            "-" if result.seed is None else str(result.seed), f"{result.seconds:.1f}", result.note or "-")


def llava_rows(results: dict[str, Result]) -> list[tuple[str, ...]]:
    """LLaVA-1.5's published row and one for each model that has a result of one of its benchmarks; none without.

    Other weights are another model: where one directory had several, eight digits of their hashes tell them apart.
    """
    tasks, models = {column.task for column in COLUMNS}, {}
    for result in results.values():
        if result.task in tasks:
            models.setdefault((result.model, result.weights_hash), []).append(result)
    weights = Counter(model for model, _ in models)
    own = [((model or "this model") + (f" ({(hashed or '-')[:8]})" if weights[model] > 1 else ""),
            *(_cell(column, found) for column in COLUMNS)) for (model, hashed), found in models.items()]
    return [(LLAVA, *(f"{column.published:.1f}" for column in COLUMNS)), *own] if own else []


def _cell(column: Column, results: list[Result]) -> str:
    """The number of a benchmark, a star where there is a note; "no score" and "-" as docs/evaluation.md says."""
    own = [result for result in results if result.task == column.task]
    for result in own:
        if result.metric == column.metric and result.value is not None:
            return f"{column.factor * result.value:.1f}{'*' if result.note else ''}"
    return "no score" if own else "-"


def markdown(tables: dict[str, tuple]) -> str:
    """The tables as a page in Markdown."""
    parts = []
    for title, (head, rows) in tables.items():
        lines = [head, ["---"] * len(head), *rows]
        cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in cells)]
    return "\n\n".join([*parts, *([SOURCE + "."] if len(tables) > 1 else [])]) + "\n"


def _draw(path: Path, tables: dict[str, tuple]) -> None:
    """Write the tables as a picture, a cell's text in as many lines as it needs."""
    drawn = []
    for title, (head, rows) in tables.items():
        widths = WIDTHS if head == HEAD else (20, *[15] * len(COLUMNS))
        drawn.append((title, widths, [[_wrapped(cell, width) for cell, width in zip(line, widths)]
                                      for line in (head, *rows)]))
    lines = 2 * (len(tables) > 1) + sum(3 + sum(_lines(line) + 0.6 for line in rows) for _, _, rows in drawn)
    width = max(sum(widths) for _, widths, _ in drawn)
    figure, axis = plt.subplots(figsize=(0.062 * width + 0.4, 0.135 * lines + 0.3))
    axis.set_xlim(0, width)
    axis.set_ylim(lines, 0)
    axis.axis("off")
    top = 0.0
    for title, widths, rows in drawn:
        axis.text(0, top + 1.2, title, fontsize=10, fontweight="bold", va="center")
        top = _draw_rows(axis, widths, rows, top + 2.4) + 0.6
    if len(tables) > 1:
        axis.text(0.5, top + 0.3, SOURCE.replace("; ", ";\n", 1), fontsize=6, va="top", linespacing=1.15)
    with written(path) as aside:
        figure.savefig(aside, dpi=160, bbox_inches="tight")
    plt.close(figure)


def _draw_rows(axis, widths: tuple[int, ...], rows: list[list[str]], top: float) -> float:
    """Draw rows below `top`, the first as a head; return where they end."""
    for number, line in enumerate(rows):
        height = _lines(line) + 0.6
        if number % 2 == 0:
            axis.axhspan(top, top + height, color="#d9e2ec" if number == 0 else "#f4f6f8", lw=0)
        left = 0
        for cell, width in zip(line, widths):
            axis.text(left + 0.5, top + 0.3, cell, fontsize=6.5, va="top", linespacing=1.15,
                      fontweight="bold" if number == 0 else "normal", parse_math=False)
            left += width
        top += height
    return top


def _wrapped(cell: str, width: int) -> str:
    """A cell's text in lines of its column's width."""
    return "\n".join(textwrap.wrap(cell, width - 1))


def _lines(cells: list[str]) -> int:
    return max(cell.count("\n") + 1 for cell in cells)
