"""Where records lie in a file: byte offsets, found once, kept as .npy beside the data and memory-mapped ever after.

An index is one array of int64: its version, the data's stamp (size and time of the last change), the shape of a table
and the length of some bytes (names), then the table and those bytes. It is written aside and renamed. Where the data's
directory cannot be written, it lies in the user's cache directory. An index whose stamp is not the data's is made anew.
Bytes are counted, never characters, so text of any language may stand in the files.
"""
import csv
import hashlib
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transfusion.data.folders import walk
from transfusion.data.sources.record import DataError
from transfusion.files import written

VERSION = 20262
CHUNK = 2**24
MAPPED = 200
"""indices and Arrow files that a process keeps mapped: each holds a file open, of which many systems allow 1,024"""
BOM = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"
_QUOTE, _OPEN, _CLOSE = 1, 2, 3
_CLASSES = np.zeros(256, np.uint8)
_CLASSES[list(b'"{}[]')] = _QUOTE, _OPEN, _CLOSE, _OPEN, _CLOSE
csv.field_size_limit(2**31 - 1)  # a cell may hold a book; 131,072 characters by default
_IS_SPACE = np.isin(np.arange(256), list(SPACE))

Stamp = tuple[int, int]
Contents = tuple[np.ndarray, bytes]


class Index:
    """A table (rows, columns) of int64 and some bytes, memory-mapped while it is among the `MAPPED` asked for last.

    It pickles as its path.
    """

    _recent: OrderedDict[int, "weakref.ref[Index]"] = OrderedDict()

    def __init__(self, path: Path, stamp: Stamp):
        self.path, self.stamp = path, stamp
        self._mapped = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "stamp": self.stamp, "_mapped": None}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def table(self) -> np.ndarray:
        """(rows, columns) int64."""
        return self._contents()[0]

    @property
    def names(self) -> np.ndarray:
        """(bytes,) uint8, of which the table says which are whose."""
        return self._contents()[1]

    def is_valid(self) -> bool:
        """Whether the file is there, whole, and of data with this stamp."""
        try:
            return self._contents() is not None
        except (OSError, ValueError, EOFError):
            return False

    def _contents(self) -> tuple[np.ndarray, np.ndarray]:
        found = self._mapped or self._map()
        self._recent.pop(id(self), None)
        self._recent[id(self)], self._mapped = weakref.ref(self), found
        while len(self._recent) > MAPPED:
            if (oldest := self._recent.popitem(last=False)[1]()) is not None:
                oldest._mapped = None
        return found

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        array = np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))
        if array.dtype != np.int64 or array.ndim != 1 or len(array) < 6 or array[0] != VERSION:
            raise ValueError(f"{self.path} is no index of this version")
        size, changed, rows, columns, length = array[1:6].tolist()
        if (size, changed) != self.stamp or len(array) != 6 + rows * columns + -(-length // 8):
            raise ValueError(f"{self.path} is of other data; open the source again")
        table = array[6:6 + rows * columns].reshape(rows, columns)
        return table, array[6 + rows * columns:].view(np.uint8)[:length]


def stamp_of(path: Path) -> Stamp:
    """Size and time of the last change of a file; an index holds for these.

    Raises:
        DataError: there is no such file, or it is empty.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(str(path), f"cannot be opened ({error.strerror})", "missing file") from error
    if status.st_size == 0:
        raise DataError(str(path), "the file is empty; one with at least one record fits", "empty file")
    return status.st_size, status.st_mtime_ns


def open_index(data: Path, kind: str, build: Callable[[Path], Contents], stamp: Stamp | None = None) -> Index:
    """Return the index of `data`, made by `build` where there is none or the data changed since.

    `kind` tells apart indices of one file; `stamp` takes the place of the file's own, such as for a folder.

    Raises:
        DataError: the file is missing, empty or damaged, or no directory takes an index.
    """
    data = Path(data)
    stamp = stamp or stamp_of(data)
    for place in _places(data, kind):
        if (index := Index(place, stamp)).is_valid():
            return index
    table, names = build(data)
    table = np.ascontiguousarray(table, np.int64)
    tail = np.frombuffer(names + bytes(-len(names) % 8), np.int64)
    array = np.concatenate([np.array([VERSION, *stamp, *table.shape, len(names)]), table.ravel(), tail])
    errors = []
    for place in _places(data, kind):
        try:
            with written(place) as aside:
                np.save(aside, array, allow_pickle=False)
            return Index(place, stamp)
        except OSError as error:
            errors.append(f"{place.parent} ({error.strerror})")
    raise DataError(str(data), f"its index cannot be written into {' nor '.join(errors)}; make one of them writable",
                    "no index")


def _places(data: Path, kind: str) -> list[Path]:
    """Where an index may lie, the best place first."""
    whole = os.path.abspath(data)
    beside = data / f".{kind}.index.npy" if data.is_dir() else data.with_name(f"{data.name}.{kind}.index.npy")
    aside = f"{hashlib.sha256(whole.encode(errors='surrogateescape')).hexdigest()[:16]}.{kind}.index.npy"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = Path(tempfile.gettempdir()) / f"transfusion-{os.getuid()}"
    return [beside, cache / "transfusion" / "index" / aside, own / aside]


def read_piece(path: Path, start: int, stop: int, stamp: Stamp) -> bytes:
    """Return bytes `start` to `stop` of a file that an index with this stamp is of.

    Raises:
        DataError: the file is gone or changed since.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) == stamp:
                return os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise DataError(str(path), f"cannot be read any more ({error.strerror})", "missing file") from error
    raise DataError(str(path), "changed since it was opened; open the source again", "changed file")


