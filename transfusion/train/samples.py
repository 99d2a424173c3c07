"""Pictures drawn while a run trains, always from the same prompts and noise: `transfusion train --samples.every 500`.

    out/samples/0000500-00.png     a drawn picture; step, prompt and seed stand in it as PNG text
    out/samples.png                all of them: a row for each time, a column for each prompt

A run that goes on drops what was drawn after its save, and goes on with the same picture. What goes wrong here, a full
disk or too little memory, is said once and counted in the log; training goes on. Several processes draw together, layer
by layer, so that an error of one while they draw ends the run.
"""
import os
import textwrap
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from transfusion.data.batches import Drawn
from transfusion.data.model_images import pixels_of
from transfusion.data.picture_files import to_picture
from transfusion.files import written
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Image, Sequence, Text
from transfusion.settings import Count, NotNegative, Seed, WholeNumber
from transfusion.train.log import LOG, records_before
from transfusion.train.optimizer import Player
from transfusion.train.parallel import gathered
from transfusion.train.watching import averaged_weights, is_due

ROWS, SIDES, GAP, LINE, LINES = 60, (64, 192), 6, 15, 5
"""Of samples.png: rows at most; the smallest and the largest side of a picture in it; pixels between them and to a line
of text; lines of a prompt at most."""


@dataclass(frozen=True)
class SamplesSettings:
    """Pictures drawn during training."""

    every: WholeNumber = 0
    """steps between pictures, drawn with the averaged weights; 0: none"""
    prompts: tuple[str, ...] | None = None
    """what is drawn: texts, or files with one in each line; none: captions of the held-out split"""
    count: Count = 8
    """how many of the held-out captions are drawn"""
    steps: Count = 50
    """denoising steps of each picture"""
    guidance: NotNegative = 3.0
    """classifier-free guidance scale; 1 is no guidance"""
    seed: Seed = 0
    """of the noise: prompt i draws from seed + i, at every time"""


class Samples:
    """A watcher that draws pictures.

    Args:
        settings: how often, and how.
        prompts: what is drawn.
        player, base: what is trained, and the Transfusion in it.
        out: directory of the run.
        steps: of the run, whose last one is always drawn.
        start: the step that the run goes on from; what was drawn after it is removed.
        device: that the model computes on; None for that of its weights.
        writes: whether this process writes pictures. Of several, all draw, for they gather sharded weights together.
    """

    def __init__(self, settings: SamplesSettings, prompts: Many[Text], player: Player, base: Transfusion, out: Path, *,
                 steps: int, start: int = 0, writes: bool = True, device: torch.device | None = None):
        self.settings, self.prompts, self.player, self.base = settings, list(prompts), player, base
        self.out, self.steps, self.writes, self.device, self.failed = Path(out), steps, writes, device, 0
        if base.vae is None and base.config.image_channels not in (1, 3):
            raise ValueError(f"train: samples.every is {settings.every} and the model's images have "
                             f"{base.config.image_channels} channels and no autoencoder; 1 or 3, or latents with their "
                             "autoencoder, fit; leave samples.every out")
        self.start, self.stale = start, writes
        if start:
            earlier = records_before(self.out / LOG, start)
            self.failed = max((record.get("samples_failed", 0) for record in earlier), default=0)

    def words(self) -> str:
        """A line to print before training."""
        return f"samples every {self.settings.every:,} steps: {len(self.prompts)} prompts, in {self.out}/samples.png"

    def after(self, done: int) -> dict[str, float]:
        """As `Watcher.after`."""
        if self.stale:  # now the run has gone on, and what it draws anew is not what it drew
            for path in (path for path, step, _ in kept(self.out) if step > self.start):
                path.unlink()
            self.stale = False
        if not is_due(done, self.settings.every, self.steps):
            return {}
        began, images = time.perf_counter(), None
        try:
            images = self.draw()
            if self.writes:
                self.write(done, images)
        except Exception as error:  # whatever it is: days of training must not end for a picture
            if images is None and dist.is_initialized():
                raise  # the others would take the layers that this process gathers next for those of the drawing
            self.failed += 1
            if self.failed == 1 and self.writes:
                said = " ".join(str(error).split()) or type(error).__name__
                tqdm.write(f"samples after step {done:,} failed, and training goes on; the log counts what fails "
                           f"(samples_failed): {said}")
        taken = {"samples_seconds": round(time.perf_counter() - began, 3)}
        return taken | {"samples_failed": self.failed} if self.failed else taken

    def draw(self) -> list[Image]:
        """One image for each prompt."""
        settings = self.settings
        with averaged_weights(self.player, self.device), gathered(self.player.model):
            return self.base.draw([[prompt] for prompt in self.prompts], steps=settings.steps,
                                  guidance=settings.guidance, seed=settings.seed)

    def write(self, done: int, images: list[Image]) -> None:
        """Write the pictures of a step, and the picture of all steps."""
        for number, (prompt, image) in enumerate(zip(self.prompts, images)):
            about = PngInfo()
            about.add_itxt("prompt", prompt.text)
            about.add_text("step", str(done))
            about.add_text("seed", str(self.settings.seed + number))
            with written(self.out / "samples" / f"{done:07d}-{number:02d}.png") as aside:
                to_picture(pixels_of(image, self.base.vae)).save(aside, pnginfo=about)
        draw_table(self.out / "samples.png", self.out, [prompt.text for prompt in self.prompts])


