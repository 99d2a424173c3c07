"""What a mixture would train on, counted and drawn before it does: `transfusion data check mix.yaml`.

Every record's text is tokenized and every picture's header is read, as training does it first of all; the counts are
kept, and training finds them. With `--decode` every picture is decoded, too.
"""
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
from tqdm import tqdm

from transfusion.data.grids import picture_size
from transfusion.data.lengths import NO_TARGET
from transfusion.data.loader import Failure, PackedRows, packed_rows
from transfusion.data.mixture import Mixture, open_mixture, read_mixture
from transfusion.data.mixture_data import MixtureData, MixtureFileSettings
from transfusion.data.sources.record import DataError
from transfusion.files import read_json
from transfusion.model.config import TransfusionConfig
from transfusion.model.transfusion import load_tokenizer
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer
from transfusion.settings import Count, Positive, Range, Share, check

MISSING = ("missing picture",)
UNREADABLE = ("unreadable picture", "empty picture", "picture too large")
SHOWN = 3          # failures of each kind that are printed
SAMPLED = 2000     # pictures of a source whose sizes are looked up
MEASURED = 3.0     # seconds in which the speed of reading is measured, at most
ROWS = 200         # rows that are read for it, at most


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how long documents are: its tokenizer and how it divides pictures."""

    model: Path | None = None
    """directory of a checkpoint, whose tokenizer and patches count; none: as the three settings below say"""
    vocabulary: Annotated[int, Range(261)] = 4096
    """tokens of the tokenizer that `transfusion train` would train on the texts; these three are of the preset own"""
    patch_size: Count = 16
    """side of a patch in pixels or, for a model of latents, in positions of the latent"""
    factor: Count = 1
    """pixels to a position of the latent: 1 for a model of pixels, 8 for Stable Diffusion's autoencoder"""

    def load(self, path: Path):
        """Return tokenizer, configuration and factor for a mixture's file.

        Raises:
            ValueError: `model` is no checkpoint.
        """
        if self.model is None:
            tokenizer = tokenizer_of(path, self.vocabulary)
            ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in
                   (("boi_token_id", BOI), ("eoi_token_id", EOI))}
            return tokenizer, SimpleNamespace(**ids, image_channels=3, patch_size=self.patch_size), self.factor
        if not (self.model / "config.json").is_file():
            raise ValueError(f"data: model is {str(self.model)!r}, which holds no config.json; a directory that "
                             "`transfusion train` or `transfusion init` wrote fits")
        try:
            config = TransfusionConfig.from_pretrained(self.model)
            tokenizer = load_tokenizer(self.model)
        except OSError as error:
            raise ValueError(f"data: model is {str(self.model)!r}, which cannot be read ({error})") from error
        vae = self.model / "vae" / "config.json"
        return tokenizer, config, 2 ** (len(read_json(vae)["block_out_channels"]) - 1) if vae.is_file() else 1


@dataclass(frozen=True)
class CheckSettings(ModelShape):
    """Count what a mixture holds, name what would fail, and draw twelve samples as the model will read them."""

    seq_len: Count = 1024
    """tokens in a packed row"""
    rows: Count = 4
    """packed rows in a step"""
    decode: bool = False
    """decode every picture, which finds what a header does not tell"""
    allow: Share = 0.05
    """share of a source's records that may be unusable"""
    tokens_per_second: Positive | None = None
    """speed of training, as its log says; the time of an epoch is then printed"""
    out: Path = Path("data-check")
    """directory of the pictures that are drawn"""
    workers: Count | None = None
    """processes that count; none: one for each processor"""


class Verdict:
    """What keeps a mixture from being trained on, if anything."""

    def __init__(self):
        self.problems: list[str] = []

    def refuse(self, problem: str) -> None:
        """Take note of a reason not to train."""
        self.problems.append(problem)


def check_mixture(path: Path, settings: CheckSettings) -> bool:
    """Run `transfusion data check`: print, write the pictures, and return whether the mixture may train.

    Raises:
        ValueError: settings or a mixture that do not fit, or a source that cannot be opened.
    """
    check("data check", settings)
    mixture_settings = dataclasses.replace(read_mixture(path), latents=None)  # what is shown are pictures
    tokenizer, config, factor = settings.load(path)
    mixture = open_mixture(mixture_settings, tokenizer, config, folder=Path(path).parent, factor=factor,
                           workers=settings.workers)
    verdict = Verdict()
    broken = [_decoded(mixture, i) if settings.decode else [] for i in range(len(mixture.sources))]
    sizes = [picture_sizes(mixture, i) for i in range(len(mixture.sources))]
    print(source_table(mixture, broken, sizes))
    print(failure_list(mixture, broken), end="")
    _judge_sources(mixture, broken, settings.allow, verdict)
    rows = _judge_plan(mixture, settings, verdict)
    _draw(mixture, rows, sizes, settings.out)
    for problem in verdict.problems:
        print(f"not yet: {problem}")
    if not verdict.problems:
        print("this may train")
    return not verdict.problems


