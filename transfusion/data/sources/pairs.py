"""Pictures and captions in the columns of a table: parquet, a `datasets` directory, JSON lines, a JSON list, or CSV.

A picture is bytes, a file's name, or what `datasets` writes: a struct of `bytes` and `path`. Captions may stand in
several columns, each a text or a list of texts.
"""
from dataclasses import dataclass
from pathlib import Path

from transfusion.data.sources.fields import CAPTIONS, captions_of, column, picture_in
from transfusion.data.sources.record import Record
from transfusion.data.sources.tables import TableSource
from transfusion.settings import check

IMAGES = ("image", "jpg", "png", "picture", "image_path", "path", "file_name")


@dataclass(frozen=True)
class PairsSettings:
    """Pictures and captions in a table, such as parquet."""

    path: Path
    """a file, a folder of files, a directory of datasets.save_to_disk, or a pattern such as "data/train-*.parquet" """
    images: Path | None = None
    """the folder that pictures' names start from; without it, the one that `path` lies in"""
    image: tuple[str, ...] = IMAGES
    """the picture's column: the first of these that a row has"""
    columns: tuple[str, ...] = CAPTIONS
    """every one of these columns that a row has is a caption of its picture"""
    drawn: bool = True
    """whether pictures are drawn, before or behind their caption; otherwise they are only read"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> "Pairs":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, nothing to open, or no pyarrow where it is needed.
            DataError: a file that cannot be read.
        """
        check("pairs", self)
        return Pairs(self)


class Pairs(TableSource):
    """Pictures and captions of a table, by number."""

    def __init__(self, settings: PairsSettings):
        super().__init__("pairs", settings, (*settings.image, *settings.columns))

    def read(self, row: dict, where: str) -> Record:
        """As `TableSource.read`."""
        value = column(row, self.settings.image, where, "picture")
        picture = picture_in(value, where, self.folder, self.settings.drawn)
        captions = captions_of(row, self.settings.columns, where)
        return Record(where, captions=captions, picture=picture)