def place(ends: np.ndarray, number: int) -> tuple[int, int]:
    """Of files that end at rows `ends`, return the one that holds row `number`, and its number there.

    Raises:
        IndexError: there is no such row; rows count from 0.
    """
    if not 0 <= number < ends[-1]:
        raise IndexError(f"row is {number}; 0 to {int(ends[-1]) - 1} fit")
    file = int(np.searchsorted(ends, number, side="right"))
    return file, int(number - (ends[file - 1] if file else 0))


def mapped(path: Path) -> np.ndarray:
    """(bytes,) uint8 of a file, memory-mapped; refuses text that is plainly not UTF-8.

    Raises:
        DataError: it is compressed, or text of 16 or 32 bits a character.
    """
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    head = data[:4].tobytes()
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(str(path), "is UTF-16 or UTF-32; UTF-8 fits; convert it, e.g. with iconv", "bad encoding")
    if head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd":
        raise DataError(str(path), "is compressed; the unpacked file fits, e.g. of gunzip", "compressed file")
    return data


def find_lines(path: Path) -> Contents:
    """(start, stop, line) of each line that is not blank; lines count from 1."""
    data = mapped(path)
    return _lines(data, _newlines(data)), b""


def find_csv_rows(path: Path) -> Contents:
    """As `find_lines`, of a CSV file, in which quoted fields may hold line breaks.

    Where every quote that opens a field stands at its beginning, a line break behind an even number of quotes ends a
    row. Otherwise some are characters, as in 5" nail, and the csv module says which.
    """
    data = mapped(path)
    breaks, quotes = _newlines(data), _where(data, lambda chunk: chunk == ord('"'))
    opening = quotes[::2][quotes[::2] > _begin(data)]
    if np.isin(data[opening - 1], list(f'{separator(path)}"\r\n'.encode())).all():
        ends = breaks[np.searchsorted(quotes, breaks) % 2 == 0]
    else:
        lines = np.fromiter(_csv_row_ends(path, _begin(data)), np.int64)
        ends = breaks[lines[lines <= len(breaks)] - 1]
    return _lines(data, ends, breaks), b""


