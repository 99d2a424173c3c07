"""How well an autoencoder keeps held-out pictures, beside linear codecs of the same latent size: `transfusion vae eval --vae DIR --classifier DIR`.

    vae          decode(encode(picture))
    patch PCA    each patch of factor x factor pixels as C numbers, its principal components: the best local linear codec of the latent's shape
    picture PCA  the whole picture as C h w numbers, or as many as the training pictures give

Both are fitted to training pictures. PSNR and SSIM are means over pictures; the Frechet distance is that of the named classifier's pooled features of
the reconstructions to those of the pictures themselves, called FID only when the classifier is Inception v3.
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

from transfusion.data.pictures import PictureFolder, PictureSettings, describe, open_pictures
from transfusion.device import choose_device
from transfusion.eval.features import Features, in_batches
from transfusion.eval.metrics import frechet_distance, psnr, ssim
from transfusion.eval.pictures import reconstruction_grid
from transfusion.files import check_writable, write_text
from transfusion.model.vae import VAE
from transfusion.settings import Count, Range, check

FITTED_NUMBERS = 2**27  # pixels times channels that the linear codecs are fitted to, at most: 1 GB in float64


@dataclass(frozen=True)
class VAEEvalSettings:
    """Measure an autoencoder."""

    vae: Path
    """directory of a diffusers AutoencoderKL, as `transfusion vae train` writes it"""
    classifier: Path | None = None
    """directory of an image classifier (transformers, safetensors) in whose features the Frechet distance is taken; None leaves it out"""
    out: Path | None = None
    """directory for metrics.json and reconstructions.png; None: eval/ inside that of the autoencoder"""
    data: PictureSettings = field(default_factory=PictureSettings)
    pictures: Count = 2000
    """held-out pictures at most"""
    fitted: Annotated[int, Range(2)] = 5000
    """training pictures that the linear codecs are fitted to, at most; fewer where they are large"""
    batch: Count = 64
    """pictures at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


class LinearCodec:
    """Principal components of rows (N, F): `components` numbers for each row, by the right singular vectors of the centred rows."""

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
    """Return the codec that keeps `channels` numbers of each factor x factor patch; it maps pictures (N, C, H, W) to pictures."""
    codec = LinearCodec(_patches(train, factor).flatten(0, 1), channels)
    return lambda pictures: F.fold(codec(_patches(pictures, factor).flatten(0, 1)).view(len(pictures), -1, codec.mean.numel()).mT, pictures.shape[-2:],
                                   factor, stride=factor).clamp(-1, 1)


def picture_pca(train: Tensor, numbers: int):
    """Return the codec that keeps `numbers` numbers of a whole picture; it maps pictures (N, C, H, W) to pictures."""
    codec = LinearCodec(train.flatten(1), numbers)
    return lambda pictures: codec(pictures.flatten(1)).view_as(pictures).clamp(-1, 1)


def _patches(pictures: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) to (N, patches, C * factor * factor)."""
    return F.unfold(pictures, factor, stride=factor).mT


def spread(pictures: Tensor | PictureFolder, count: int) -> Tensor:
    """At most `count` pictures, evenly spread, as one tensor."""
    return pictures[torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().long()]


def measure(real: Tensor, kept: Tensor, features: Features | None) -> dict[str, float]:
    """PSNR, SSIM and, given a classifier, the Frechet distance of reconstructions `kept` from the pictures themselves."""
    parts = list(zip(real.split(64), kept.split(64)))
    numbers = {name: torch.cat([of(a, b) for a, b in parts]).mean().item() for name, of in (("psnr", psnr), ("ssim", ssim))}
    if features is not None:
        numbers[frechet_name(features)] = frechet_distance(in_batches(features.pooled, real), in_batches(features.pooled, kept))
    return numbers


def frechet_name(features: Features) -> str:
    """`fid` for Inception v3's features alone, else `frechet_distance`."""
    return "fid" if features.is_inception else "frechet_distance"


def evaluate(settings: VAEEvalSettings) -> dict:
    """Run `transfusion vae eval`: print a table, write metrics.json and reconstructions.png; return what metrics.json holds.

    Raises:
        ValueError: pictures that the autoencoder cannot take.
    """
    check("vae eval", settings)
    out = settings.out or settings.vae / "eval"
    check_writable("vae eval", out)
    device = choose_device(settings.device)
    vae = VAE.from_pretrained(settings.vae)
    vae.autoencoder.to(device)
    features = None if settings.classifier is None else Features.from_pretrained(settings.classifier).to(device)
    sets = {split: open_pictures(settings.data, split) for split in ("train", "held-out")}
    if sets["train"].shape[1] != vae.picture_channels:
        raise ValueError(f"vae eval: pictures have {sets['train'].shape[1]} channels and the autoencoder of {str(settings.vae)!r} takes "
                         f"{vae.picture_channels}; name the pictures it is for with --data.name, or --data.folder and --data.channels")
    for split, pictures in sets.items():
        print(describe(pictures, settings.data, split))
    train = spread(sets["train"], min(settings.fitted, FITTED_NUMBERS // sets["train"].shape[1:].numel()))
    real = spread(sets["held-out"], settings.pictures)

    began = time.perf_counter()
    latent = vae.encode(real[:settings.batch]).shape[1:]
    vae.decode(vae.encode(real[:settings.batch]))
    print(f"encoding and decoding {len(real):,} of them: about {(time.perf_counter() - began) * len(real) / settings.batch / 60:,.1f} min; Frechet distance: "
          f"{'left out, no classifier is named' if features is None else f'{frechet_name(features)} in {features.name}'}", flush=True)
    batches = tqdm(real.split(settings.batch), desc="vae eval", unit="batch", dynamic_ncols=True)
    kept = {"vae": torch.cat([vae.decode(vae.encode(batch)) for batch in batches]), **{
        name: torch.cat([codec(batch) for batch in real.split(settings.batch)])
        for name, codec in (("patch PCA", patch_pca(train, vae.factor, vae.channels)), ("picture PCA", picture_pca(train, latent.numel())))}}

    results = {"pictures": len(real), "latent": list(latent), "features": features and features.name,
               "codecs": {name: measure(real, pictures, features) for name, pictures in kept.items()}}
    write_text(out / "metrics.json", json.dumps(results, indent=2))
    shown = torch.linspace(0, len(real) - 1, min(16, len(real))).round().long()
    reconstruction_grid(out / "reconstructions.png", {"picture": real[shown], **{name: pictures[shown] for name, pictures in kept.items()}})
    columns = list(results["codecs"]["vae"])
    print("\n".join([f"{'codec':<14}" + "".join(f"{name:>18}" for name in columns)] + [
        f"{name:<14}" + "".join(f"{numbers[column]:>18.3f}" for column in columns) for name, numbers in results["codecs"].items()]))
    return results
