"""Named emoji in two styles: the data set, and the presets that train on it.

1,905 pictures of Noto (Apache-2.0, Google) and as many of Twemoji (CC BY 4.0, Twitter and others), on white. The
package holds them at 32x32 (`assets/emoji`, with both licences): a sheet of tiles for each style, and a table of
names. `python -m transfusion.recipes.emoji_fetch` fetches them at 64x64. Emoji that are drawn as an earlier one are
left out: 1,870 names are left. One name in ten is held out in one of its styles: a model has seen the thing and has
seen the style, never both together.
"""
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor

from transfusion.data.dataset import Arrangement, DatasetSettings, Labels, PictureDataset
from transfusion.sequence import Image, Part, Text
from transfusion.settings import check
from transfusion.train.autoencoder import AutoencoderSettings, LossSettings, VAEOptimSettings, VAETrainConfig
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig

STYLES = ("noto", "twemoji")
COLUMNS = 44  # tiles in a row of a sheet
SHIPPED = Path(__file__).parent / "assets" / "emoji"
FETCHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfusion"
CATEGORIES = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
              "Objects", "Symbols", "Flags")
LIVELY = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


@dataclass(frozen=True)
class EmojiSettings(DatasetSettings):
    """Named emoji in two styles, with captions such as "a red apple, noto style"."""

    lively: bool = False
    """faces, animals, plants and dishes alone: 459 of the 1,870 names"""
    size: Literal[32, 64] = 32
    """side of a picture: 32, from the package, or 64, as `python -m transfusion.recipes.emoji_fetch` fetched them"""

    @property
    def name(self) -> str:
        """What messages and caches call the data set."""
        return "emoji" + "-lively" * self.lively + "-64" * (self.size == 64)

    def open(self, split: str = "train") -> "Emoji":
        """As `DatasetSettings.open`."""
        check("emoji", self)
        return Emoji(split, SHIPPED if self.size == 32 else FETCHED / "emoji-64", LIVELY if self.lively else CATEGORIES)


class Emoji(PictureDataset):
    """Emoji with captions made of their names and styles, "a red apple, noto style".

    A tenth of the names is held out in one style.

    Args:
        split: "train", "held-out" (the pairs of name and style that training never shows), or "all".
        sheets: directory of noto.webp, twemoji.webp and names.json; those of the package by default.
        categories: those of `CATEGORIES` that are taken.
    """

    def __init__(self, split: str = "train", sheets: Path = SHIPPED, categories: tuple[str, ...] = CATEGORIES):
        if not (Path(sheets) / "names.json").is_file():
            raise ValueError(f"Emoji: sheets is {str(sheets)!r}, which holds no names.json; a directory that `python "
                             "-m "
                             "transfusion.recipes.emoji_fetch` wrote fits; run it")
        if split not in ("train", "held-out", "all"):
            raise ValueError(f"Emoji: split is {split!r}; 'train', 'held-out' or 'all' fits")
        table = json.loads((Path(sheets) / "names.json").read_text())
        self.size = table["size"]
        files = [Path(sheets) / f"{style}.webp" for style in STYLES]
        pictures = torch.stack([read_sheet(path, self.size, len(table["emoji"])) for path in files])
        held = held_out_pairs([name for name, _, _ in table["emoji"]])
        chosen = [i for i in distinct(pictures) if table["emoji"][i][1] in categories]
        rows, pictures, held = [table["emoji"][i] for i in chosen], pictures[:, chosen], held[:, chosen]
        self.names = [name for name, _, _ in rows]
        self.category_names = list(dict.fromkeys(category for _, category, _ in rows))     # in the emoji's own order
        self.kind_names = list(dict.fromkeys(kind for _, _, kind in rows))
        keep = {"train": ~held, "held-out": held, "all": torch.ones_like(held)}[split]
        self.styles, self.labels = keep.nonzero().unbind(1)                                # (N,) each
        super().__init__(pictures[self.styles, self.labels])                               # (N, 3, size, size)
        self.categories = torch.tensor([self.category_names.index(category) for _, category, _ in rows])[self.labels]
        self.kinds = torch.tensor([self.kind_names.index(kind) for _, _, kind in rows])[self.labels]

    @staticmethod
    def caption(name: str, style: str) -> str:
        """Return the words for a picture, e.g. "a red apple, noto style"."""
        plural = name.endswith("s") and not name.endswith("ss")
        vowel = name[0] in "aeiou" and not name.startswith(("eu", "uni", "one", "u."))
        return f"{'' if plural else 'an ' if vowel else 'a '}{name}, {style} style"

    def caption_of(self, i: int) -> str:
        """Return the words for picture `i`."""
        return self.caption(self.names[self.labels[i]], STYLES[self.styles[i]])

    def kind_of(self, i: int) -> str:
        """Return the words for the kind of picture `i`, e.g. "food fruit, noto style"."""
        return f"{self.kind_names[self.kinds[i]]}, {STYLES[self.styles[i]]} style"

    def texts(self) -> list[str]:
        """As `Dataset.texts`."""
        named = [self.caption(name, style) for name in self.names for style in STYLES]
        return named + [f"{kind}, {style} style" for kind in self.kind_names for style in STYLES]

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """Draw one document: a caption and its image in either order, or an image alone.

        Once in ten times a caption that stands first says the kind in place of the name.
        """
        i = int(torch.randint(len(self.labels), (), generator=generator))
        order, drop, vague = torch.rand(3, generator=generator).tolist()
        says_kind = vague < 0.1 and not arrangement.is_image_first(order)
        caption = Text(self.kind_of(i) if says_kind else self.caption_of(i))
        return arrangement.pair(caption, Image(self.pictures[i]), order, drop)

    def labels_by_name(self) -> dict[str, Labels]:
        """As `Dataset.labels_by_name`."""
        return {"name": Labels(self.labels, self.names), "style": Labels(self.styles, STYLES),
                "category": Labels(self.categories, self.category_names), "kind": Labels(self.kinds, self.kind_names)}


