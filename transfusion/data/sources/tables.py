"""Rows by number, whatever file they lie in: a JSON list, JSON lines, CSV, parquet, or a `datasets` directory.

Files of one table stand one behind the other. JSON and CSV are read through an index of byte offsets, a row at a time;
for parquet and Arrow see arrow.py.
"""
import csv
import glob
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from transfusion.data.sources.arrow import ARROW, PARQUET, ArrowTable, ParquetTable, dataset_files
from transfusion.data.sources.index import (
    BOM,
    SPACE,
    Contents,
    Index,
    find_csv_rows,
    find_json_objects,
    find_lines,
    list_files,
    open_index,
    place,
    read_piece,
    separator,
    stamp_of,
)
from transfusion.data.sources.record import DataError, Record
from transfusion.files import spelled

JSON, CSV = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
TABLES = JSON + CSV + PARQUET + ARROW


class Pieces:
    """Rows of the indices of several files, one behind the other."""

    def __init__(self, paths: list[Path], kind: str, build: Callable[[Path], Contents]):
        self.paths = paths
        self.indices = [open_index(path, kind, build) for path in paths]
        self.ends = np.cumsum([self._rows(index) for index in self.indices])
        if not len(self):
            raise DataError(", ".join(map(str, paths)), "there is no record; at least one fits", "empty file")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _rows(self, index: Index) -> int:
        return len(index)

    def find(self, number: int) -> tuple[Path, Index, int]:
        """Return the file of row `number`, that file's index, and the number of the row in it.

        Raises:
            IndexError: there is no such row.
        """
        file, row = place(self.ends, number)
        return self.paths[file], self.indices[file], row

    def stamps(self) -> list:
        """Return what changes when the files do."""
        return [(path.name, *index.stamp) for path, index in zip(self.paths, self.indices)]


class Lines(Pieces):
    """Rows that are lines or other runs of bytes, with their texts."""

    def where(self, number: int) -> str:
        """Return file and line, for messages."""
        path, index, row = self.find(number)
        return f"{path}, line {index.table[row, 2]}"

    def data(self, number: int) -> bytes:
        """Return the bytes of row `number`.

        Raises:
            DataError: the file is gone or changed.
        """
        path, index, row = self.find(number)
        start, stop = index.table[row, :2].tolist()
        return read_piece(path, start, stop, index.stamp)

    def row(self, number: int, columns: frozenset | None = None) -> dict:
        """Return row `number`, an object in JSON.

        Raises:
            DataError: it is none.
        """
        return parse_object(self.data(number), self.where(number))


class JsonList(Lines):
    """The objects of files that are one JSON list each."""

    def where(self, number: int) -> str:
        """Return file and row, counted from 0 as in the list."""
        path, _, row = self.find(number)
        return f"{path}, row {row}"


class CsvTable(Lines):
    """The rows of CSV files behind their headers; a file whose name ends in .tsv has tabs between its columns."""

    def _rows(self, index: Index) -> int:
        return max(0, len(index) - 1)

    def find(self, number: int) -> tuple[Path, Index, int]:
        """As `Pieces.find`; row 0 of an index is the header."""
        path, index, row = super().find(number)
        return path, index, row + 1

    def row(self, number: int, columns: frozenset | None = None) -> dict:
        """Return row `number` by the header's names; an empty cell is None.

        Raises:
            DataError: it has more or fewer columns than the header.
        """
        path, index, row = self.find(number)
        header = self._cells(read_piece(path, *index.table[0, :2].tolist(), index.stamp), path, f"{path}, line 1")
        where = self.where(number)
        cells = self._cells(read_piece(path, *index.table[row, :2].tolist(), index.stamp), path, where)
        if len(cells) != len(header):
            raise DataError(
                where, f"the row has {len(cells)} columns and the header {len(header)}; as many fit", "bad csv"
            )
        return {name: cell or None for name, cell in zip(header, cells)}

    def _cells(self, data: bytes, path: Path, where: str) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(decoded(data, where)), delimiter=separator(path), strict=True))
        except (csv.Error, StopIteration) as error:
            raise DataError(where, f"is no row of CSV ({error})", "bad csv") from error


