"""Latents of a data set's pictures, computed once: `transfusion vae encode --vae DIR --out DIR data:NAME`.

A cache is a directory: {train, held-out}.safetensors with `latents` (N, C, h, w), the autoencoder in vae/, and
cache.json, which says what they are of. `transfusion train ... --data.latents DIR` trains on them as if they were the
data set's pictures, and its checkpoints carry the autoencoder.
"""
import json
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from transfusion.command import claim
from transfusion.data.dataset import SPLITS, Dataset, DatasetSettings, Pictures
from transfusion.device import choose_device
from transfusion.files import current, load_tensors, read_json, replacing, whole
from transfusion.locks import LOCK
from transfusion.model.vae import VAE
from transfusion.settings import Count, check


@dataclass(frozen=True)
class EncodeSettings:
    """Compute the latents of a data set's pictures and keep them: what `--data.latents` of a training run names."""

    vae: Path
    """directory of a diffusers AutoencoderKL, as `transfusion vae train` writes it"""
    out: Path
    """directory of the cache"""
    data: DatasetSettings = field(default_factory=DatasetSettings)
    batch: Count = 64
    """pictures encoded at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


def identity(name: str, split: str, pictures: Pictures) -> dict:
    """Return what latents are of: data set, split, shape of its pictures (N, C, H, W) and a checksum of them."""
    checksum = 0
    for batch in in_order(pictures, 1024):
        checksum = zlib.crc32(batch.contiguous().numpy(), checksum)
    return {"data": name, "split": split, "pictures": list(pictures.shape), "checksum": checksum}


def in_order(pictures: Pictures, size: int):
    """Yield all pictures in batches of at most `size`."""
    for indices in torch.arange(len(pictures)).split(size):
        yield pictures[indices]


def encode_dataset(settings: EncodeSettings) -> Path:
    """Run `transfusion vae encode`; return the cache's directory, which appears whole or not at all.

    A cache of the same pictures and autoencoder is left as it is.

    Raises:
        ValueError: a data set without captions, which nothing could be trained on, or an `out` that holds something
        else.
    """
    check("vae encode", settings)
    device = choose_device(settings.device)
    inputs = {f"data.{name}": path for name, path in settings.data.directories().items()}
    with claim("vae encode", settings.out, {"vae": settings.vae, **inputs}):
        return _encode(settings, device)


def _open(settings: EncodeSettings) -> dict[str, Pictures]:
    """Return the pictures of each split; a cache of a data set without captions could not be trained on."""
    datasets = {split: open_pictures("vae encode", settings.data, split) for split in SPLITS}
    try:
        datasets["train"].texts()
    except ValueError as error:
        raise ValueError(f"vae encode: data is {settings.data.name!r}: {error}") from None
    return {split: dataset.pictures for split, dataset in datasets.items()}


def _encode(settings: EncodeSettings, device: torch.device) -> Path:
    pictures = _open(settings)
    vae = VAE.from_pretrained(settings.vae)
    vae.autoencoder.to(device)
    name, shape = settings.data.name, pictures["train"].shape[1:]
    if shape[0] != vae.picture_channels:
        raise ValueError(f"vae encode: data.name is {name!r}, of {shape[0]} channels, and the autoencoder of "
                         f"{str(settings.vae)!r} "
                         f"takes {vae.picture_channels}; name the pictures it is for, for example with data:emoji")
    about = {"vae": vae.fingerprint(), "splits": [identity(name, split, pictures[split]) for split in SPLITS]}
    if any(path.name != LOCK for path in settings.out.iterdir()):
        kept = settings.out / "cache.json"
        if not kept.is_file() or read_json(kept) != about:
            raise ValueError(f"vae encode: out is {str(settings.out)!r}, which holds something else; a new "
                             "directory, or a cache "
                             "of the same pictures and autoencoder, fits")
        print(f"{settings.out} holds these latents already")
        return settings.out

    began, count = time.perf_counter(), sum(map(len, pictures.values()))
    latent = vae.encode(next(in_order(pictures["train"], settings.batch))).shape[1:]
    minutes = (time.perf_counter() - began) * count / settings.batch / 60
    print(f"{count:,} pictures of {'x'.join(map(str, shape))} ({name}) to latents of {'x'.join(map(str, latent))}: "
          "about "
          f"{minutes:,.1f} min", flush=True)
    progress = tqdm(total=count, desc=f"vae encode {settings.out.name}", unit="picture", dynamic_ncols=True)
    with replacing(settings.out) as fresh, progress:
        for split in SPLITS:
            latents = []
            for batch in in_order(pictures[split], settings.batch):
                latents.append(vae.encode(batch))
                progress.update(len(batch))
            save_file({"latents": torch.cat(latents).contiguous()}, fresh / f"{split}.safetensors")
        vae.save_pretrained(fresh / "vae")
        (fresh / "cache.json").write_text(json.dumps(about, indent=2))
    return settings.out


def open_pictures(op: str, settings: DatasetSettings, split: str = "train") -> Dataset:
    """Return a data set for what reads pictures alone.

    Raises:
        ValueError: a data set that cannot be opened, or settings that name latents.
    """
    if settings.latents is not None:
        raise ValueError(f"{op}: data.latents is {str(settings.latents)!r}; leave it out, for pictures are read here")
    return settings.open(split)


def open_dataset(settings: DatasetSettings, split: str = "train") -> tuple[Dataset, VAE | None]:
    """Return a data set and None, or, where `settings.latents` names a cache, its latents for pictures, and their VAE.

    Raises:
        ValueError: a data set that cannot be opened, a cache of other pictures, or one whose autoencoder is not the one
            beside it.
    """
    dataset = settings.open(split)
    if settings.latents is None:
        return dataset, None
    dataset.pictures, vae = _load_latents(settings.latents, identity(settings.name, split, dataset.pictures))
    return dataset, vae


def _load_latents(cache: Path, ours: dict) -> tuple[Tensor, VAE]:
    """Load from a cache the latents of what `ours` describes, and their VAE."""
    if not current(cache, "cache.json").is_file():
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, which holds no cache.json; a directory that "
                         "`transfusion vae "
                         "encode` wrote fits")
    about = read_json(current(cache, "cache.json"), "encode the data set anew")
    kept = next(kept for kept in about["splits"] if kept["split"] == ours["split"])
    if kept != ours:
        changed = ", ".join(f"{key} {kept[key]} (now {ours[key]})" for key in ours if kept[key] != ours[key])
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, made of other pictures: {changed}; a cache of "
                         f"{ours['data']!r} as it is fits; encode it anew")
    with whole(cache) as directory:
        vae = VAE.from_pretrained(directory / "vae")
        latents = load_tensors(directory / f"{ours['split']}.safetensors")["latents"]
    if vae.fingerprint() != about["vae"]:
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, whose vae is not the one that made them; encode "
                         "the data set "
                         "anew")
    return latents, vae
