"""Curves of training logs: the demo's two losses, and the panels of a run's report."""
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402

from transfusion.files import written  # noqa: E402
from transfusion.train.log import read_log  # noqa: E402
from transfusion.train.run_log import Run, bins, column  # noqa: E402

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22")
SHOWN = 1000
"""points of a curve at most; of more steps, the smallest and the largest value of each of so many stretches"""
WIDE = 4.0
"""Values that differ by a larger factor stand on a logarithmic axis."""


class Panel(NamedTuple):
    """One plot of a report: what it shows, in which unit, and how a run's curve is read from its log."""

    title: str
    unit: str
    curve: Callable[[Run], tuple[np.ndarray, np.ndarray]]  # steps and values
    held_out: str | None = None                            # key of the same loss on held-out data
    logarithmic: bool = False                              # where values are wide apart
    smooth: bool = True                                    # show a running mean
    from_zero: bool = False                                # begin the axis at 0


def loss_curves(path: Path, log: Path) -> None:
    """Plot the text and the diffusion loss of a training log (JSON lines), raw and as a running mean."""
    records = read_log(log)
    if not records:
        print(f"{log} holds no step: {path} is not drawn", flush=True)
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"text_loss": "text loss (nats per token)", "diffusion_loss": "diffusion loss (mean squared error)"}
    for axis, (key, title) in zip(axes, titles.items()):
        values = torch.tensor([record[key] for record in records])
        width = max(1, len(values) // 50)
        axis.plot(values, color="0.8", linewidth=0.8)
        means = values.unfold(0, width, 1).mean(-1)
        axis.plot(torch.arange(width - 1, len(values)), means, linewidth=1.5, label=f"mean of {width} steps")
        axis.set(xlabel="step", title=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_panels(path: Path, panels: Sequence[Panel], runs: Sequence[Run], width: int | None, title: str) -> None:
    """Write all panels as one picture."""
    count = len(panels) + has_bins(runs)
    columns = min((3, 4), key=lambda n: -count % n) if count > 3 else count  # as few empty places as can be
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.1 * lines + 0.7), squeeze=False,
                                layout="constrained")
    left = list(axes.flat)
    for draw in drawings(panels, runs, width):
        draw(left.pop(0))
    for axis in left:
        axis.axis("off")
    figure.suptitle(title, fontweight="bold", parse_math=False)
    handles = legend(runs)
    named = figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False,
                          fontsize=9)
    for text in named.get_texts():  # a `$` in a run's name begins no formula
        text.set_parse_math(False)
    with written(path) as aside:
        figure.savefig(aside, dpi=130)
    plt.close(figure)


def draw_alone(path: Path, draw: Callable) -> None:
    """Write one panel as a picture of its own."""
    figure, axis = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    draw(axis)
    figure.savefig(path)
    plt.close(figure)


def drawings(panels: Sequence[Panel], runs: Sequence[Run], width: int | None) -> list[Callable]:
    """What draws each panel on an axis, in order; held-out losses by noise time stand behind the losses."""
    found = [lambda axis, panel=panel: draw_panel(axis, panel, runs, width) for panel in panels]
    if has_bins(runs):
        behind = sum(panel.held_out is not None for panel in panels)
        found.insert(behind, lambda axis: draw_bins(axis, runs))
    return found


def has_bins(runs: Sequence[Run]) -> bool:
    """Whether a run has held-out losses by noise time."""
    return any(bins(run) for run in runs)


