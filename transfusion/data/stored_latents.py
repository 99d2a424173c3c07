"""A directory of latents that `transfusion data encode` wrote, as training reads it."""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transfusion.data.choices import hashed
from transfusion.data.sources.record import DataError, PictureRef
from transfusion.files import read_json

ABOUT = "latents.json"
CHANGED = "changed picture"


def shard_paths(directory: Path) -> list[Path]:
    """The shards of a directory, in the order in which they were written."""
    return sorted(Path(directory).glob("[0-9]*.safetensors"))


def open_shard(path: Path):
    """Open a shard, memory-mapped.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"latents: {path} is damaged ({error}); delete it and run `transfusion data encode` "
                         "again") from error


def entry_key(picture: PictureRef, folder: Path, size: tuple[int, int], mode: str, flipped: bool) -> int:
    """The 64 bits that an entry is found by: of the file, seen from the mixture's folder, and of what becomes of it."""
    if isinstance(picture.file, bytes):
        name = hashlib.blake2b(picture.file, digest_size=16).hexdigest()
    else:
        name = f"{os.path.relpath(picture.file.path, folder)}|{picture.file.offset}|{picture.file.size}"
    return _hash(f"{name}|{size[0]}x{size[1]}|{mode}|{int(flipped)}")


def picture_stamp(picture: PictureRef) -> int:
    """What changes when a picture's file does: of its size and time; 0 for bytes, whose key is their content.

    Raises:
        DataError: there is no such file.
    """
    if isinstance(picture.file, bytes):
        return 0
    try:
        about = os.stat(picture.file.path)
    except OSError as error:
        raise DataError(picture.name or picture.file.path, f"the picture {picture.file.path!r} cannot be opened "
                        f"({error.strerror})", "missing picture") from error
    return _hash(f"{about.st_size}|{about.st_mtime_ns}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little",
                          signed=True)


class PosteriorStore:
    """Posteriors by picture; it pickles as its paths, and a process opens a shard when it first reads from it.

    Args:
        directory: of the latents.
        folder: that of the mixture's file, from which files are named.
        autoencoder: the fingerprint of the one in use; "" takes any.

    Raises:
        ValueError: there are no latents, they are damaged, or another autoencoder made them.
    """

    def __init__(self, directory: Path, folder: Path, autoencoder: str = ""):
        self.directory, self.folder = Path(directory), Path(folder)
        if not (self.directory / ABOUT).is_file():
            raise ValueError(f"latents: {str(directory)!r} holds no {ABOUT}; a directory that `transfusion data "
                             "encode` wrote fits")
        about = read_json(self.directory / ABOUT, "run `transfusion data encode` again with another --out")
        self.made_by, self.channels, self.factor, self.scale, self.shift = (
            about[name] for name in ("vae", "channels", "factor", "scale", "shift"))
        if autoencoder not in ("", self.made_by):
            raise ValueError(f"latents: {str(directory)!r} was made by the autoencoder {self.made_by[:12]}, and "
                             f"{autoencoder[:12]} is in use; run `transfusion data encode` with that one, into "
                             "another --out")
        self._load()

    def _load(self) -> None:
        self.paths, self._open = shard_paths(self.directory), {}
        keys, stamps, shards, rows = ([np.zeros(0, np.int64)] for _ in range(4))
        for number, path in enumerate(self.paths):
            shard = open_shard(path)
            keys.append(shard.get_tensor("keys").numpy())
            stamps.append(shard.get_tensor("stamps").numpy())
            shards.append(np.full(len(keys[-1]), number))
            rows.append(np.arange(len(keys[-1])))
        keys = np.concatenate(keys)
        order = np.argsort(keys, kind="stable")        # of two entries with one key, the newer one stands behind
        self._keys, self._stamps = keys[order], np.concatenate(stamps)[order]
        self._shards, self._rows = (np.concatenate(x)[order].astype(np.int32) for x in (shards, rows))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in
                ("_keys", "_stamps", "_shards", "_rows", "_open", "paths")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._load()

    def __len__(self) -> int:
        return len(self._keys)

    def _find(self, key: int) -> int | None:
        at = int(np.searchsorted(self._keys, key, side="right")) - 1
        return at if at >= 0 and self._keys[at] == key else None

    def knows(self, key: int) -> bool:
        """Whether there is an entry, of the file as it is or as it was."""
        return self._find(key) is not None

    def holds(self, key: int, stamp: int) -> bool:
        """Whether there is an entry of the file as it is."""
        at = self._find(key)
        return at is not None and int(self._stamps[at]) == stamp

    def posterior(self, picture: PictureRef, size: tuple[int, int], mode: str, flipped: bool) -> Tensor | None:
        """Return mean and log-variance (2, C, h, w) of a picture at this size, None where there are none.

        Raises:
            DataError: the picture's file is gone, or changed since it was encoded.
        """
        at = self._find(entry_key(picture, self.folder, size, mode, flipped))
        if at is None:
            return None
        if int(self._stamps[at]) != picture_stamp(picture):
            raise DataError(picture.name or picture.file.path, f"the picture changed since {str(self.directory)!r} was "
                            "made of it; run `transfusion data encode` again", CHANGED)
        return self._read(int(self._shards[at]), int(self._rows[at]))

    def _read(self, number: int, row: int) -> Tensor:
        if number not in self._open:
            shard = open_shard(self.paths[number])
            self._open[number] = shard, shard.get_tensor("offsets").tolist(), shard.get_tensor("sides").tolist()
        shard, offsets, sides = self._open[number]
        values = shard.get_slice("posteriors")[offsets[row]:offsets[row + 1]]
        return values.float().view(2, self.channels, *sides[row])

    def draw(self, picture: PictureRef, size: tuple[int, int], mode: str, flipped: bool, noise: int) -> Tensor | None:
        """Return a latent (C, h, w), drawn with a noise that depends on `noise` alone; None where there is no entry.

        Raises:
            DataError: as `posterior`.
        """
        found = self.posterior(picture, size, mode, flipped)
        if found is None:
            return None
        mean, log_variance = found
        return (mean + torch.exp(log_variance / 2) * normal(noise, mean.shape) - self.shift) * self.scale


def normal(noise: int, shape: torch.Size) -> Tensor:
    """Standard normal numbers that depend on `noise` alone: what a latent is drawn with."""
    random = np.random.Generator(np.random.Philox(key=int(hashed(noise))))
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32))
