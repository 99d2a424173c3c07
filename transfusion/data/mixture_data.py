"""Training on a mixture's file: `transfusion train PRESET --data mix.yaml`.

Its rows are planned and read ahead by worker processes (`transfusion.data.loader`). Where the model draws latents, an
autoencoder encodes each step's pictures on the trainer's device; the noise of a latent is a hash of its record, as that
of stored latents is: a resumed run, or one of more processes, draws the same.
"""
import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from transfusion.data.batches import Drawn
from transfusion.data.dataset import DataSettings
from transfusion.data.grids import Grids
from transfusion.data.lengths import is_trained_on
from transfusion.data.loader import Batch, Loader, PackedRows, packed_rows
from transfusion.data.mixture import Mixture, MixtureSettings, open_mixture, open_sources, read_mixture
from transfusion.data.plan import epochs_in_plan
from transfusion.data.sources import FORMATS, DataError, Record
from transfusion.data.stored_latents import normal
from transfusion.model.vae import VAE
from transfusion.sequence import Text
from transfusion.settings import Count, OneOf, WholeNumber, check

TEXTS, CHARACTERS = 20_000, 2_000
"""What a new model's tokenizer is trained on: so many texts of the sources, and so much of each."""
AT_ONCE = 32
"""pictures that an autoencoder encodes at once"""


@dataclass(frozen=True)
class MixtureFileSettings(DataSettings):
    """Pictures and texts of your own, in any format, as a mixture's file names them: see docs/data.md."""

    file: Path | None = None
    """mix.yaml: sources, their weights, and how they are shown"""
    workers: WholeNumber = 2
    """processes that read and decode ahead; 0 reads in the trainer's own"""
    prefetch: Count = 2
    """steps that each of them has ready"""
    vae: Path | None = None
    """directory of a diffusers AutoencoderKL whose latents a new model draws in place of pixels"""
    channels: Annotated[int, OneOf((1, 3))] = 3
    """of the pictures that a new model draws as pixels: 3 (colour) or 1 (grey)"""

    name = "mixture"
    free = ("file", "workers", "prefetch", "files")

    @functools.cached_property
    def mixture(self) -> MixtureSettings:
        """What the file says, read once."""
        if self.file is None:
            raise ValueError("train: data.file names no mixture; add, for example, --data mix.yaml; docs/data.md shows "
                             "what stands in it")
        return read_mixture(self.file)

    @functools.cached_property
    def files(self) -> list[str]:
        """What the sources' files were when they were opened, so that a run that goes on can say that they changed."""
        sources, _ = open_sources(self.mixture)
        return [f"{source.name}: {len(source):,} records, {source.fingerprint()[:8]}" for source in sources]

    def directories(self) -> dict[str, Path | None]:
        """As `DataSettings.directories`."""
        return {"vae": self.vae}

    def record(self) -> dict[str, object]:
        """As `DataSettings.record`: the mixture itself, its paths as seen from its file."""
        shown = {name: value for name, value in vars(self.mixture).items() if name != "cache"}
        mixture = {name: _plain(value, self.file.parent) for name, value in shown.items()}
        return {"name": self.name, "mixture": mixture, "files": self.files}


def _plain(value, folder: Path):
    """Settings as JSON can hold them; a format's own are named after it."""
    if isinstance(value, Path):
        return os.path.relpath(value, folder)
    if isinstance(value, tuple):
        return [_plain(one, folder) for one in value]
    if not dataclasses.is_dataclass(value):
        return value
    kinds = {kind: name for name, kind in FORMATS.items()}
    named = {"format": kinds[type(value)]} if type(value) in kinds else {}
    return named | {name: _plain(one, folder) for name, one in vars(value).items()}