def separator(path: Path) -> str:
    """What stands between the columns of a CSV file: tabs where its name ends in .tsv."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_row_ends(path: Path, begin: int) -> Iterator[int]:
    """The line that each row ends with, counted from 1; of a row that is none the last line that it was read from."""
    with open(path, encoding="latin-1", newline="\n") as file:
        file.seek(begin)
        rows = csv.reader(file, delimiter=separator(path))
        while True:
            try:
                next(rows)
            except StopIteration:
                return
            except csv.Error:  # what is wrong with it is said when it is read
                pass
            yield rows.line_num


def find_paragraphs(path: Path) -> Contents:
    """(start, stop, line) of each run of lines that are not blank."""
    data = mapped(path)
    breaks = _newlines(data)
    lines = _lines(data, breaks)
    if not len(lines):
        return lines, b""
    new = np.diff(lines[:, 2], prepend=-1) > 1
    last = np.append(np.flatnonzero(new)[1:], len(lines)) - 1
    return np.stack([lines[new, 0], lines[last, 1], lines[new, 2]], 1), b""


def _where(data: np.ndarray, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    found = [at + np.flatnonzero(test(data[at:at + CHUNK])) for at in range(0, len(data), CHUNK)]
    return np.concatenate([*found, np.zeros(0, np.int64)])


def _newlines(data: np.ndarray) -> np.ndarray:
    return _where(data, lambda chunk: chunk == ord("\n"))


def _begin(data: np.ndarray) -> int:
    """Where the text begins, behind the mark that some editors write."""
    return len(BOM) if data[:3].tobytes() == BOM else 0


def _lines(data: np.ndarray, ends: np.ndarray, breaks: np.ndarray | None = None) -> np.ndarray:
    """(start, stop, line) of what stands between `ends`, where it is more than white space."""
    starts, stops = np.append(_begin(data), ends + 1), np.append(ends, len(data))
    numbers = np.searchsorted(ends if breaks is None else breaks, starts) + 1
    blank = stops <= starts
    for i in np.flatnonzero(~blank & _IS_SPACE[data[np.minimum(starts, len(data) - 1)]]):
        blank[i] = not data[starts[i]:stops[i]].tobytes().strip(SPACE)
    return np.stack([starts, stops, numbers], 1)[~blank]


def find_json_objects(path: Path) -> Contents:
    """(start, stop) of each object in a file that is one JSON list of objects.

    Brackets outside strings say how deep a byte stands; a quote behind an odd number of backslashes is a character.

    Raises:
        DataError: the file ends inside the list, or something else than objects stands in it or behind it.
    """
    data = mapped(path)
    depth, inside, starts, stops = 0, 0, [], []
    for at in range(0, len(data), CHUNK):
        classes = _CLASSES[data[at:at + CHUNK]]
        places = np.flatnonzero(classes)
        classes, places = classes[places], places + at
        kept = ~_escaped(data, places, classes)
        classes, places = classes[kept], places[kept]
        quotes = inside + np.cumsum(classes == _QUOTE)
        outside = (quotes % 2 == 0) & (classes != _QUOTE)
        inside = int(quotes[-1]) % 2 if len(quotes) else inside
        classes, places = classes[outside], places[outside]
        depths = depth + np.cumsum(np.where(classes == _OPEN, 1, -1))
        depth = int(depths[-1]) if len(depths) else depth
        starts.append(places[(classes == _OPEN) & (depths == 2)])
        stops.append(places[(classes == _CLOSE) & (depths == 1)] + 1)
        if (depths < 1).any():
            end = int(places[depths < 1][0])
            _refuse_rest(path, data, end + 1)
            break
    else:
        raise DataError(
            f"{path}, row {sum(map(len, stops))}",
            f"the list does not end: the file stops at byte {len(data)}"
            f"{' inside a string' if inside else ''}; it is cut off; copy it again",
            "truncated file",
        )
    table = np.stack([np.concatenate(starts), np.concatenate(stops)], 1)
    _check_gaps(path, data, table, end)
    return table, b""


def _escaped(data: np.ndarray, places: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which of `places` are quotes behind an odd number of backslashes."""
    escaped = np.zeros(len(places), bool)
    running = np.flatnonzero((classes == _QUOTE) & (places > 0))
    back = 1
    while len(running := running[(places[running] >= back) & (data[places[running] - back] == ord("\\"))]):
        escaped[running] ^= True
        back += 1
    return escaped


def _refuse_rest(path: Path, data: np.ndarray, begin: int) -> None:
    """Refuse anything but white space behind the end of the list."""
    rest = data[begin:begin + CHUNK].tobytes().strip(SPACE)
    if rest:
        raise DataError(
            f"{path}, byte {begin}",
            f"{rest[:20]!r} stands behind the end of the list; one list of objects fits",
            "bad json",
        )


def _check_gaps(path: Path, data: np.ndarray, table: np.ndarray, end: int) -> None:
    """Refuse a list in which anything else than objects stands; between two of them only one comma fits."""
    if len(table) == 0:
        raise DataError(str(path), "the list holds no object; at least one fits", "empty file")
    opened = int(np.flatnonzero(data[:table[0, 0]] == ord("["))[-1])
    begins = np.append(opened + 1, table[:, 1])
    sizes = np.append(table[:, 0], end) - begins
    wanted = np.ones(len(sizes), np.int64)
    wanted[[0, -1]] = 0
    offsets = np.cumsum(sizes) - sizes
    gaps = data[np.repeat(begins - offsets, sizes) + np.arange(sizes.sum())]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    commas, others = (np.bincount(owner[chosen], minlength=len(sizes))
                      for chosen in (gaps == ord(","), (gaps != ord(",")) & ~_IS_SPACE[gaps]))
    wrong = (commas != wanted) | (others > 0) | (data[np.append(table[:, 0], table[0, 0])] != ord("{"))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        text = data[begins[row]:begins[row] + max(int(sizes[row]), 1) + 1].tobytes()[:40]
        raise DataError(f"{path}, row {row}", f"{text!r} stands at byte {begins[row]}; objects {{...}} with one comma "
                        "between them fit", "bad json")


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names of files with these suffixes in a folder and its subfolders; hidden ones are left out.

    Raises:
        ValueError: a folder that cannot be read.
    """
    found = []
    for place, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(place, folder)
        found += [name if inner == "." else f"{inner}/{name}" for name in names
                  if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


def index_names(folder: Path, kind: str, names: list[str]) -> Index:
    """Return an index of names in a folder: (start, stop) of each in its bytes; the names are its stamp."""
    encoded = [os.fsencode(name) for name in names]
    joined = b"".join(encoded)
    stops = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    digest = hashlib.sha256(b"\0".join(encoded)).digest()
    stamp = len(names), int.from_bytes(digest[:7], "big")
    return open_index(folder, kind, lambda _: (np.stack([np.append(0, stops[:-1]), stops], 1), joined), stamp)


def name_at(index: Index, start: int, stop: int) -> str:
    """Return one of an index's names."""
    return os.fsdecode(index.names[start:stop].tobytes())
