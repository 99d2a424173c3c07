"""Train a Transfusion. Its commands are `transfusion train PRESET ...` and `python -m transfusion.train PRESET ...`.

Each step draws documents, noises their images and takes one AdamW step on text loss + lambda * diffusion loss. Documents, times
and noise of a step depend on (seed, step) alone, so a resumed run gives the losses of one that never stopped. Ctrl-C saves.
"""
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import AutoConfig, LlamaConfig

from transfusion.command import Interrupt, claim, saved_step
from transfusion.data.batches import document_lengths, draw_batch, step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.data.latents import open_dataset
from transfusion.device import choose_device, seconds_of
from transfusion.diffusion.objective import TIMES, sample_times
from transfusion.files import replacing
from transfusion.model.config import TransfusionConfig, TransfusionSettings
from transfusion.model.lora import TuneSettings, name_base, prepare, trained_table
from transfusion.model.transfusion import Transfusion
from transfusion.model.vae import VAE
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer
from transfusion.settings import Count, Decay, NotNegative, OneOf, Positive, Range, Seed, WholeNumber, check
from transfusion.train.checkpoint import check_finite, check_weights, load_state, load_training_state, numbers, trained_parameters, training_state, write_state
from transfusion.train.log import open_log, start_log
from transfusion.train.optimizer import build_average, build_optimizer, learning_rate


@dataclass(frozen=True)
class ModelSettings(TransfusionSettings):
    """The decoder and, as `TransfusionSettings`, the image layers."""

    vocabulary: Annotated[int, Range(261)] = 512
    """tokens of the tokenizer trained on the data set's texts, at most"""
    hidden: Count = 128
    """width of the decoder"""
    layers: Count = 4
    """blocks of the decoder"""
    heads: Count = 4
    """query heads"""
    kv_heads: Count = 4
    """key and value heads"""
    mlp: Count = 352
    """width inside the SwiGLU"""
    norm_eps: Positive = 1e-6
    """epsilon of the decoder's RMS norms"""