def read_prompts(given: Many[str]) -> list[Text]:
    """Texts, and the lines of those that are files.

    Raises:
        ValueError: none is left, or a file is no UTF-8.
    """
    prompts = []
    for one in given:
        try:
            prompts += Path(one).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(one) else [one]
        except UnicodeDecodeError as error:
            raise ValueError(f"train: samples.prompts names {one!r}, which is no text in UTF-8 ({error.reason}); save "
                             "it as UTF-8") from error
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"train: samples.prompts is {tuple(given)!r}, which holds no text; texts, or a file with one "
                         "in each line, fit")
    return [Text(prompt) for prompt in prompts]


def held_out_prompts(rows: Many[Drawn], tokenizer, count: int) -> list[Text]:
    """The first texts that stand before the first image of a held-out document, each once.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, Text] = {}
    for number in range(len(rows)):
        for prompt in captions(rows[number].sequence, tokenizer):
            found.setdefault(prompt.text, prompt)
        if len(found) >= count:
            break
    if not found:
        raise ValueError("train: samples.every is set and no held-out document has a text before its first image; name "
                         "some with --samples.prompts")
    return list(found.values())[:count]


def captions(sequence: Sequence, tokenizer) -> list[Text]:
    """What stands before the first image of each document that begins with text, in packed rows."""
    found = []
    for tokens, documents, spans in zip(sequence.tokens, sequence.documents, sequence.spans.tolist()):
        seen = set()
        for start, stop in spans:
            owner = int(documents[start]) if stop > start else -1
            if owner < 0 or owner in seen:
                continue
            seen.add(owner)
            before = tokens[:start - 1][documents[:start - 1] == owner].tolist()  # BOI stands at start - 1
            before = before[1:] if before[:1] == [tokenizer.bos_token_id] else before
            text = tokenizer.decode(before)
            special = bool(set(before) & set(tokenizer.all_special_ids))
            found += [Text(text, special=special)] if text.strip() else []
    return found


def kept(out: Path) -> list[tuple[Path, int, int]]:
    """The drawn pictures of a run in order, with their step and the number of their prompt."""
    found = []
    for path in sorted(Path(out).glob("samples/*-*.png")):
        step, _, number = path.stem.partition("-")
        if step.isdigit() and number.isdigit():
            found.append((path, int(step), int(number)))
    return sorted(found, key=lambda one: one[1:])


def draw_table(path: Path, out: Path, prompts: Many[str]) -> None:
    """Write the picture of all that a run drew from these prompts: a row for each time, a column for each prompt.

    Of more than `ROWS` times it shows as many, evenly apart, the first and the last among them.
    """
    times: dict[int, dict[int, Path]] = {}
    for file, step, number in kept(out):
        with Picture.open(file) as picture:
            if number < len(prompts) and picture.text.get("prompt") == prompts[number]:
                times.setdefault(step, {})[number] = file
    steps = sorted(times)
    if len(steps) > ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)]
    cells = {(row, column): _cell(file) for row, step in enumerate(steps) for column, file in times[step].items()}
    width, height = (max(cell.size[i] for cell in cells.values()) for i in (0, 1))
    font = _font(12)
    column = max(width, 90)
    heads = [_wrapped(prompt, font, column) for prompt in prompts]
    top = LINE * max(head.count("\n") + 1 for head in heads) + 2 * GAP
    left = int(max(font.getlength(f"step {step:,}") for step in steps)) + 2 * GAP
    size = left + len(prompts) * (column + GAP), top + len(steps) * (height + GAP)
    table = Picture.new("RGB", size, "white")
    pen = ImageDraw.Draw(table)
    for number, head in enumerate(heads):
        pen.multiline_text((left + number * (column + GAP), GAP), head, "black", font, spacing=LINE - 12)
    for row, step in enumerate(steps):
        pen.text((left - GAP, top + row * (height + GAP) + height // 2), f"step {step:,}", "black", font, anchor="rm")
    for (row, number), cell in cells.items():
        table.paste(cell, (left + number * (column + GAP), top + row * (height + GAP)))
    with written(path) as aside:
        table.save(aside)


def _cell(file: Path) -> Picture.Image:
    """A picture as large as it is in the table: small ones magnified by a whole number, large ones made smaller."""
    with Picture.open(file) as picture:
        cell = picture.convert("RGB")
    smallest, largest = SIDES
    times = max(1, smallest // max(cell.size))
    cell = cell.resize((cell.width * times, cell.height * times), Picture.Resampling.NEAREST)
    cell.thumbnail((largest, largest), Picture.Resampling.LANCZOS)
    return cell


def _wrapped(text: str, font, width: int) -> str:
    """A prompt in lines that are no wider than its column, cut after `LINES`."""
    wide = max(1, int(width / max(1.0, font.getlength("abcdefghijklmnopqrstuvwxyz") / 26)))
    lines = textwrap.wrap(" ".join(text.split()), wide) or [""]
    return "\n".join(lines if len(lines) <= LINES else [*lines[:LINES - 1], f"{lines[LINES - 1][:wide - 2]} …"])


def _font(size: int):
    """DejaVu Sans, which knows more than Latin, where matplotlib brings it; Pillow's own otherwise."""
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
