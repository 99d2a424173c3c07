"""Handwritten digits: the data set, and the presets that train on it.

scikit-learn's 1,797 digits of 8x8 pixels (UCI, CC BY 4.0), with captions in words; 1,437 to train on and 360 held out.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from transfusion.data.dataset import SPLITS, Arrangement, DatasetSettings, Labels, PictureDataset
from transfusion.sequence import Image, Part, Text
from transfusion.settings import Range, Share, check
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitsSettings(DatasetSettings):
    """Handwritten digits, 8x8, with captions in words."""

    story: Share = 0.0
    """share of documents that hold two pairs, joined by "and" """
    jitter: Annotated[float, Range(0, 6)] = 0.0
    """half of the images to be read are turned, shifted and scaled at random: 1 is up to 15 degrees, 1/16 of the side
    and 15 %; images to be drawn never are"""

    name = "digits"

    def open(self, split: str = "train") -> "Digits":
        """As `DatasetSettings.open`."""
        check("digits", self)
        if self.jitter and self.latents is not None:
            raise ValueError(f"digits: jitter is {self.jitter} and latents {str(self.latents)!r}; 0 fits latents, "
                             "which cannot be "
                             "turned and shifted as pixels can")
        return Digits(split, self.story, self.jitter)


class Digits(PictureDataset):
    """One split of the digits; `story` and `jitter` are those of `DigitsSettings`."""

    def __init__(self, split: str = "train", story: float = 0.0, jitter: float = 0.0):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError(f"digits: the pictures are scikit-learn's, which is not installed ({error}); "
                             "pip install 'tfkernels[demo]'") from error
        if split not in SPLITS:
            raise ValueError(f"Digits: split is {split!r}; {' or '.join(map(repr, SPLITS))} fits")
        self.story, self.jitter = story, jitter
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        chosen = order[360:] if split == "train" else order[:360]
        super().__init__(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 8 - 1)
        self.labels = torch.tensor(labels)[chosen]

    @staticmethod
    def caption(label: int) -> str:
        """Return the words for a digit, e.g. "a handwritten seven"."""
        return f"a handwritten {DIGIT_NAMES[label]}"

    def texts(self) -> list[str]:
        """As `Dataset.texts`."""
        return [prefix + self.caption(label) for label in range(10) for prefix in ("", " and ")]

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """Draw one document: a pair in either order, a lone image, or two pairs joined by "and"."""
        kind, order, drop = torch.rand(3, generator=generator).tolist()
        chosen = torch.randint(len(self.labels), (2,), generator=generator).tolist()
        (text, image), (other_text, other_image) = (
            (Text(self.caption(int(self.labels[i]))), Image(self.pictures[i])) for i in chosen)
        if kind < self.story:
            return [text, image, Text(f" and {other_text.text}"), other_image]
        if arrangement.is_image_first(order):
            image = Image(jitter(image.latent, self.jitter * (drop < 0.5), generator))
        return arrangement.pair(text, image, order, drop)

    def labels_by_name(self) -> dict[str, Labels]:
        """As `Dataset.labels_by_name`."""
        return {"name": Labels(self.labels, DIGIT_NAMES)}


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn, shift and scale a (C, H, W) image, whose background is -1, by random amounts that grow with `strength`."""
    angle, scale, *shift = (strength * (2 * torch.rand(4, generator=generator) - 1)).tolist()
    cos, sin, zoom = math.cos(math.radians(15 * angle)), math.sin(math.radians(15 * angle)), 1 + 0.15 * scale
    matrix = torch.tensor([[zoom * cos, -zoom * sin, shift[0] / 8], [zoom * sin, zoom * cos, shift[1] / 8]])
    grid = torch.nn.functional.affine_grid(matrix[None], (1, *image.shape), align_corners=False)
    return torch.nn.functional.grid_sample(image[None] + 1, grid, align_corners=False)[0] - 1


def digits() -> TrainConfig:
    """Handwritten digits, 8x8, flow matching: the demo, minutes on two CPU cores."""
    return TrainConfig(
        out=Path("runs/digits"), model=ModelSettings(),
        data=DigitsSettings(caption_first=0.4, story=0.1, noise_limit=0.3, jitter=1.0),
        optim=OptimSettings(steps=1300, rows=8, seq_len=256, lr=2e-3, min_lr=1e-5, warmup=100, weight_decay=0.05,
                            ema=0.995))


def digits_paper() -> TrainConfig:
    """The same digits with the paper's recipe: cosine eps-prediction, 80 % captions first, noise limit 0.5."""
    base = digits()
    return replace(base, out=Path("runs/digits-paper"), model=replace(base.model, objective="eps"),
                   data=replace(base.data, caption_first=0.8, noise_limit=0.5))