def decoded(data: bytes, where: str) -> str:
    """Return bytes as text.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            where,
            f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x} ({error.reason}); save the file as "
            "UTF-8",
            "bad encoding",
        ) from error


def parse_object(data: bytes, where: str) -> dict:
    """Return the object that JSON holds.

    Raises:
        DataError: it is no JSON, or no object.
    """
    text = decoded(data, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        raise DataError(where, f"is no JSON ({error}): {data[:60]!r}; one object fits", "bad json") from error
    if not isinstance(value, dict):
        raise DataError(where, f"is a {type(value).__name__} in JSON; an object {{...}} fits", "bad json")
    return value


def json_table(paths: list[Path]) -> Lines:
    """Open files of JSON, lists or lines as their first bytes say, whatever they are called.

    Raises:
        DataError: one is missing, empty, cut off, or neither; or lists and lines are mixed.
    """
    kinds = {_first_byte(path): path for path in paths}
    if len(kinds) > 1:
        raise DataError(
            ", ".join(map(str, kinds.values())),
            "one is a JSON list and one JSON lines; files of one kind fit; name the others as a source of their own",
            "bad json",
        )
    if b"[" in kinds:
        return JsonList(paths, "json", find_json_objects)
    return Lines(paths, "lines", find_lines)


def _first_byte(path: Path) -> bytes:
    stamp_of(path)
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip(SPACE)[:1]
    if head in b"[{" and head:
        return head
    if head in (b"\xff", b"\xfe", b"\x1f", b"\x28"):  # `mapped` says what these are
        return b"{"
    raise DataError(str(path), f"begins with {head!r}; a JSON list of objects, or one object a line, fits",
                    "bad json" if head else "empty file")


def matching(op: str, path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that `path` names: itself, those in a folder, or those of a pattern (* ? [...] {0..9} {a,b}).

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [path / name for name in list_files(path, suffixes)]
    else:
        found = list(itertools.chain.from_iterable(_glob(pattern) for pattern in _braces(str(path))))
    if not found:
        raise ValueError(
            f"{op}: path is {str(path)!r}, where no file is; {' or '.join(suffixes)} files, a folder of them or a "
            "pattern such as 'part-*' fit"
        )
    return found


def _glob(pattern: str) -> list[Path]:
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())


def _braces(pattern: str) -> list[str]:
    """Spell out {000..012} and {a,b}."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    choices = names.split(",") if names else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for choice in choices for name in _braces(pattern[:match.start()] + choice + pattern[match.end():])]


def open_table(op: str, path: Path, split: str = "train"):
    """Open whatever table lies at `path`; `split` chooses among those of a `datasets` directory.

    Raises:
        ValueError: there is none.
        DataError: a file of it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (found := dataset_files(op, path, split)):
        return found
    paths = matching(op, path, TABLES)
    kinds = {next((kind for kind in (CSV, PARQUET, ARROW) if one.name.lower().endswith(kind)), JSON) for one in paths}
    if len(kinds) > 1:
        raise ValueError(f"{op}: path is {str(path)!r}, where files of several kinds are; those of one kind fit, e.g. "
                         f"'{path}/*{kinds.pop()[0]}'")
    kind = kinds.pop()
    if kind == CSV:
        return CsvTable(paths, "csv", find_csv_rows)
    return {JSON: json_table, PARQUET: ParquetTable, ARROW: ArrowTable}[kind](paths)


class TableSource:
    """Records of a table, by number; a format's own class says what stands in its `columns`, and reads a row.

    `settings` have `path`, `images` (the folder that pictures' names start from, None for the path's own) and `split`.
    """

    def __init__(self, op: str, settings, columns: Iterable[str]):
        self.name, folder = begin(op, settings.path)
        self.folder = settings.images if settings.images is not None else folder
        self.op, self.settings, self.columns = op, settings, frozenset(columns)
        self.table = open_table(op, settings.path, settings.split)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Record:
        return self.read(self.table.row(number, self.columns), self.table.where(number))

    def read(self, row: dict, where: str) -> Record:
        """Return the record of a row.

        Raises:
            DataError: what stands in its columns does not fit.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        return digest(self.op, str(self.settings), self.table.stamps())


def digest(*parts) -> str:
    """Return a fingerprint of what these say."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def begin(op: str, path: Path) -> tuple[str, Path]:
    """Return a source's name, from its file's, and the folder that its files lie in."""
    path = Path(path)
    if path.is_dir():
        return spelled(path.resolve().name) or op, path
    name = spelled(path.stem)
    return name, next(folder for folder in path.parents if not set("*?[{") & set(str(folder)) or folder.is_dir())
