"""A folder of pictures with captions, in one of three ways that the folder itself tells apart.

metadata: `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has it: a `file_name`, from the folder that
the metadata lies in, and the caption in one or several columns.
txt: `cat.txt` beside `cat.jpg`; the whole text is the caption.
folders: `tabby cat/001.jpg`; the name of the folder is the label, and a template makes the caption of it.
"""
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

from transfusion.data.picture_files import SUFFIXES
from transfusion.data.sources.fields import CAPTIONS, captions_of, column, picture_in, string
from transfusion.data.sources.index import find_csv_rows, index_names, list_files, name_at
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record
from transfusion.data.sources.tables import CsvTable, begin, decoded, digest, json_table
from transfusion.settings import OneOf, check

METADATA = ("metadata.jsonl", "metadata.csv")
FILES = ("file_name", "image", "file", "path")
WAYS = ("auto", "metadata", "txt", "folders")


@dataclass(frozen=True)
class ImageFolderSettings:
    """A folder of pictures with captions."""

    path: Path
    """the folder; folders inside it count"""
    captions: Annotated[str, OneOf(WAYS)] = "auto"
    """where captions are: "metadata", "txt" or "folders"; "auto" takes the first of them that the folder has"""
    columns: tuple[str, ...] = CAPTIONS
    """of the metadata: every column of these that a row has is a caption of its picture"""
    template: str = "{label}"
    """of folders' captions; a folder's name with spaces for underscores takes the place of {label}"""
    drawn: bool = True
    """whether pictures are drawn, before or behind their caption; otherwise they are only read"""

    def open(self) -> "MetadataFolder | NamedFolder":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or a folder without pictures or captions.
            DataError: metadata that cannot be read.
        """
        op = "imagefolder"
        check(op, self)
        if not self.path.is_dir():
            raise ValueError(
                f"{op}: path is {str(self.path)!r}, which is no folder; one with pictures and captions fits"
            )
        if "{label}" not in self.template:
            raise ValueError(f"{op}: template is {self.template!r}; text with {{label}} in it fits, e.g. 'a {{label}}'")
        metadata = [name for name in list_files(self.path, METADATA) if PurePath(name).name in METADATA]
        if self.captions == "metadata" or self.captions == "auto" and metadata:
            return MetadataFolder(self, metadata)
        found = list_files(self.path, (*SUFFIXES, ".txt"))
        names = [name for name in found if not name.lower().endswith(".txt")]
        if not names:
            raise ValueError(
                f"{op}: path is {str(self.path)!r}, in which no picture lies; {', '.join(SUFFIXES)} files fit"
            )
        stems = {os.path.splitext(name)[0] for name in found if name.endswith(".txt")}
        if (
            self.captions == "txt"
            or self.captions == "auto"
            and any(os.path.splitext(name)[0] in stems for name in names)
        ):
            return TextBesideFolder(self, names)
        if any("/" in name for name in names):
            return LabelFolder(self, names)
        raise ValueError(
            f"{op}: path is {str(self.path)!r}, whose {len(names)} pictures have no captions; metadata.jsonl, "
            "metadata.csv, a .txt beside each picture or folders named after labels fit"
        )


class MetadataFolder:
    """Pictures and captions by the rows of metadata files."""

    def __init__(self, settings: ImageFolderSettings, names: list[str]):
        paths = [settings.path / name for name in names]
        if not paths:
            raise ValueError(f"imagefolder: captions is 'metadata', and in {str(settings.path)!r} lies no "
                             f"{' or '.join(METADATA)}; one fits")
        if len({path.suffix for path in paths}) > 1:
            raise ValueError(
                f"imagefolder: path is {str(settings.path)!r}, in which {', '.join(names)} lie; metadata of one "
                "kind fits"
            )
        self.name, self.settings = begin("imagefolder", settings.path)[0], settings
        self.table = json_table(paths) if paths[0].suffix == ".jsonl" else CsvTable(paths, "csv", find_csv_rows)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Record:
        row, where = self.table.row(number), self.table.where(number)
        folder = self.table.find(number)[0].parent
        name = string(column(row, FILES, where, "picture"), where, "a picture's name")
        picture = picture_in(name, where, folder, self.settings.drawn)
        return Record(where, captions=captions_of(row, self.settings.columns, where), picture=picture)

    def fingerprint(self) -> str:
        return digest("imagefolder", str(self.settings), self.table.stamps())


class NamedFolder:
    """Pictures by the sorted names of their files; what their captions are, the two classes below say."""

    def __init__(self, settings: ImageFolderSettings, names: list[str]):
        self.name, self.settings = begin("imagefolder", settings.path)[0], settings
        self.index = index_names(settings.path, self.kind, names)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"record is {number}; 0 to {len(self) - 1} fit")
        name = name_at(self.index, *self.index.table[number].tolist())
        path = self.settings.path / name
        picture = PictureRef(PictureFile(str(path), name=str(path)), self.settings.drawn, name)
        return Record(str(path), captions=(self.caption(path),), picture=picture)

    def fingerprint(self) -> str:
        return digest("imagefolder", str(self.settings), self.index.stamp, self.kind)


class TextBesideFolder(NamedFolder):
    """The caption is the text of the file of the same name that ends in .txt."""

    kind = "txt"

    def caption(self, path: Path) -> str:
        """Return the caption of the picture at `path`.

        Raises:
            DataError: there is none, or it is empty or no UTF-8.
        """
        beside = path.with_suffix(".txt")
        try:
            text = decoded(beside.read_bytes(), str(beside)).removeprefix("\ufeff").strip()
        except OSError as error:
            raise DataError(
                str(path),
                f"its caption {beside.name!r} cannot be read ({error.strerror}); a text file beside the picture fits",
                "missing caption",
            ) from error
        if not text:
            raise DataError(str(path), f"its caption {beside.name!r} is empty; text fits", "missing caption")
        return text

    def fingerprint(self) -> str:
        changes = []
        for start, stop in self.index.table.tolist():
            beside = (self.settings.path / name_at(self.index, start, stop)).with_suffix(".txt")
            changes.append(beside.stat().st_mtime_ns if beside.is_file() else 0)
        return digest(super().fingerprint(), changes)


class LabelFolder(NamedFolder):
    """The caption is the template with the name of the folder that the picture lies in."""

    kind = "folders"

    def caption(self, path: Path) -> str:
        """Return the caption of the picture at `path`.

        Raises:
            DataError: the picture lies beside the folders that are labels, or the folder's name is no Unicode text.
        """
        if path.parent == self.settings.path:
            raise DataError(str(path), "it lies in no folder that is a label; move it into one", "missing caption")
        label = string(path.parent.name, str(path), "the folder's name")
        return self.settings.template.replace("{label}", label.replace("_", " "))
