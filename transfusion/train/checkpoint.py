"""What a training run saves to go on from, and the checks before it does.

A run's directory holds its checkpoint, log.jsonl and resume/, with state.safetensors (weights, the optimizer's moments) and run.json (step, settings).
Checkpoint and resume/ are replaced together (transfusion/files.py): a kill at any moment leaves the older or the newer of both.
"""
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from transfusion.command import saved_run, saved_step
from transfusion.data.dataset import DatasetSettings
from transfusion.files import load_tensors, whole
from transfusion.model.config import present_backbone


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_state(model: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """What is trained of a model, and the optimizer's moments, by name; `load_training_state` undoes it."""
    trained = trained_parameters(model)
    return {f"model.{name}": p for name, p in trained.items()} | {
        f"optimizer.{name}.{key}": x for name, p in trained.items() for key, x in optimizer.state[p].items()}


def load_training_state(state: dict[str, torch.Tensor], model: torch.nn.Module, optimizer) -> None:
    """Put what `training_state` returned into a model and its optimizer."""
    for name, p in trained_parameters(model).items():
        p.data.copy_(state[f"model.{name}"])
        optimizer.state[p] = {key: state[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{key}" in state}


def numbers(**values: torch.Tensor) -> dict[str, float]:
    """Single numbers as floats, with one wait for the device."""
    return dict(zip(values, torch.stack([x.detach().float() for x in values.values()]).tolist()))


def check_finite(command: str, out: Path, step: int, values: Mapping[str, float], way_on: str = "") -> None:
    """Refuse to take a step whose losses or gradient are not finite.

    Raises:
        FloatingPointError: with what stands and how to go on; `way_on` says it of trainers without --resume.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{command}: in step {step:,} {', '.join(bad)}; {way_on or _way_on(out, step)}")


def check_weights(command: str, out: Path, step: int, tensors: Mapping[str, torch.Tensor], way_on: str = "") -> None:
    """Refuse to save weights or moments that are not finite, before anything of the older save is touched.

    Raises:
        FloatingPointError: as `check_finite`.
    """
    names = [name for name, x in tensors.items() if x.is_floating_point()]
    flags = [torch.isfinite(tensors[name]).all() for name in names]
    flags = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # one wait for the device
    bad = [name for name, fine in zip(names, flags) if not fine]
    if bad:
        raise FloatingPointError(f"{command}: after {step:,} steps {len(bad)} tensors are not finite ({bad[0]}); they are not saved; "
                                 f"{way_on or _way_on(out, step)}")


def _way_on(out: Path, step: int) -> str:
    """What a run that diverged leaves, and what helps."""
    saved = saved_step(out)
    if saved is None:
        return "nothing was saved; start again with a lower optim.lr"
    if saved == step:
        return (f"the save of {saved:,} steps in {out} holds the very weights that gave this, so that --resume would end here again; start anew with a lower "
                "optim.lr and another --out")
    return f"the save of {saved:,} steps in {out} stands; --resume with a lower optim.lr goes on from it"


def write_state(directory: Path, config, state: dict[str, torch.Tensor], step: int) -> None:
    """Write tensors and settings to a directory's resume/, for `load_state`."""
    kept = directory / "resume"
    kept.mkdir()
    save_file({name: x.detach().contiguous().cpu().clone() for name, x in state.items()}, kept / "state.safetensors")
    (kept / "run.json").write_text(json.dumps({"step": step, "config": recorded(config)}, indent=2))


def recorded(config) -> dict:
    """Return settings as JSON can hold them; beside the settings of a data set stands its name."""
    named = {field.name: value.name for field in dataclasses.fields(config)
             if isinstance(value := getattr(config, field.name), DatasetSettings)}
    record = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return record | {field: record[field] | {"name": name} for field, name in named.items()}


def load_state(config, fixed: tuple[str, ...], device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Return what `write_state` wrote and its step; the settings that `fixed` names, single ones or groups, must be what they were.

    Others may change, and one line says which do.
    """
    run, out = saved_run(config.out), str(config.out)
    theirs, ours = _flat(run.get("config") or {}), _flat(recorded(config))
    if theirs.get("data.folder") is not None:
        theirs.pop("data.name", None)  # earlier versions wrote a data set's name beside a folder, too
    if "model.backbone" in theirs:
        theirs["model.backbone"] = present_backbone(theirs["model.backbone"])
    if not {key.split(".")[0] for key in ours if "." in key} <= {key.split(".")[0] for key in theirs}:
        raise ValueError(f"train: out is {out!r}, which holds a run of another kind; --resume goes on with the same command's; take another --out")
    changed = [key for key in ours if key in theirs and theirs[key] != ours[key] and key not in ("out", "resume", "stop_after")]
    other = [key for key in changed if any(key == name or key.startswith(f"{name}.") for name in fixed)]
    if other:
        raise ValueError(f"train: {', '.join(other)} differ from the run saved in {out!r}; the same settings fit; start anew with another --out")
    if config.resume and config.stop_after is not None and config.stop_after <= run["step"]:
        raise ValueError(f"train: stop_after is {config.stop_after} and the run saved in {out!r} has {run['step']:,} steps; a later step fits, or leave it out")
    if changed:
        print(f"going on with {', '.join(f'{key} {ours[key]} (was {theirs[key]})' for key in changed)}", flush=True)
    with whole(config.out) as directory:
        return load_tensors(directory / "resume" / "state.safetensors", str(device)), run["step"]


def _flat(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"optim.lr": 0.001, ...}."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
