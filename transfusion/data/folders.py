"""The files of a folder and of the folders inside it, none of which is passed over unsaid."""
import os
from collections.abc import Iterator
from pathlib import Path


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder with the names of folders and files in it, as `os.walk` does; links to folders are followed.

    A folder that several names lead to is yielded once, so that links in a circle end. Names that the caller removes
    from the list of folders are not followed.

    Raises:
        ValueError: a folder inside that cannot be read; without it the rest would pass for the whole.
    """
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield place, folders, names


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes, in any case, in a folder and those inside it, in the order of their names.

    Raises:
        ValueError: as `walk`.
    """
    return sorted(path for place, _, names in walk(folder) for name in names
                  if (path := Path(place, name)).suffix.lower() in suffixes)


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that is not there has no files
        raise ValueError(f"{str(error.filename)!r} cannot be read ({error.strerror}); a folder that this user may read "
                         "fits, with all folders inside it") from error
