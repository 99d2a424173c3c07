"""Picture files: how one is read, and a folder of them as a data set without captions, to train an autoencoder on.

One file of a folder in ten is held out, chosen by its name, so that new files move no old one. The others are read
when they are asked for.
"""
import functools
import struct
import zlib
from collections.abc import Sequence
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

from transfusion.data.dataset import SPLITS, DatasetSettings, PictureDataset, Pictures
from transfusion.data.folders import files_in
from transfusion.settings import Count, check

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
"""Pillow's names of the formats that are read, whatever a file is called: no EPS, which another program would run."""
UNREADABLE = (  # what Pillow raises of bad files
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, EOFError, MemoryError,
    NotImplementedError, struct.error, zlib.error, Picture.DecompressionBombError)


@dataclass(frozen=True)
class PictureFolderSettings(DatasetSettings):
    """The picture files of a folder, without captions: for `transfusion vae train` and `transfusion vae eval`."""

    folder: Path | None = None
    """a folder of picture files, with those in folders inside it; one in ten is held out"""
    size: Count = 32
    """side that pictures are cropped and resized to"""
    channels: Count = 3
    """of the pictures: 3, colour, or 1, grey"""

    name = "folder"

    def open(self, split: str = "train") -> PictureDataset:
        """As `DatasetSettings.open`."""
        check("PictureFolder", self)
        return PictureDataset(PictureFolder(self, split))

    def directories(self) -> dict[str, Path | None]:
        """As `DatasetSettings.directories`."""
        return super().directories() | {"folder": self.folder}


class PictureFolder:
    """The picture files of one split of a folder, each cropped to its central square and resized (Lanczos).

    Transparent parts become white. Files that cannot be read are left out at the start and counted (`skipped`); one
    that breaks later is replaced by the next.
    """

    def __init__(self, settings: PictureFolderSettings, split: str = "train"):
        self.settings, folder = settings, settings.folder
        if folder is None or not folder.is_dir():
            raise ValueError(f"PictureFolder: folder is {folder and str(folder)!r}, which is no directory; one with "
                             "picture files fits; "
                             "name it with --data.folder")
        if settings.channels not in (1, 3):
            raise ValueError(f"PictureFolder: channels is {settings.channels}; 1 (grey) or 3 (colour) fits")
        if split not in SPLITS:
            raise ValueError(f"PictureFolder: split is {split!r}; {' or '.join(map(repr, SPLITS))} fits")
        found = files_in(folder, SUFFIXES)
        names = [path.relative_to(folder).as_posix().encode(errors="surrogateescape") for path in found]
        held_out = [zlib.crc32(name) % 10 == 0 for name in names]
        own = [path for path, held in zip(found, held_out) if held == (split == "held-out")]
        with ThreadPoolExecutor(8) as threads:
            checked = tqdm(threads.map(_readable, own), desc=f"check {folder.name}", total=len(own), unit="file",
                           disable=len(own) < 1000)
            readable = list(checked)
        self.paths = [path for path, good in zip(own, readable) if good]
        self.skipped = [path for path, good in zip(own, readable) if not good]
        if not self.paths:
            raise ValueError(f"PictureFolder: folder is {str(folder)!r}, in which no {split} picture of "
                             f"{len(self.skipped)} can be "
                             f"read; a folder of {', '.join(sorted(SUFFIXES))} files fits, of which about one in ten "
                             "is held out")
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
        raise ValueError(f"PictureFolder: no picture of {str(self.settings.folder)!r} can be read any more; put them "
                         "back")


def to_picture(pixels: Tensor) -> Picture.Image:
    """Return pixels (C, H, W) in [-1, 1], of 1 or 3 channels, as a picture; what lies outside is cut off."""
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).squeeze(-1)
    return Picture.fromarray(pixels.numpy())


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
    if picture.mode == "RGBA":
        picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.resize((width, height), Picture.Resampling.LANCZOS, box=(left, top, left + wide, top + high))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, channels)
    return pixels.movedim(-1, 0).float() / 127.5 - 1


def open_picture(path: Path | BinaryIO, name: str = "", *, only: Sequence[str] | None = None) -> Picture.Image:
    """Return the pixels of a file, upright, 8 bits a channel: RGB or, where some may be transparent, RGBA.

    `path` may be an open file, such as bytes of a larger one; messages call it `name`. `only` are Pillow's names of the
    formats that are read; None for `FORMATS`.

    Raises:
        ValueError: as `read_picture`.
    """
    try:
        with Picture.open(path, formats=formats() if only is None else only) as picture:
            return upright(picture)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"read_picture: {name or path} is not a picture that can be read ({reason})") from error


def upright(picture: Picture.Image) -> Picture.Image:
    """Return a picture turned as EXIF says, 8 bits a channel: RGB or, where some may be transparent, RGBA.

    Raises:
        ValueError: its numbers do not say what is white.
    """
    turned = ImageOps.exif_transpose(picture)
    # PNG's and PPM's "I" is 16 bits, too
    if turned.mode.startswith("I;16") or turned.mode == "I" and picture.format in ("PNG", "PPM"):
        pixels = np.asarray(turned).astype(np.int64)
        turned = Picture.fromarray(((pixels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if turned.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {turned.mode}, whose white is not known; 8 or 16 bits a channel fit; "
                         "convert it")
    opaque = turned.mode in ("RGB", "L") and "transparency" not in turned.info
    return turned.convert("RGB" if opaque else "RGBA")


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Picture.init()
    return tuple(name for name in FORMATS if name in Picture.OPEN)


def _readable(path: Path) -> bool:
    try:
        open_picture(path)
    except ValueError:
        return False
    return True


def describe(pictures: Pictures, settings: DatasetSettings, split: str) -> str:
    """Return one line: how many pictures of which shape, and which files of a folder were left out."""
    count, *shape = pictures.shape
    is_folder = isinstance(pictures, PictureFolder)
    source = pictures.settings.folder if is_folder else settings.name
    line = f"{count:,} {split} pictures of {'x'.join(map(str, shape))} ({source})"
    if not is_folder or not pictures.skipped:
        return line
    named = ", ".join(path.name for path in pictures.skipped[:3])
    more = ", ..." if len(pictures.skipped) > 3 else ""
    return f"{line}; {len(pictures.skipped):,} files that cannot be read are left out: {named}{more}"