def draw_panel(axis, panel: Panel, runs: Sequence[Run], width: int | None) -> None:
    """Draw the curve of each run, raw and as a running mean, and its held-out losses."""
    shown = []
    for run, colour in zip(runs, colours(runs)):
        steps, values = panel.curve(run)
        if not len(values):
            continue
        means = running_mean(values, width or max(1, len(values) // 50)) if panel.smooth else values
        if panel.smooth:
            axis.plot(*thinned(steps, values), color=colour, linewidth=0.7, alpha=0.25)
        axis.plot(*thinned(steps, means), color=colour, linewidth=1.5, marker="o" if len(values) == 1 else None)
        shown.append(means if panel.smooth and len(means) > 1 else values)
        if panel.held_out is not None and len(column(run, panel.held_out)[0]):
            steps, values = column(run, panel.held_out)
            axis.plot(steps, values, color=colour if len(runs) > 1 else "black", linewidth=1, marker="o", markersize=3,
                      linestyle="--")
            shown.append(values)
    _finish(axis, panel.title, panel.unit, panel.logarithmic, np.concatenate(shown) if shown else np.zeros(0))
    if panel.from_zero:
        axis.set_ylim(0, 1.06 * axis.dataLim.y1 or 1)


def draw_bins(axis, runs: Sequence[Run]) -> None:
    """Draw held-out losses by noise time: over the steps of one run; of several, the last ones over the time."""
    shown = [run for run in runs if bins(run)]
    title = "held-out diffusion loss by noise time"
    if len(runs) > 1:
        for run, colour in zip(runs, colours(runs)):
            if run in shown:
                ends, values = zip(*((key, column(run, name)[1][-1]) for key, name in bins(run).items()))
                axis.plot([sum(end) / 2 for end in ends], values, color=colour, marker="o", markersize=4)
        axis.set(xlim=(0, 1))
        _finish(axis, f"{title}, last", "mean squared error", False, np.zeros(0), "noise time t (0: image, 1: noise)")
        return
    parts = bins(shown[0])
    shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(parts)))
    for ((low, high), name), colour in zip(parts.items(), shades):
        axis.plot(*column(shown[0], name), color=colour, linewidth=1.3, marker="o", markersize=2.5,
                  label=f"t in {low:g} to {high:g}")
    values = np.concatenate([column(shown[0], name)[1] for name in parts.values()])
    _finish(axis, title, "mean squared error", True, values)
    axis.legend(fontsize=7, title_fontsize=7, frameon=False, ncols=2 if len(parts) > 4 else 1)


def legend(runs: Sequence[Run]) -> list[Line2D]:
    """What colours and lines mean."""
    named = [Line2D([], [], color=colour, linewidth=2, label=run.name) for run, colour in zip(runs, colours(runs))]
    first = COLOURS[0] if len(runs) == 1 else "0.3"
    return [*(named if len(runs) > 1 else []),
            Line2D([], [], color=first, linewidth=0.7, alpha=0.4, label="each step"),
            Line2D([], [], color=first, linewidth=1.5, label="running mean"),
            Line2D([], [], color="black" if len(runs) == 1 else "0.3", linewidth=1, linestyle="--", marker="o",
                   markersize=3, label="held out")]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each one, of those that there are at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def thinned(steps: np.ndarray, values: np.ndarray, count: int = SHOWN) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most two points for each of `count` stretches: its smallest and its largest value."""
    if len(values) <= 2 * count:
        return steps, values
    edges = np.linspace(0, len(values), count + 1).astype(int)
    places = [sorted((low + int(values[low:high].argmin()), low + int(values[low:high].argmax())))
              for low, high in zip(edges[:-1], edges[1:])]
    places = np.unique(np.array(places))
    return steps[places], values[places]


def colours(runs: Sequence[Run]) -> list[str]:
    """A colour for each run."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _finish(axis, title: str, unit: str, logarithmic: bool, values: np.ndarray, below: str = "step") -> None:
    """Title, unit, grid, and an axis on which the values can be read."""
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left")
    axis.set_xlabel(below, fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, which="both", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if below == "step":
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if logarithmic and len(values) and values.min() > 0 and values.max() > WIDE * values.min():
        axis.set_yscale("log")
        many = values.max() > 1000 * values.min()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 3, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif len(values) and values.max() >= 10_000:
        axis.yaxis.set_major_formatter(EngFormatter(sep=" "))
    elif len(values) and 0 < abs(values).max() < 0.01:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