def tokenizer_of(path: Path, vocabulary: int):
    """Return the tokenizer that `transfusion train` would make for a mixture's file."""
    return train_tokenizer(MixtureData(MixtureFileSettings(file=path)).texts(), vocabulary)


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of these, evenly spread."""
    return numbers if len(numbers) <= count else numbers[np.linspace(0, len(numbers) - 1, count).astype(np.int64)]


def picture_sizes(mixture: Mixture, i: int) -> np.ndarray:
    """(n, 2) widths and heights of a source's pictures, of many only a part; those of unusable records are left out."""
    lengths, source, found = mixture.lengths[i], mixture.sources[i], []
    usable = np.flatnonzero((lengths.arrays["reason"] == 0) & (lengths.arrays["images"] > 0))
    for number in _spread(usable, SAMPLED).tolist():
        try:
            found += [picture_size(picture) for picture in source[number].pictures()]
        except DataError:
            continue
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _decoded(mixture: Mixture, i: int) -> list[Failure]:
    """Decode all pictures of a source's usable records; return those that cannot be."""
    source, grids = mixture.sources[i], mixture.documents.grids
    usable = np.flatnonzero(mixture.lengths[i].arrays["reason"] == 0).tolist()

    def read(number: int) -> Failure | None:
        try:
            record = source[number]
        except DataError as error:
            return Failure(error.where, error.reason, error.kind)
        for picture in record.pictures():
            try:
                grids.pixels(picture, grids.of(picture))
            except DataError as error:
                return Failure(record.where, f"{error.where}: {error.reason}", error.kind)
        return None

    with ThreadPoolExecutor() as threads:
        found = tqdm(threads.map(read, usable), desc=f"decode {mixture.names[i]}", total=len(usable), unit="record",
                     dynamic_ncols=True, disable=len(usable) < 100)
        return [failure for failure in found if failure is not None]


def source_table(mixture: Mixture, broken: list[list[Failure]], sizes: list[np.ndarray]) -> str:
    """A line for each source."""
    head = ("source", "records", "usable", "pictures", "missing", "unreadable", "no target", "other", "tokens",
            "longest", "picture sizes")
    lines = [head]
    for i, name in enumerate(mixture.names):
        lengths, counts = mixture.lengths[i], failure_counts(mixture, broken, i)
        usable = lengths.arrays["reason"] == 0
        first = lengths.arrays["lengths"][lengths.arrays["starts"][:-1][usable]]
        kinds = [sum(counts.get(kind, 0) for kind in group) for group in (MISSING, UNREADABLE, (NO_TARGET,))]
        others = sum(counts.values()) - sum(kinds)
        pictures = int(lengths.arrays["images"].sum())
        numbers = (len(lengths), int(usable.sum()) - len(broken[i]), pictures, *kinds, others, int(first.sum()),
                   int(first.max(initial=0)))
        lines.append((name, *(f"{number:,}" for number in numbers), _size_words(sizes[i])))
    return table(lines)


