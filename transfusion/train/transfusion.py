"""Train a Transfusion. Its commands are `transfusion train PRESET ...` and `python -m transfusion.train PRESET ...`.

Each step draws documents, noises their images and takes one step of AdamW on text loss + lambda * diffusion loss. The
documents, times and noise of a step depend on (seed, step) alone, so that a resumed run gives the losses of one that
never stopped. Ctrl-C saves.
"""
import contextlib
import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig

from transfusion.command import claim, saved_step
from transfusion.data.arrays import fingerprint
from transfusion.data.batches import Drawn, step_generator
from transfusion.data.dataset import DatasetSettings, DataSettings
from transfusion.data.training_data import Rows, TrainingData, open_data
from transfusion.device import choose_device
from transfusion.diffusion.objective import TIMES, sample_times
from transfusion.files import whole
from transfusion.model.config import TransfusionConfig, TransfusionSettings
from transfusion.model.lora import TuneSettings, check_base, is_of_images, name_base, prepare, trained_table
from transfusion.model.transfusion import Transfusion, load_tokenizer
from transfusion.sequence import CONTEXT_ATTENTION, Context, Sequence, split_rows
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer
from transfusion.settings import Count, OneOf, Positive, Range, check
from transfusion.train.activations import outline
from transfusion.train.average import Average
from transfusion.train.estimates import work
from transfusion.train.frozen import narrow_frozen
from transfusion.train.loop import Batch, Term, fit, say_stopped
from transfusion.train.optimizer import Player, build_optimizer, learning_rate, scale_rates
from transfusion.train.parallel import shard
from transfusion.train.processes import (
    ALONE,
    DTYPES,
    ParallelSettings,
    Processes,
    start_processes,
)
from transfusion.train.recompute import RECOMPUTE, checkpoint_layers, compile_layers
from transfusion.train.resuming import found_resume
from transfusion.train.samples import Samples, SamplesSettings, held_out_prompts, read_prompts
from transfusion.train.settings import OptimizerSettings, RunSettings, check_steps
from transfusion.train.sharded import without_memory
from transfusion.train.trackers import check_trackers
from transfusion.train.validation import Validation, ValidationSettings

FIXED = ("model", "data", "tune", "seed", "optim.rows", "optim.seq_len", "optim.times")
"""Settings that decide what was trained on: a run goes on with these alone as they were."""


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
class OptimSettings(OptimizerSettings):
    """Steps and batches of packed rows."""

    rows: Count = 8
    """packed rows in a step's batch, over all processes and micro-batches"""
    seq_len: Count = 512
    """tokens in a row"""
    times: Annotated[str, OneOf(TIMES)] = "uniform"
    """how an image's time is drawn: uniform (the paper) or logit-normal"""
    image_lr: Positive = 1.0
    """what the image layers' learning rate is multiplied by; they may have more or less to learn than a pretrained
    decoder or its adapters"""


