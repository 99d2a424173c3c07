"""Grids of pictures: generated beside real ones, and what an autoencoder keeps of them.

What people and models wrote is drawn with `parse_math=False`: a `$` in it begins no formula.
"""
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image as Picture
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from transfusion.files import written  # noqa: E402

WIDEST, HIGHEST = 8, 1024  # of a picture on a sheet: its width over its height, and pixels


def sample_grid(path: Path, generated: Tensor, real: Tensor, names: list[str], titles: tuple[str, str]) -> None:
    """Write (rows, columns, C, H, W) generated images beside as many real ones, a named row each."""
    rows, columns = generated.shape[:2]
    size = (0.55 * (2 * columns + 1) + 1.2, 0.6 * rows + 0.6)
    figure, axes = plt.subplots(rows, 2 * columns + 1, figsize=size, squeeze=False)
    for r in range(rows):
        for c in range(2 * columns + 1):
            axis = axes[r][c]
            axis.axis("off")
            if c != columns:
                picture = generated[r, c] if c < columns else real[r, c - columns - 1]
                axis.imshow(_pixels(picture), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes[r][0].text(-0.3, 0.5, names[r], transform=axes[r][0].transAxes, ha="right", va="center", fontsize=9,
                        parse_math=False)
    for start, title in zip((0, columns + 1), titles):
        axes[0][start].text(0, 1.25, title, transform=axes[0][start].transAxes, fontsize=10, fontweight="bold")
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def reconstruction_grid(path: Path, rows: dict[str, Tensor]) -> None:
    """Write pictures (N, C, H, W) beneath what is made of them, a named row each."""
    count = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), count, figsize=(0.75 * count + 1.2, 0.8 * len(rows)), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(line, pictures):
            axis.axis("off")
            axis.imshow(_pixels(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(-0.2, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def emoji_grid(path: Path, titles: list[str], shown: Tensor, drawn: Tensor, real: Tensor, count: int = 30,
               blocks: int = 3) -> None:
    """Write the first `count` pairs, each a line of pictures.

    On it stand the picture in the style that was shown (N, C, H, W), what was drawn (N, n, C, H, W), and the real one.
    The lines stand in `blocks` columns; each has its caption above it.
    """
    count = min(count, len(titles))
    lines, each = -(-count // blocks), drawn.shape[1]
    size = (0.62 * blocks * (each + 2.6), 0.86 * lines)
    figure, axes = plt.subplots(lines, blocks * (each + 3), figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        line = axes[i % lines][i // lines * (each + 3):][:each + 2]
        for axis, picture in zip(line, [shown[i], *drawn[i], real[i]]):
            axis.imshow(_pixels(picture), interpolation="nearest")
        line[0].text(0, 1.12, titles[i], transform=line[0].transAxes, fontsize=7)
        if i % lines == 0:
            for axis, title in zip((line[0], line[1], line[-1]), ("shown", "drawn", "never shown")):
                axis.text(0, 1.45, title, transform=axis.transAxes, fontsize=8, fontweight="bold")
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def contact_sheet(path: Path, pictures: list[Path], titles: list[str], columns: int = 8) -> None:
    """Write the picture files, eight on a line, each above the beginning of its title."""
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.5 * columns, 1.75 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, file, title in zip(axes.flat, pictures, titles):
        with Picture.open(file) as picture:
            axis.imshow(picture.convert("RGB"), interpolation="nearest")
        shown = "\n".join(textwrap.wrap(title, 26, max_lines=2, placeholder=" ..."))
        axis.text(0.5, -0.03, shown, transform=axis.transAxes, fontsize=6, ha="center", va="top",
                  parse_math=False)
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def answer_sheet(path: Path, shown: list[tuple[tuple[Picture.Image, ...], str, str, str]], columns: int = 6) -> None:
    """Write pictures with what was asked about them and answered.

    Each of `shown` is (pictures, question, answer, correction); an answer that needs no correction is green.
    """
    figure = answer_figure(shown, columns)
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)


def answer_figure(shown: list[tuple[tuple[Picture.Image, ...], str, str, str]], columns: int = 6) -> plt.Figure:
    """The figure of `answer_sheet`; each row of it is as high as its longest question and answer need."""
    width, side, line = 2.1, 1.6, 0.13  # inches: of a column, of a picture, of a line of text
    cells = [(pictures, textwrap.fill(question, 26), _answer(answer, correction), correction)
             for pictures, question, answer, correction in shown]
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)] or [[]]
    above = [line * (1 + max((question.count("\n") + 1 for _, question, _, _ in row), default=1)) for row in rows]
    below = [line * (2 + max((said.count("\n") + 1 for _, _, said, _ in row), default=1)) for row in rows]
    height = sum(above) + sum(below) + side * len(rows)
    figure, top = plt.figure(figsize=(width * columns, height)), height
    for row, room, text_room in zip(rows, above, below):
        for column, (pictures, question, said, correction) in enumerate(row):
            place = (column + 0.5 * (1 - side / width)) / columns, (top - room - side) / height
            axis = figure.add_axes((*place, side / width / columns, side / height))
            axis.axis("off")
            if pictures:
                axis.imshow(_side_by_side(pictures), interpolation="nearest")
            axis.text(0.5, 1 + 0.4 * line / side, question, transform=axis.transAxes, ha="center", va="bottom",
                      fontsize=7, parse_math=False)
            axis.text(0.5, -0.4 * line / side, said, transform=axis.transAxes, ha="center", va="top", fontsize=7,
                      color="tab:red" if correction else "tab:green", parse_math=False)
        top -= room + side + text_room
    return figure


def _answer(answer: str, correction: str) -> str:
    said = [answer or "(nothing)", *([f"right: {correction}"] if correction else [])]
    return "\n".join(textwrap.fill(line, 28) for line in said)


def _side_by_side(pictures: tuple[Picture.Image, ...]) -> Picture.Image:
    """The pictures at one height, from left to right, a little apart.

    A strip is smaller: at the height of a high picture beside it, it would be as wide as no memory holds.
    """
    height = min(max(picture.height for picture in pictures), HIGHEST)
    scales = [min(height / picture.height, WIDEST * height / picture.width) for picture in pictures]
    fitted = [picture.convert("RGB").resize([max(1, round(side * scale)) for side in picture.size])
              for picture, scale in zip(pictures, scales)]
    apart = height // 8
    whole = Picture.new("RGB", (sum(x.width + apart for x in fitted) - apart, height), "white")
    left = 0
    for picture in fitted:
        whole.paste(picture, (left, 0))
        left += picture.width + apart
    return whole


def _pixels(image: Tensor) -> Tensor:
    return ((image.clamp(-1, 1) + 1) / 2).movedim(0, -1).squeeze(-1)
