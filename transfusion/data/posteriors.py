"""Latents of a mixture's pictures, computed once ahead: `transfusion data encode mix.yaml --vae DIR --out DIR`.

Kept is what the autoencoder says of each picture, mean and log-variance, not a draw: training draws anew each time,

    latent = (mean + exp(log-variance / 2) * noise - shift) * scale

with noise that is a hash of (seed, source, pass, record). An entry is of a file, the size that the picture becomes, and
whether it is mirrored; a mixture that mirrors pictures has two of each, for the latent of a mirrored picture is not the
mirrored latent. Entries lie in shards, each written whole, so that whoever was killed goes on behind the last one. A
picture whose file changed since is encoded again by the next run, and until then it is left out in training, and named.
"""
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from transfusion.command import claim
from transfusion.data.grids import Grids
from transfusion.data.mixture import MixtureSettings, open_sources, read_mixture
from transfusion.data.read_ahead import read_ahead
from transfusion.data.sources.record import DataError, PictureRef, Source
from transfusion.data.stored_latents import ABOUT, PosteriorStore, entry_key, picture_stamp, shard_paths
from transfusion.device import choose_device
from transfusion.files import read_json, write_text, written
from transfusion.model.vae import VAE
from transfusion.settings import Count, OneOf, WholeNumber, check

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD = 1024       # entries in a shard
SHOWN = 3          # skipped pictures of each kind that are named


@dataclass(frozen=True)
class PosteriorSettings:
    """Compute the latents of a mixture's pictures and keep them; name their directory as `latents` in the mixture."""

    vae: Path
    """directory of a diffusers AutoencoderKL"""
    out: Path
    """directory of the latents; one that holds some goes on"""
    patch_size: Count = 2
    """side of the model's patches, in positions of the latent: pictures become whole patches"""
    dtype: Annotated[str, OneOf(DTYPES)] = "float16"
    """of what is kept: float16, bfloat16 or float32; the error that it makes is printed"""
    batch: Count = 16
    """pictures encoded at once"""
    shard: Count = SHARD
    """entries in a file, so many are lost at most where the command is killed"""
    workers: WholeNumber = 2
    """processes that read and decode pictures; 0 does it in this one"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


class Entry(NamedTuple):
    """A picture to encode: its key, its file's stamp, and its pixels (channels, H, W) uint8."""

    key: int
    stamp: int
    pixels: Tensor


class Skipped(NamedTuple):
    """A record or picture that cannot be read."""

    where: str
    reason: str
    kind: str


def encode_mixture(path: Path, settings: PosteriorSettings) -> Path:
    """Run `transfusion data encode`; return the directory of the latents.

    Raises:
        ValueError: a mixture or an autoencoder that cannot be read, an `out` with other latents in it, or a process of
            the `workers` was killed.
    """
    check("data encode", settings)
    device = choose_device(settings.device)
    mixture = read_mixture(path)
    with claim("data encode", settings.out, {"vae": settings.vae}):
        vae = VAE.from_pretrained(settings.vae).to(device)
        grids = Grids(mixture.pictures, settings.patch_size * vae.factor, vae.picture_channels)
        _begin(settings, vae)
        _encode(mixture, Path(path).parent, grids, vae, settings)
    return settings.out


def _begin(settings: PosteriorSettings, vae: VAE) -> None:
    """Write what the latents are of, or check that those of an earlier run are of the same."""
    about = {"vae": vae.fingerprint(), "dtype": settings.dtype, "channels": vae.channels, "factor": vae.factor,
             "scale": vae.scale, "shift": vae.shift}
    file = settings.out / ABOUT
    if file.is_file():
        kept = read_json(file, "take another --out")
        differ = [name for name in about if kept.get(name) != about[name]]
        if differ:
            words = ", ".join(f"{name} {kept.get(name)} (now {about[name]})" for name in differ)
            raise ValueError(f"data encode: out is {str(settings.out)!r}, which holds latents of another autoencoder "
                             f"or dtype: {words}; the same ones, or a new directory, fit")
        return
    if shard_paths(settings.out):
        raise ValueError(f"data encode: out is {str(settings.out)!r}, which holds shards and no {ABOUT}; a new "
                         "directory fits")
    write_text(file, json.dumps(about, indent=2) + "\n")


def _encode(mixture: MixtureSettings, folder: Path, grids: Grids, vae: VAE, settings: PosteriorSettings) -> None:
    store = PosteriorStore(settings.out, folder)
    sources, _ = open_sources(mixture)
    kept = len(store)
    shards, skipped, changed, errors = _Shards(settings), {}, 0, RoundingError()
    for entry, source in zip(mixture.sources, sources):
        mirrored = (mixture.flip if entry.flip is None else entry.flip) > 0
        unread = _Unread(source, grids, store, mirrored)
        records = read_ahead("data encode", unread, range(len(source)), settings.workers,
                             advice="the same command goes on; fewer --workers take less")
        progress = tqdm(records, total=len(source), desc=f"data encode {entry.name or source.name}", unit="record",
                        dynamic_ncols=True)
        found = _new_entries(progress, shards.keys, skipped)
        with contextlib.closing(records):
            for batch in _alike(found, settings.batch):
                changed += sum(store.knows(one.key) for one in batch)
                pixels = torch.stack([one.pixels for one in batch]).float() / 127.5 - 1
                shards.add(batch, errors.rounded(*_posterior(vae, pixels), DTYPES[settings.dtype]))
    shards.finish()
    print(f"{len(shards.keys):,} entries encoded, {kept:,} were there"
          f"{f', {changed:,} of them of files that changed since' if changed else ''}: {settings.out}")
    print(errors.words(settings.dtype), end="")
    print(_skipped_words(skipped), end="")


