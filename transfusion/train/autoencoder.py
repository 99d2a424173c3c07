"""Train the autoencoder whose latents a Transfusion draws: `transfusion vae train PRESET [data:folder --data.folder DIR ...]`.

Each step draws pictures, encodes them, decodes a sample of the posterior and takes one AdamW step on the losses of
transfusion/train/autoencoder_losses.py, then one on the discriminator's once it plays. Pictures, flips and samples of a step depend on (seed, step)
alone, so a resumed run gives the losses of one that never stopped. Ctrl-C saves. What is saved is what `VAE.from_pretrained` reads:
the averaged weights, with scaling_factor and shift_factor such that the training pictures' latents have mean 0 and standard deviation 1.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from transfusion.command import Interrupt, claim
from transfusion.data.batches import step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.data.picture_files import describe
from transfusion.device import choose_device, seconds_of
from transfusion.eval.features import Features
from transfusion.files import replacing
from transfusion.settings import Count, Decay, NotNegative, Positive, Seed, Share, WholeNumber, check
from transfusion.train.autoencoder_losses import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    identity_loss,
    kl_loss,
    perceptual_loss,
    reconstruction_loss,
)
from transfusion.train.checkpoint import check_finite, check_weights, load_state, load_training_state, numbers, training_state, write_state
from transfusion.train.log import open_log, start_log
from transfusion.train.optimizer import build_average, build_optimizer, learning_rate

FIRST_LOG_VARIANCE = -6.0  # of the posterior: at 0 the decoder would first read noise
MEASURED = 4096  # training pictures, evenly spread, that scale and shift are measured on


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
    """directory of an image classifier (transformers, safetensors) whose stages the perceptual term compares; None leaves the term out"""
    identity_model: Path | None = None
    """directory of the model whose pooled features the identity term compares (the paper: MoCo v2); None leaves the term out"""
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
class VAEOptimSettings:
    """Steps, batches and AdamW, the same for the autoencoder and the discriminator."""

    steps: Count = 1000
    """optimizer steps in all"""
    batch: Count = 32
    """pictures in a step"""
    lr: Positive = 1e-3
    """peak learning rate"""
    min_lr: NotNegative = 1e-5
    """learning rate at the end of the cosine"""
    warmup: WholeNumber = 50
    """steps of linear warm-up"""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """AdamW's betas"""
    weight_decay: NotNegative = 0.0
    """AdamW's decay of matrices and filters"""
    clip: Positive = 1.0
    """largest gradient norm"""
    ema: Decay = 0.99
    """decay of the averaged weights that are saved; 0 saves the last ones"""
    flip: Share = 0.5
    """share of pictures that are mirrored"""


