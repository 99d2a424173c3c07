"""How well an autoencoder keeps held-out pictures: `transfusion vae eval --vae DIR --classifier DIR data:NAME`.

It is measured beside linear codecs of the same latent size, which are fitted to training pictures:

    vae          decode(encode(picture))
    patch PCA    each patch of factor x factor pixels as C numbers, its principal components: the best local linear
                 codec of the latent's shape
    picture PCA  the whole picture as C h w numbers, or as many as the training pictures give

PSNR and SSIM are means over pictures. The Frechet distance is that between the reconstructions and the pictures
themselves in the pooled features of the named classifier; it is called FID only when the classifier is Inception v3.
"""
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from transfusion.data.dataset import SPLITS, DatasetSettings, Pictures
from transfusion.data.latents import open_pictures
from transfusion.data.picture_files import describe
from transfusion.device import choose_device
from transfusion.eval.features import Features, in_batches
from transfusion.eval.metrics import frechet_distance, psnr, ssim
from transfusion.eval.picture_grids import reconstruction_grid
from transfusion.files import check_writable, write_text
from transfusion.model.vae import VAE
from transfusion.settings import Count, Range, check

FITTED_NUMBERS = 2**27  # pixels times channels that the linear codecs are fitted to, at most: 1 GB in float64


@dataclass(frozen=True)
class VAEEvalSettings:
    """Measure an autoencoder on held-out pictures."""

    vae: Path
    """directory of a diffusers AutoencoderKL, as `transfusion vae train` writes it"""
    classifier: Path | None = None
    """directory of an image classifier (transformers, safetensors) in whose features the Frechet distance is taken;
    None leaves it out"""
    out: Path | None = None
    """directory for metrics.json and reconstructions.png; None: eval/ inside that of the autoencoder"""
    data: DatasetSettings = field(default_factory=DatasetSettings)
    pictures: Count = 2000
    """held-out pictures at most"""
    fitted: Annotated[int, Range(2)] = 5000
    """training pictures that the linear codecs are fitted to, at most; fewer where they are large"""
    batch: Count = 64
    """pictures at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


class LinearCodec:
    """The first `components` principal components of rows (N, F): right singular vectors of the centred rows."""

    def __init__(self, rows: Tensor, components: int):
        rows = rows.double()
        self.mean = rows.mean(0)
        centred = rows - self.mean
        gram = centred.mT @ centred if len(rows) >= rows.shape[1] else centred @ centred.mT
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :min(components, len(rows) - 1, rows.shape[1])]
        basis = vectors if len(rows) >= rows.shape[1] else centred.mT @ vectors
        self.basis = torch.linalg.qr(basis).Q                                              # (F, k)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (M, F) as their components keep them."""
        return ((rows.double() - self.mean) @ self.basis @ self.basis.mT + self.mean).float()


def patch_pca(train: Tensor, factor: int, channels: int):
    """Return the codec, of pictures (N, C, H, W) to pictures, that keeps `channels` numbers of each patch."""
    codec = LinearCodec(_patches(train, factor).flatten(0, 1), channels)

    def through(pictures: Tensor) -> Tensor:
        kept = codec(_patches(pictures, factor).flatten(0, 1)).view(len(pictures), -1, codec.mean.numel()).mT
        return F.fold(kept, pictures.shape[-2:], factor, stride=factor).clamp(-1, 1)

    return through


def picture_pca(train: Tensor, numbers: int):
    """Return the codec, of pictures (N, C, H, W) to pictures, that keeps `numbers` numbers of each picture."""
    codec = LinearCodec(train.flatten(1), numbers)
    return lambda pictures: codec(pictures.flatten(1)).view_as(pictures).clamp(-1, 1)


