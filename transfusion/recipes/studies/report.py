"""From runs to a study's table, sentences, plot and samples.

A pair's order is decided by the differences of equal seeds: their mean and its standard error, by Student's t at 95 %
(4.3 standard errors for three seeds). Two numbers of the paper, which has no error bars, are the same where they
differ by less than 2 %.
"""
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from scipy.stats import t as student
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from transfusion.files import load_tensors, write_text, written  # noqa: E402
from transfusion.recipes.studies.arms import METRICS, Study, StudyData  # noqa: E402


class Difference(NamedTuple):
    """Mean over `seeds` of a - b, and the standard error of that mean (nan for one seed)."""

    mean: float
    error: float
    seeds: int = 3

    @property
    def sign(self) -> int:
        """-1 or 1; 0 where the error is not known or the mean is within 95 % of what chance gives."""
        if self.seeds < 2 or abs(self.mean) <= student.ppf(0.975, self.seeds - 1) * self.error:
            return 0
        return int(math.copysign(1, self.mean))


def difference(a: dict[int, float], b: dict[int, float]) -> Difference:
    """Compare values by seed."""
    paired = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    return Difference(round(statistics.fmean(paired), 12), error, len(paired))


def sentence(metric: str, labels: tuple[str, str], ours: Difference, paper: tuple[float, float]) -> str:
    """Say whether the order of two arms in `metric` is the paper's; `paper` are its numbers for both."""
    title, better = METRICS[metric].title, 1 if METRICS[metric].more_is_better else -1
    theirs = 0 if abs(paper[0] - paper[1]) < 0.02 * max(paper) else 1 if paper[0] > paper[1] else -1
    verdict = "no difference seen" if ours.sign == 0 else f"{labels[0] if ours.sign == better else labels[1]} is better"
    verdict = "one seed, no error" if math.isnan(ours.error) else verdict
    held = {(True, True): "nor in the paper", (True, False): "agrees with the paper",
            (False, True): "does not show the paper's order", (False, False): "differs from the paper"}
    held = held[ours.sign == theirs, ours.sign == 0]
    best = "no difference" if theirs == 0 else f"{labels[0] if theirs == better else labels[1]} better"
    claim = "" if math.isnan(ours.error) else f": {held}"
    return (f"{title}, {labels[0]} minus {labels[1]}: {ours.mean:+.3g} ± {ours.error:.2g}, {verdict}{claim} "
            f"({METRICS[metric].paper} {paper[0]:g} and {paper[1]:g}, {best})")


def by_seed(results: list[dict], arm: str, metric: str) -> dict[int, float]:
    """A metric's value for each seed of an arm."""
    return {result["seed"]: result["metrics"][metric] for result in results if result["arm"] == arm}


def comparisons(study: Study, results: list[dict]) -> list[str]:
    """One sentence for each pair and metric that the paper has a number for."""
    rows, lines = {row.arm: row for row in study.rows}, []
    for a, b in study.pairs:
        for metric in METRICS:
            paper = rows[a].number(metric), rows[b].number(metric)
            if None not in paper:
                ours = difference(by_seed(results, a, metric), by_seed(results, b, metric))
                lines.append(sentence(metric, (rows[a].label, rows[b].label), ours, paper))
    return lines


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def table(study: Study, results: list[dict], real: dict[str, dict[str, float]]) -> list[str]:
    """The study's table in Markdown, the paper's numbers in its last column."""
    titles = [f"{metric.title} {'↑' if metric.more_is_better else '↓'}" for metric in METRICS.values()]
    head = ["| arm", "parameters", *titles, f"paper ({study.size}): C4 ppl / CIDEr / FID / CLIP |"]
    lines = [" | ".join(head), "|---" * len(head) + "|"]
    for row in study.rows:
        parameters = next(result["parameters"] for result in results if result["arm"] == row.arm)
        cells = [cell(list(by_seed(results, row.arm, metric).values())) for metric in METRICS]
        paper = " / ".join(f"{x:g}" for x in row.paper) if row.paper else ""
        lines.append(" | ".join([f"| {row.label}", f"{parameters:,}", *cells, f"{paper} |"]))
    for name, found in real.items():
        cells = [f"{found[metric]:.3g}" if metric in found else "" for metric in METRICS]
        lines.append(" | ".join([f"| *{name}*", "", *cells, " |"]))
    return lines


def notes(study: Study, data: StudyData, results: list[dict]) -> list[str]:
    """How the numbers were made, and what one document of each arm costs."""
    model, optim, measuring = data.base.model, data.base.optim, data.measuring
    seeds = len({result["seed"] for result in results})
    lines = [f"{data.name}, {seeds} seeds: ± is the standard deviation over them, behind a difference the standard "
             "error "
             "of its mean over equal seeds; one is called better where Student's t at 95 % tells them apart. "
             f"{optim.steps} steps of {optim.rows} x {optim.seq_len} tokens, lr {optim.lr:g}; {model.layers} layers of "
             f"width {model.hidden}, {model.objective}-prediction, lambda {model.diffusion_weight:g}, captions first "
             f"{data.base.data.caption_first:.0%}, guidance {measuring.guidance:g}; {measuring.draws} pictures drawn "
             "in "
             f"{measuring.steps} steps. Pictures are pixels, without a VAE.",
             "Fréchet distance, precision, recall and label accuracy are of a small classifier trained on the same "
             "real "
             "pictures, so they compare with each other and not with the paper's FID and CLIP; losses are nats per "
             "caption token."]
    for row in study.rows:
        result = next(result for result in results if result["arm"] == row.arm)
        cost = result["document_flops"]
        seconds = statistics.fmean(other["seconds"]["train"] for other in results if other["arm"] == row.arm)
        lines.append(f"{row.label}: {result['document_tokens']} tokens a document, {sum(cost.values()) / 1e6:.2f} "
                     "MFLOP "
                     f"forward (layers {cost['layers'] / 1e6:.2f}, attention {cost['attention'] / 1e6:.2f}, linear "
                     "heads "
                     f"{cost['heads'] / 1e6:.2f}; convolutions not counted), {seconds:.0f} s to train")
    return lines


