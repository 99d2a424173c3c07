"""What stands in a row's columns: text, captions and pictures, checked; a misfit is a `DataError` with the row."""
import os
from collections.abc import Iterable
from pathlib import Path

from transfusion.data.sources.record import DataError, PictureFile, PictureRef
from transfusion.settings import nearest

CAPTIONS = ("text", "caption", "captions", "prompt")
"""Columns of captions, where the settings of a format name no others."""


def string(value, where: str, what: str) -> str:
    """Return `value`, which must be text that UTF-8 can write.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(where, f"{what} is {_short(value)}; text fits", "no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            where,
            f"{what} is {value[:40]!r}, which is no Unicode text ({error.reason}); what UTF-8 can write fits",
            "bad encoding",
        ) from None
    return value


def column(row: dict, names: Iterable[str], where: str, what: str):
    """Return the value of the first of `names` that the row has and that is not None.

    Raises:
        DataError: it has none.
    """
    names = tuple(names)
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise missing_column(row, names, where, what)


def missing_column(row: dict, names: tuple[str, ...], where: str, what: str) -> DataError:
    """Return the error that says which columns were looked for and which there are."""
    empty = [name for name in names if name in row]
    if empty:
        return DataError(where, f"column {empty[0]!r} holds no {what}; a value fits", f"missing {what}")
    there = [str(name) for name in getattr(row, "names", row)]
    hint = next(filter(None, (nearest(name, there) for name in names)), "")
    return DataError(where, f"there is no column {' or '.join(map(repr, names))} for the {what}; the row has "
                     f"{', '.join(map(repr, there)) or 'none'}{hint}", "missing column")


def captions_of(row: dict, names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return every caption in these columns, each text or a list of texts, without empty ones and repetitions.

    Raises:
        DataError: there is none, or one that is no text.
    """
    found = []
    for name in names:
        value = row.get(name)
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            found.append(string(one, where, f"the caption in column {name!r}").strip())
    captions = tuple(dict.fromkeys(filter(None, found)))
    if not captions:
        raise missing_column(row, names, where, "caption")
    return captions


def picture_in(value, where: str, folder: Path, loss: bool) -> PictureRef:
    """Return a picture given as a file's name in `folder`, as bytes, or as a dict of `path` and `bytes`.

    Raises:
        DataError: it is something else, empty, or an address of the web.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return PictureRef(value, loss, where)
    if not isinstance(value, str) or not value:
        raise DataError(where, f"a picture is {_short(value)}; a file's name or bytes fit", "no picture")
    if value.startswith(("http://", "https://", "data:")):
        raise DataError(where, f"a picture is {value[:60]!r}; the name of a file on this machine fits; fetch it first",
                        "no picture")
    path = os.path.join(folder, string(value, where, "a picture's name"))
    if "\0" in path:
        raise DataError(where, f"a picture is {value[:60]!r}; a file's name fits", "no picture")
    return PictureRef(PictureFile(path, name=where), loss, value)


def listed(value) -> list:
    """Return a column's value as a list: [] for None, [x] for x."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _short(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