def held_out_pairs(names: list[str]) -> Tensor:
    """Return (styles, names), true for one style of one name in ten.

    Names alone decide, so that every choice of categories or size holds out the same.
    """
    numbers = torch.tensor([zlib.crc32(name.encode()) for name in names])
    held = torch.zeros(len(STYLES), len(names), dtype=torch.bool)
    held[numbers // 10 % len(STYLES), torch.arange(len(names))] = numbers % 10 == 0
    return held


def distinct(pictures: Tensor) -> list[int]:
    """Return the names whose pictures (styles, names, C, H, W) no earlier name has in the same style.

    Some flags and families are drawn alike.
    """
    seen, kept = set(), []
    for i in range(pictures.shape[1]):
        drawn = [(style, picture.numpy().tobytes()) for style, picture in enumerate(pictures[:, i])]
        if not seen.intersection(drawn):
            kept.append(i)
        seen.update(drawn)
    return kept


def read_sheet(path: Path, size: int, count: int) -> Tensor:
    """Read the first `count` tiles of a sheet: (count, 3, size, size), values in [-1, 1]."""
    with Picture.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))                  # (rows * size, COLUMNS * size, 3)
    tiles = pixels.unflatten(0, (-1, size)).unflatten(2, (-1, size))                 # (rows, size, COLUMNS, size, 3)
    return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1)[:count].float() / 127.5 - 1


def emoji() -> TrainConfig:
    """459 named emoji in two styles, 32x32, x0-prediction in patches of 8x8: the showcase, over an hour on one core."""
    return TrainConfig(
        out=Path("runs/emoji"), save_every=200, data=EmojiSettings(lively=True, caption_first=0.8, noise_limit=0.5),
        model=ModelSettings(
            vocabulary=2048, hidden=256, layers=6, heads=8, kv_heads=8, mlp=688, patch_size=8, backbone="adaln",
            positions="2d", objective="x0", diffusion_weight=50.0),
        optim=OptimSettings(
            steps=6000, rows=4, seq_len=256, lr=1e-3, min_lr=1e-5, warmup=100, weight_decay=0.02, ema=0.995))


def emoji_autoencoder() -> VAETrainConfig:
    """Emoji of 32x32 to latents of 16x16x4: twenty minutes of one CPU core."""
    return VAETrainConfig(
        data=EmojiSettings(), model=AutoencoderSettings(widths=(16, 48)),
        losses=LossSettings(discriminator_width=32, discriminator_layers=2),
        optim=VAEOptimSettings(steps=3000, batch=16, lr=2e-3))