@dataclass(frozen=True)
class VAETrainConfig:
    """A training run of an autoencoder."""

    out: Path = Path("runs/vae")
    """directory for the autoencoder, the log and what resuming needs"""
    seed: Seed = 0
    """seed of initialisation, pictures and samples"""
    save_every: Count = 500
    """steps between saves"""
    resume: bool = False
    """go on from what `out` holds"""
    stop_after: Count | None = None
    """stop (and save) after this step, as Ctrl-C would"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    autocast: bool = False
    """compute in bfloat16 under autocast"""
    model: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    data: DatasetSettings = field(default_factory=DatasetSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    optim: VAEOptimSettings = field(default_factory=VAEOptimSettings)


def build_autoencoder(settings: AutoencoderSettings, shape: tuple[int, int, int], seed: int) -> AutoencoderKL:
    """Return a freshly initialised autoencoder for pictures of `shape` (C, H, W), its posteriors narrow.

    Raises:
        ValueError: sides that the halvings do not divide, or widths that the groups do not.
    """
    channels, *sides = shape
    factor, levels = 2 ** (len(settings.widths) - 1), len(settings.widths)
    if any(side % factor for side in sides):
        raise ValueError(f"vae train: pictures have shape {tuple(shape)} and model.widths is {settings.widths}; sides that {factor} divides fit; set "
                         "--data.size (folders) or fewer widths")
    if any(width % settings.groups for width in settings.widths):
        raise ValueError(f"vae train: model.groups is {settings.groups} and model.widths {settings.widths}; "
                         "a divisor of each width fits")
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=settings.latent_channels, block_out_channels=settings.widths,
        layers_per_block=settings.blocks, norm_num_groups=settings.groups, mid_block_add_attention=settings.attention, sample_size=sides[0],
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, scaling_factor=1.0, shift_factor=0.0)
    torch.nn.init.constant_(autoencoder.quant_conv.bias[settings.latent_channels:], FIRST_LOG_VARIANCE)
    return autoencoder


def build_discriminator(settings: LossSettings, shape: tuple[int, int, int]) -> PatchDiscriminator:
    """Return a freshly initialised discriminator of pictures of `shape` (C, H, W).

    Raises:
        ValueError: it is to play and its layers leave no patch of such pictures.
    """
    channels, *sides = shape
    if settings.adversarial_from is not None and min(sides) < 3 * 2 ** settings.discriminator_layers:
        raise ValueError(f"vae train: losses.discriminator_layers is {settings.discriminator_layers} and pictures have shape {tuple(shape)}; sides of at least "
                         f"{3 * 2 ** settings.discriminator_layers} fit; lower --losses.discriminator-layers")
    return PatchDiscriminator(channels, settings.discriminator_width, settings.discriminator_layers)


class Terms:
    """The terms that have what they need: their weights, and their values for pictures and what the autoencoder makes of them."""

    def __init__(self, settings: LossSettings, discriminator: PatchDiscriminator, device: torch.device):
        self.settings, self.discriminator = settings, discriminator
        self.perceptual, self.identity = (path and Features.from_pretrained(path).to(device) for path in (settings.perceptual_model, settings.identity_model))

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at a step; what is missing is not computed."""
        s = self.settings
        plays = s.adversarial_from is not None and step >= s.adversarial_from
        weights = {"l1": 1.0, "perceptual": s.perceptual * (self.perceptual is not None), "identity": s.identity * (self.identity is not None),
                   "adversarial": s.adversarial * plays, "kl": s.kl}
        return {name: weight for name, weight in weights.items() if weight}

    def values(self, step: int, pictures: Tensor, drawn: Tensor, posterior) -> dict[str, Tensor]:
        """Value of each term that has a weight, unweighted."""
        terms = {"l1": lambda: reconstruction_loss(pictures, drawn), "perceptual": lambda: perceptual_loss(self.perceptual, pictures, drawn),
                 "identity": lambda: identity_loss(self.identity, pictures, drawn), "kl": lambda: kl_loss(posterior),
                 "adversarial": lambda: generator_loss(self.discriminator, drawn)}
        return {name: terms[name]() for name in self.weights(step)}

    def table(self) -> str:
        """What the loss is made of, and what is left out, and why."""
        s, never = self.settings, "left out: losses.adversarial_from is None"
        perceptual, identity = (f"left out: losses.{name}_model is None" if features is None else features.name
                                for name, features in (("perceptual", self.perceptual), ("identity", self.identity)))
        rows = (("l1", 1.0, "always"), ("perceptual", s.perceptual, perceptual), ("identity", s.identity, identity),
                ("adversarial", s.adversarial, never if s.adversarial_from is None else f"from step {s.adversarial_from:,}"),
                ("kl", s.kl, "always"))
        return "\n".join([f"{'term':<14}{'weight':>8}", *(f"{name:<14}{weight:>8g}  {note}" for name, weight, note in rows)])


def reconstruct(autoencoder: AutoencoderKL, pictures: Tensor, generator: torch.Generator):
    """Return the decoded sample of the posterior, (N, C, H, W), and the posterior."""
    posterior = autoencoder.encode(pictures).latent_dist
    return autoencoder.decode(posterior.sample(generator)).sample, posterior


def draw_pictures(pictures, optim: VAEOptimSettings, generator: torch.Generator) -> Tensor:
    """Draw a batch, a share of it mirrored."""
    indices = torch.randint(len(pictures), (optim.batch,), generator=generator)
    flipped = torch.rand(optim.batch, generator=generator) < optim.flip
    batch = pictures[indices]
    return torch.where(flipped[:, None, None, None], batch.flip(-1), batch)


def latent_statistics(autoencoder: AutoencoderKL, pictures, batch: int) -> tuple[float, float]:
    """Mean and standard deviation of all numbers of the latents (posterior means) of at most MEASURED pictures, evenly spread."""
    chosen = torch.linspace(0, len(pictures) - 1, min(MEASURED, len(pictures))).round().long()
    with torch.no_grad():
        latents = [autoencoder.encode(pictures[part].to(autoencoder.device)).latent_dist.mode().cpu().double() for part in chosen.split(batch)]
    latents = torch.cat(latents)
    return latents.mean().item(), latents.std().item()


def train(config: VAETrainConfig) -> Path:
    """Run `config` to its end, to `stop_after`, or to Ctrl-C, SIGTERM or SIGHUP; return the directory with the autoencoder."""
    inputs = {f"data.{name}": path for name, path in config.data.directories().items()}
    inputs |= {f"losses.{name}": getattr(config.losses, name) for name in ("perceptual_model", "identity_model")}
    check("vae train", config)
    with claim("vae train", config.out, inputs, config.resume):
        return _train(config)


