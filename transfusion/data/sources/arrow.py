"""Tables of parquet files and of `datasets` directories, read by pyarrow, which the extra `[data]` installs.

Parquet is compressed by row groups: a row needs its whole group, of which the last few are kept. Arrow files, as
`save_to_disk` writes them, are memory-mapped, and a row is read where it lies.
"""
import contextlib
import importlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transfusion.data.sources.index import MAPPED, list_files, place, stamp_of
from transfusion.data.sources.record import DataError
from transfusion.settings import nearest

PARQUET, ARROW = (".parquet",), (".arrow",)
KEPT = 2**28
"""bytes of row groups that a process keeps, beside the newest one"""


def _pyarrow(module: str = "pyarrow"):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"open_table: parquet and Arrow files need pyarrow, which is not installed ({error}); "
                         "pip install 'tfkernels[data]'") from error


class Row(dict):
    """A row of the columns that were asked for; `names` are those of all there are, for messages."""

    def __init__(self, values: dict, names: tuple[str, ...]):
        super().__init__(values)
        self.names = names


class _Files:
    """Files of rows, opened in each process anew."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.file_stamps = [stamp_of(path) for path in paths]
        self._opened = OrderedDict()
        self._count()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, number: int) -> str:
        """Return file and row, for messages."""
        file, row = place(self.ends, number)
        return f"{self.paths[file]}, row {row}"

    def stamps(self) -> list:
        """Return what changes when the files do."""
        return [(path.name, *stamp) for path, stamp in zip(self.paths, self.file_stamps)]

    def _values(self, number: int, table, row: int, columns: list[str]) -> dict:
        """The values of a row, which is row `number` of all files."""
        try:
            return {name: table.column(name)[row].as_py() for name in columns}
        except ValueError as error:
            raise DataError(self.where(number), f"is not UTF-8 ({error}); write the file anew",
                            "bad encoding") from error

    def _counted(self, counts: list[int]) -> np.ndarray:
        if not sum(counts):
            raise DataError(str(self.paths[0]), "the table has no row; at least one fits", "empty file")
        return np.cumsum(counts)

    def _check(self, file: int) -> None:
        if stamp_of(self.paths[file]) != self.file_stamps[file]:
            raise DataError(str(self.paths[file]), "changed since it was opened; open the source again", "changed file")


class ParquetTable(_Files):
    """Rows of parquet files; row groups are read one at a time, with the columns that are asked for."""

    def _count(self) -> None:
        groups, self.names = [], []
        for path in self.paths:
            with _errors(path):
                about = _pyarrow("pyarrow.parquet").read_metadata(path)
                groups.append([about.row_group(g).num_rows for g in range(about.num_row_groups)])
                self.names.append(tuple(about.schema.to_arrow_schema().names))
        self.ends = self._counted([sum(rows) for rows in groups])
        self.group_ends = [np.cumsum(rows, dtype=np.int64) for rows in groups]

    def row(self, number: int, columns: frozenset | None = None) -> dict:
        """Return row `number`, of the columns that it has of those asked for.

        Raises:
            DataError: the file is damaged, gone or changed.
        """
        file, row = place(self.ends, number)
        group, row = place(self.group_ends[file], row)
        table = self._group(file, group, columns)
        return Row(self._values(number, table, row, table.column_names), self.names[file])

    def _group(self, file: int, group: int, columns: frozenset | None):
        key = file, group, columns
        if key not in self._opened:
            self._check(file)
            path = self.paths[file]
            with _errors(path), _pyarrow("pyarrow.parquet").ParquetFile(path) as opened:
                names = opened.schema_arrow.names
                wanted = [name for name in names if columns is None or name in columns]
                self._opened[key] = opened.read_row_group(group, columns=wanted, use_threads=False)
            while len(self._opened) > 1 and sum(table.nbytes for table in self._opened.values()) > KEPT:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return self._opened[key]


class ArrowTable(_Files):
    """Rows of Arrow files, streams or not, memory-mapped."""

    def _count(self) -> None:
        self.ends = self._counted([self._table(file).num_rows for file in range(len(self.paths))])

    def row(self, number: int, columns: frozenset | None = None) -> dict:
        """As `ParquetTable.row`."""
        file, row = place(self.ends, number)
        table = self._table(file)
        wanted = [name for name in table.column_names if columns is None or name in columns]
        return Row(self._values(number, table, row, wanted), tuple(table.column_names))

    def _table(self, file: int):
        if file not in self._opened:
            self._check(file)
            arrow = _pyarrow()
            with _errors(self.paths[file]):
                source = arrow.memory_map(str(self.paths[file]))
                try:
                    reader = _pyarrow("pyarrow.ipc").open_stream(source)
                except arrow.ArrowInvalid:
                    source.seek(0)
                    reader = _pyarrow("pyarrow.ipc").open_file(source)
                self._opened[file] = reader.read_all()
            while len(self._opened) > MAPPED:
                self._opened.popitem(last=False)
        self._opened.move_to_end(file)
        return self._opened[file]


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into a DataError that names the file."""
    arrow = _pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(str(path), f"cannot be read ({reason}); copy it again", "unreadable file") from error


def dataset_files(op: str, folder: Path, split: str):
    """Return the table of a `datasets` directory or of a folder of parquet files; None where `folder` is neither.

    Where files or directories are named after splits ("train-00000-of-00002.parquet"), only those of `split` count; a
    file's own name counts before its directories'.

    Raises:
        ValueError: there are splits and none of this name.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        if split not in splits:
            raise _no_split(op, folder, split, splits)
        folder = folder / split
    if (folder / "state.json").is_file():
        names = [one.get("filename") for one in _listed(folder / "state.json", "_data_files") if isinstance(one, dict)]
        return ArrowTable([folder / str(name) for name in names])
    for suffix, kind in ((PARQUET, ParquetTable), (ARROW, ArrowTable)):
        if names := list_files(folder, suffix):
            return kind([folder / name for name in _of_split(op, folder, names, split)])
    return None


def _of_split(op: str, folder: Path, names: list[str], split: str) -> list[str]:
    known = {"train", "validation", "valid", "val", "test", "dev", split}
    split_of = {name: _split_of(name, known) for name in names}
    splits = sorted(set(filter(None, split_of.values())))
    if splits and split not in splits:
        raise _no_split(op, folder, split, splits)
    return [name for name in names if not splits or split_of[name] == split]


def _split_of(name: str, known: set[str]) -> str | None:
    """The split that a file's name begins with, or else the innermost of its directories that is called like one."""
    *folders, base = name.split("/")
    return next((one for one in (base.split(".")[0].split("-")[0], *reversed(folders)) if one in known), None)


def _no_split(op: str, folder: Path, split: str, splits: list[str]) -> ValueError:
    return ValueError(
        f"{op}: split is {split!r}, and {str(folder)!r} has {', '.join(map(repr, splits))}; one of these fits"
        f"{nearest(split, splits)}"
    )


def _listed(path: Path, key: str) -> list:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise DataError(str(path), f"is damaged ({error}); copy it again", "unreadable file") from error
    if not isinstance(value, list) or not value:
        raise DataError(str(path), f"has no list {key!r}; what datasets.save_to_disk wrote fits", "unreadable file")
    return value