@dataclass(frozen=True)
class TrainConfig(RunSettings):
    """A training run."""

    tune: TuneSettings = field(default_factory=TuneSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DatasetSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    recompute: Annotated[str, OneOf(RECOMPUTE)] = "none"
    """activation checkpointing: what the backward pass computes again in place of keeping it; selective keeps the
    results of matrix products and of attention, full the inputs of layers alone"""
    compile: bool = False
    """compile the decoder's layers with torch.compile; the first steps wait for it"""
    validate: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SamplesSettings = field(default_factory=SamplesSettings)


def check_settings(op: str, config: TrainConfig, prefix: str = "") -> None:
    """Refuse settings that do not fit, or not each other, named behind `prefix`.

    Raises:
        ValueError: the first of them.
    """
    check(op, config, prefix)
    check_steps(op, config.optim, "rows", f"{prefix}optim.")
    model = config.model
    if model.hidden % (2 * model.heads):
        raise ValueError(f"{op}: {prefix}model.heads is {model.heads} and {prefix}model.hidden {model.hidden}; "
                         "heads of an even width fit, whose number times their width is hidden")
    if model.heads % model.kv_heads:
        raise ValueError(f"{op}: {prefix}model.kv_heads is {model.kv_heads} and {prefix}model.heads {model.heads}; "
                         "a divisor of heads fits")


def check_rows(op: str, optim: OptimSettings, processes: Processes) -> None:
    """Refuse a batch that the processes cannot split evenly.

    Raises:
        ValueError: the number of its rows.
    """
    ranks, rows = processes.data_ranks, optim.rows
    if rows % ranks:
        raise ValueError(f"{op}: optim.rows is {rows}, the rows of a step over all processes, and {ranks} of them take "
                         f"a part each; a multiple of {ranks} fits; change optim.rows, or how many processes start")
    if optim.accumulate > rows // ranks:
        raise ValueError(f"{op}: optim.accumulate is {optim.accumulate} and each of {ranks} processes takes "
                         f"{rows // ranks} of the {rows} rows of a step; at most {rows // ranks} fits; lower "
                         "optim.accumulate or raise optim.rows")


def build_model(config: TrainConfig, data: TrainingData) -> Transfusion:
    """Return a freshly initialised model, with its tokenizer, for `texts` and `image_shape` of data.

    A run that goes on keeps the tokenizer that it began with: one of texts that have changed has other pieces.
    """
    tokenizer = saved_tokenizer(config.out) if config.resume else None
    tokenizer = tokenizer or train_tokenizer(data.texts(), config.model.vocabulary)
    torch.manual_seed(config.seed)
    text_config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.model.hidden, intermediate_size=config.model.mlp,
        num_hidden_layers=config.model.layers, num_attention_heads=config.model.heads,
        num_key_value_heads=config.model.kv_heads, tie_word_embeddings=False,
        rms_norm_eps=config.model.norm_eps, max_position_embeddings=max(2048, config.optim.seq_len),
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    channels, *size = data.image_shape
    return Transfusion(TransfusionConfig(
        text_config=AutoConfig.for_model(**text_config.to_dict()), image_channels=channels, image_size=size,
        boi_token_id=tokenizer.convert_tokens_to_ids(BOI), eoi_token_id=tokenizer.convert_tokens_to_ids(EOI),
        **config.model.shared()), tokenizer)


def saved_tokenizer(out: Path):
    """The tokenizer of the checkpoint that is saved in `out`; None where there is none."""
    with whole(out) as save:
        return load_tokenizer(save) if (save / "tokenizer.json").is_file() else None


def check_tokenizer(tokenizer, processes: Processes) -> None:
    """Refuse processes whose tokenizers are not the same: they were made of texts that some could not read.

    Raises:
        ValueError: in all of them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow ones have none
    known = "none" if tokenizer is None else tokenizer.get_vocab() if backend is None else backend.to_str()
    processes.check_same(fingerprint(known), "train: the processes have different tokenizers: some read other texts, "
                         "or another checkpoint, than the main one; files that all nodes can read fit")


def start_model(config: TrainConfig, data: TrainingData) -> Transfusion:
    """Load the checkpoint to start from and check that the data's images, and what their latents are of, fit it."""
    if config.resume and config.tune.trained != "all" and not config.allow_changed:
        check_base("train", config.tune.start, config.out)
    model = Transfusion.from_pretrained(config.tune.start, dtype=torch.float32)
    asked = json.loads(json.dumps(config.model.shared()))  # lists, as in a checkpoint's configuration
    kept = {name: getattr(model.config, name) for name in asked}
    if differ := [f"{name} {value}" for name, value in kept.items() if value != asked[name]]:
        print(f"{config.tune.start} keeps its own {', '.join(differ)}; --model settings are not used", flush=True)
    data.check_start(model)
    return model


class TransfusionTask:
    """Packed documents whose text is predicted and whose images are denoised."""

    unit, shown = "tokens", ("text_loss", "diffusion_loss")

    def __init__(self, config: TrainConfig, rows: Rows, base: Transfusion, model: nn.Module,
                 processes: Processes = ALONE, written: nn.Module | None = None):
        """`model` is `base`, or the adapters around it; `rows` are those of this one of the processes.

        Where `model` is in shards, `written` is what it was before, without memory, which saves are made with.
        """
        self.config, self.rows, self.base, self.processes, self.written = config, rows, base, processes, written
        self.size, self.device = config.optim.rows * config.optim.seq_len, processes.device
        self.context = None
        if processes.context_ranks > 1:
            self.context = Context(processes.context_group, CONTEXT_ATTENTION[config.parallel.context_by])
        optimizer = build_optimizer(model, config.optim)
        images = (p for name, p in model.named_parameters() if is_of_images(name))
        scale_rates(optimizer, images, config.optim.image_lr)
        self.player = Player(model, optimizer, Average(model, config.optim.ema))
        self.players, self.drawn = (self.player,), None

    def batches(self, step: int) -> list[Batch]:
        """Draw this process's part of a step's rows, and the times of its images, then split them into micro-batches.

        Times and noise are drawn for the images of the whole batch, of which each process and each micro-batch takes
        its own: what is drawn depends neither on the number of processes nor on `accumulate`. Processes that split the
        tokens of rows draw the same rows.
        """
        config, base = self.config, self.base
        generator = step_generator(config.seed, step)
        (sequence, limit, notes), before, totals = self._draw(step, generator)
        self.drawn = sequence
        tokens = sequence.layout.offsets.diff()
        first, after = before["images"], totals["images"] - before["images"] - sequence.image_count
        times = sample_times(config.optim.times, limit, tokens, base.config.time_shift_tokens, generator,
                             before=first, after=after)
        batches, start = [], 0
        for number, part in enumerate(split_rows(sequence, config.optim.accumulate)):
            held = part if self.context is None else base.share(part, self.context)
            inputs = held, times[start:start + part.image_count], torch.tensor([config.seed, step, first + start])
            batches.append(Batch(inputs, _counts(held), {} if number else notes, totals))
            start += part.image_count
        return batches

    def _draw(self, step: int, generator: torch.Generator) -> tuple[Drawn, dict[str, int], dict[str, int]]:
        """This process's rows, and how much the rows before them hold, and all; an error of one ends all processes."""
        drawn, counts, error = None, dict.fromkeys(("images", "text_loss", "diffusion_loss", "failed"), 0), None
        rows = 0
        try:
            drawn = self.rows.draw(step, generator)
            counts = {"images": drawn.sequence.image_count, "failed": drawn.notes.get("failed", 0),
                      **_counts(drawn.sequence)}
            rows = zlib.crc32(drawn.sequence.tokens.numpy().tobytes()) if self.context is not None else 0
        except Exception as caught:
            error = caught
        try:
            before, totals = self.processes.exchange(counts, error, rows)
        finally:
            del error  # see `Processes.agreeing`
        notes = drawn.notes | {name: totals[name] for name in drawn.notes if name == "failed"}
        return drawn._replace(notes=notes), before, totals

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """Text loss + lambda * diffusion loss."""
        device = self.processes.device or self.base.device
        sequence, times, seed = (x.to(device) for x in batch.inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
            output = self.player.model(sequence, times, seed)
        yield self.player, {"text_loss": Term(1.0, output.text_loss),
                            "diffusion_loss": Term(self.base.config.diffusion_weight, output.diffusion_loss)}

    def operations(self) -> float:
        """How many the model's mathematics needs of this process for the step drawn last, forward and backward."""
        plain = outline(self.base.config, TuneSettings(frozen=self.config.tune.frozen))
        parts = work(self.player.model, plain, self.drawn)
        return sum(part.step for part in parts.values()) / self.processes.context_ranks

    def save(self, directory: Path, step: int) -> None:
        """Write the averaged model or, where only adapters are trained, those and the way to their model."""
        with self.player.averaged.applied(self.player.model):
            self._write(directory, self.player.model)

    def save_whole(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write the same of whole weights, where those of the model are in shards."""
        self._write(directory, self.written, state_dict=weights)

    def _write(self, directory: Path, model: nn.Module, **weights) -> None:
        model.save_pretrained(directory, **weights)
        if self.config.tune.trained != "all":
            name_base(directory, self.config.tune.start, self.config.out)


def _counts(sequence: Sequence) -> dict[str, int]:
    """How many things the loss's terms are means over."""
    return {"text_loss": len(sequence.text_targets), "diffusion_loss": int(sequence.drawn.sum())}


def watch(config: TrainConfig, task: TransfusionTask, rows: Rows) -> list[Validation | Samples]:
    """Make what looks at the run while it trains, and say what that is.

    Raises:
        ValueError: the data hold out nothing, or there is nothing to draw.
    """
    watchers, here, base = [], task.processes, task.base
    common = {"steps": config.optim.steps, "device": here.device}
    with here.agreeing():
        if config.validate.every:
            held_out = rows.held_out(config.validate.rows)
            share = None if task.context is None else functools.partial(base.share, context=task.context)
            watchers.append(Validation(config.validate, held_out, task.player, autocast=config.autocast, share=share,
                                       rank=here.data_rank, ranks=here.data_ranks, **common))
        if config.samples.every:
            given, count = config.samples.prompts, config.samples.count
            prompts = (held_out_prompts(rows.held_out(4 * count), base.tokenizer, count) if given is None
                       else read_prompts(given))
            start = saved_step(config.out) if config.resume else 0
            watchers.append(Samples(config.samples, prompts, task.player, base, config.out, start=start,
                                    writes=here.is_main, **common))
    for watcher in watchers:
        print(watcher.words(), flush=True)
    return watchers


def holds_narrow(config: TrainConfig, processes: int) -> bool:
    """Whether the frozen matrices of layers are held in bfloat16: autocast computes in it, and adapters are saved."""
    return config.autocast and config.tune.trained != "all" and processes == 1


def train(config: TrainConfig) -> Path:
    """Run `config` as far as `fit` goes; return the directory with the checkpoint.

    Under torchrun, each of its processes calls this with the same settings.
    """
    with start_processes("train", config.parallel, config.device) as processes:
        with processes.agreeing():
            config = found_resume(config)
            check_settings("train", config)
            check_trackers("train", config.log or ())
            check_rows("train", config.optim, processes)
            inputs = {f"data.{name}": path for name, path in config.data.directories().items()}
        processes.check_same(str(config.resume), f"train: auto_resume is True and out is {str(config.out)!r}, where "
                             "some processes find a saved run and some do not; a directory that all nodes see fits")
        claimed = claim("train", config.out, {"tune.start": config.tune.start, **inputs}, config.resume,
                        alone=processes.size == 1)
        with processes.main_holds(claimed):
            return _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> Path:
    # data and model
    with processes.agreeing():
        device = processes.device or choose_device(config.device)
        data = open_data(config.data, config.model.patch_size if config.tune.start is None else None)
        base = (build_model(config, data) if config.tune.start is None else start_model(config, data)).to(device)
        base.vae = base.vae if data.vae is None else data.vae
        if base.vae is not None:
            base.vae.to(device)
        torch.manual_seed(config.seed)  # adapters start at random
        model = prepare(base, config.tune).train()
        written = without_memory(model, base.vae) if processes.size > 1 else None
        if holds_narrow(config, processes.size):
            narrow_frozen(base)
        checkpoint_layers(base, config.recompute)
        if config.compile:
            compile_layers(base, whole=processes.context_ranks == 1)
        print(trained_table(model), flush=True)
        optim = config.optim
        rows = data.rows(base.tokenizer, base.config, base.vae, rows=optim.rows, seq_len=optim.seq_len,
                         steps=optim.steps, rank=processes.data_rank, ranks=processes.data_ranks)
        for line in rows.words():
            print(line, flush=True)

    check_tokenizer(base.tokenizer, processes)

    # optimizer and loop
    if processes.mesh is not None:
        model = shard(model, processes.mesh, DTYPES[config.parallel.dtype], offload=config.parallel.offload)
    task = TransfusionTask(config, rows, base, model, processes, written)
    with contextlib.closing(rows):
        watchers = watch(config, task, rows)
        done = fit("train", config, config.optim, task, lambda step: learning_rate(step, config.optim), fixed=FIXED,
                   epoch=rows.steps_in_epoch, watchers=watchers, operations=task.operations)
    say_stopped(config, config.optim, done)
    return config.out


def train_to_end(config: TrainConfig) -> Path:
    """`train`, going on with what `out` holds; KeyboardInterrupt where it was stopped before the last step."""
    out = train(dataclasses.replace(config, auto_resume=True))
    if (step := saved_step(out)) < config.optim.steps:
        raise KeyboardInterrupt(f"{out}: {step:,} of {config.optim.steps:,} steps are done; the same command goes on")
    return out