@dataclass(frozen=True)
class OptimSettings:
    """Steps, batches and AdamW (the paper: 3e-4, betas 0.9 and 0.95, decay 0.1, clip 1)."""

    steps: Count = 1000
    """optimizer steps in all"""
    rows: Count = 8
    """packed rows in a batch"""
    seq_len: Count = 512
    """tokens in a row"""
    lr: Positive = 3e-4
    """peak learning rate"""
    min_lr: NotNegative = 1.5e-5
    """learning rate at the end of the cosine"""
    warmup: WholeNumber = 100
    """steps of linear warm-up"""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's betas"""
    weight_decay: NotNegative = 0.1
    """AdamW's decay of matrices"""
    clip: Positive = 1.0
    """largest gradient norm"""
    times: Annotated[str, OneOf(TIMES)] = "uniform"
    """how an image's time is drawn: uniform (the paper) or logit-normal"""
    ema: Decay = 0.999
    """decay of the averaged weights that are saved; 0 saves the last ones"""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: Path = Path("runs/train")
    """directory for the checkpoint, the log and what resuming needs"""
    seed: Seed = 0
    """seed of initialisation, data, times and noise"""
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
    tune: TuneSettings = field(default_factory=TuneSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DatasetSettings = field(default_factory=DatasetSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)




def check_settings(op: str, config: TrainConfig, prefix: str = "") -> None:
    """Refuse settings that do not fit, or not each other, named behind `prefix`.

    Raises:
        ValueError: the first of them.
    """
    check(op, config, prefix)
    model = config.model
    if model.hidden % (2 * model.heads):
        raise ValueError(f"{op}: {prefix}model.heads is {model.heads} and {prefix}model.hidden {model.hidden}; "
                         "heads of an even width fit, whose number times their width is hidden")
    if model.heads % model.kv_heads:
        raise ValueError(f"{op}: {prefix}model.kv_heads is {model.kv_heads} and {prefix}model.heads {model.heads}; "
                         "a divisor of heads fits")


def build_model(config: TrainConfig, dataset) -> Transfusion:
    """Return a freshly initialised model and its tokenizer for a data set."""
    tokenizer = train_tokenizer(dataset.texts(), config.model.vocabulary)
    torch.manual_seed(config.seed)
    text_config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.model.hidden, intermediate_size=config.model.mlp, num_hidden_layers=config.model.layers,
        num_attention_heads=config.model.heads, num_key_value_heads=config.model.kv_heads, tie_word_embeddings=False,
        rms_norm_eps=config.model.norm_eps, max_position_embeddings=max(2048, config.optim.seq_len),
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    channels, *size = dataset.image_shape
    return Transfusion(TransfusionConfig(
        text_config=AutoConfig.for_model(**text_config.to_dict()), image_channels=channels, image_size=size, **config.model.shared(),
        boi_token_id=tokenizer.convert_tokens_to_ids(BOI), eoi_token_id=tokenizer.convert_tokens_to_ids(EOI)), tokenizer)


def start_model(config: TrainConfig, dataset, vae: VAE | None) -> Transfusion:
    """Load the checkpoint to start from and check that the data set's images, and what their latents are of, fit it."""
    model = Transfusion.from_pretrained(config.tune.start)
    asked = json.loads(json.dumps(config.model.shared()))  # lists, as in a checkpoint's configuration
    if differ := [f"{name} {getattr(model.config, name)}" for name in asked if getattr(model.config, name) != asked[name]]:
        print(f"{config.tune.start} keeps its own {', '.join(differ)}; --model settings are not used", flush=True)
    channels, *size = dataset.image_shape
    if channels != model.config.image_channels or any(side % model.config.patch_size for side in size):
        raise ValueError(f"train: data.name is {config.data.name!r}, whose images are {tuple(dataset.image_shape)}, and tune.start a model of "
                         f"{model.config.image_channels} channels and patches of {model.config.patch_size}; equal channels and whole patches fit")
    if (vae and vae.fingerprint()) != (model.vae and model.vae.fingerprint()):
        raise ValueError(f"train: data.latents is {config.data.latents and str(config.data.latents)!r} and tune.start a model of "
                         f"{'pictures' if model.vae is None else 'another autoencoder'}; latents of its own autoencoder fit; make them with "
                         "`transfusion vae encode`, and the model with `transfusion init --vae`")
    return model


def train(config: TrainConfig) -> Path:
    """Run `config` to its end, to `stop_after`, or to Ctrl-C, SIGTERM or SIGHUP; return the directory with the checkpoint."""
    check_settings("train", config)
    inputs = {f"data.{name}": path for name, path in config.data.directories().items()}
    with claim("train", config.out, {"tune.start": config.tune.start, **inputs}, config.resume):
        return _train(config)


def _train(config: TrainConfig) -> Path:
    # data and model
    device = choose_device(config.device)
    dataset, vae = open_dataset(config.data)
    base = (build_model(config, dataset) if config.tune.start is None else start_model(config, dataset, vae)).to(device)
    base.vae = base.vae if vae is None else vae
    torch.manual_seed(config.seed)  # adapters start at random
    model = prepare(base, config.tune).train()
    averaged = build_average(model, config.optim)
    print(trained_table(model), flush=True)
    if share := document_lengths(dataset, config.data, base.tokenizer, base.config, config.optim.seq_len).left_out:
        print(f"documents of more than optim.seq_len, {config.optim.seq_len} tokens, are left out, about "
              f"{100 * share:.1f} % of those drawn; the log counts them (left_out)", flush=True)

    # optimizer
    optimizer = build_optimizer(model, config.optim)
    start = _restore(config, model, averaged, optimizer) if config.resume else 0

    def forward(step: int):
        generator = step_generator(config.seed, step)
        sequence, limit = draw_batch(dataset, config.data, base.tokenizer, base.config, config.optim.rows, config.optim.seq_len, generator)
        times = sample_times(config.optim.times, limit, sequence.layout.offsets.diff(), base.config.time_shift_tokens, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            output = model(sequence.to(device), times, torch.tensor([config.seed, step], device=device))
        return output, sequence.left_out

    print(_cost(config, forward, optimizer, start, device), flush=True)

    # loop
    spent = start_log(config.out / "log.jsonl", start)
    progress = tqdm(range(start, config.optim.steps), initial=start, total=config.optim.steps, desc=f"train {config.out.name}", smoothing=0.05,
                    unit="step", dynamic_ncols=True)
    began, tokens = time.perf_counter() - spent, 0
    with Interrupt() as stop, open_log(config.out / "log.jsonl") as log:
        step = start
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.optim)
            output, left_out = forward(step)
            output.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            found = numbers(loss=output.loss, text_loss=output.text_loss, diffusion_loss=output.diffusion_loss, grad_norm=norm)
            check_finite("train", config.out, step, found)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)

            tokens += config.optim.rows * config.optim.seq_len
            record = {"step": step, **found, "lr": learning_rate(step, config.optim), "seconds": time.perf_counter() - began}
            record |= {"left_out": left_out} if left_out else {}
            log.write(json.dumps(record) + "\n")
            speed = tokens / (record["seconds"] - spent)
            progress.set_postfix(text=f"{record['text_loss']:.3f}", image=f"{record['diffusion_loss']:.3f}", tok_s=f"{speed:,.0f}")
            last = step + 1 == config.optim.steps or stop.asked or step + 1 == config.stop_after
            if last or (step + 1) % config.save_every == 0:
                log.flush()
                os.fsync(log.fileno())
                _save(config, model, averaged, optimizer, step + 1)
            if last and step + 1 < config.optim.steps:
                progress.close()
                break
    if step + 1 < config.optim.steps:
        print(f"stopped after step {step + 1} of {config.optim.steps}, saved in {config.out}; add --resume to the same command to go on", file=sys.stderr)
    return config.out


