"""What a training run saves to go on from, and the checks before it does.

A run's directory holds its checkpoint, log.jsonl and resume/:

    resume/state.safetensors   model.NAME, averaged.NAME and optimizer.NAME.KEY: weights, averages, optimizers' tensors
    resume/run.json            the step, the settings, and what optimizers keep that is no tensor

The checkpoint and resume/ are replaced together (transfusion/files.py): a kill at any moment leaves the older or the
newer of both. Names of a second player, a discriminator, stand behind its own: discriminator.model.NAME.
"""
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from transfusion.command import saved_run, saved_step
from transfusion.data.dataset import DataSettings
from transfusion.files import load_tensors, whole
from transfusion.model.config import present_backbone
from transfusion.train.average import trained_parameters
from transfusion.train.optimizer import Player
from transfusion.train.settings import RunSettings


def training_state(players: Sequence[Player]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """What going on needs: tensors by name and, for each player, what its optimizer keeps that is no tensor.

    `restore_players` undoes it.
    """
    state, optimizers = {}, {}
    for player in players:
        tensors = {f"model.{name}": x for name, x in _weights(player.model).items()}
        moments, optimizers[player.name] = _optimizer_state(player)
        tensors |= {f"optimizer.{name}": x for name, x in moments.items()}
        if player.averaged is not None:
            tensors |= {f"averaged.{name}": x for name, x in player.averaged.tensors.items()}
            tensors["averaged_steps"] = player.averaged.n_averaged
        state |= {player.prefix(".") + name: x for name, x in tensors.items()}
    return state, optimizers


@torch.no_grad()
def restore_players(players: Sequence[Player], state: Mapping[str, Tensor], optimizers: Mapping[str, dict]) -> None:
    """Put what `training_state` returned into the players.

    Raises:
        ValueError: the state is another optimizer's.
    """
    for player in players:
        prefix = player.prefix(".")
        for name, x in _weights(player.model).items():
            x.copy_(state[f"{prefix}model.{name}"])
        start = f"{prefix}optimizer."
        tensors = {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}
        _restore_optimizer(player, tensors, optimizers.get(player.name, {}))
        if player.averaged is not None:
            for name, x in player.averaged.tensors.items():
                x.copy_(state[f"{prefix}averaged.{name}"])
            player.averaged.n_averaged.copy_(state[f"{prefix}averaged_steps"])


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and the buffers that belong to a model's weights, as batch norm's statistics do."""
    kept = model.state_dict().keys()
    return trained_parameters(model) | {name: x for name, x in model.named_buffers() if name in kept}


def _optimizer_state(player: Player) -> tuple[dict[str, Tensor], dict]:
    """All that an optimizer keeps: tensors, by parameter, and the rest, as JSON can hold it."""
    optimizer, tensors, others = player.optimizer, {}, {}
    names = {p: name for name, p in trained_parameters(player.model).items()}
    for p, values in optimizer.state.items():
        for key, x in values.items():
            if isinstance(x, Tensor):
                tensors[f"{names[p]}.{key}"] = x
            elif x is None or isinstance(x, bool | int | float | str):
                others[f"{names[p]}.{key}"] = x
            else:
                raise ValueError(f"train: the optimizer, {type(optimizer).__name__}, keeps a {type(x).__name__} "
                                 f"({key}); tensors and numbers can be saved; take another one in "
                                 "transfusion/train/optimizer.py")
    groups = [{key: value for key, value in group.items() if key not in ("params", "lr") and value != before.get(key)}
              for group, before in zip(optimizer.param_groups, player.built)]
    return tensors, {"kind": type(optimizer).__name__, "numbers": others, "groups": groups}


def _restore_optimizer(player: Player, tensors: Mapping[str, Tensor], kept: Mapping) -> None:
    """Put what `_optimizer_state` returned into an optimizer; older saves have its tensors alone."""
    optimizer, kind = player.optimizer, type(player.optimizer).__name__
    if kept.get("kind", kind) != kind:
        raise ValueError(f"train: the saved run's optimizer is {kept['kind']} and this one {kind}; the same one fits; "
                         "start anew with another --out")
    found: dict[str, dict] = {}
    for path, x in [*tensors.items(), *kept.get("numbers", {}).items()]:
        name, _, key = path.rpartition(".")
        found.setdefault(name, {})[key] = x
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained_parameters(player.model).items():
        if name in found:
            optimizer.state[p] = {key: _placed(key, x, p, groups[p]) for key, x in found[name].items()}
    for group, changed in zip(optimizer.param_groups, kept.get("groups", [])):
        group.update(changed)


def _placed(key: str, x, p: Tensor, group: Mapping):
    """A value where its optimizer keeps it: torch's keep steps on the host, but for fused and capturable ones."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return x.to(p.device) if isinstance(x, Tensor) and not on_host else x


def check_finite(command: str, out: Path, step: int, values: Mapping[str, float], way_on: str = "") -> None:
    """Refuse to take a step whose losses or gradient are not finite.

    Raises:
        FloatingPointError: with what stands and how to go on; `way_on` says it of trainers without --resume.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{command}: in step {step:,} {', '.join(bad)}; {way_on or _way_on(out, step)}")


def check_weights(command: str, out: Path, step: int, tensors: Mapping[str, Tensor], way_on: str = "") -> None:
    """Refuse to save weights or moments that are not finite, before anything of the older save is touched.

    Raises:
        FloatingPointError: as `check_finite`.
    """
    names = [name for name, x in tensors.items() if x.is_floating_point()]
    flags = [torch.isfinite(tensors[name]).all() for name in names]
    flags = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # one wait for the device
    bad = [name for name, fine in zip(names, flags) if not fine]
    if bad:
        raise FloatingPointError(f"{command}: after {step:,} steps {len(bad)} tensors are not finite ({bad[0]}); they "
                                 f"are not saved; {way_on or _way_on(out, step)}")


def _way_on(out: Path, step: int) -> str:
    """What a run that diverged leaves, and what helps."""
    saved = saved_step(out)
    if saved is None:
        return "nothing was saved; start again with a lower optim.lr"
    if saved == step:
        return (f"the save of {saved:,} steps in {out} holds the very weights that gave this, so that --resume would "
                "end here again; start anew with a lower optim.lr and another --out")
    return f"the save of {saved:,} steps in {out} stands; --resume with a lower optim.lr goes on from it"


def write_state(directory: Path, config: RunSettings, state: Mapping[str, Tensor], optimizers: Mapping[str, dict],
                step: int) -> None:
    """Write what `training_state` returned, and the settings, to a directory's resume/, for `load_state`."""
    kept = directory / "resume"
    kept.mkdir()
    tensors = {name: x.detach().contiguous().cpu().clone() for name, x in state.items()}
    save_file(tensors, kept / "state.safetensors")
    run = {"step": step, "config": recorded(config), "optimizers": optimizers}
    (kept / "run.json").write_text(json.dumps(run, indent=2))


def recorded(config: RunSettings) -> dict:
    """Return settings as JSON can hold them; with those of data stands what they say of themselves (`record`)."""
    said = {name: value.record() for name, value in _data(config).items()}
    record = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return record | {name: record[name] | more for name, more in json.loads(json.dumps(said, default=str)).items()}


def _data(config: RunSettings) -> dict[str, DataSettings]:
    """The settings among `config` that name data."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, DataSettings)}


def load_state(config: RunSettings, fixed: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors that `write_state` wrote, on the host, and what run.json holds.

    The settings that `fixed` names, single ones or groups, must be what they were. Others may change, and one line says
    which do.

    Raises:
        ValueError: no run of this kind or of these settings, or a damaged one.
    """
    run, out = saved_run(config.out), str(config.out)
    theirs, ours = _flat(run.get("config") or {}), _flat(recorded(config))
    if theirs.get("data.folder") is not None:
        theirs.pop("data.name", None)  # earlier versions wrote a data set's name beside a folder, too
    if "model.backbone" in theirs:
        theirs["model.backbone"] = present_backbone(theirs["model.backbone"])
    groups = {name.partition(".")[0] for name in fixed} & {key.partition(".")[0] for key in ours if "." in key}
    if not groups <= {key.partition(".")[0] for key in theirs}:  # settings that are new since then are in none of them
        raise ValueError(f"train: out is {out!r}, which holds a run of another kind; --resume goes on with the same "
                         "command's; take another --out")
    of_a_call = "out", "resume", "stop_after", "max_hours"
    changed = [key for key in ours if key in theirs and theirs[key] != ours[key] and key not in of_a_call]
    free = {f"{name}.{one}" for name, value in _data(config).items() for one in value.free}
    other = [key for key in changed
             if key not in free and any(key == name or key.startswith(f"{name}.") for name in fixed)]
    if other:
        raise ValueError(f"train: {', '.join(other)} differ from the run saved in {out!r}; the same settings fit; "
                         "start anew with another --out")
    if config.resume and config.stop_after is not None and config.stop_after <= run["step"]:
        raise ValueError(f"train: stop_after is {config.stop_after} and the run saved in {out!r} has {run['step']:,} "
                         "steps; a later step fits, or leave it out")
    if changed:
        print(f"going on with {', '.join(f'{key} {ours[key]} (was {theirs[key]})' for key in changed)}", flush=True)
    with whole(config.out) as directory:
        return load_tensors(directory / "resume" / "state.safetensors"), run


def same_run(config: RunSettings, names: tuple[str, ...]) -> bool:
    """Whether `out` holds a run that was stopped and whose settings of these names were equal; one line says so."""
    saved, ours = saved_run(config.out) or {}, recorded(config)
    theirs = saved.get("config", {})
    same = bool(theirs) and all(theirs.get(name) == ours[name] for name in names)
    if same:
        print(f"going on from step {saved['step']} of the run kept in {config.out / 'resume'}", flush=True)
    return same


def _flat(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"optim.lr": 0.001, ...}."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
