"""Train the autoencoder whose latents a Transfusion draws: `transfusion vae train PRESET [--optim.steps 100 ...]`.

Each step draws pictures, encodes them, decodes a sample of the posterior and takes one step of AdamW on the losses of
transfusion/train/autoencoder_losses.py, then one on the discriminator's loss once it plays. The pictures, flips and
samples of a step depend on (seed, step) alone, so that a resumed run gives the losses of one that never stopped. Ctrl-C
saves. What is saved is what `VAE.from_pretrained` reads: the averaged weights, and scaling_factor and shift_factor such
that the latents of the training pictures have mean 0 and standard deviation 1.
"""
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import diffusers  # its classes are looked up where they are used, as in `transfusion.model.vae`
import torch
from torch import Tensor, nn

from transfusion.command import claim
from transfusion.data.batches import step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.data.latents import open_pictures
from transfusion.data.picture_files import describe
from transfusion.device import choose_device
from transfusion.eval.features import Features
from transfusion.settings import Count, NotNegative, Share, WholeNumber, check
from transfusion.train.autoencoder_losses import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    identity_loss,
    kl_loss,
    perceptual_loss,
    reconstruction_loss,
)
from transfusion.train.average import Average
from transfusion.train.checkpoint import check_finite
from transfusion.train.loop import Batch, Term, fit, say_stopped
from transfusion.train.optimizer import Player, build_optimizer, learning_rate
from transfusion.train.resuming import found_resume
from transfusion.train.settings import OptimizerSettings, RunSettings, check_steps, defaults
from transfusion.train.trackers import check_trackers

FIRST_LOG_VARIANCE = -6.0  # of the posterior: at 0 the decoder would first read noise
MEASURED = 4096  # training pictures, evenly spread, that scale and shift are measured on
FIXED = ("model", "data", "losses", "seed", "optim.batch", "optim.flip")
"""Settings that decide what was trained on: a run goes on with these alone as they were."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """The shape of diffusers' AutoencoderKL."""

    latent_channels: Count = 4
    """channels of the latent"""
    widths: tuple[Count, ...] = (16, 48, 96)
    """channels at each resolution, from the picture down; each after the first halves the sides"""
    blocks: Count = 1
    """residual blocks at each resolution of the encoder; the decoder has one more"""
    groups: Count = 8
    """of the group norms"""
    attention: bool = False
    """attention at the lowest resolution"""


@dataclass(frozen=True)
class LossSettings:
    """The terms of the loss (arXiv:2408.11039, appendix A)."""

    perceptual_model: Path | None = None
    """directory of an image classifier (transformers, safetensors) whose stages the perceptual term compares; None
    leaves the term out"""
    identity_model: Path | None = None
    """directory of the model whose pooled features the identity term compares (the paper: MoCo v2); None leaves
    the term out"""
    perceptual: NotNegative = 1.0
    """weight of the perceptual term"""
    identity: NotNegative = 0.2
    """weight of the identity term"""
    adversarial: NotNegative = 0.5
    """weight of the adversarial term"""
    adversarial_from: WholeNumber | None = None
    """step from which the discriminator plays (the paper: 50,000); None: never"""
    kl: NotNegative = 1e-6
    """weight of the KL divergence, summed over a picture's latent"""
    discriminator_width: Count = 64
    """channels of the discriminator's first layer"""
    discriminator_layers: Count = 3
    """its layers of stride 2: 3 see patches of 70x70 pixels, 1 of 16x16"""


@dataclass(frozen=True)
@defaults(lr=1e-3, min_lr=1e-5, warmup=50, betas=(0.9, 0.99), weight_decay=0.0, ema=0.99)
class VAEOptimSettings(OptimizerSettings):
    """Steps and batches, the same for the autoencoder and the discriminator."""

    batch: Count = 32
    """pictures in a step"""
    flip: Share = 0.5
    """share of pictures that are mirrored"""


@dataclass(frozen=True)
@defaults(out=Path("runs/vae"))
class VAETrainConfig(RunSettings):
    """A training run of an autoencoder."""

    model: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    data: DatasetSettings = field(default_factory=DatasetSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    optim: VAEOptimSettings = field(default_factory=VAEOptimSettings)


def build_autoencoder(settings: AutoencoderSettings, shape: tuple[int, int, int],
                      seed: int) -> "diffusers.AutoencoderKL":
    """Return a freshly initialised autoencoder for pictures of `shape` (C, H, W), its posteriors narrow.

    Raises:
        ValueError: sides that the halvings do not divide, or widths that the groups do not.
    """
    channels, *sides = shape
    factor, levels = 2 ** (len(settings.widths) - 1), len(settings.widths)
    if any(side % factor for side in sides):
        raise ValueError(f"vae train: pictures have shape {tuple(shape)} and model.widths is {settings.widths}; "
                         f"sides that {factor} divides fit; set --data.size (folders) or fewer widths")
    if any(width % settings.groups for width in settings.widths):
        raise ValueError(f"vae train: model.groups is {settings.groups} and model.widths {settings.widths}; "
                         "a divisor of each width fits")
    torch.manual_seed(seed)
    autoencoder = diffusers.AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=settings.latent_channels, sample_size=sides[0],
        block_out_channels=settings.widths, layers_per_block=settings.blocks, norm_num_groups=settings.groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=settings.attention, scaling_factor=1.0, shift_factor=0.0)
    torch.nn.init.constant_(autoencoder.quant_conv.bias[settings.latent_channels:], FIRST_LOG_VARIANCE)
    return autoencoder


