"""What of a pretrained model is trained: everything, images alone, or images and low-rank adapters (LoRA).

    all      every parameter
    images   the image layers and the rows of BOI and EOI; the language model stays what it was, to the bit, on text
    lora     the same and W + (alpha / rank) B A for every linear layer of the decoder's blocks (arXiv:2106.09685)

The last two are peft's: what is trained is saved as one adapter (adapter_model.safetensors), a few per cent of the
model, and `Transfusion.from_pretrained` on its directory loads the model it was made from and puts the adapter in.
"""
import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoQuantizationConfig

from transfusion.files import STEPS, check_files, checksums, current, read_json
from transfusion.model.weights import check_complete
from transfusion.settings import Count, OneOf, nearest

PROJECTIONS = r"backbone\.decoder\.model\.layers\..*_proj"  # a Llama's linear layers
BASE = "base.json"  # beside an adapter: the way to its model

TRAINED = ("all", "images", "lora")


@dataclass(frozen=True)
class TuneSettings:
    """Where training starts and what of the model it changes."""

    start: Path | None = None
    """checkpoint to start from, such as `transfusion init` makes; the model's settings are then its own; None starts
    anew"""
    trained: Annotated[str, OneOf(TRAINED)] = "all"
    """all; images: the image layers and BOI's and EOI's rows; lora: these and adapters of the decoder"""
    lora_rank: Count = 16
    """rank of the adapters"""
    lora_alpha: Count = 32
    """the adapters' product is multiplied by alpha / rank"""
    frozen: tuple[str, ...] | None = None
    """modules of images that are not trained, whatever `trained` says, by their names in the printed table without
    "images: "; `patch_embedding timestep` are what pictures are read by"""


def prepare(model, settings: TuneSettings) -> nn.Module:
    """Return `model` with what is not trained frozen: itself, or a PeftModel around it.

    The latter's `save_pretrained` writes the adapter alone.

    Raises:
        ValueError: `trained` is none of TRAINED, `frozen` names what the model has not, or an adapter is asked for
            without a checkpoint that it belongs to.
    """
    if settings.trained not in TRAINED:
        raise ValueError(f"train: tune.trained is {settings.trained!r}; one of {', '.join(map(repr, TRAINED))} fits")
    groups = {name: _image_group(name) for name in image_modules(model)}
    frozen = settings.frozen or ()
    for name in frozen:
        if name not in groups.values():
            known = list(dict.fromkeys(groups.values()))
            raise ValueError(f"train: tune.frozen has {name!r}, and the model's modules of images are "
                             f"{', '.join(known)}; names of these fit{nearest(name, known)}")
    changed = [name for name, group in groups.items() if group not in frozen]
    if settings.trained == "all":
        for name in groups.keys() - set(changed):
            model.get_submodule(name).requires_grad_(False)
        return model
    if settings.start is None:
        raise ValueError(f"train: tune.trained is {settings.trained!r} and tune.start None; a checkpoint that the "
                         "adapter belongs to fits; make one with `transfusion init`")
    rows, ends = [model.config.boi_token_id, model.config.eoi_token_id], [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:  # peft follows a tie itself
        ends.append(model.get_output_embeddings())
    tokens = {name.split(".")[-1]: rows for name, module in model.named_modules() if any(module is end for end in ends)}
    if settings.trained == "images":
        config = TrainableTokensConfig(target_modules=list(tokens), token_indices=rows)
    else:
        transposed = any(isinstance(module, Conv1D) for module in model.backbone.decoder.modules())  # GPT-2's weights
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, trainable_token_indices=tokens,
                            target_modules=_linear_layers(model), fan_in_fan_out=transposed)
    config.modules_to_save = changed
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(Path(settings.start).resolve())
    return adapted


def _linear_layers(model) -> str | list[str]:
    """Every linear layer of the decoder's blocks, by a pattern where it says all of them, else by their names."""
    blocks = {module for block in model.backbone.blocks() for module in block.modules()}
    names = [name for name, module in model.named_modules()
             if module in blocks and not is_of_images(name) and isinstance(module, nn.Linear | Conv1D)]
    if names and all(re.fullmatch(PROJECTIONS, name) for name in names):
        return PROJECTIONS
    return names


