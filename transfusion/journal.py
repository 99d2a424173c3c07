"""The journal of a save: which files wait to be moved into their places, and which older ones go.

A directory may come from somebody else, and what its journal names is linked, moved and removed. So it names nothing
outside of the directory.
"""
import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Journal(NamedTuple):
    """What waits (`files`), what goes (`obsolete`), and a directory where what waits stands too; names in the save's.
    """

    files: list[str]
    obsolete: list[str]
    keep: str | None


def read_journal(path: Path) -> Journal:
    """Read the journal of a save.

    Raises:
        ValueError: it is none, or names a place outside of the save's directory.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        journal = Journal(found["files"], found["obsolete"], found.get("keep"))
        names = [*journal.files, *journal.obsolete, *([] if journal.keep is None else [journal.keep])]
        inside = all(map(_is_inside, names))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the directory again") from error
    if not inside:
        raise ValueError(f"{path} names a place outside of its directory, which no save writes; do not use what you do "
                         "not trust, or remove it")
    return journal


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
