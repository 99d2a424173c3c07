"""What a training run saves to go on from, and the checks before it does.

A run's directory holds its checkpoint, log.jsonl and resume/:

    resume/state.safetensors   model.NAME, averaged.NAME and optimizer.NAME.KEY: weights, averages where there are any,
                               optimizers' tensors
    resume/state/              the same of several processes, in shards (transfusion/train/sharded.py)
    resume/run.json            the step, the settings, and what optimizers keep that is no tensor

The checkpoint and resume/ are replaced together (transfusion/files.py): a kill at any moment leaves the older or the
newer of both. Names of a second player, a discriminator, stand behind its own: discriminator.model.NAME. Any number of
processes goes on from either form.
"""
import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion.command import saved_step
from transfusion.files import load_tensors, verify, whole
from transfusion.train.average import trained_parameters
from transfusion.train.optimizer import Player
from transfusion.train.processes import agreed
from transfusion.train.sharded import SHARDS, local, read_shards, shapes_of


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


class Saved(NamedTuple):
    """The tensors of a save."""

    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    read: Callable[[dict[str, Tensor]], None]
    """fill tensors, whole ones or shards, with those of their names"""


@contextlib.contextmanager
def open_saved(out: Path) -> Iterator[Saved]:
    """The tensors of the save in `out`, of one process or in shards, checked against their checksums.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    with whole(out) as directory:
        shards = directory / SHARDS
        if shards.is_dir():
            if not dist.is_initialized() or dist.get_rank() == 0:  # once for all processes
                verify(shards)
            yield Saved(shapes_of(shards), functools.partial(read_shards, shards))
        else:
            tensors = load_tensors(directory / "resume" / "state.safetensors")
            yield Saved({name: (x.shape, x.dtype) for name, x in tensors.items()}, functools.partial(_fill, tensors))


def _fill(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy tensors to those of their names; of a sharded one each process takes its shard."""
    for name, x in targets.items():
        found = tensors[name]
        if isinstance(x, DTensor):
            found = distribute_tensor(found.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
        x.copy_(found)


@torch.no_grad()
def restore_players(players: Sequence[Player], saved: Saved, optimizers: Mapping[str, dict]) -> None:
    """Put what `training_state` returned into the players.

    Raises:
        ValueError: the state is another optimizer's or another model's.
    """
    for player in players:  # optimizers keep nothing before their first step
        start = player.prefix(".") + "optimizer."
        shapes = {name.removeprefix(start): shape for name, shape in saved.shapes.items() if name.startswith(start)}
        _restore_optimizer(player, shapes, optimizers.get(player.name, {}))
    targets = {name: x.detach() for name, x in training_state(players)[0].items()}
    begun = _unsaved_averages(players, saved)
    targets = {name: x for name, x in targets.items() if name not in begun}
    other = [name for name, x in targets.items() if saved.shapes.get(name, (None,))[0] != x.shape]
    if other:
        raise ValueError(f"train: the saved run has no {other[0]} of {tuple(targets[other[0]].shape)}, and this one "
                         "has; the same model fits; start anew with another --out")
    saved.read(targets)
    for average, weights in begun.values():
        average.copy_(weights)


def _unsaved_averages(players: Sequence[Player], saved: Saved) -> dict[str, tuple[Tensor, Tensor]]:
    """Averages of players of which the saved run kept none, its `ema` being 0, each with the weights it begins as."""
    found = {}
    for player in players:
        start, weights = player.prefix(".") + "averaged.", _weights(player.model)
        if player.averaged is not None and not any(name.startswith(start) for name in saved.shapes):
            found |= {start + name: (average, weights[name]) for name, average in player.averaged.tensors.items()}
    return found


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that belong to a model's weights, as batch norm's statistics do.

    Around an adapter's model, whose own weights lie elsewhere, they are those that are trained.
    """
    kept = model.state_dict().keys()
    parameters = trained_parameters(model) if isinstance(model, PeftModel) else dict(model.named_parameters())
    return parameters | {name: x for name, x in model.named_buffers() if name in kept}


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


def _restore_optimizer(player: Player, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], kept: Mapping) -> None:
    """Put what `_optimizer_state` returned into an optimizer, its tensors still empty.

    Older saves have its tensors alone.
    """
    optimizer, kind = player.optimizer, type(player.optimizer).__name__
    if kept.get("kind", kind) != kind:
        raise ValueError(f"train: the saved run's optimizer is {kept['kind']} and this one {kind}; the same one fits; "
                         "start anew with another --out")
    found: dict[str, dict] = {}
    for path, x in [*shapes.items(), *kept.get("numbers", {}).items()]:
        name, _, key = path.rpartition(".")
        found.setdefault(name, {})[key] = x
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained_parameters(player.model).items():
        if name in found:
            optimizer.state[p] = {key: _empty(key, *x, p, groups[p]) if isinstance(x, tuple) else x
                                  for key, x in found[name].items()}
    for group, changed in zip(optimizer.param_groups, kept.get("groups", [])):
        group.update(changed)


def _empty(key: str, shape: torch.Size, dtype: torch.dtype, p: Tensor, group: Mapping) -> Tensor:
    """A tensor where its optimizer keeps it: torch's keep steps on the host, but for fused and capturable ones."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    if isinstance(p, DTensor) and key != "step":  # in shards, as the parameter itself
        return torch.empty_like(p, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device="cpu" if on_host else p.device)


def check_finite(command: str, out: Path, step: int, values: Mapping[str, float], way_on: str = "") -> None:
    """Refuse to take a step whose losses or gradient are not finite.

    Raises:
        FloatingPointError: with what stands and how to go on; `way_on` says it of trainers without --resume.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        error = FloatingPointError(f"{command}: in step {step:,} {', '.join(bad)}; {way_on or _way_on(out, step)}")
        raise agreed(error)  # all processes have the same numbers


def check_weights(command: str, out: Path, step: int, tensors: Mapping[str, Tensor], way_on: str = "") -> None:
    """Refuse to save weights or moments that are not finite, before anything of the older save is touched.

    Of those in shards each process looks at its own.

    Raises:
        FloatingPointError: as `check_finite`.
    """
    names = [name for name, x in tensors.items() if x.is_floating_point()]
    flags = [torch.isfinite(local(tensors[name])).all() for name in names]
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


def write_state(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Write the tensors that `training_state` returned, of one process, to a directory's resume/, for `open_saved`."""
    (directory / "resume").mkdir(exist_ok=True)
    tensors = {name: x.detach().contiguous().cpu().clone() for name, x in state.items()}
    save_file(tensors, directory / "resume" / "state.safetensors")


def write_run(directory: Path, run: Mapping) -> None:
    """Write the rest of what going on needs: step, config (as `recorded` returns it), optimizers, history."""
    (directory / "resume" / "run.json").write_text(json.dumps(run, indent=2))
