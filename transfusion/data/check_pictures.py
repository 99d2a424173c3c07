"""What `transfusion data check` draws: lengths of documents, sizes of pictures, and samples as the model reads them."""
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch import Tensor

from transfusion.data.documents import Encoded
from transfusion.data.loader import PackedRows
from transfusion.data.mixture import Mixture
from transfusion.files import written

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SAMPLES, COLUMNS = 12, 3
WIDTH, HEIGHT, MARGIN, THUMB = 480, 380, 12, 128
READ, TARGET, DRAWN, PALE = (110, 110, 110), (0, 90, 40), (200, 40, 20), (170, 170, 170)
LEGEND = ((("bold green", TARGET, True), ("text that the model learns to write", READ, False)),
          (("grey", READ, False), ("text that it only reads", READ, False)),
          (("red frame", DRAWN, True), ("drawn: noised, with a diffusion loss", READ, False)),
          (("grey frame", READ, False), ("only read, clean", READ, False)))


def draw_histograms(path: Path, mixture: Mixture, sizes: list[np.ndarray]) -> Path:
    """Draw how many documents have how many tokens, and how wide and high pictures are, a colour for each source."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    lengths = [_lengths(mixture, i) for i in range(len(mixture.names))]
    longest = max((x.max(initial=1) for x in lengths), default=1)
    shortest = min((x.min(initial=longest) for x in lengths), default=1)
    bins = np.unique(np.geomspace(max(shortest, 1), longest + 1, 50).round())
    shown = [i for i, x in enumerate(lengths) if len(x)]
    if shown:
        *_, bars = left.hist([lengths[i] for i in shown], bins=bins, stacked=True)
        bars = bars if len(shown) > 1 else [bars]
        named = left.legend(bars, [mixture.names[i] for i in shown], fontsize=8)  # as labels, "_name" would be hidden
        for text in named.get_texts():  # a `$` in a source's name begins no formula
            text.set_parse_math(False)
    left.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Lengths")
    for i, found in enumerate(sizes):
        colour = f"C{shown.index(i) % 10}" if i in shown else "C0"
        middle.plot(*found.T, ".", markersize=3, alpha=0.5, color=colour)
    middle.set(xlabel="width in pixels", ylabel="height in pixels", title="Sizes of pictures")
    if any(len(found) for found in sizes):
        middle.set(xscale="log", yscale="log")
        _draw_grids(right, mixture, np.concatenate(sizes))
    right.set(title="Sizes that they become", ylabel="pictures")
    with written(path) as aside:
        figure.savefig(aside, dpi=110)
    plt.close(figure)
    return path


def _lengths(mixture: Mixture, i: int) -> np.ndarray:
    """Tokens of a source's usable records, with all their captions."""
    arrays = mixture.lengths[i].arrays
    counts = np.diff(arrays["starts"])
    return arrays["lengths"][np.repeat(arrays["reason"] == 0, counts)]


def _draw_grids(axis, mixture: Mixture, sizes: np.ndarray) -> None:
    grids = mixture.documents.grids
    found, counts = np.unique([grids.nearest(width, height) for width, height in sizes.tolist()], axis=0,
                              return_counts=True)
    most = np.sort(np.argsort(-counts, kind="stable")[:24])
    names = [f"{columns * grids.cell}x{rows * grids.cell}" for rows, columns in found[most].tolist()]
    axis.bar(range(len(most)), counts[most])
    axis.set_xticks(range(len(most)), names, rotation=90, fontsize=7)


def draw_montage(path: Path, rows: PackedRows, mixture: Mixture, count: int = SAMPLES) -> Path:
    """Draw samples of the plan's first rows as the model reads them, about as many of each source."""
    chosen = _choose(rows, len(mixture.names), count)
    cells = [_cell(mixture.names[source], one, mixture) for source, one in chosen]
    lines = [cells[at:at + COLUMNS] for at in range(0, len(cells), COLUMNS)]
    heights = [max(high for _, high in line) for line in lines]
    sheet = Picture.new("RGB", (COLUMNS * WIDTH, 40 + sum(heights)), "white")
    pen, x = ImageDraw.Draw(sheet), MARGIN
    for pair in LEGEND:
        for text, colour, bold in pair:
            pen.text((x, 12), text, colour, _font(bold))
            x += round(_font(bold).getlength(text)) + 8
        x += 22
    for number, (line, high) in enumerate(zip(lines, heights)):
        top = 40 + sum(heights[:number])
        for column, (cell, _) in enumerate(line):
            sheet.paste(cell, (column * WIDTH, top))
            pen.rectangle((column * WIDTH + 2, top + 2, (column + 1) * WIDTH - 3, top + high - 3), outline=PALE)
    with written(path) as aside:
        sheet.save(aside)
    return path