class MixtureData:
    """A mixture's file, as `TrainingData`; `patch_size` is that of the model that will be built, if one will."""

    def __init__(self, settings: MixtureFileSettings, patch_size: int | None = None):
        check("train", settings, "data.")
        self.settings, self.mixture = settings, settings.mixture
        settings.record()                              # what the files are now, not when the run is first saved
        self.vae = None if settings.vae is None else VAE.from_pretrained(settings.vae)
        factor, channels = (1, settings.channels) if self.vae is None else (_factor(self.vae), self.vae.channels)
        if patch_size is not None:
            Grids(self.mixture.pictures, patch_size * factor)
        size = (self.mixture.pictures.sizes or ((self.mixture.pictures.side,) * 2,))[0]
        self.image_shape = channels, *(side // factor for side in size)

    def texts(self) -> list[str]:
        """As `TrainingData.texts`: those of records spread evenly over each source, none of them held out."""
        texts, share = [], -(-TEXTS // len(self.mixture.sources))
        for source in open_sources(self.mixture)[0]:
            for number in np.unique(np.linspace(0, len(source) - 1, min(share, len(source)), dtype=np.int64)).tolist():
                try:
                    record = source[number]
                    if is_trained_on(record, self.mixture.held_out, self.mixture.held_out_by):
                        texts += [text[:CHARACTERS] for text in _texts(record)]
                except DataError:
                    continue                           # it is counted, and named, where lengths are
        return texts

    def check_start(self, model) -> None:
        """As `TrainingData.check_start`."""
        if self.vae is not None and (model.vae is None or model.vae.fingerprint() != self.vae.fingerprint()):
            theirs = "pictures" if model.vae is None else "another autoencoder's latents"
            raise ValueError(f"train: data.vae is {str(self.settings.vae)!r} and tune.start a model of {theirs}; leave "
                             "data.vae out, or make the model with `transfusion init --vae`")

    def rows(self, tokenizer, config, vae: VAE | None, *, rows: int, seq_len: int, steps: int, rank: int = 0,
             ranks: int = 1) -> "MixtureRows":
        """As `TrainingData.rows`; the mixture's lengths are counted, and its first rows planned."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are what runs in parallel
        mixture = open_mixture(self.mixture, tokenizer, config, folder=self.settings.file.parent,
                               factor=1 if vae is None else _factor(vae),
                               channels=None if vae is None else vae.picture_channels,
                               autoencoder="" if vae is None else vae.fingerprint())
        packed = packed_rows(mixture, rows=rows // ranks, seq_len=seq_len, rank=rank, ranks=ranks)
        latents = None if vae is None else Posterior(vae)
        return MixtureRows(self.settings, mixture, packed, config.patch_size, latents, steps)


class MixtureRows:
    """A mixture's planned rows, read ahead while steps are asked for in order.

    latents: makes the latents of a batch's pictures; None where the model draws pixels.
    """

    def __init__(self, settings: MixtureFileSettings, mixture: Mixture, packed: PackedRows, patch_size: int,
                 latents: "Posterior | None", steps: int):
        self.settings, self.mixture, self.packed, self.steps = settings, mixture, packed, steps
        self.patch_size, self.latents = patch_size, latents
        self.report = packed.planned.report(0)
        self.epochs = epochs_in_plan(packed.planned.streams, mixture.settings.weights)
        self._step, self._batch, self._ahead = -1, None, None
        self._kinds: Counter[str] = Counter()

    @property
    def steps_in_epoch(self) -> float:
        """As `Rows.steps_in_epoch`."""
        return self.report["rows"] / self.epochs / (self.packed.rows * self.packed.ranks)

    def words(self) -> list[str]:
        """As `Rows.words`."""
        report, seq_len = self.report, self.packed.seq_len
        samples, tokens = (sum(report[name]) / self.epochs for name in ("samples", "tokens"))
        lines = [f"{self.settings.file}: an epoch has {samples:,.0f} documents of {tokens:,.0f} tokens in "
                 f"{report['rows'] / self.epochs:,.0f} rows of {seq_len:,}, {100 * report['fill']:.1f} % full: "
                 f"{self.steps_in_epoch:,.1f} steps"]
        lines += self._shares() if len(self.mixture.sources) > 1 else []
        for name, lengths, too_long in zip(self.mixture.names, self.mixture.lengths, report["too_long"]):
            for kind, count in lengths.failures().items():
                _, where, reason = lengths.examples[kind][0]
                lines.append(f"{name}: {count:,} of {len(lengths):,} records cannot be used: {kind} "
                             f"({where}: {reason})")
            if too_long:
                lines.append(f"{name}: {too_long / self.epochs:,.0f} documents an epoch are longer than optim.seq_len, "
                             f"{seq_len} tokens, and are left out; a larger optim.seq_len, or max_length in the "
                             "mixture's file, fits")
        return lines

    def _shares(self) -> list[str]:
        """A line for each source: how much of an epoch it is."""
        amounts = self.mixture.epoch()
        total = sum(amount.tokens for amount in amounts)
        return [f"{amount.name}: {amount.samples:,.0f} documents of {amount.tokens:,.0f} tokens, "
                f"{100 * amount.tokens / total:.1f} %; read {amount.passes:.3g} times an epoch" for amount in amounts]

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """As `Rows.draw`."""
        batch, waited = self._read(step)
        sequence = batch.sequence
        if self.latents is not None:
            sequence = batch.with_latents(self.latents(batch.pictures(), batch.noises), self.patch_size)
        return Drawn(sequence, batch.limit, {"failed": len(batch.failures), "waited": waited})

    def held_out(self, count: int) -> "HeldOutRows":
        """As `Rows.held_out`: at most one epoch of the split."""
        if not any(len(stream.records) for stream in self.mixture.streams("held-out")):
            raise ValueError(f"train: {self.settings.file} holds out no record (held_out is "
                             f"{self.mixture.settings.held_out:g}); a larger share fits, such as held_out: 0.05")
        packed = packed_rows(self.mixture, rows=1, seq_len=self.packed.seq_len, split="held-out")
        epochs = epochs_in_plan(packed.planned.streams, self.mixture.settings.weights)
        rows = math.ceil(packed.planned.report(0)["rows"] / epochs)
        return HeldOutRows(packed, self.patch_size, self.latents, min(count, rows))

    def close(self) -> None:
        """As `Rows.close`."""
        if self._ahead is not None:
            self._ahead.close()
        self._step, self._batch, self._ahead = -1, None, None

    def _read(self, step: int) -> tuple[Batch, float]:
        """A step's batch, and the seconds it was waited for; the last one is kept, for it may be asked for again."""
        if step != self._step:
            if step != self._step + 1 or self._batch is None:
                self.close()
                stop = max(self.steps, step + 1)
                self._loader = Loader(self.packed, step, stop, self.settings.workers, self.settings.prefetch)
                self._ahead = iter(self._loader)
            self._batch, self._step = next(self._ahead), step
            self._say_failures(self._batch)
        return self._batch, round(self._loader.waited, 4)

    def _say_failures(self, batch: Batch) -> None:
        """Name the first record of each kind that could be read when it was counted and cannot be now."""
        for failure in batch.failures:
            self._kinds[failure.kind] += 1
            if self._kinds[failure.kind] == 1:
                tqdm.write(f"left out, and counted in the log (failed): {failure.where}: {failure.reason}")


class HeldOutRows(Sequence):
    """Planned rows of a mixture's held-out split; `latents` as in `MixtureRows`."""

    def __init__(self, packed: PackedRows, patch_size: int, latents: "Posterior | None", count: int):
        self.packed, self.patch_size, self.latents, self.count = packed, patch_size, latents, count
        packed.planned.ensure(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Drawn:
        batch = self.packed[number]
        sequence = batch.sequence
        if self.latents is not None:
            sequence = batch.with_latents(self.latents(batch.pictures(), batch.noises), self.patch_size)
        return Drawn(sequence, batch.limit, {"failed": len(batch.failures)})


class Posterior:
    """Latents of pictures, a sample of what an autoencoder says of each; it computes on its own device."""

    def __init__(self, vae: VAE):
        self.vae = vae

    def __call__(self, pictures: Sequence[Tensor], noises: Sequence[int]) -> list[Tensor]:
        """Return a latent (C, h, w) for each picture (channels, H, W) and its seed, in order, on the host."""
        latents: list[Tensor | None] = [None] * len(pictures)
        for places in _alike(pictures):
            mean, deviation = self.vae.posterior(torch.stack([pictures[i] for i in places]))
            for i, one, width in zip(places, mean, deviation):
                latents[i] = one + width * normal(noises[i], one.shape)
        return latents


def _alike(pictures: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of pictures of one shape, at most AT_ONCE together."""
    shapes: dict[tuple, list[int]] = {}
    for i, picture in enumerate(pictures):
        shapes.setdefault(tuple(picture.shape), []).append(i)
    for places in shapes.values():
        yield from (places[at:at + AT_ONCE] for at in range(0, len(places), AT_ONCE))


def _factor(vae: VAE) -> int:
    if vae.factor == 1:
        raise ValueError("train: the autoencoder's latents are as large as its pictures; one that halves them at least "
                         "once fits")
    return vae.factor


def _texts(record: Record) -> Iterator[str]:
    """Every text of a record."""
    yield from record.captions
    yield from (part.text for part in record.parts if isinstance(part, Text))
    yield from (part for turn in record.turns for part in turn.parts if isinstance(part, str))
