"""LLaVA's command line, as its `scripts/v1_5/finetune_lora.sh` has it, in this project's settings.

    transfusion train --model_name_or_path DIR --data_path mix665k.json --image_folder data --output_dir OUT ...

Flags become a mixture, written to OUT-mix.json, and settings of the trainer. Those that belong to CLIP, DeepSpeed or
Hugging Face's trainer are accepted and named, so that a script runs as it is. An unknown one is answered with the
nearest. Flags of `transfusion train` itself, such as --optim.steps or --resume, may stand among them and count last.

`model_name_or_path` is a Transfusion's checkpoint, or a language model's, of which `transfusion init` makes one beside
OUT; of several processes the main one does.
"""
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from transfusion.data.mixture import MixtureSettings, make_mixture, open_sources
from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.data.training_data import open_data
from transfusion.device import PATIENCE, launched
from transfusion.files import current, read_json, write_text
from transfusion.locks import in_use
from transfusion.model.config import TransfusionConfig
from transfusion.model.from_language_model import InitSettings, init, was_made_of
from transfusion.model.lora import TuneSettings, find_base
from transfusion.model.transfusion import load_tokenizer
from transfusion.model.vae import VAE
from transfusion.settings import nearest
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig

TEMPLATES = {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "llama_2": "llama_2", "llava_llama_2": "llama_2",
             "chatml": "chatml", "chatml_direct": "chatml", "qwen": "chatml", "plain": "plain"}
ASPECTS = {"pad": "pad", "square": "centre", "anyres": "crop"}
NO_SUCH_PART = "this model has no CLIP and no projector: images go through its own patches"
OTHERS_WAY = "rows are packed, saved and logged in this project's own way"
NO_COUNTERPART = "it has no counterpart here"
ACCEPTED = {
    **dict.fromkeys(("vision_tower", "pretrain_mm_mlp_adapter", "mm_projector_type", "mm_projector_lr",
                     "mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end",
                     "mm_use_im_patch_token", "mm_patch_merge_type", "freeze_mm_mlp_adapter", "freeze_backbone",
                     "image_grid_pinpoints", "is_multimodal"), NO_SUCH_PART),
    **dict.fromkeys(("group_by_modality_length", "lazy_preprocess", "remove_unused_columns", "evaluation_strategy",
                     "eval_strategy", "save_strategy", "save_total_limit", "logging_steps", "report_to", "run_name",
                     "per_device_eval_batch_size", "lr_scheduler_type"), OTHERS_WAY),
    **dict.fromkeys(("deepspeed", "gradient_checkpointing", "tf32", "fp16", "bits", "double_quant", "quant_type",
                     "optim", "cache_dir", "local_rank", "mpt_attn_impl", "lora_dropout", "lora_bias"), NO_COUNTERPART),
}


class Flag(NamedTuple):
    """Where a flag's value goes, and what makes the value of its text."""

    name: str
    read: Callable[[str], Any]


