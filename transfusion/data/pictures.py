"""Pictures to train an autoencoder on: those of a data set, or the files of a folder, read when they are asked for.

Both are indexed alike: `len(pictures)`, `pictures.shape` (N, C, H, W) and `pictures[indices]`, float32 (n, C, H, W) in [-1, 1].
One file of a folder in ten is held out, chosen by its name, so that new files move no old one.
"""
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

from transfusion.data.batches import DATASETS
from transfusion.settings import Count, check

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = ("train", "held-out")
UNREADABLE = (  # what Pillow raises of bad files
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, EOFError, MemoryError,
    NotImplementedError, struct.error, zlib.error, Picture.DecompressionBombError)


@dataclass(frozen=True)
class PictureSettings:
    """Where pictures come from."""

    name: str = "digits"
    """the data set, where there is no folder; see DATASETS in transfusion/data/batches.py"""
    folder: Path | None = None
    """a folder of picture files, with those in folders inside it, in place of the data set; one in ten is held out"""
    size: Count = 32
    """side that a folder's pictures are cropped and resized to; a data set's stay as they are"""
    channels: Count = 3
    """of a folder's pictures: 3, colour, or 1, grey"""


class PictureFolder:
    """The picture files of one split of a folder, each cropped to its central square and resized (Lanczos); transparent parts become white.

    Files that cannot be read are left out at the start and counted (`skipped`); one that breaks later is replaced by
    the next.
    """

    def __init__(self, settings: PictureSettings, split: str = "train"):
        if not settings.folder.is_dir():
            raise ValueError(f"PictureFolder: folder is {str(settings.folder)!r}, which is no directory; one with picture files fits")
        if settings.channels not in (1, 3):
            raise ValueError(f"PictureFolder: channels is {settings.channels}; 1 (grey) or 3 (colour) fits")
        self.settings = settings
        found = sorted(path for path in settings.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        held_out = [zlib.crc32(path.relative_to(settings.folder).as_posix().encode()) % 10 == 0 for path in found]
        own = [path for path, held in zip(found, held_out) if held == (split == "held-out")]
        with ThreadPoolExecutor(8) as threads:
            readable = list(tqdm(threads.map(_readable, own), desc=f"check {settings.folder.name}", total=len(own), unit="file", disable=len(own) < 1000))
        self.paths, self.skipped = ([path for path, good in zip(own, readable) if good == wanted] for wanted in (True, False))
        if not self.paths:
            raise ValueError(f"PictureFolder: folder is {str(settings.folder)!r}, in which no {split} picture of {len(self.skipped)} can be read; a folder of "
                             f"{', '.join(sorted(SUFFIXES))} files fits, of which about one in ten is held out")
        self.shape = torch.Size((len(self.paths), settings.channels, settings.size, settings.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        with ThreadPoolExecutor(8) as threads:
            return torch.stack(list(threads.map(self.read, indices.tolist())))

    def read(self, index: int) -> Tensor:
        """Return picture `index`, (C, H, W), or the next that can be read."""
        for at in range(index, index + len(self.paths)):
            try:
                return read_picture(self.paths[at % len(self.paths)], self.settings.size, self.settings.channels)
            except ValueError:
                continue
        raise ValueError(f"PictureFolder: no picture of {str(self.settings.folder)!r} can be read any more; put them back")


def read_picture(path: Path | BinaryIO, size: int | tuple[int, int], channels: int) -> Tensor:
    """Read a file as (channels, height, width) in [-1, 1]: its central part, of `size` or (height, width), resized.

    It stands as its camera held it and is white where it is transparent. 16 bits a channel are rounded to 8; of an
    animation, the first picture is read.

    Raises:
        ValueError: a file that is no picture, is damaged, or is so large that Pillow takes it for an attack.
    """
    return fit_picture(open_picture(path), size, channels)


def fit_picture(picture: Picture.Image, size: int | tuple[int, int], channels: int) -> Tensor:
    """Return the central part of a picture that `open_picture` opened, resized; as `read_picture` does."""
    height, width = (size, size) if isinstance(size, int) else size
    columns, lines = picture.size
    wide = min(columns, max(1, round(lines * width / height)))
    high = min(lines, max(1, round(columns * height / width)))
    left, top = (columns - wide) // 2, (lines - high) // 2
    picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.resize((width, height), Picture.Resampling.LANCZOS, box=(left, top, left + wide, top + high))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, channels)
    return pixels.movedim(-1, 0).float() / 127.5 - 1


def open_picture(path: Path | BinaryIO, name: str = "") -> Picture.Image:
    """The pixels of a file, or of a picture's bytes opened as one, upright, as RGBA of 8 bits; messages call it `name`.

    Raises:
        ValueError: as `read_picture`.
    """
    try:
        with Picture.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16") or upright.mode == "I" and picture.format == "PNG":  # both are 16 bits
                pixels = np.asarray(upright).astype(np.int64)
                upright = Picture.fromarray(((pixels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise ValueError(f"pixels of kind {upright.mode}, whose white is not known; 8 or 16 bits a channel "
                                 "fit; convert it")
            return upright.convert("RGBA")
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"read_picture: {name or path} is not a picture that can be read ({reason})") from error


def _readable(path: Path) -> bool:
    try:
        open_picture(path)
    except ValueError:
        return False
    return True


def open_pictures(settings: PictureSettings, split: str = "train") -> Tensor | PictureFolder:
    """Return one split of the pictures that `settings` name.

    Raises:
        ValueError: a data set or split that does not exist, or a folder without pictures.
    """
    check("open_pictures", settings)
    if split not in SPLITS:
        raise ValueError(f"open_pictures: split is {split!r}; {' or '.join(map(repr, SPLITS))} fits")
    if settings.folder is not None:
        return PictureFolder(settings, split)
    if settings.name not in DATASETS:
        raise ValueError(f"open_pictures: name is {settings.name!r}; {', '.join(map(repr, DATASETS))} fits, or a folder of picture files")
    return DATASETS[settings.name](split).images


def describe(pictures: Tensor | PictureFolder, settings: PictureSettings, split: str) -> str:
    """One line: how many pictures of which shape, and which files were left out."""
    count, *shape = pictures.shape
    line = f"{count:,} {split} pictures of {'x'.join(map(str, shape))} ({settings.name if settings.folder is None else settings.folder})"
    if settings.folder is None or not pictures.skipped:
        return line
    named = ", ".join(path.name for path in pictures.skipped[:3])
    return f"{line}; {len(pictures.skipped):,} files that cannot be read are left out: {named}{', ...' if len(pictures.skipped) > 3 else ''}"