def build_discriminator(settings: LossSettings, shape: tuple[int, int, int]) -> PatchDiscriminator:
    """Return a freshly initialised discriminator of pictures of `shape` (C, H, W).

    Raises:
        ValueError: a width that its norms do not divide, or it is to play and its layers leave no patch of such
            pictures.
    """
    if settings.discriminator_width % 4:
        raise ValueError(f"vae train: losses.discriminator_width is {settings.discriminator_width}; a multiple of 4 "
                         "fits, for twice as many channels are normed in 8 groups")
    channels, *sides = shape
    if settings.adversarial_from is not None and min(sides) < 3 * 2 ** settings.discriminator_layers:
        raise ValueError(f"vae train: losses.discriminator_layers is {settings.discriminator_layers} and pictures "
                         f"have shape {tuple(shape)}; sides of at least {3 * 2 ** settings.discriminator_layers} fit; "
                         "lower --losses.discriminator-layers")
    return PatchDiscriminator(channels, settings.discriminator_width, settings.discriminator_layers)


class Terms:
    """The terms that have what they need: their weights, and their values for pictures and their reconstructions."""

    def __init__(self, settings: LossSettings, discriminator: PatchDiscriminator, device: torch.device):
        self.settings, self.discriminator = settings, discriminator
        self.perceptual, self.identity = (path and Features.from_pretrained(path).to(device)
                                          for path in (settings.perceptual_model, settings.identity_model))

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at a step; what is missing is not computed."""
        s = self.settings
        plays = s.adversarial_from is not None and step >= s.adversarial_from
        weights = {"l1": 1.0, "perceptual": s.perceptual * (self.perceptual is not None),
                   "identity": s.identity * (self.identity is not None), "adversarial": s.adversarial * plays,
                   "kl": s.kl}
        return {name: weight for name, weight in weights.items() if weight}

    def values(self, step: int, pictures: Tensor, drawn: Tensor, posterior) -> dict[str, Tensor]:
        """Value of each term that has a weight, unweighted; the discriminator gets no gradient from it."""
        def adversarial() -> Tensor:
            with frozen(self.discriminator):
                return generator_loss(self.discriminator, drawn)

        terms = {"l1": lambda: reconstruction_loss(pictures, drawn), "kl": lambda: kl_loss(posterior),
                 "perceptual": lambda: perceptual_loss(self.perceptual, pictures, drawn),
                 "identity": lambda: identity_loss(self.identity, pictures, drawn), "adversarial": adversarial}
        return {name: terms[name]() for name in self.weights(step)}

    def table(self) -> str:
        """What the loss is made of, and what is left out, and why."""
        s, start = self.settings, self.settings.adversarial_from
        adversarial = "left out: losses.adversarial_from is None" if start is None else f"from step {start:,}"
        perceptual, identity = (f"left out: losses.{name}_model is None" if features is None else features.name
                                for name, features in (("perceptual", self.perceptual), ("identity", self.identity)))
        rows = (("l1", 1.0, "always"), ("perceptual", s.perceptual, perceptual), ("identity", s.identity, identity),
                ("adversarial", s.adversarial, adversarial), ("kl", s.kl, "always"))
        lines = (f"{name:<14}{weight:>8g}  {note}" for name, weight, note in rows)
        return "\n".join([f"{'term':<14}{'weight':>8}", *lines])


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """What is computed inside gives the model's parameters no gradient."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def reconstruct(autoencoder: "diffusers.AutoencoderKL", pictures: Tensor, generator: torch.Generator):
    """Return the decoded sample of the posterior, (N, C, H, W), and the posterior."""
    posterior = autoencoder.encode(pictures).latent_dist
    return autoencoder.decode(posterior.sample(generator)).sample, posterior


def draw_pictures(pictures, optim: VAEOptimSettings, generator: torch.Generator) -> Tensor:
    """Draw a batch, a share of it mirrored."""
    indices = torch.randint(len(pictures), (optim.batch,), generator=generator)
    flipped = torch.rand(optim.batch, generator=generator) < optim.flip
    batch = pictures[indices]
    return torch.where(flipped[:, None, None, None], batch.flip(-1), batch)