def _posterior(vae: VAE, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (N, C, h, w) of pictures (N, channels, H, W), as the autoencoder says them."""
    with torch.inference_mode():
        posterior = vae.autoencoder.encode(pictures.to(vae.autoencoder.device, vae.autoencoder.dtype)).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()


class _Unread(Dataset):
    """By record: the entries that the store lacks, decoded, and what could not be read."""

    def __init__(self, source: Source, grids: Grids, store: PosteriorStore, mirrored: bool):
        self.source, self.grids, self.store, self.mirrored = source, grids, store, mirrored

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> list[Entry | Skipped]:
        try:
            record = self.source[number]
        except DataError as error:
            return [Skipped(error.where, error.reason, error.kind)]
        found = []
        for picture in record.pictures():
            try:
                found += self.entries(picture)
            except DataError as error:
                found.append(Skipped(record.where, f"{error.where}: {error.reason}", error.kind))
        return found

    def entries(self, picture: PictureRef) -> list[Entry]:
        """What is to be encoded of a picture."""
        grid = self.grids.of(picture)
        size, stamp = tuple(side * self.grids.cell for side in grid), picture_stamp(picture)
        keys = {flipped: entry_key(picture, self.store.folder, size, self.grids.mode, flipped)
                for flipped in (False, True)[:1 + self.mirrored]}
        missing = [flipped for flipped, key in keys.items() if not self.store.holds(key, stamp)]
        if not missing:
            return []
        pixels = ((self.grids.pixels(picture, grid) + 1) * 127.5).round().byte()
        return [Entry(keys[flipped], stamp, pixels.flip(-1) if flipped else pixels) for flipped in missing]


def _new_entries(records, seen: set[int], skipped: dict[str, list]) -> Iterator[Entry]:
    """The entries of records, each once; what was skipped is put down."""
    begun: set[int] = set()
    for found in records:
        for one in found:
            if isinstance(one, Skipped):
                skipped.setdefault(one.kind, []).append(one)
            elif one.key not in seen and one.key not in begun:
                begun.add(one.key)
                yield one


def _alike(entries: Iterator[Entry], count: int) -> Iterator[list[Entry]]:
    """Batches of entries of one shape."""
    waiting: dict[tuple, list[Entry]] = {}
    for one in entries:
        batch = waiting.setdefault(tuple(one.pixels.shape), [])
        batch.append(one)
        if len(batch) == count:
            yield waiting.pop(tuple(one.pixels.shape))
    yield from waiting.values()


class _Shards:
    """Collects entries and writes them, a whole file at a time."""

    def __init__(self, settings: PosteriorSettings):
        self.out, self.size = settings.out, settings.shard
        numbers = [int(path.stem) for path in shard_paths(self.out)]
        self.number = max(numbers, default=-1) + 1
        self.keys: set[int] = set()
        self._entries: list[tuple[int, int, Tensor]] = []

    def add(self, batch: list[Entry], posteriors: Tensor) -> None:
        """Take entries and their posteriors (N, 2, C, h, w)."""
        self._entries += [(one.key, one.stamp, posterior) for one, posterior in zip(batch, posteriors)]
        self.keys.update(one.key for one in batch)
        while len(self._entries) >= self.size:
            self._write(self._entries[:self.size])
            self._entries = self._entries[self.size:]

    def finish(self) -> None:
        """Write what is left."""
        if self._entries:
            self._write(self._entries)
            self._entries = []

    def _write(self, entries: list) -> None:
        keys, stamps, posteriors = zip(*entries)
        offsets = np.cumsum([0, *(x.numel() for x in posteriors)], dtype=np.int64)
        tensors = {"keys": torch.tensor(keys, dtype=torch.int64), "stamps": torch.tensor(stamps, dtype=torch.int64),
                   "sides": torch.tensor([x.shape[-2:] for x in posteriors], dtype=torch.int32),
                   "offsets": torch.from_numpy(offsets), "posteriors": torch.cat([x.flatten() for x in posteriors])}
        with written(self.out / f"{self.number:06d}.safetensors") as aside:
            save_file(tensors, aside)
        self.number += 1


class RoundingError:
    """What is lost where mean and log-variance are rounded."""

    def __init__(self):
        self.lost, self.of, self.width, self.count = 0.0, 0.0, 0.0, 0

    def rounded(self, mean: Tensor, log_variance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (N, 2, C, h, w) in `dtype`.

        Raises:
            ValueError: a value that this dtype cannot hold, or that is not finite.
        """
        exact = torch.stack([mean, log_variance], 1)
        kept = exact.to(dtype)
        if not kept.isfinite().all():
            raise ValueError(f"data encode: dtype is {str(dtype).removeprefix('torch.')} and a latent is "
                             f"{exact.abs().max():g}; finite ones that it can hold fit; bfloat16 and float32 hold "
                             "larger ones")
        back = kept.float()
        self.lost += float((back[:, 0] - mean).square().sum())
        self.of += float(mean.square().sum())
        self.width = max(self.width, float(((back[:, 1] - log_variance) / 2).exp().sub(1).abs().max()))
        self.count += len(mean)
        return kept

    def words(self, dtype: str) -> str:
        """Say how much was lost."""
        if not self.count:
            return ""
        moved = (self.lost / max(self.of, 1e-30)) ** 0.5
        return (f"{dtype} moves the means by {100 * moved:.2g} % (root mean square) and a standard deviation by "
                f"{100 * self.width:.2g} % at most\n")


def _skipped_words(skipped: dict[str, list[Skipped]]) -> str:
    lines = []
    for kind, found in skipped.items():
        lines.append(f"skipped, {kind}: {len(found):,}")
        lines += [f"  {one.where}: {one.reason}" for one in found[:SHOWN]]
    return "".join(f"{line}\n" for line in lines)