def train_to_end(config: TrainConfig) -> Path:
    """`train`, going on with what `out` holds; KeyboardInterrupt where it was stopped before the last step."""
    out = train(dataclasses.replace(config, resume=saved_step(config.out) is not None))
    if (step := saved_step(out)) < config.optim.steps:
        raise KeyboardInterrupt(f"{out}: {step:,} of {config.optim.steps:,} steps are done; the same command goes on")
    return out


def _cost(config: TrainConfig, forward, optimizer, step: int, device: torch.device) -> str:
    """Say what is left to do and, by the second of two passes that change nothing, about how long it takes."""
    steps, tokens = config.optim.steps - step, config.optim.rows * config.optim.seq_len
    if steps <= 0:
        return f"all {config.optim.steps:,} steps are done"

    def once():
        forward(step)[0].loss.backward()
        optimizer.zero_grad()

    seconds = seconds_of(once, device)
    return f"{steps:,} steps of {tokens:,} tokens at {seconds:.2f} s: about {steps * seconds / 60:,.0f} min"


def _save(config: TrainConfig, model: Transfusion, averaged: AveragedModel, optimizer, step: int) -> None:
    """Write the checkpoint and what resuming needs, together; a kill while writing leaves the save before whole."""
    final = averaged.module if config.optim.ema else model
    state = training_state(model, optimizer) | {f"averaged.{name}": p for name, p in trained_parameters(averaged.module).items()}
    check_weights("train", config.out, step, state)
    with replacing(config.out) as fresh:
        final.save_pretrained(fresh)
        if config.tune.trained != "all":
            name_base(fresh, config.tune.start, config.out)
        write_state(fresh, config, state | {"averaged_steps": averaged.n_averaged}, step)


def _restore(config: TrainConfig, model: Transfusion, averaged: AveragedModel, optimizer) -> int:
    """Load what `_save` wrote; return the step to go on from. What decides what was trained on must be what it was."""
    fixed = ("model", "data", "tune", "seed", "optim.rows", "optim.seq_len", "optim.times")
    state, step = load_state(config, fixed, next(model.parameters()).device)
    load_training_state(state, model, optimizer)
    for name, p in trained_parameters(averaged.module).items():
        p.data.copy_(state[f"averaged.{name}"])
    averaged.n_averaged.copy_(state["averaged_steps"])
    return step
