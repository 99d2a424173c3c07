"""How large a picture becomes: grids of patches of about equal area, and the one that is nearest to its shape.

Rows are packed, so pictures need no buckets: each takes the grid of its own shape. The size of a picture is read from
its file's header, turned as EXIF says, so that a plan knows every length before a picture is decoded.
"""
import math
import struct
from dataclasses import dataclass
from typing import Annotated, BinaryIO

import numpy as np
from PIL import ExifTags
from PIL import Image as Picture
from torch import Tensor

from transfusion.data.picture_files import UNREADABLE, fit_picture, formats, open_picture
from transfusion.data.sources.record import DataError, PictureRef
from transfusion.settings import Count, OneOf, Range, check

MODES = ("crop", "pad", "centre")
PADDING = (122, 116, 104)
"""The colour around a padded picture: the mean of CLIP's pictures, as LLaVA has it."""
LONGEST = 8192
"""Pixels of a padded square's side at most."""
TURNED = (5, 6, 7, 8)
"""EXIF orientations in which width and height change places."""


@dataclass(frozen=True)
class GridSettings:
    """The sizes that pictures take."""

    side: Count = 256
    """pixels: pictures have about the area of a square of this side"""
    aspect: Annotated[float, Range(1, 64)] = 2.0
    """the widest picture's width over its height, and the highest one's height over its width"""
    mode: Annotated[str, OneOf(MODES)] = "crop"
    """crop: to the nearest grid; pad: to a square, as LLaVA does, so that coordinates stay true; centre: to a square"""
    sizes: tuple[tuple[Count, Count], ...] | None = None
    """(height, width) in pixels of every size, in place of those made from side and aspect"""