def latent_statistics(autoencoder: "diffusers.AutoencoderKL", pictures, batch: int) -> tuple[float, float]:
    """Mean and standard deviation over the latents, which are posterior means, of at most MEASURED pictures."""
    chosen = torch.linspace(0, len(pictures) - 1, min(MEASURED, len(pictures))).round().long()
    with torch.no_grad():
        batches = (pictures[part].to(autoencoder.device) for part in chosen.split(batch))
        latents = [autoencoder.encode(x).latent_dist.mode().cpu().double() for x in batches]
    latents = torch.cat(latents)
    return latents.mean().item(), latents.std().item()


class AutoencoderTask:
    """Pictures that an autoencoder reconstructs; a discriminator, once it plays, tells the two apart."""

    unit, shown = "pictures", ("loss", "l1", "perceptual", "identity", "adversarial", "discriminator")

    def __init__(self, config: VAETrainConfig, pictures, autoencoder: "diffusers.AutoencoderKL", terms: Terms):
        self.config, self.pictures, self.terms, self.size = config, pictures, terms, config.optim.batch
        average = Average(autoencoder, config.optim.ema)
        self.autoencoder = Player(autoencoder, build_optimizer(autoencoder, config.optim), average)
        self.opponent = Player(terms.discriminator, build_optimizer(terms.discriminator, config.optim),
                               name="discriminator", loss="discriminator")
        self.players = (self.autoencoder, self.opponent)

    def batches(self, step: int) -> list[Batch]:
        """Draw a step's pictures, then split them; samples of the posteriors come from the same generator, in order."""
        generator = step_generator(self.config.seed, step)
        drawn = draw_pictures(self.pictures, self.config.optim, generator)
        return [Batch((part, generator), dict.fromkeys(self.shown + ("kl",), len(part)))
                for part in drawn.tensor_split(self.config.optim.accumulate)]

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """The autoencoder's terms, then the discriminator's loss of the same reconstructions."""
        device, generator = self.autoencoder.model.device, batch.inputs[1]
        given, weights = batch.inputs[0].to(device), self.terms.weights(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
            drawn, posterior = reconstruct(self.autoencoder.model, given, generator)
            values = self.terms.values(step, given, drawn, posterior)
        yield self.autoencoder, {name: Term(weights[name], value) for name, value in values.items()}
        if "adversarial" in weights:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
                loss = discriminator_loss(self.opponent.model, given, drawn)
            yield self.opponent, {"discriminator": Term(1.0, loss)}

    def save(self, directory: Path, step: int) -> None:
        """Write the averaged autoencoder with the scale and shift of its latents."""
        config, model = self.config, self.autoencoder.model
        with self.autoencoder.averaged.applied(model):
            mean, std = latent_statistics(model, self.pictures, 4 * config.optim.batch)  # as little memory as a step's
            check_finite("vae train", config.out, step,
                         {"mean of the latents": mean, "1 / their standard deviation": 1 / std if std else math.inf})
            model.register_to_config(scaling_factor=1 / std, shift_factor=mean)
            model.save_pretrained(directory, safe_serialization=True)


def train(config: VAETrainConfig) -> Path:
    """Run `config` as far as `fit` goes; return the directory with the autoencoder."""
    config = found_resume(config)
    inputs = {f"data.{name}": path for name, path in config.data.directories().items()}
    inputs |= {f"losses.{name}": getattr(config.losses, name) for name in ("perceptual_model", "identity_model")}
    check("vae train", config)
    check_steps("vae train", config.optim, "batch", "optim.")
    check_trackers("vae train", config.log or ())
    with claim("vae train", config.out, inputs, config.resume):
        return _train(config)


def _train(config: VAETrainConfig) -> Path:
    # data and models
    device = choose_device(config.device)
    pictures = open_pictures("vae train", config.data).pictures
    shape = tuple(pictures.shape[1:])
    autoencoder = build_autoencoder(config.model, shape, config.seed).to(device).train()
    discriminator = build_discriminator(config.losses, shape).to(device)
    terms = Terms(config.losses, discriminator, device)
    print(describe(pictures, config.data, "train"))
    print(terms.table())
    print(parameter_counts(config, autoencoder, discriminator), flush=True)

    # optimizers and loop
    task = AutoencoderTask(config, pictures, autoencoder, terms)
    done = fit("vae train", config, config.optim, task, lambda step: learning_rate(step, config.optim), fixed=FIXED)
    say_stopped(config, config.optim, done)
    return config.out


def parameter_counts(config: VAETrainConfig, autoencoder: "diffusers.AutoencoderKL",
                     discriminator: PatchDiscriminator) -> str:
    """How large the networks are that play."""
    counts = [sum(p.numel() for p in model.parameters()) for model in (autoencoder, discriminator)]
    against = "" if config.losses.adversarial_from is None else f", {counts[1]:,} of the discriminator"
    return f"{counts[0]:,} parameters{against}"