def _patches(pictures: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) to (N, patches, C * factor * factor)."""
    return F.unfold(pictures, factor, stride=factor).mT


def spread(pictures: Pictures, count: int) -> Tensor:
    """At most `count` pictures, evenly spread, as one tensor."""
    return pictures[torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().long()]


def measure(real: Tensor, kept: Tensor, features: Features | None) -> dict[str, float]:
    """Return PSNR, SSIM and, given a classifier, the Frechet distance of reconstructions `kept` from real pictures."""
    parts = list(zip(real.split(64), kept.split(64)))
    numbers = {name: torch.cat([of(a, b) for a, b in parts]).mean().item()
               for name, of in (("psnr", psnr), ("ssim", ssim))}
    if features is not None:
        pooled = (in_batches(features.pooled, pictures) for pictures in (real, kept))
        numbers["frechet_distance"] = frechet_distance(*pooled)
    return numbers


def evaluate(settings: VAEEvalSettings) -> dict:
    """Run `transfusion vae eval`: print a table, write metrics.json and reconstructions.png; return the metrics.

    Raises:
        ValueError: pictures that the autoencoder cannot take.
    """
    check("vae eval", settings)
    out = settings.out or settings.vae / "eval"
    device = choose_device(settings.device)
    vae = VAE.from_pretrained(settings.vae).to(device)
    check_writable("vae eval", out)
    features = None if settings.classifier is None else Features.from_pretrained(settings.classifier).to(device)
    train, real = _open(settings, vae)

    kept = _through_codecs(settings, vae, train, real, features)
    results = {"pictures": len(real), "latent": list(vae.encode(real[:1]).shape[1:]),
               "features": features and features.name,
               "codecs": {name: measure(real, pictures, features) for name, pictures in kept.items()}}
    write_text(out / "metrics.json", json.dumps(results, indent=2))
    shown = torch.linspace(0, len(real) - 1, min(16, len(real))).round().long()
    rows = {"picture": real[shown], **{name: pictures[shown] for name, pictures in kept.items()}}
    reconstruction_grid(out / "reconstructions.png", rows)
    print(_table(results["codecs"]))
    return results


def _open(settings: VAEEvalSettings, vae: VAE) -> tuple[Tensor, Tensor]:
    """Return the training pictures that codecs are fitted to and the held-out ones that are measured."""
    train, held_out = (open_pictures("vae eval", settings.data, split).pictures for split in SPLITS)
    if train.shape[1] != vae.picture_channels:
        raise ValueError(f"vae eval: pictures have {train.shape[1]} channels and the autoencoder of "
                         f"{str(settings.vae)!r} takes "
                         f"{vae.picture_channels}; name the pictures it is for with data:NAME, or data:folder with "
                         "--data.folder and --data.channels")
    for split, pictures in zip(SPLITS, (train, held_out)):
        print(describe(pictures, settings.data, split))
    fitted = min(settings.fitted, FITTED_NUMBERS // train.shape[1:].numel())
    return spread(train, fitted), spread(held_out, settings.pictures)


def _through_codecs(settings: VAEEvalSettings, vae: VAE, train: Tensor, real: Tensor,
                    features: Features | None) -> dict[str, Tensor]:
    """Return what each codec makes of the pictures `real`; say before how long it takes."""
    began = time.perf_counter()
    latent = vae.encode(real[:settings.batch])
    vae.decode(latent)
    minutes = (time.perf_counter() - began) * len(real) / settings.batch / 60
    distance = "left out, no classifier is named"
    if features is not None:
        distance = f"in {features.name}"
    print(f"encoding and decoding {len(real):,} of them: about {minutes:,.1f} min; Frechet distance: "
          f"{distance}", flush=True)
    batches = tqdm(real.split(settings.batch), desc="vae eval", unit="batch", dynamic_ncols=True)
    kept = {"vae": torch.cat([vae.decode(vae.encode(batch)) for batch in batches])}
    codecs = {"patch PCA": patch_pca(train, vae.factor, vae.channels),
              "picture PCA": picture_pca(train, latent.shape[1:].numel())}
    parts = real.split(settings.batch)
    return kept | {name: torch.cat([codec(part) for part in parts]) for name, codec in codecs.items()}


def _table(codecs: dict[str, dict[str, float]]) -> str:
    """A line for each codec."""
    columns = list(codecs["vae"])
    head = f"{'codec':<14}" + "".join(f"{name:>18}" for name in columns)
    lines = [f"{name:<14}" + "".join(f"{numbers[column]:>18.3f}" for column in columns)
             for name, numbers in codecs.items()]
    return "\n".join([head, *lines])
