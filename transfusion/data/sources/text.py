"""Plain text for the language loss: a column of a table (JSON lines, parquet, CSV), or text files.

A document of a text file is the whole file, a paragraph between blank lines, or a line.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.data.sources.fields import column, string
from transfusion.data.sources.index import find_lines, find_paragraphs, index_names, list_files, name_at
from transfusion.data.sources.record import DataError, Record
from transfusion.data.sources.tables import TABLES, Lines, begin, decoded, digest, matching, open_table
from transfusion.sequence import Text
from transfusion.settings import OneOf, check

TEXTS = (".txt", ".md")
DOCUMENTS = ("auto", "row", "file", "paragraph", "line")


@dataclass(frozen=True)
class TextSettings:
    """Plain text."""

    path: Path
    """a file, a folder of files, a pattern, or a `datasets` directory"""
    documents: Annotated[str, OneOf(DOCUMENTS)] = "auto"
    """what a document is: a "row" of a table; a "file", "paragraph" or "line" of .txt; "auto": a row, or a .txt file"""
    columns: tuple[str, ...] = ("text", "content")
    """of a table: the first of these that a row has"""
    loss: bool = True
    """whether the text is a target; otherwise it is only read"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> "TextTable | TextFiles | TextPieces":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or nothing to open.
            DataError: a file that cannot be read.
        """
        check("text", self)
        documents = self.documents
        if documents == "auto":
            documents = self._documents()
        if documents == "row":
            return TextTable(self)
        if documents == "file":
            return TextFiles(self)
        kind, find = ("lines", find_lines) if documents == "line" else ("paragraphs", find_paragraphs)
        return TextPieces(self, Lines(matching("text", self.path, TEXTS), kind, find))


    def _documents(self) -> str:
        """What a document of `path` is: a README beside tables is none."""
        if not self.path.is_dir():
            return "file" if str(self.path).lower().endswith(TEXTS) else "row"
        texts, tables = list_files(self.path, TEXTS), list_files(self.path, TABLES)
        if tables and any(name.lower().endswith(".txt") for name in texts):
            raise ValueError(f"text: path is {str(self.path)!r}, which holds texts ({texts[0]}) and tables "
                             f"({tables[0]}); documents 'file', 'paragraph' or 'line' fits for those, 'row' for these")
        return "file" if texts and not tables else "row"


class TextTable:
    """A column of a table, by number."""

    def __init__(self, settings: TextSettings):
        self.name, self.settings = begin("text", settings.path)[0], settings
        self.table = open_table("text", settings.path, settings.split)
        self.columns = frozenset(settings.columns)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Record:
        where = self.table.where(number)
        value = column(self.table.row(number, self.columns), self.settings.columns, where, "text")
        return _document(string(value, where, "the text"), where, self.settings.loss)

    def fingerprint(self) -> str:
        return digest("text", self.settings.columns, self.settings.loss, self.table.stamps())


class TextPieces:
    """Lines or paragraphs of text files, by number."""

    def __init__(self, settings: TextSettings, pieces: Lines):
        self.name, self.settings, self.pieces = begin("text", settings.path)[0], settings, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> Record:
        where = self.pieces.where(number)
        return _document(decoded(self.pieces.data(number), where), where, self.settings.loss)

    def fingerprint(self) -> str:
        return digest("text", self.settings.documents, self.settings.loss, self.pieces.stamps())


class TextFiles:
    """Text files, each one document, by number."""

    def __init__(self, settings: TextSettings):
        self.name, self.folder = begin("text", settings.path)
        self.settings, paths = settings, matching("text", settings.path, TEXTS)
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        self.stamps = digest([(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in zip(names, paths)])
        self.index = index_names(self.folder, f"text-{digest(str(settings.path))[:8]}", names)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"record is {number}; 0 to {len(self) - 1} fit")
        path = self.folder / name_at(self.index, *self.index.table[number].tolist())
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(str(path), f"cannot be read ({error.strerror})", "missing file") from error
        return _document(decoded(data, str(path)).removeprefix("\ufeff"), str(path), self.settings.loss)

    def fingerprint(self) -> str:
        return digest("text", self.settings.loss, self.stamps)


def _document(text: str, where: str, loss: bool) -> Record:
    text = text.strip()
    if not text:
        raise DataError(where, "the text is empty; at least one character fits", "empty text")
    return Record(where, parts=(Text(text, loss=loss),))