def _is_true(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("True or False fits")
    return text.lower() in ("true", "1", "yes")


def _one_of(names: dict[str, str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(map(repr, names))} fits{nearest(text, names)}")
        return names[text]

    return read


TRAINER = {
    "output_dir": Flag("out", Path),
    "max_steps": Flag("optim.steps", int),
    "model_max_length": Flag("optim.seq_len", int),
    "learning_rate": Flag("optim.lr", float),
    "weight_decay": Flag("optim.weight_decay", float),
    "max_grad_norm": Flag("optim.clip", float),
    "warmup_steps": Flag("optim.warmup", int),
    "save_steps": Flag("save_every", int),
    "seed": Flag("seed", int),
    "bf16": Flag("autocast", _is_true),
    "lora_r": Flag("tune.lora_rank", int),
    "lora_alpha": Flag("tune.lora_alpha", int),
}
OTHERS = {
    "model_name_or_path": Flag("model", Path),
    "per_device_train_batch_size": Flag("rows", int),
    "gradient_accumulation_steps": Flag("accumulate", int),
    "image_size": Flag("side", int),
    "data_path": Flag("data_path", str),
    "image_folder": Flag("image_folder", str),
    "version": Flag("chat", _one_of(TEMPLATES)),
    "image_aspect_ratio": Flag("aspect", _one_of(ASPECTS)),
    "lora_enable": Flag("lora", _is_true),
    "tune_mm_mlp_adapter": Flag("images_only", _is_true),
    "num_train_epochs": Flag("epochs", float),
    "warmup_ratio": Flag("warmup_ratio", float),
    "dataloader_num_workers": Flag("workers", int),
}


OURS = ("resume", "auto-resume", "device", "recompute", "stop-after", "max-hours", "save-every", "keep-last",
        "keep-every", "allow-changed", "compile", "log")
"""flags of `transfusion train` without a dot that may stand among LLaVA's"""
PATCH, SIDE = 16, 256
"""pixels of a patch, and of a picture, of a model that is made of a language model: 256 tokens a picture"""


@dataclass(frozen=True)
class LLaVAFlags:
    """What LLaVA's flags say.

    given, mixture: the mixture of the one source, as its file has it, and as settings.
    trainer: settings of `transfusion train` by name, such as "optim.lr".
    model: what training starts from. epochs, warmup_ratio: how long to train, and the share of it that is warm-up.
    workers: processes of the loader. None where they were not given.
    words: a line for each flag that has no effect here, with the reason.
    ours: flags of `transfusion train` that stood among them.
    """

    given: dict[str, Any]
    mixture: MixtureSettings
    trainer: dict[str, Any]
    model: Path | None
    epochs: float | None
    warmup_ratio: float | None
    workers: int | None
    words: tuple[str, ...]
    ours: tuple[str, ...] = ()

    def say(self, name: str) -> bool:
        """Whether a setting of `transfusion train` has its value from a flag, LLaVA's or our own."""
        return name in self.trainer or f"--{name}" in self.ours


def is_llava(arguments: Sequence[str]) -> bool:
    """Whether a command line is LLaVA's: it names its data or its model as LLaVA does."""
    return any(argument.split("=")[0] in ("--data_path", "--model_name_or_path") for argument in arguments)


def read_llava(arguments: Sequence[str]) -> TrainConfig:
    """Return the run that LLaVA's flags describe, its model made and its mixture written, for they say how long it is.

    Raises:
        ValueError: flags that do not fit, named, or a model that is not there.
    """
    flags = read_flags(arguments, Path.cwd())
    out = flags.trainer.get("out")
    if out is None:
        raise ValueError("train: there is no --output_dir; a new directory fits")
    if flags.model is None:
        raise ValueError("train: there is no --model_name_or_path; the directory of a language model or of a "
                         "Transfusion fits")
    for line in flags.words:
        print(line, flush=True)
    file = out.with_name(f"{out.name}-mix.json")
    workers = {} if flags.workers is None else {"workers": flags.workers}
    config = TrainConfig(  # what is not said is as in LLaVA and Hugging Face's trainer
        tune=TuneSettings(lora_rank=64, lora_alpha=16), data=MixtureFileSettings(file=file, **workers),
        model=ModelSettings(patch_size=PATCH, objective="x0"),
        optim=OptimSettings(lr=5e-5, min_lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, warmup=0, ema=0.0))
    for name, value in flags.trainer.items():
        config = _with(config, name, value)
    config = tyro.cli(TrainConfig, default=config, args=list(flags.ours), prog="transfusion train")
    open_sources(flags.mixture)                        # what is missing is told before a model is made
    if not flags.say("tune.start"):
        config = _with(config, "tune.start", _start(flags, config))
    write_text(file, json.dumps(flags.given, indent=2) + "\n")
    if not flags.say("optim.steps"):
        config = _with(config, "optim.steps", _steps(config, 3.0 if flags.epochs is None else flags.epochs))
    if flags.warmup_ratio is not None and not flags.say("optim.warmup"):
        config = _with(config, "optim.warmup", math.ceil(flags.warmup_ratio * config.optim.steps))
    return config


def read_flags(arguments: Sequence[str], folder: Path = Path()) -> LLaVAFlags:
    """Read LLaVA's flags, "--name value" or "--name=value"; paths count from `folder`.

    Raises:
        ValueError: an unknown flag, one without a value, a value that does not fit, or no --data_path.
    """
    trainer, others, words, ours = {}, {}, [], []
    for name, values in _pairs(arguments):
        text = " ".join(values)
        if name in ACCEPTED:
            words.append(f"--{name} {text} has no effect: {ACCEPTED[name]}")
        elif name in TRAINER:
            trainer[TRAINER[name].name] = _value(TRAINER, name, text)
        elif name in OTHERS:
            others[OTHERS[name].name] = _value(OTHERS, name, text)
        elif _is_ours(name):
            ours += [f"--{name}", *values]
        else:
            raise ValueError(f"train: --{name} is no flag of LLaVA's{nearest(name, (*TRAINER, *OTHERS, *ACCEPTED))}")
    if "data_path" not in others:
        raise ValueError("train: there is no --data_path; a json file of conversations fits")
    if others.get("lora"):
        trainer["tune.trained"] = "lora"
    elif others.get("images_only"):
        trainer["tune.trained"] = "images"
    if "rows" in others or "accumulate" in others:
        trainer["optim.rows"] = others.get("rows", 8) * others.get("accumulate", 1)
        trainer["optim.accumulate"] = others.get("accumulate", 1)
    given = _mixture(others, trainer, folder)
    rest = {name: others.get(name) for name in ("model", "epochs", "warmup_ratio", "workers")}
    mixture = make_mixture(given, folder, "train")
    return LLaVAFlags(given, mixture, trainer, **rest, words=tuple(words), ours=tuple(ours))


def _mixture(others: dict[str, Any], trainer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the mixture's file says."""
    source = {"format": "llava", "path": str(folder / others["data_path"])}
    if "image_folder" in others:
        source["images"] = str(folder / others["image_folder"])
    given = {"sources": [source], "chat": {"image_position": "front"}, "held_out": 0.0,
             "pictures": {"side": others.get("side", SIDE)}}
    if "chat" in others:
        given["chat"]["template"] = others["chat"]
    if "aspect" in others:
        given["pictures"]["mode"] = others["aspect"]
    if "optim.seq_len" in trainer:
        given["max_length"] = trainer["optim.seq_len"]
    if "seed" in trainer:
        given["seed"] = trainer["seed"]
    return given


def _start(flags: LLaVAFlags, config: TrainConfig) -> Path:
    """The checkpoint to start from; made of a language model, where that is named."""
    model = flags.model
    if (model / "adapter_config.json").is_file():
        return model
    if model.suffix != ".gguf":
        if not current(model, "config.json").is_file():
            raise ValueError(f"train: --model_name_or_path is {str(model)!r}, which is no checkpoint's directory; "
                             "nothing is downloaded; the directory of a language model or of a Transfusion fits")
        if read_json(current(model, "config.json")).get("model_type") == TransfusionConfig.model_type:
            return model
    start = config.out.with_name(f"{config.out.name}-from-{model.stem if model.suffix == '.gguf' else model.name}")
    side, vae = flags.mixture.pictures.side, config.data.vae
    if vae is not None:
        side //= VAE.from_pretrained(vae).factor
    asked = {"image_size": (side, side), **config.model.shared()}
    rank, processes = launched()
    stands = current(start, "config.json").is_file()
    if rank > 0:
        _wait_for(start)
    elif not stands:
        init(InitSettings(llm=model, out=start, vae=vae, **asked), alone=processes == 1)
    _check_start(start, model, asked, vae)
    if stands and rank == 0:
        print(f"{start} was made of {model} before", flush=True)
    return start


def _wait_for(start: Path) -> None:
    """Wait until the main process has made a checkpoint."""
    until = time.monotonic() + PATIENCE.total_seconds()
    while not current(start, "config.json").is_file() or in_use(start):
        if time.monotonic() > until:
            raise ValueError(f"train: {start} is not there after {PATIENCE.total_seconds() / 60:.0f} min; the main "
                             "process makes it, in a directory that all processes see; `transfusion init` before the "
                             "run makes one, too, for --model_name_or_path")
        time.sleep(0.5)


def _check_start(start: Path, llm: Path, asked: dict[str, Any], vae: Path | None) -> None:
    """Refuse a checkpoint that was made of another language model, or with other settings than are asked for now."""
    made, wanted = TransfusionConfig.from_pretrained(start).to_dict(), TransfusionConfig(**asked).to_dict()
    differ = [f"{name} {made[name]} (now {wanted[name]})" for name in asked
              if json.dumps(made[name]) != json.dumps(wanted[name])]
    kept = VAE.from_pretrained(start / "vae").fingerprint() if (start / "vae").is_dir() else None
    if kept != (None if vae is None else VAE.from_pretrained(vae).fingerprint()):
        differ.append("another autoencoder")
    if not was_made_of(start, llm):
        differ.append("another language model")
    if differ:
        raise ValueError(f"train: {start} was made before with {', '.join(differ)}; the same settings, or another "
                         "--output_dir, fit")


def _steps(config: TrainConfig, epochs: float) -> int:
    """Steps of so many epochs; lengths are counted for it, and kept."""
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"train: --num_train_epochs is {epochs}; a number above 0 fits")
    start = config.tune.start
    while (start / "adapter_config.json").is_file():
        start = find_base(start)
    tokenizer, vae = load_tokenizer(start), start / "vae"
    rows = open_data(config.data).rows(
        tokenizer, TransfusionConfig.from_pretrained(start), VAE.from_pretrained(vae) if vae.is_dir() else None,
        rows=config.optim.rows, seq_len=config.optim.seq_len, steps=1)
    return max(1, math.ceil(epochs * rows.steps_in_epoch - 1e-9))


def _with(config: TrainConfig, name: str, value) -> TrainConfig:
    """The settings with one of them, such as "optim.lr", replaced."""
    group, _, inner = name.rpartition(".")
    changed = value if not group else dataclasses.replace(getattr(config, group), **{inner: value})
    return dataclasses.replace(config, **{group or name: changed})


def _is_ours(name: str) -> bool:
    """Whether it is a flag of `transfusion train`, with as many values as that takes."""
    return "." in name or name.replace("_", "-") in OURS


def _pairs(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    pairs, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"train: {argument!r} stands where a flag is due; --name value fits")
        name, equals, text = argument[2:].partition("=")
        values = [text] if equals else []
        while left and not left[0].startswith("--") and (_is_ours(name) or not values):
            values.append(left.pop(0))
        if not values and not _is_ours(name):
            raise ValueError(f"train: --{name} has no value; --{name} VALUE fits")
        pairs.append((name, values))
    return pairs


def _value(flags: dict[str, Flag], name: str, text: str):
    try:
        return flags[name].read(text)
    except ValueError as error:
        fits = {int: "a whole number fits", float: "a number fits"}.get(flags[name].read, str(error))
        raise ValueError(f"train: --{name} is {text!r}; {fits}") from error
