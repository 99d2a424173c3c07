"""Pictures as codes: a VQ-VAE of diffusers (arXiv:1711.00937), trained on the pictures themselves with commitment 0.25.

    loss = mean |picture - decoded|^2 + mean |sg(z) - code|^2 + 0.25 mean |z - sg(code)|^2       arXiv:1711.00937, eq. 3

The first third of the steps trains an autoencoder without codes. The centres that k-means finds among what it encodes
are the codebook that the rest starts from, so that no code is dead.
"""
import dataclasses
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import VQModel
from sklearn.cluster import KMeans
from torch import Tensor

from transfusion.command import claim
from transfusion.files import check_files, current, whole
from transfusion.settings import Count, check
from transfusion.train.loop import Batch, Term, end_run, fit
from transfusion.train.optimizer import Player, build_optimizer
from transfusion.train.resuming import same_run
from transfusion.train.settings import RunSettings, StepSettings, check_steps, defaults

GROUPS = 8  # of the group norms


@dataclass(frozen=True)
@defaults(steps=900, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0, clip=None)
class VQSettings(StepSettings):
    """A VQ autoencoder and its training; lr falls to 0 along a cosine."""

    channels: tuple[Count, ...] = (16, 32)
    """at each resolution; each further one halves the sides"""
    codes: Count = 128
    """vectors in the codebook"""
    code_dim: Count = 8
    """numbers in one"""
    batch: Count = 64
    """pictures in a step"""


@dataclass(frozen=True)
class VQRun(RunSettings):
    """A training run: what the autoencoder is made of."""

    settings: VQSettings = VQSettings()
    """how it is trained"""
    pictures: tuple[int, ...] = ()
    """shape and checksum of the pictures"""


def build_autoencoder(channels: int, settings: VQSettings) -> VQModel:
    """A VQModel without attention for pictures of `channels`."""
    depth = len(settings.channels)
    autoencoder = VQModel(
        in_channels=channels, out_channels=channels, latent_channels=settings.code_dim,
        block_out_channels=settings.channels, norm_num_groups=GROUPS, num_vq_embeddings=settings.codes,
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        mid_block_add_attention=False)
    autoencoder.quantize.legacy = False  # the default has 0.25 on the other term
    return autoencoder


def learning_rates(settings: VQSettings) -> list[float]:
    """The learning rate of each step: torch's CosineAnnealingLR, whose recursion the closed form meets to 3e-15."""
    rates, cosine = [settings.lr], [1 + math.cos(math.pi * step / settings.steps) for step in range(settings.steps)]
    for before, now in zip(cosine, cosine[1:]):
        rates.append(now / before * rates[-1])
    return rates


def train_autoencoder(images: Tensor, out: Path, settings: VQSettings, seed: int = 0) -> VQModel:
    """Train on pictures (N, C, H, W) in [-1, 1], save to `out` as safetensors and return the autoencoder, frozen.

    The same call after an interruption goes on from the last state saved.
    """
    check("train_autoencoder", settings)
    check_steps("train_autoencoder", settings, "batch")
    if any(width % GROUPS for width in settings.channels):
        raise ValueError(f"train_autoencoder: channels is {settings.channels}; multiples of {GROUPS} fit")
    pictures = (*images.shape, zlib.crc32(images.contiguous().numpy()))
    run = VQRun(out=Path(out), seed=seed, settings=settings, pictures=pictures)
    with claim("train_autoencoder", out):
        run = dataclasses.replace(run, resume=same_run(run, ("settings", "pictures", "seed")))
        task, rates = VQTask(run, images), learning_rates(settings)
        done = fit("train_autoencoder", run, settings, task, rates.__getitem__, fixed=(),
                   way_on="nothing was saved; train again with a lower lr")
        end_run(run, settings, done)
    return task.autoencoder.eval().requires_grad_(False)


class VQTask:
    """Pictures that an autoencoder reconstructs, from its latents at first and then from their codes."""

    unit, shown = "pictures", ("reconstruction", "commitment")

    def __init__(self, run: VQRun, images: Tensor):
        """Build the autoencoder and draw what all steps draw, so that a step can be taken again."""
        settings = run.settings
        self.run, self.images, self.size = run, images, settings.batch
        self.quantized_from = settings.steps // 3
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            self.autoencoder = build_autoencoder(images.shape[1], settings).train()
            self.chosen = []
            for step in range(settings.steps):
                if step == self.quantized_from:
                    self.measured = torch.randperm(len(images))[:2048]
                self.chosen.append(torch.randint(len(images), (settings.batch,)))
        self.player = Player(self.autoencoder, build_optimizer(self.autoencoder, settings, fused=None))
        self.players = (self.player,)

    def batches(self, step: int) -> list[Batch]:
        """A step's pictures in parts; before the first step with codes, the codebook is made."""
        if step == self.quantized_from:
            start_codebook(self.autoencoder, self.images[self.measured], self.run.seed)
        parts = self.images[self.chosen[step]].tensor_split(self.run.settings.accumulate)
        return [Batch(part, dict.fromkeys(self.shown, len(part))) for part in parts]

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """What the reconstruction misses, and how far latents and codes are apart."""
        latents = self.autoencoder.encode(batch.inputs).latents
        decoded = self.autoencoder.decode(latents, force_not_quantize=step < self.quantized_from)
        reconstruction = torch.nn.functional.mse_loss(decoded.sample, batch.inputs)
        yield self.player, {"reconstruction": Term(1.0, reconstruction),
                            "commitment": Term(1.0, decoded.commit_loss.mean())}

    def save(self, directory: Path, step: int) -> None:
        """Write the autoencoder after the last step."""
        if step == self.run.settings.steps:
            self.autoencoder.save_pretrained(directory, safe_serialization=True)


@torch.no_grad()
def start_codebook(autoencoder: VQModel, images: Tensor, seed: int) -> None:
    """Make the codes the k-means centres of what pictures are encoded to."""
    latents = autoencoder.encode(images).latents.movedim(1, -1).flatten(0, -2)
    book = autoencoder.quantize.embedding.weight
    centres = KMeans(len(book), n_init=1, random_state=seed).fit(latents.numpy()).cluster_centers_
    book.copy_(torch.from_numpy(centres))


def holds_autoencoder(path: Path) -> bool:
    """Whether a directory holds what `train_autoencoder` saves."""
    return current(path, "diffusion_pytorch_model.safetensors").is_file()


def load_autoencoder(path: Path) -> VQModel:
    """Load what `train_autoencoder` saved, frozen."""
    with whole(path) as directory:
        check_files(directory)
        return VQModel.from_pretrained(directory, use_safetensors=True).eval().requires_grad_(False)


@torch.no_grad()
def to_codes(autoencoder: VQModel, images: Tensor) -> Tensor:
    """Pictures (N, C, H, W) to their codes (N, h, w), int64."""
    latents = autoencoder.encode(images).latents
    return autoencoder.quantize(latents)[2][2].view(len(images), *latents.shape[2:])


@torch.no_grad()
def from_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """Codes (N, h, w) to pictures (N, C, H, W) in [-1, 1]."""
    latents = autoencoder.quantize.embedding(codes).movedim(-1, 1)
    return autoencoder.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
