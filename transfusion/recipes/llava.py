"""LLaVA's command line, as its `scripts/v1_5/finetune_lora.sh` has it, in this project's settings.

    --data_path mix665k.json --image_folder data --version v1 --image_aspect_ratio pad --model_max_length 2048 ...

Flags become a mixture and settings of the trainer. Those that belong to CLIP, DeepSpeed or Hugging Face's trainer are
accepted and named, so that a script runs as it is. An unknown one is answered with the nearest.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transfusion.data.mixture import MixtureSettings, make_mixture
from transfusion.settings import nearest

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
                     "per_device_eval_batch_size", "lr_scheduler_type", "gradient_accumulation_steps"), OTHERS_WAY),
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
    "model_name_or_path": Flag("tune.start", Path),
    "output_dir": Flag("out", Path),
    "max_steps": Flag("optim.steps", int),
    "per_device_train_batch_size": Flag("optim.rows", int),
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


@dataclass(frozen=True)
class LLaVAFlags:
    """What LLaVA's flags say.

    mixture: of the one source.
    trainer: settings of `transfusion train` by name, such as "optim.lr".
    epochs, warmup_ratio, workers: how long to train, the share of it that is warm-up, and processes of the loader; None
        where they were not given.
    words: a line for each flag that has no effect here, with the reason.
    """

    mixture: MixtureSettings
    trainer: dict[str, Any]
    epochs: float | None
    warmup_ratio: float | None
    workers: int | None
    words: tuple[str, ...]


def is_llava(arguments: Sequence[str]) -> bool:
    """Whether a command line is LLaVA's: it names its data by --data_path."""
    return any(argument.split("=")[0] == "--data_path" for argument in arguments)


def read_flags(arguments: Sequence[str], folder: Path = Path()) -> LLaVAFlags:
    """Read LLaVA's flags, "--name value" or "--name=value"; paths count from `folder`.

    Raises:
        ValueError: an unknown flag, one without a value, a value that does not fit, or no --data_path.
    """
    trainer, others, words = {}, {}, []
    for name, text in _pairs(arguments):
        if name in ACCEPTED:
            words.append(f"--{name} {text} has no effect: {ACCEPTED[name]}")
        elif name in TRAINER:
            trainer[TRAINER[name].name] = _value(TRAINER, name, text)
        elif name in OTHERS:
            others[OTHERS[name].name] = _value(OTHERS, name, text)
        else:
            raise ValueError(f"train: --{name} is no flag of LLaVA's{nearest(name, (*TRAINER, *OTHERS, *ACCEPTED))}")
    if "data_path" not in others:
        raise ValueError("train: there is no --data_path; a json file of conversations fits")
    if others.get("lora"):
        trainer["tune.trained"] = "lora"
    elif others.get("images_only"):
        trainer["tune.trained"] = "images"
    source = {"format": "llava", "path": others["data_path"]}
    if "image_folder" in others:
        source["images"] = others["image_folder"]
    given = {"sources": [source], "chat": {"image_position": "front"}, "held_out": 0.0}
    if "chat" in others:
        given["chat"]["template"] = others["chat"]
    if "aspect" in others:
        given["pictures"] = {"mode": others["aspect"]}
    if "optim.seq_len" in trainer:
        given["max_length"] = trainer["optim.seq_len"]
    if "seed" in trainer:
        given["seed"] = trainer["seed"]
    rest = {name: others.get(name) for name in ("epochs", "warmup_ratio", "workers")}
    return LLaVAFlags(make_mixture(given, folder, "train"), trainer, **rest, words=tuple(words))


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"train: {argument!r} stands where a flag is due; --name value fits")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"train: --{name} has no value; --{name} VALUE fits")
            text = left.pop(0)
        pairs.append((name, text))
    return pairs


def _value(flags: dict[str, Flag], name: str, text: str):
    try:
        return flags[name].read(text)
    except ValueError as error:
        fits = {int: "a whole number fits", float: "a number fits"}.get(flags[name].read, str(error))
        raise ValueError(f"train: --{name} is {text!r}; {fits}") from error
