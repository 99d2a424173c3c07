"""What a run trains on, whatever it comes from: `open_data` chooses, and a trainer asks for the rows of a step.

Digits, emoji and data sets written in Python draw documents at random (`DrawnData`); a mixture's rows are planned
(`transfusion.data.mixture_data`). Either way a step's rows are a function of (seed, step).
"""
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from transfusion.data.batches import Drawn, document_lengths, draw_batch, step_generator
from transfusion.data.dataset import DatasetSettings, DataSettings
from transfusion.data.latents import open_dataset
from transfusion.data.mixture_data import MixtureData, MixtureFileSettings
from transfusion.model.vae import VAE
from transfusion.sequence import split_rows

HELD_OUT_SEED = 0
"""of the held-out documents that are drawn at random: that of no run, so that runs compare"""


class Rows(Protocol):
    """Packed rows by step."""

    steps_in_epoch: float | None
    """how many steps show everything once; None where documents are drawn at random"""

    def words(self) -> list[str]:
        """Lines to print before training: how much there is, and what is left out."""

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """Return what a step trains on; all that is random in it comes from `generator`, the step's own, or a hash.

        Steps may be asked for in any order and again; asked for in order, they are read ahead.
        """

    def held_out(self, count: int) -> Sequence[Drawn]:
        """Return at most `count` packed rows of held-out documents, one by one.

        They are the same in every run on these data, whatever its seed, and on every process.

        Raises:
            ValueError: nothing is held out.
        """

    def close(self) -> None:
        """End what reads ahead. Steps may be asked for again, which begins anew."""


class TrainingData(Protocol):
    """What a trainer builds a model for and takes rows from."""

    image_shape: tuple[int, int, int]
    """(C, H, W) that a new model draws: of pictures, or of their latents"""
    vae: VAE | None
    """of the latents, where the data name one"""

    def texts(self) -> list[str]:
        """Return texts for the tokenizer of a new model."""

    def check_start(self, model) -> None:
        """Refuse a model to start from that these data do not fit.

        Raises:
            ValueError: what differs, named.
        """

    def rows(self, tokenizer, config, vae: VAE | None, *, rows: int, seq_len: int, steps: int, rank: int = 0,
             ranks: int = 1) -> Rows:
        """Return the rows of a model's steps, up to `steps`; the VAE is the model's.

        `rows` are those of a step, of which this is part `rank` of `ranks` equal ones.
        """


class DrawnData:
    """A data set that draws documents from a random generator, or its latents."""

    def __init__(self, settings: DatasetSettings):
        self.settings = settings
        self.dataset, self.vae = open_dataset(settings)
        self.image_shape = self.dataset.image_shape

    def texts(self) -> list[str]:
        """As `TrainingData.texts`."""
        return self.dataset.texts()

    def check_start(self, model) -> None:
        """As `TrainingData.check_start`."""
        settings, (channels, *size) = self.settings, self.image_shape
        if channels != model.config.image_channels or any(side % model.config.patch_size for side in size):
            raise ValueError(f"train: data.name is {settings.name!r}, whose images are {tuple(self.image_shape)}, "
                             f"and tune.start a model of {model.config.image_channels} channels and patches of "
                             f"{model.config.patch_size}; equal channels and whole patches fit")
        if (self.vae and self.vae.fingerprint()) != (model.vae and model.vae.fingerprint()):
            latents, source = settings.latents, "pictures" if model.vae is None else "another autoencoder"
            raise ValueError(f"train: data.latents is {latents and str(latents)!r} and tune.start a model of {source}; "
                             "latents of its own autoencoder fit; make them with "
                             "`transfusion vae encode`, and the model with `transfusion init --vae`")

    def rows(self, tokenizer, config, vae: VAE | None, *, rows: int, seq_len: int, steps: int, rank: int = 0,
             ranks: int = 1) -> "DrawnRows":
        """As `TrainingData.rows`."""
        return DrawnRows(self.dataset, self.settings, tokenizer, config, rows, seq_len, rank, ranks)


class DrawnRows:
    """Rows of documents that a data set draws with the step's generator: all of them, of which this is a part."""

    steps_in_epoch = None

    def __init__(self, dataset, settings: DatasetSettings, tokenizer, config, rows: int, seq_len: int,
                 rank: int = 0, ranks: int = 1):
        self.how = dataset, settings, tokenizer, config
        self.shape, self.part = (rows, seq_len), (rank, ranks)

    def words(self) -> list[str]:
        """As `Rows.words`."""
        seq_len = self.shape[1]
        share = document_lengths(*self.how, seq_len).left_out
        return [f"documents of more than optim.seq_len, {seq_len} tokens, are left out, about {100 * share:.1f} % of "
                "those drawn; the log counts them (left_out)"] if share else []

    def draw(self, step: int, generator: torch.Generator) -> Drawn:
        """As `Rows.draw`."""
        sequence, limit = draw_batch(*self.how, *self.shape, generator)
        rank, ranks = self.part
        parts = split_rows(sequence, ranks)
        first = sum(part.image_count for part in parts[:rank])
        own = limit[first:first + parts[rank].image_count]
        return Drawn(parts[rank], own, {"left_out": sequence.left_out})

    def held_out(self, count: int) -> "HeldOutRows":
        """As `Rows.held_out`."""
        trained, settings, tokenizer, config = self.how
        try:
            dataset, _ = open_dataset(settings, "held-out")
        except ValueError as error:
            raise ValueError(f"train: the held-out split of data {settings.name!r} cannot be opened: {error}") from None
        if not len(dataset.pictures):
            raise ValueError(f"train: data {settings.name!r} holds out no picture; a data set whose "
                             "open(\"held-out\") has some fits")
        if _are_equal(dataset.pictures, trained.pictures):
            print(f"the held-out pictures of data {settings.name!r} are those that are trained on: losses on them say "
                  "nothing of new ones", flush=True)
        return HeldOutRows((dataset, settings, tokenizer, config), self.shape[1], count)

    def close(self) -> None:
        """As `Rows.close`: nothing is open."""


class HeldOutRows(Sequence):
    """Rows of documents that a held-out split draws, each with a generator of its own."""

    def __init__(self, how: tuple, seq_len: int, count: int):
        self.how, self.seq_len, self.count = how, seq_len, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Drawn:
        sequence, limit = draw_batch(*self.how, 1, self.seq_len, step_generator(HELD_OUT_SEED, number))
        return Drawn(sequence, limit, {"left_out": sequence.left_out})


def _are_equal(pictures, others) -> bool:
    """Whether two splits that are in memory hold the same pictures."""
    return isinstance(pictures, Tensor) and isinstance(others, Tensor) and torch.equal(pictures, others)


def open_data(settings: DataSettings, patch_size: int | None = None) -> TrainingData:
    """Open what settings name; `patch_size` is that of the model that will be built, if one will.

    Raises:
        ValueError: settings that do not fit, or files that are not there.
    """
    if isinstance(settings, MixtureFileSettings):
        return MixtureData(settings, patch_size)
    return DrawnData(settings)
