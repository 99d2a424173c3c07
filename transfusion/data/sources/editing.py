"""Editing triples in a table: a source picture, an instruction, and the target picture, which alone is drawn.

The default columns are those of InstructPix2Pix, MagicBrush, UltraEdit and OmniGen. The source may be a list of
pictures.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.data.sources.fields import column, listed, picture_in, string
from transfusion.data.sources.record import DataError, Record
from transfusion.data.sources.tables import TableSource
from transfusion.sequence import Text
from transfusion.settings import OneOf, check

SOURCES = ("source", "source_image", "source_img", "original_image", "input_image", "input_images", "image")
INSTRUCTIONS = ("instruction", "edit_prompt", "edit", "prompt", "text")
TARGETS = ("target", "target_image", "target_img", "edited_image", "output_image")


@dataclass(frozen=True)
class EditingSettings:
    """Editing triples."""

    path: Path
    """JSON lines, a JSON list, CSV, parquet or a `datasets` directory; several files by a pattern or a folder"""
    images: Path | None = None
    """the folder that pictures' names start from; without it, the one that `path` lies in"""
    source: tuple[str, ...] = SOURCES
    """the source picture's column, or that of a list of pictures: the first of these that a row has"""
    instruction: tuple[str, ...] = INSTRUCTIONS
    """the instruction's column: the first of these that a row has"""
    target: tuple[str, ...] = TARGETS
    """the target picture's column: the first of these that a row has"""
    drawn: Annotated[str, OneOf(("target", "all"))] = "target"
    """which pictures are drawn: the "target", or "all"; others are only read"""
    loss: bool = False
    """whether the instruction is a target; otherwise it is only read"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> "Edits":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or nothing to open.
            DataError: a file that cannot be read.
        """
        check("editing", self)
        return Edits(self)


class Edits(TableSource):
    """Triples of a table, by number."""

    def __init__(self, settings: EditingSettings):
        super().__init__("editing", settings, (*settings.source, *settings.instruction, *settings.target))

    def read(self, row: dict, where: str) -> Record:
        """As `TableSource.read`."""
        settings = self.settings
        sources = [picture_in(one, where, self.folder, settings.drawn == "all")
                   for one in listed(column(row, settings.source, where, "source picture"))]
        if not sources:
            raise DataError(where, "the list of source pictures is empty; at least one fits", "missing source picture")
        text = string(column(row, settings.instruction, where, "instruction"), where, "the instruction")
        target = picture_in(column(row, settings.target, where, "target picture"), where, self.folder, True)
        return Record(where, parts=(*sources, Text(text, loss=settings.loss), target))