def base_of(model: nn.Module) -> nn.Module:
    """Return the Transfusion in what `prepare` returns: the model itself, or the one that adapters stand around."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_of_images(name: str) -> bool:
    """Whether a parameter, by its name in a model or in one with adapters, stands outside the decoder."""
    return "backbone.decoder." not in name


def image_modules(model) -> list[str]:
    """Names of the modules that hold every parameter outside the decoder."""
    children = [(name, module) for name, module in model.backbone.named_children() if name != "decoder"]
    lists = [(name, module) for name, module in children if isinstance(module, nn.ModuleList)]
    names = [name for name, _ in model.named_children() if name != "backbone"]
    names += [f"backbone.{name}" for name, module in children if not isinstance(module, nn.ModuleList)]
    return names + [f"backbone.{name}.{i}" for name, module in lists for i in range(len(module))]


def _image_group(name: str) -> str:
    """The module of images that a parameter or a module of one belongs to, as the table of what is trained calls it."""
    return name.removeprefix("backbone.").split(".")[0]


def spare_images(model, quantization):
    """Return a quantiser's settings, transformers' or a dict of them, that leave every module of images alone.

    So do they leave the text head. Operators of images read their layers' weights themselves, which must therefore be
    numbers.
    """
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(dict(quantization))
    quantization = copy.deepcopy(quantization)
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    for field in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(quantization, field):
            spared = [*(getattr(quantization, field) or ()), *heads, *image_modules(model)]
            setattr(quantization, field, list(dict.fromkeys(spared)))
    return quantization


def load_adapter(base, path: Path):
    """Put the adapter in `path` into its model for good; return the model."""
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"Transfusion.from_pretrained: path is {str(path)!r}, an adapter without "
                         "adapter_model.safetensors; copy it again or make it anew")
    check_files(path)
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}  # peft freezes all
    adapted = PeftModel.from_pretrained(base, path)
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        lacking = get_peft_model_state_dict(adapted).keys() - file.keys()
    check_complete("Transfusion.from_pretrained", "path", path, {"missing_keys": lacking})
    merged = adapted.merge_and_unload()
    for name, p in merged.named_parameters():
        p.requires_grad_(name in trainable)
    merged.name_or_path = str(path)
    return merged


def name_base(directory: Path, start: Path, out: Path) -> None:
    """Write into an adapter's directory where its model lies, also as seen from `out`, where the adapter will be.

    Both may then move together.
    """
    absolute = Path(start).resolve()
    places = {"relative": os.path.relpath(absolute, Path(out).resolve()), "absolute": str(absolute)}
    (directory / BASE).write_text(json.dumps(places | {"weights": checksums(start)}, indent=2) + "\n")


def check_base(op: str, start: Path, out: Path) -> None:
    """Refuse to go on with an adapter on other weights than those that it was trained on.

    Raises:
        ValueError: the model in `start` has changed since the adapter in `out` was saved.
    """
    file = current(out, BASE)
    kept = read_json(file).get("weights") if file.is_file() else None
    if kept and not _has_weights(start, kept):
        raise ValueError(f"{op}: tune.start is {str(start)!r}, whose weights are others than those that the adapter in "
                         f"{str(out)!r} was trained on; put those back, or go on with --allow-changed")


def find_base(path: Path, base: Path | None = None) -> Path:
    """Where the model lies that the adapter in `path` belongs to.

    That is `base`, or the place beside the adapter, or beside the run that it is a save of, where it was when the
    adapter was made, or the directory it then was.

    Raises:
        ValueError: none of them holds a checkpoint, or the adapter names itself, or another that leads back to it.
    """
    path, tried = Path(path), [Path(base)] if base is not None else _named_bases(Path(path))
    found = next(filter(holds_checkpoint, tried), None)
    if found is None:
        places = ", ".join(repr(str(place)) for place in dict.fromkeys(tried))
        why = f"tried {places}" if tried else "where it was, other weights lie"
        raise ValueError(f"Transfusion.from_pretrained: path is {str(path)!r}, an adapter, and the model that it was "
                         f"trained on is not there ({why}); put it back, or name it with "
                         "from_pretrained(path, base=...)")
    seen, place = {path.resolve()}, found
    while place is not None and place.resolve() not in seen and holds_adapter(place):
        seen.add(place.resolve())
        place = next(filter(holds_checkpoint, _named_bases(place)), None)
    if place is not None and place.resolve() in seen:
        raise ValueError(f"Transfusion.from_pretrained: path is {str(path)!r}, an adapter whose model is "
                         f"{str(found)!r}, an adapter that leads back to itself; name the model it was trained on with "
                         "from_pretrained(path, base=...)")
    return found


def holds_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter."""
    return current(path, "adapter_config.json").is_file()


def holds_checkpoint(path: Path) -> bool:
    """Whether a directory holds a model or an adapter."""
    return holds_adapter(path) or current(path, "config.json").is_file()


def _named_bases(path: Path) -> list[Path]:
    """Where an adapter's model may lie, likeliest first, but for models of other weights than it was trained on."""
    file = current(path, BASE)
    kept = read_json(file) if file.is_file() else {}
    peft_says = read_json(current(path, "adapter_config.json")).get("base_model_name_or_path")
    said = [kept.get("relative"), kept.get("absolute"), peft_says]
    homes = dict.fromkeys((path, path.resolve()))
    # what a save that stays says is as seen from its run's directory, in whose steps/ it lies
    homes |= dict.fromkeys([home.parent.parent for home in homes if home.parent.name == STEPS])
    places = [home / place for place in said if isinstance(place, str) for home in homes]
    places += [Path(said[2])] if isinstance(said[2], str) else []
    return [place for place in places if not kept.get("weights") or _has_weights(place, kept["weights"])]


def _has_weights(place: Path, kept: dict[str, str]) -> bool:
    """Whether a directory has files of these checksums, beside others, or tells none."""
    found = checksums(place)
    return not found or kept.items() <= found.items()


_GROUPS = {"lora_": "decoder: adapters", "trainable_tokens": "decoder: BOI and EOI",
           "decoder.model.embed": "decoder: embeddings", "decoder.lm_head": "decoder: text head",
           "backbone.decoder.": "decoder: blocks"}


def trained_table(model: nn.Module) -> str:
    """What is trained, group by group: parameters, and those that change."""
    groups: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        if "original_module." in name:  # what peft keeps of a module beside its trained copy
            continue
        name = name.removeprefix("base_model.model.")
        images = f"images: {_image_group(name)}"
        group = next((label for key, label in _GROUPS.items() if key in name), images)
        total = groups.setdefault(group, [0, 0])
        total[0] += p.numel()
        total[1] += p.numel() * p.requires_grad
    lines = [f"{'what':<28}{'parameters':>14}{'trained':>14}"]
    lines += [f"{group:<28}{count:>14,}{trained:>14,}" for group, (count, trained) in sorted(groups.items())]
    total, trained = (sum(x[i] for x in groups.values()) for i in (0, 1))
    return "\n".join([*lines, f"{'all':<28}{total:>14,}{trained:>14,} ({100 * trained / total:.2f} %)"])