def plot(path: Path, study: Study, results: list[dict], real: dict[str, dict[str, float]]) -> None:
    """One panel for each metric: a point for each seed, a bar at the mean, dashed lines where real pictures are."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    for axis, (name, metric) in zip(axes.flat, METRICS.items()):
        for x, row in enumerate(study.rows):
            values = list(by_seed(results, row.arm, name).values())
            axis.scatter([x] * len(values), values, s=28, color=f"C{x}", alpha=0.7, zorder=3)
            axis.hlines(statistics.fmean(values), x - 0.25, x + 0.25, color=f"C{x}", linewidth=2)
        for label, found in real.items():
            if name in found:
                style = "--" if label == "real, held out" else ":"
                axis.axhline(found[name], color="0.4", linestyle=style, linewidth=1, label=label)
        axis.set_title(f"{metric.title} ({'more' if metric.more_is_better else 'less'} is better)", fontsize=10)
        axis.set_xticks(range(len(study.rows)), [row.label.replace(", ", ",\n") for row in study.rows], fontsize=8)
        axis.set_xlim(-0.6, len(study.rows) - 0.4)
        axis.grid(axis="y", alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    axes.flat[-1].axis("off")
    figure.suptitle(f"{study.question} (the paper's table {study.table})")
    with written(path) as aside:
        figure.savefig(aside, dpi=130)
    plt.close(figure)


def mosaic(images: Tensor, rows: int, line: float) -> Tensor:
    """Pictures (rows * columns, C, H, W), row by row, as one (H', W', C) in [0, 1] with a line behind each."""
    count, channels, height, width = images.shape
    framed = torch.nn.functional.pad((images.clamp(-1, 1) + 1) / 2, (0, 1, 0, 1), value=line)
    framed = framed.unflatten(0, (rows, count // rows))
    return framed.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), -1, channels)


def samples(path: Path, study: Study, data: StudyData, drawn: dict[str, Tensor], real: Tensor, ink: bool) -> None:
    """Write a row for each class: its first pictures in each arm side by side, and real ones last.

    `ink` says that grey pictures are to be dark on white.
    """
    classes, blocks = len(data.titles), {**{row.label: drawn[row.arm] for row in study.rows}, "real, held out": real}
    figure, axes = plt.subplots(1, len(blocks), figsize=(2.7 * len(blocks) + 1, 0.36 * classes + 0.8), squeeze=False)
    for axis, (label, images) in zip(axes[0], blocks.items()):
        picture = mosaic(-images if ink else images, classes, line=0.8)
        axis.imshow(picture.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(label, fontsize=9)
        axis.axis("off")
    height = images.shape[-1] + 1
    for i, title in enumerate(data.titles):
        axes[0][0].text(-2, (i + 0.5) * height, title, ha="right", va="center", fontsize=7)
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def by_class(images: Tensor, labels: Tensor, classes: int, count: int, blank: float) -> Tensor:
    """The first `count` pictures of each class, (classes * count, C, H, W); `blank` ones where a class has fewer."""
    chosen = torch.full((classes, count, *images.shape[1:]), blank)
    for label in range(classes):
        found = images[labels == label][:count]
        chosen[label, :len(found)] = found
    return chosen.flatten(0, 1)


def report(study: Study, data: StudyData, results: list[dict], bench, columns: int = 6) -> Path:
    """Write <data>-<study>.md, .json, .png and -samples.png beside the data set's runs; return the first."""
    arms = {row.arm for row in study.rows}
    results, real = [result for result in results if result["arm"] in arms], bench.real("codes" in arms)
    stem = bench.out.parent / f"{data.name}-{study.name}"
    lines = [f"# {study.question[0].upper() + study.question[1:]}: {data.name}", "",
             f"Table {study.table} of arXiv:2408.11039, reproduced small.", "",
             *table(study, results, real), "", *(f"- {line}" for line in comparisons(study, results)), "",
             f"![every seed of every arm]({stem.name}.png)", "",
             f"![drawn pictures beside real ones]({stem.name}-samples.png)", "",
             "How it was made:", "", *(f"- {line}" for line in notes(study, data, results))]
    write_text(stem.with_suffix(".md"), "\n".join(lines) + "\n")
    record = {"study": study._asdict(), "real": real, "runs": results}
    write_text(stem.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    plot(stem.with_suffix(".png"), study, results, real)
    classes, ink = len(data.captions), bench.held_out.pictures.shape[1] == 1
    columns, blank = min(columns, data.measuring.draws // classes), -1.0 if ink else 1.0
    seed = min(result["seed"] for result in results)
    drawn = {row.arm: load_tensors(bench.out / f"{row.arm}-{seed}" / "drawn.safetensors")["drawn"]
             for row in study.rows}
    labels = torch.arange(len(next(iter(drawn.values())))) % classes
    drawn = {arm: by_class(images, labels, classes, columns, blank) for arm, images in drawn.items()}
    held_out = by_class(bench.held_out.pictures, bench.held_out.labels, classes, columns, blank)
    samples(Path(f"{stem}-samples.png"), study, data, drawn, held_out, ink)
    return stem.with_suffix(".md")