def _train(config: VAETrainConfig) -> Path:
    # data and models
    device = choose_device(config.device)
    pictures = config.data.open().pictures
    autoencoder = build_autoencoder(config.model, tuple(pictures.shape[1:]), config.seed).to(device).train()
    discriminator = build_discriminator(config.losses, tuple(pictures.shape[1:])).to(device)
    terms = Terms(config.losses, discriminator, device)
    averaged = build_average(autoencoder, config.optim)

    # optimizers
    optimizer, opponent = (build_optimizer(model, config.optim) for model in (autoencoder, discriminator))
    start = _restore(config, autoencoder, averaged, discriminator, optimizer, opponent) if config.resume else 0

    def losses(step: int):
        generator = step_generator(config.seed, step)
        given = draw_pictures(pictures, config.optim, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            drawn, posterior = reconstruct(autoencoder, given, generator)
            values = terms.values(step, given, drawn, posterior)
        return given, drawn, values, sum(weight * values[name] for name, weight in terms.weights(step).items())

    print(describe(pictures, config.data, "train"))
    print(terms.table())
    print(_cost(config, autoencoder, discriminator, losses, start), flush=True)

    # loop
    spent = start_log(config.out / "log.jsonl", start)
    progress = tqdm(range(start, config.optim.steps), initial=start, total=config.optim.steps, desc=f"vae train {config.out.name}", smoothing=0.05,
                    unit="step", dynamic_ncols=True)
    began = time.perf_counter() - spent
    with Interrupt() as stop, open_log(config.out / "log.jsonl") as log:
        step = start
        for step in progress:
            for group in (*optimizer.param_groups, *opponent.param_groups):
                group["lr"] = learning_rate(step, config.optim)
            given, drawn, values, loss = losses(step)
            loss.backward()
            norms = {"grad_norm": torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), config.optim.clip)}
            opponent.zero_grad()  # what the adversarial term left there
            plays = "adversarial" in values
            if plays:
                with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                    values["discriminator"] = discriminator_loss(discriminator, given, drawn)
                values["discriminator"].backward()
                norms["discriminator_grad_norm"] = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), config.optim.clip)
            found = numbers(loss=loss, **values, **norms)
            check_finite("vae train", config.out, step, found)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(autoencoder)
            if plays:
                opponent.step()
                opponent.zero_grad()

            record = {"step": step, **found, "lr": learning_rate(step, config.optim), "seconds": time.perf_counter() - began}
            log.write(json.dumps(record) + "\n")
            progress.set_postfix({name: f"{value:.3f}" for name, value in record.items() if name in values and name != "kl"})
            last = step + 1 == config.optim.steps or stop.asked or step + 1 == config.stop_after
            if last or (step + 1) % config.save_every == 0:
                log.flush()
                os.fsync(log.fileno())
                _save(config, pictures, autoencoder, averaged, discriminator, optimizer, opponent, step + 1)
            if last and step + 1 < config.optim.steps:
                progress.close()
                break
    if step + 1 < config.optim.steps:
        print(f"stopped after step {step + 1} of {config.optim.steps}, saved in {config.out}; add --resume to the same command to go on", file=sys.stderr)
    return config.out


def _cost(config: VAETrainConfig, autoencoder: AutoencoderKL, discriminator: PatchDiscriminator, losses, start: int) -> str:
    """One line: parameters, and how long the run takes by a step that is timed and thrown away."""
    seconds = seconds_of(lambda: losses(config.optim.steps)[-1].backward(), autoencoder.device)
    for model in (autoencoder, discriminator):
        model.zero_grad()
    counts = [sum(p.numel() for p in model.parameters()) for model in (autoencoder, discriminator)]
    left = config.optim.steps - start
    against = "" if config.losses.adversarial_from is None else f", {counts[1]:,} of the discriminator"
    minutes = left * seconds / 60
    return f"{counts[0]:,} parameters{against}; {left:,} steps of {config.optim.batch} pictures at {seconds:.2f} s: about {minutes:,.0f} min"


def _save(config: VAETrainConfig, pictures, autoencoder: AutoencoderKL, averaged: AveragedModel, discriminator: PatchDiscriminator, optimizer, opponent,
          step: int) -> None:
    """Write the autoencoder with its scale and shift and what resuming needs, together; a kill while writing leaves the save before whole."""
    final = averaged.module if config.optim.ema else autoencoder
    state = training_state(autoencoder, optimizer) | {"averaged_steps": averaged.n_averaged}
    state |= {f"averaged.{name}": p for name, p in averaged.module.named_parameters()}
    state |= {f"discriminator.{name}": x for name, x in training_state(discriminator, opponent).items()}
    check_weights("vae train", config.out, step, state)
    mean, std = latent_statistics(final, pictures, 4 * config.optim.batch)  # without gradients as little memory as a step
    check_finite("vae train", config.out, step, {"mean of the latents": mean, "1 / their standard deviation": 1 / std if std else math.inf})
    final.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    with replacing(config.out) as fresh:
        final.save_pretrained(fresh, safe_serialization=True)
        write_state(fresh, config, state, step)


def _restore(config: VAETrainConfig, autoencoder: AutoencoderKL, averaged: AveragedModel, discriminator: PatchDiscriminator, optimizer, opponent) -> int:
    """Load what `_save` wrote; return the step to go on from. What decides what was trained on must be what it was."""
    fixed = ("model", "data", "losses", "seed", "optim.batch", "optim.flip")
    state, step = load_state(config, fixed, autoencoder.device)
    load_training_state(state, autoencoder, optimizer)
    load_training_state({name.removeprefix("discriminator."): x for name, x in state.items() if name.startswith("discriminator.")}, discriminator, opponent)
    for name, p in averaged.module.named_parameters():
        p.data.copy_(state[f"averaged.{name}"])
    averaged.n_averaged.copy_(state["averaged_steps"])
    return step