def _choose(rows: PackedRows, sources: int, count: int) -> list[tuple[int, Encoded]]:
    """Documents of the first rows: of each source in turn, as far as there are."""
    found: list[list[Encoded]] = [[] for _ in range(sources)]
    each, number = -(-count // sources), 0
    while number < 200 and any(len(one) < each for one in found) and (number == 0 or sum(map(len, found)) < 40 * count):
        rows.planned.ensure(number + 1)
        for source, record, passes in zip(*(x.tolist() for x in rows.planned.row(number))):
            if len(found[source]) < count and isinstance(one := rows.read(source, record, passes), Encoded):
                found[source].append(one)
        number += 1
    turns = [(source, found[source][n]) for n in range(count) for source in range(sources) if n < len(found[source])]
    return sorted(turns[:count], key=lambda pair: pair[0])


def _cell(name: str, one: Encoded, mixture: Mixture) -> tuple[Picture.Image, int]:
    """One sample, its source, text and pictures in the order in which they are read, and how high that is."""
    cell = Picture.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(cell)
    pen.text((MARGIN, 7), f"{name}, {len(one.document.tokens):,} tokens", (0, 0, 0), _font(True))
    writer = _Writer(cell, pen)
    for part in pieces(one, mixture):
        if isinstance(part, tuple):
            writer.write(*part)
        else:
            writer.show(part.picture, part.drawn)
    if writer.full:
        pen.text((WIDTH - MARGIN - 24, HEIGHT - 24), "...", (0, 0, 0), _font(True))
    return cell, HEIGHT if writer.full else min(HEIGHT, writer.y + writer.high + 2 * MARGIN)


class Shown:
    """A picture of a sample, and whether it is drawn."""

    def __init__(self, picture: Picture.Image, drawn: bool):
        self.picture, self.drawn = picture, drawn


def pieces(one: Encoded, mixture: Mixture) -> list[tuple[str, bool] | Shown]:
    """What a document holds, decoded from its tokens: (text, whether it is a target), and pictures; no clean copy."""
    document, kind = one.document, mixture.documents.kind
    decode = mixture.documents.tokenizer.decode
    copies, found, at, shown = {n + 1 for n in document.hidden}, [], 0, 0

    def text(stop: int) -> None:
        nonlocal at
        while at < stop:
            end = at + 1
            while end < stop and document.targets[end] == document.targets[at]:
                end += 1
            found.append((decode(document.tokens[at:end]), bool(document.targets[at])))
            at = end

    for number, (start, patches, grid, _) in enumerate(document.images):
        if number in copies:
            at = start + len(patches) + 1
            continue
        text(start - 1)
        pixels = one.pictures[shown].float() / 127.5 - 1 if one.pictures else unpatched(patches, grid, kind.patch_size)
        found.append(Shown(_picture(pixels), number not in document.read))
        at, shown = start + len(patches) + (0 if number in document.hidden else 1), shown + 1
    text(len(document.tokens))
    return found


def unpatched(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patches (rows * columns, channels * size^2) as the image (channels, height, width) that they were cut from."""
    return torch.nn.functional.pixel_shuffle(patches.T.unflatten(1, grid), size)


def _picture(pixels: Tensor) -> Picture.Image:
    values = ((pixels[:3].clamp(-1, 1) + 1) * 127.5).round().byte()
    values = values if len(values) == 3 else values[:1].expand(3, -1, -1)
    return Picture.fromarray(values.movedim(0, -1).contiguous().numpy())


class _Writer:
    """Puts words and pictures behind one another into a cell, and begins new lines."""

    def __init__(self, cell: Picture.Image, pen: ImageDraw.ImageDraw):
        self.cell, self.pen, self.x, self.y, self.high, self.full = cell, pen, MARGIN, 32, 18, False

    def write(self, text: str, target: bool) -> None:
        font, colour = _font(target), TARGET if target else READ
        for line in text.replace("\n", "\u21b5\n").splitlines(keepends=True):
            for word in line.replace(" ", " \0").split("\0"):
                self._word(word.rstrip("\n"), font, colour)
            if line.endswith("\n"):
                self._new_line()

    def _word(self, word: str, font, colour) -> None:
        while word and not self.full:
            fits = len(word)
            while fits > 1 and font.getlength(word[:fits].rstrip()) > WIDTH - 2 * MARGIN:
                fits -= 1
            self._make_room(font.getlength(word[:fits].rstrip()), 18)
            if not self.full:
                self.pen.text((self.x, self.y), word[:fits], colour, font)
                self.x += font.getlength(word[:fits])
            word = word[fits:]

    def show(self, picture: Picture.Image, drawn: bool) -> None:
        """Show a picture in a frame, small pictures enlarged."""
        scale = THUMB / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Picture.Resampling.NEAREST if scale > 1 else Picture.Resampling.LANCZOS)
        self._make_room(size[0] + 10, size[1] + 12)
        if not self.full:
            left, top = round(self.x) + 4, self.y + 3
            self.cell.paste(picture, (left, top))
            frame = (left - 3, top - 3, left + size[0] + 2, top + size[1] + 2)
            self.pen.rectangle(frame, outline=DRAWN if drawn else READ, width=3 if drawn else 2)
            self.x = left + size[0] + 8

    def _make_room(self, wide: float, high: int) -> None:
        if self.x + wide > WIDTH - MARGIN and self.x > MARGIN:
            self._new_line()
        self.high = max(self.high, high)
        self.full = self.full or self.y + self.high > HEIGHT - MARGIN

    def _new_line(self) -> None:
        self.x, self.y, self.high = MARGIN, self.y + self.high, 18


_FONTS: dict[bool, ImageFont.FreeTypeFont] = {}


def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more; other characters are boxes."""
    if bold not in _FONTS:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        _FONTS[bold] = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), 14)
    return _FONTS[bold]
