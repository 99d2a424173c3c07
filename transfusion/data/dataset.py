"""What a data set is, and the settings that name one.

A data set draws documents (lists of `Text` and `Image`) from a random generator. To add one, write two classes:

    @dataclass(frozen=True)
    class FlowerSettings(DatasetSettings):
        name = "flowers"
        folder: Path = Path("flowers")

        def open(self, split="train"):
            pictures, captions = read_flowers(self.folder, split)    # (N, C, H, W) in [-1, 1], and N texts
            return CaptionedPictures(pictures, captions)

`TrainConfig(data=FlowerSettings())` trains on it, `VAETrainConfig` and `EncodeSettings` take the same settings. What
every data set has in common (`DatasetSettings`) happens once: the order of caption and image and the captions left
out in `Arrangement.pair`, the noise limit and the clean copies in `transfusion.data.batches`.
"""
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
from torch import Tensor

from transfusion.sequence import Image, Part, Text
from transfusion.settings import OneOf, Share

SPLITS = ("train", "held-out")
CONTEXTS = ("noised", "clean")
NO_CAPTIONS = ("the data set has pictures and no captions, so that only an autoencoder can be trained on it "
               "(transfusion vae "
               "train); a data set with captions fits")


class Pictures(Protocol):
    """Pictures, float32 in [-1, 1], or their latents: a tensor, or files that are read when they are asked for."""

    shape: torch.Size
    """(N, C, H, W)"""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the pictures of these indices, an int64 tensor (n,), as (n, C, H, W)."""


class Labels(NamedTuple):
    """What tells pictures apart: the label of each picture (N,), and the labels' names."""

    of_pictures: Tensor
    names: Sequence[str]


@dataclass(frozen=True)
class Arrangement:
    """How the parts of a document are arranged, and how much noise there is where an image is read."""

    caption_first: Share = 0.8
    """share of pairs whose caption stands before the image (the paper: 0.8)"""
    caption_dropout: Share = 0.1
    """share of caption-first pairs whose caption is left out, so that guidance has an unconditional model"""
    noise_limit: Share = 0.5
    """largest noise time of an image that stands before its caption (the paper: 0.5); none with context clean"""
    context: Annotated[str, OneOf(CONTEXTS)] = "noised"
    """what later tokens read of an image: noised, the patches it is drawn from (the paper), or clean, a second copy of
    them without noise (BAGEL), which makes an image twice as long"""

    def is_image_first(self, order: float) -> bool:
        """Whether the image stands before its caption, to be read; `order` is a uniform random number in [0, 1)."""
        return order >= self.caption_first

    def pair(self, caption: Text, image: Image, order: float, drop: float) -> list[Part]:
        """Return a document of a caption and its image; `order` and `drop` are uniform random numbers in [0, 1)."""
        if self.is_image_first(order):
            return [image, caption]
        return [image] if drop < self.caption_dropout else [caption, image]


class Dataset(Protocol):
    """What a trainer asks of a data set."""

    pictures: Pictures
    """what `transfusion vae train` and `transfusion vae encode` read; `open_dataset` puts latents in their place"""
    image_shape: tuple[int, int, int]
    """(C, H, W) of `pictures`"""

    def texts(self) -> list[str]:
        """Return every text that documents are made of, for the tokenizer."""

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """Draw one document."""

    def labels_by_name(self) -> dict[str, Labels]:
        """Return what can be told apart in the pictures, for a classifier."""


@dataclass(frozen=True)
class DataSettings:
    """What a run is trained on: a data set in Python (`DatasetSettings`), or a mixture's file."""

    name = ""
    """what messages and caches call it; each class has its own"""
    free = ()
    """settings of the class that may change when a run goes on"""

    def shared(self) -> dict[str, object]:
        """Return what every data set of its kind has, as keywords for the settings of another one."""
        return {}

    def directories(self) -> dict[str, Path | None]:
        """Return the directories that are read, by the settings that name them: no command may write there."""
        return {}

    def record(self) -> dict[str, object]:
        """Return what a run's record holds of it beside the settings."""
        return {"name": self.name}


@dataclass(frozen=True)
class DatasetSettings(Arrangement, DataSettings):
    """The data set of a run: what every data set has; its own settings are added by a class of its own."""

    latents: Path | None = None
    """a cache that `transfusion vae encode` wrote of this data set: its latents are drawn in place of pictures, and the
    checkpoint carries their autoencoder"""

    def open(self, split: str = "train") -> Dataset:
        """Return one split of the data set, "train" or "held-out".

        Raises:
            ValueError: settings that do not fit, or files that are not there.
        """
        raise ValueError(f"open: data is {type(self).__name__}, which names no data set; settings of one fit; on the "
                         "command "
                         "line add, for example, data:digits")

    def shared(self) -> dict[str, object]:
        """As `DataSettings.shared`."""
        return {field.name: getattr(self, field.name) for field in fields(DatasetSettings)}

    def directories(self) -> dict[str, Path | None]:
        """As `DataSettings.directories`."""
        return {"latents": self.latents}


class PictureDataset:
    """A data set of pictures alone: enough to train and to measure an autoencoder."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture, or of its latent."""
        return tuple(self.pictures.shape[1:])

    def texts(self) -> list[str]:
        """Refuse: there are none."""
        raise ValueError(NO_CAPTIONS)

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """Refuse: there are no captions to make documents of."""
        raise ValueError(NO_CAPTIONS)

    def labels_by_name(self) -> dict[str, Labels]:
        """As `Dataset.labels_by_name`."""
        return {}


class CaptionedPictures(PictureDataset):
    """A data set of pictures with a caption each; documents are pairs in either order, or an image alone."""

    def __init__(self, pictures: Pictures, captions: Sequence[str]):
        if len(pictures) != len(captions):
            raise ValueError(f"CaptionedPictures: pictures are {len(pictures)} and captions {len(captions)}; as many "
                             "fit")
        super().__init__(pictures)
        self.captions = captions

    def texts(self) -> list[str]:
        """As `Dataset.texts`: each caption once."""
        return list(dict.fromkeys(self.captions))

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """As `Dataset.document`."""
        order, drop = torch.rand(2, generator=generator).tolist()
        chosen = torch.randint(len(self.pictures), (), generator=generator)
        caption, image = Text(self.captions[chosen]), Image(self.pictures[chosen[None]][0])
        return arrangement.pair(caption, image, order, drop)
