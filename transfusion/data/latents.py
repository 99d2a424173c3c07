"""Latents of a data set's pictures, computed once and kept on disk: `transfusion vae encode --vae DIR --data.name NAME --out DIR`.

A cache is a directory: {train, held-out}.safetensors with `latents` (N, C, h, w), the autoencoder in vae/, and cache.json, which says what they are of.
`transfusion train --data.latents DIR` trains on them as if they were the data set's pictures, and its checkpoints carry the autoencoder.
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
from transfusion.data.batches import DATASETS, DataSettings
from transfusion.data.pictures import SPLITS, PictureSettings
from transfusion.device import choose_device
from transfusion.files import LOCK, current, load_tensors, read_json, replacing, whole
from transfusion.model.vae import VAE
from transfusion.settings import Count, check


@dataclass(frozen=True)
class EncodeSettings:
    """Compute a data set's latents and keep them."""

    vae: Path
    """directory of a diffusers AutoencoderKL, as `transfusion vae train` writes it"""
    out: Path
    """directory of the cache"""
    data: PictureSettings = field(default_factory=PictureSettings)
    batch: Count = 64
    """pictures encoded at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


def identity(name: str, split: str, pictures: Tensor) -> dict:
    """What latents are of: data set, split, shape of its pictures (N, C, H, W) and a checksum of them."""
    return {"data": name, "split": split, "pictures": list(pictures.shape), "checksum": zlib.crc32(pictures.contiguous().numpy())}


def encode_dataset(settings: EncodeSettings) -> Path:
    """Run `transfusion vae encode`; return the cache's directory, which appears whole or not at all.

    A cache of the same pictures and autoencoder is left as it is.

    Raises:
        ValueError: a folder in place of a data set, or an `out` that holds something else.
    """
    check("vae encode", settings)
    device = choose_device(settings.device)
    if settings.data.folder is not None or settings.data.name not in DATASETS:
        raise ValueError(f"vae encode: data.name is {settings.data.name!r} and data.folder {str(settings.data.folder)!r}; a data set with captions fits, "
                         f"one of {', '.join(map(repr, DATASETS))}")
    with claim("vae encode", settings.out, {"vae": settings.vae}):
        return _encode(settings, device)


def _encode(settings: EncodeSettings, device: torch.device) -> Path:
    vae = VAE.from_pretrained(settings.vae)
    vae.autoencoder.to(device)
    pictures = {split: DATASETS[settings.data.name](split).images for split in SPLITS}
    if pictures["train"].shape[1] != vae.picture_channels:
        raise ValueError(f"vae encode: data.name is {settings.data.name!r}, of {pictures['train'].shape[1]} channels, and the autoencoder of "
                         f"{str(settings.vae)!r} takes {vae.picture_channels}; name the pictures it is for with --data.name")
    about = {"vae": vae.fingerprint(), "splits": [identity(settings.data.name, split, pictures[split]) for split in SPLITS]}
    if any(path.name != LOCK for path in settings.out.iterdir()):
        if not (settings.out / "cache.json").is_file() or read_json(settings.out / "cache.json") != about:
            raise ValueError(f"vae encode: out is {str(settings.out)!r}, which holds something else; a new directory, or a cache of the same pictures and "
                             "autoencoder, fits")
        print(f"{settings.out} holds these latents already")
        return settings.out

    began, count = time.perf_counter(), sum(map(len, pictures.values()))
    shape = "x".join(map(str, vae.encode(pictures["train"][:settings.batch]).shape[1:]))
    minutes = (time.perf_counter() - began) * count / settings.batch / 60
    print(f"{count:,} pictures of {'x'.join(map(str, pictures['train'].shape[1:]))} ({settings.data.name}) to latents of {shape}: about {minutes:,.1f} min",
          flush=True)
    with replacing(settings.out) as fresh, tqdm(total=count, desc=f"vae encode {settings.out.name}", unit="picture", dynamic_ncols=True) as progress:
        for split in SPLITS:
            latents = []
            for batch in pictures[split].split(settings.batch):
                latents.append(vae.encode(batch))
                progress.update(len(batch))
            save_file({"latents": torch.cat(latents).contiguous()}, fresh / f"{split}.safetensors")
        vae.save_pretrained(fresh / "vae")
        (fresh / "cache.json").write_text(json.dumps(about, indent=2))
    return settings.out


def open_dataset(settings: DataSettings, split: str = "train"):
    """Return (data set, None), or, where `settings.latents` names a cache, the data set with latents for images and the VAE they are of.

    Raises:
        ValueError: a data set that does not exist, a cache of other pictures or of another autoencoder than the one beside it, or jitter of latents.
    """
    if settings.name not in DATASETS:
        raise ValueError(f"open_dataset: name is {settings.name!r}; {', '.join(map(repr, DATASETS))} fits")
    dataset, cache = DATASETS[settings.name](split), settings.latents
    if cache is None:
        return dataset, None
    if settings.jitter:
        raise ValueError(f"open_dataset: jitter is {settings.jitter} and latents {str(cache)!r}; 0 fits latents, which cannot be turned and shifted as pixels")
    if not current(cache, "cache.json").is_file():
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, which holds no cache.json; a directory that `transfusion vae encode` wrote fits")
    about, ours = read_json(current(cache, "cache.json"), "encode the data set anew"), identity(settings.name, split, dataset.images)
    kept = next(kept for kept in about["splits"] if kept["split"] == split)
    if kept != ours:
        changed = ", ".join(f"{key} {kept[key]} (now {ours[key]})" for key in ours if kept[key] != ours[key])
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, made of other pictures: {changed}; a cache of {settings.name!r} as it is fits; "
                         "encode it anew")
    with whole(cache) as directory:
        vae, latents = VAE.from_pretrained(directory / "vae"), load_tensors(directory / f"{split}.safetensors")["latents"]
    if vae.fingerprint() != about["vae"]:
        raise ValueError(f"open_dataset: latents is {str(cache)!r}, whose vae is not the one that made them; encode the data set anew")
    dataset.images = latents
    dataset.image_shape = tuple(dataset.images.shape[1:])
    return dataset, vae
