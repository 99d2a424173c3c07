"""Arrays kept in a directory as .npy files, read through memory maps: workers share them, and nothing is unpickled."""
import hashlib
import json
from pathlib import Path

import numpy as np

from transfusion.files import read_json, write_text, written

ABOUT = "about.json"


class Arrays:
    """The arrays of a directory by name, each mapped when a process first asks for it; pickles as the path alone."""

    def __init__(self, directory: Path):
        self.directory, self._mapped = Path(directory), {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            path = self.directory / f"{name}.npy"
            try:
                self._mapped[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:
                found = np.load(path, allow_pickle=False)  # an array without elements cannot be mapped
                if found.size:
                    raise
                self._mapped[name] = found
        return self._mapped[name]

    def __getstate__(self) -> dict:
        return {"directory": self.directory, "_mapped": {}}

    def forget(self) -> None:
        """Map them anew when they are asked for; until then no file is open."""
        self._mapped = {}

    def about(self) -> dict:
        """What was written beside them."""
        return read_json(self.directory / ABOUT, "delete its directory; it is made anew")

    def stand(self, key: str) -> bool:
        """Whether they were written to their end, under this key."""
        return (self.directory / ABOUT).is_file() and self.about().get("key") == key


def write_arrays(directory: Path, key: str, about: dict, **arrays: np.ndarray) -> Arrays:
    """Write arrays and, when all are whole, what is to be known of them."""
    directory = Path(directory)
    (directory / ABOUT).unlink(missing_ok=True)
    for name, array in arrays.items():
        with written(directory / f"{name}.npy") as aside, open(aside, "wb") as file:
            np.save(file, array, allow_pickle=False)
    write_text(directory / ABOUT, json.dumps({"key": key, **about}, indent=2) + "\n")
    return Arrays(directory)


def fingerprint(*parts) -> str:
    """Return 16 hexadecimal digits that change when a part does: strings, numbers, and lists and dicts of them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
