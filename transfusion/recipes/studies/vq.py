"""Pictures as codes: a VQ-VAE of diffusers (arXiv:1711.00937), trained on the pictures themselves with commitment 0.25.

    loss = mean |picture - decoded|^2 + mean |sg(z) - code|^2 + 0.25 mean |z - sg(code)|^2              arXiv:1711.00937, eq. 3

Its first third trains an autoencoder without codes; k-means of what that encodes is the codebook that the rest starts from, so that no code is dead.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import VQModel
from sklearn.cluster import KMeans
from torch import Tensor
from tqdm import tqdm

from transfusion.command import claim
from transfusion.files import check_files, current, replacing, whole
from transfusion.settings import Count, Positive, check
from transfusion.train.checkpoint import check_finite, check_weights, numbers

GROUPS = 8

DIVERGED = "nothing was saved; train again with a lower lr"


@dataclass(frozen=True)
class VQSettings:
    """A VQ autoencoder and its training."""

    channels: tuple[Count, ...] = (16, 32)
    """at each resolution; each further one halves the sides"""
    codes: Count = 128
    """vectors in the codebook"""
    code_dim: Count = 8
    """numbers in one"""
    steps: Count = 900
    """optimizer steps"""
    batch: Count = 64
    """pictures in one"""
    lr: Positive = 2e-3
    """peak learning rate; it falls to 0 along a cosine"""


def build_autoencoder(channels: int, settings: VQSettings) -> VQModel:
    """A VQModel without attention for pictures of `channels`."""
    depth = len(settings.channels)
    autoencoder = VQModel(
        in_channels=channels, out_channels=channels, latent_channels=settings.code_dim,
        block_out_channels=settings.channels, norm_num_groups=GROUPS,
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth, num_vq_embeddings=settings.codes,
        mid_block_add_attention=False)
    autoencoder.quantize.legacy = False  # the default has 0.25 on the other term
    return autoencoder


def train_autoencoder(images: Tensor, out: Path, settings: VQSettings, seed: int = 0) -> VQModel:
    """Train on pictures (N, C, H, W) in [-1, 1], save to `out` as safetensors and return the autoencoder, frozen."""
    check("train_autoencoder", settings)
    if any(width % GROUPS for width in settings.channels):
        raise ValueError(f"train_autoencoder: channels is {settings.channels}; multiples of {GROUPS} fit")
    with claim("train_autoencoder", out):
        return _train(images, out, settings, seed)


def _train(images: Tensor, out: Path, settings: VQSettings, seed: int) -> VQModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = build_autoencoder(images.shape[1], settings).train()
        optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=settings.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        for step in tqdm(range(settings.steps), desc="train VQ autoencoder", unit="step", dynamic_ncols=True):
            quantized = step >= settings.steps // 3
            if step == settings.steps // 3:
                start_codebook(autoencoder, images, seed)
            batch = images[torch.randint(len(images), (settings.batch,))]
            decoded = autoencoder.decode(autoencoder.encode(batch).latents, force_not_quantize=not quantized)
            loss = torch.nn.functional.mse_loss(decoded.sample, batch) + decoded.commit_loss.mean()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in autoencoder.parameters() if p.grad is not None])
            check_finite("train_autoencoder", out, step, numbers(loss=loss, grad_norm=norm), DIVERGED)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    check_weights("train_autoencoder", out, settings.steps, autoencoder.state_dict(), DIVERGED)
    with replacing(out) as fresh:
        autoencoder.save_pretrained(fresh, safe_serialization=True)
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def start_codebook(autoencoder: VQModel, images: Tensor, seed: int) -> None:
    """Make the codes the k-means centres of what up to 2048 pictures are encoded to."""
    latents = autoencoder.encode(images[torch.randperm(len(images))[:2048]]).latents.movedim(1, -1).flatten(0, -2)
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
    return autoencoder.decode(autoencoder.quantize.embedding(codes).movedim(-1, 1), force_not_quantize=True).sample.clamp(-1, 1)