def table(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells as text: the first column to the left, numbers to the right, the last as it is."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def failure_counts(mixture: Mixture, broken: list[list[Failure]], i: int) -> dict[str, int]:
    """How many records of a source cannot be used, by kind."""
    counts = dict(mixture.lengths[i].failures())
    for failure in broken[i]:
        counts[failure.kind] = counts.get(failure.kind, 0) + 1
    return counts


def failure_list(mixture: Mixture, broken: list[list[Failure]]) -> str:
    """What cannot be used: the kinds of each source with counts, and the first records of each."""
    lines = []
    for i, name in enumerate(mixture.names):
        for kind, count in sorted(failure_counts(mixture, broken, i).items(), key=lambda pair: -pair[1]):
            lines.append(f"{name}: {count:,} {'record' if count == 1 else 'records'}, {kind}")
            first = [f"{where}: {reason}" for _, where, reason in mixture.lengths[i].examples.get(kind, [])]
            first += [f"{one.where}: {one.reason}" for one in broken[i] if one.kind == kind]
            lines += [f"  {_printable(line)}" for line in first[:SHOWN]]
            lines += [f"  and {count - SHOWN:,} more"] if count > SHOWN else []
    return "".join(f"{line}\n" for line in lines)


def _printable(text: str) -> str:
    """Text without what moves a terminal's cursor or changes its colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _size_words(sizes: np.ndarray) -> str:
    if not len(sizes):
        return "-"
    width, height = np.median(sizes, axis=0).astype(int).tolist()
    (low, low_height), (high, high_height) = sizes.min(0).tolist(), sizes.max(0).tolist()
    if (low, low_height) == (high, high_height):
        return f"{low}x{low_height}"
    return f"{low}-{high} x {low_height}-{high_height}, median {width}x{height}"


def _judge_sources(mixture: Mixture, broken: list[list[Failure]], allow: float, verdict: Verdict) -> None:
    for i, name in enumerate(mixture.names):
        count, failed = len(mixture.lengths[i]), sum(failure_counts(mixture, broken, i).values())
        if failed == count:
            verdict.refuse(f"none of {count:,} records of {name!r} can be used; see above why")
        elif failed > allow * count:
            verdict.refuse(f"{failed:,} of {count:,} records of {name!r} cannot be used, {100 * failed / count:.1f} %; "
                           f"at most {100 * allow:g} % fit; put them right, or raise --allow")


def _judge_plan(mixture: Mixture, settings: CheckSettings, verdict: Verdict) -> PackedRows | None:
    """Plan the rows, print how full they are and what an epoch costs, and return them, if any can be made."""
    try:
        rows = packed_rows(mixture, rows=settings.rows, seq_len=settings.seq_len)
        report, amounts = rows.planned.report(0), mixture.epoch()
    except ValueError as error:
        verdict.refuse(str(error))
        return None
    total = sum(amount.tokens for amount in amounts)
    print("\nan epoch")
    print(table([("source", "passes", "samples", "tokens", "share of tokens", "too long"), *(
        (amount.name, f"{amount.passes:.3g}", f"{amount.samples:,.0f}", f"{amount.tokens:,.0f}",
         f"{100 * share:.1f} %", f"{100 * long / max(long + count, 1):.1f} %")
        for amount, share, long, count in zip(amounts, report["shares"], report["too_long"], report["samples"]))]))
    used = sum(report["tokens"]) / max(report["rows"], 1)
    epoch_rows = total * (1 - _share_too_long(report)) / max(used, 1)
    print(f"{total:,.0f} tokens, about {epoch_rows:,.0f} rows of {settings.seq_len:,}, "
          f"{100 * report['fill']:.2f} % full; {epoch_rows / settings.rows:,.1f} steps of {settings.rows} rows; "
          f"attention of a step's slowest row over their mean: {report['slowest']:.2f}")
    for name, long, count in zip(mixture.names, report["too_long"], report["samples"]):
        if long > settings.allow * (long + count):
            verdict.refuse(f"{long:,} of {long + count:,} documents of {name!r} are longer than a row of "
                           f"{settings.seq_len:,} tokens; raise --seq-len, or set max_length in the mixture, which "
                           "cuts them")
    print(_time_words(rows, total, settings))
    return rows


def _share_too_long(report: dict) -> float:
    long, counted = sum(report["too_long"]), sum(report["samples"])
    return long / max(long + counted, 1)


def _time_words(rows: PackedRows, tokens: float, settings: CheckSettings) -> str:
    """How fast records are read here, and how long an epoch takes."""
    read, failed, number, began = 0, 0, 0, time.perf_counter()
    while number == 0 or time.perf_counter() - began < MEASURED and number < ROWS:
        rows.planned.ensure(number + 1)
        found = rows.read_row(number)
        failed += sum(isinstance(one, Failure) for one in found)
        read += sum(len(one.document.tokens) for one in found if not isinstance(one, Failure))
        number += 1
    speed = max(read, 1) / (time.perf_counter() - began)
    words = f"reading: {speed:,.0f} tokens a second in one process here, {_duration(tokens / speed)} an epoch"
    if failed:
        words += f"; {failed} of the documents read failed"
    if settings.tokens_per_second is None:
        return f"{words}; --tokens-per-second, from the log of a run, tells the time of training"
    return f"{words}; training: {_duration(tokens / settings.tokens_per_second)} an epoch"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} s"


def _draw(mixture: Mixture, rows: PackedRows | None, sizes: list[np.ndarray], out: Path) -> None:
    from transfusion.data.check_pictures import draw_histograms, draw_montage  # matplotlib, which only pictures need
    paths = [draw_histograms(out / "lengths.png", mixture, sizes)]
    if rows is not None:
        paths.append(draw_montage(out / "samples.png", rows, mixture))
    print(f"pictures: {', '.join(map(str, paths))}")