class Grids:
    """The grids of a model whose patches are `cell` pixels wide: patch size times the factor of its autoencoder.

    Raises:
        ValueError: settings that do not fit, or sizes that are no multiple of the cell.
    """

    def __init__(self, settings: GridSettings, cell: int, channels: int = 3):
        check("grids", settings)
        self.mode, self.cell, self.channels = settings.mode, cell, channels
        if settings.mode != "crop":
            if settings.sizes is not None:
                raise ValueError(f"grids: sizes is {settings.sizes} and mode {settings.mode!r}, whose pictures are all "
                                 "squares of one side; mode 'crop' fits sizes")
            self.grids = (_grid((settings.side, settings.side), cell, "side"),)
        elif settings.sizes is not None:
            self.grids = tuple(dict.fromkeys(_grid(size, cell, "sizes") for size in settings.sizes))
        else:
            self.grids = grid_list(_grid((settings.side, settings.side), cell, "side")[0], settings.aspect)
        rows, columns = np.log(self.grids).T
        self._aspects, self._areas = columns - rows, columns + rows + 2 * math.log(cell)  # logarithms

    @property
    def several_of_a_shape(self) -> bool:
        """Whether grids of one shape differ in size alone."""
        return len({columns / rows for rows, columns in self.grids}) < len(self.grids)

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the grid (rows, columns) whose shape is nearest to a picture's: of it, least is cut off.

        Of several grids of that shape it is the one that is nearest in size.
        """
        off = np.abs(self._aspects - math.log(width / height))
        fit = np.flatnonzero(off < off.min() + 1e-6)
        return self.grids[int(fit[np.abs(self._areas[fit] - math.log(width * height)).argmin()])]

    def of(self, picture: PictureRef) -> tuple[int, int]:
        """Return a picture's grid, (rows, columns).

        Raises:
            DataError: see `picture_size`.
        """
        width, height = picture_size(picture)
        return self.nearest(width, height)

    def pixels(self, picture: PictureRef, grid: tuple[int, int], flipped: bool = False) -> Tensor:
        """Decode a picture to (channels, rows * cell, columns * cell) in [-1, 1].

        Raises:
            DataError: it is missing or cannot be read.
        """
        where = name_of(picture)
        try:
            with picture.open() as file:
                opened = open_picture(file, where)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(where, str(error).removeprefix("read_picture: "), "unreadable picture") from error
        pixels = self.fitted(opened, grid)
        return pixels.flip(-1) if flipped else pixels

    def fitted(self, picture: Picture.Image, grid: tuple[int, int]) -> Tensor:
        """Return a picture that is open already, upright and RGB or RGBA, as `pixels` returns one of a file."""
        whole = _padded(picture) if self.mode == "pad" else picture
        return fit_picture(whole, (grid[0] * self.cell, grid[1] * self.cell), self.channels)


def grid_list(side: int, aspect: float) -> tuple[tuple[int, int], ...]:
    """Return grids (rows, columns) of about side^2 patches, from columns = rows / aspect to columns = rows * aspect."""
    found = {(side, side)}
    for rows in range(1, side):
        columns = round(side * side / rows)
        if columns / rows <= aspect * (1 + 1e-9):
            found |= {(rows, columns), (columns, rows)}
    return tuple(sorted(found))


def picture_size(picture: PictureRef) -> tuple[int, int]:
    """Return (width, height) of a picture as it is seen, from its header alone.

    Raises:
        DataError: the picture is missing, empty, no picture, or so large that Pillow takes it for an attack; `kind`
            says which.
    """
    where = name_of(picture)
    with picture.open() as file:
        try:
            if not file.read(1):
                raise DataError(where, "the picture's file is empty; copy it again", "empty picture")
            file.seek(0)
            with Picture.open(file, formats=formats()) as opened:
                width, height = opened.size
                if opened.format == "TIFF":            # whose size some versions of Pillow turn when they open it
                    tags = ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength
                    width, height = (opened.tag_v2[tag] for tag in tags)
                turned = _orientation(opened, file) in TURNED
        except DataError:
            raise
        except Picture.DecompressionBombError as error:
            raise DataError(where, f"the picture is too large: {error}; make it smaller",
                            "picture too large") from error
        except UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(where, f"this is not a picture that can be read ({reason})",
                            "unreadable picture") from error
    if width < 1 or height < 1:
        raise DataError(where, f"the picture is {width}x{height}; at least one pixel fits", "unreadable picture")
    return (height, width) if turned else (width, height)


def name_of(picture: PictureRef) -> str:
    """What messages call a picture."""
    if picture.name or isinstance(picture.file, bytes):
        return picture.name or "a picture"
    return picture.file.name or picture.file.path


def _grid(size: tuple[int, int], cell: int, setting: str) -> tuple[int, int]:
    if any(pixels % cell for pixels in size):
        near = "x".join(str(max(1, round(pixels / cell)) * cell) for pixels in size)
        raise ValueError(f"grids: {setting} has {size[0]}x{size[1]} pixels and a patch of this model is {cell} pixels "
                         f"wide; multiples of {cell} fit, such as {near}")
    return size[0] // cell, size[1] // cell


def _padded(picture: Picture.Image) -> Picture.Image:
    """The picture in the middle of a square, as LLaVA's expand2square; of a longer one than `LONGEST`, made smaller.

    Of a strip of 1x60,000 pixels, which is soon read, the square would be 14 GB.
    """
    if max(picture.size) > LONGEST:
        picture = picture.copy()
        picture.thumbnail((LONGEST, LONGEST), Picture.Resampling.LANCZOS)
    side = max(picture.size)
    square = Picture.new("RGBA", (side, side), (*PADDING, 255))
    white = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    square.paste(white, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _orientation(picture: Picture.Image, file: BinaryIO) -> int:
    """EXIF's orientation, without decoding: a PNG's own `getexif` would decode it to look behind its pixels."""
    if picture.format == "PNG" and "exif" not in picture.info and (data := _late_exif(file)):
        exif = Picture.Exif()
        exif.load(data)
    else:
        exif = Picture.Image.getexif(picture)
    return exif.get(ExifTags.Base.Orientation, 1)


def _late_exif(file: BinaryIO) -> bytes | None:
    """The eXIf chunk of a PNG, wherever it stands; the data of the others is passed over."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return b"Exif\0\0" + file.read(size)
        if kind == b"IEND":
            return None
        file.seek(size + 4, 1)
    return None
