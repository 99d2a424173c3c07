"""Which settings a run may go on with: what is saved of them, and what must be equal."""
import dataclasses
import json
from collections.abc import Mapping

from transfusion.command import saved_run
from transfusion.data.dataset import DataSettings
from transfusion.model.config import present_backbone
from transfusion.train.settings import RunSettings


def recorded(config: RunSettings) -> dict:
    """Return settings as JSON can hold them; with those of data stands what they say of themselves (`record`)."""
    said = {name: value.record() for name, value in _data(config).items()}
    record = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return record | {name: record[name] | more for name, more in json.loads(json.dumps(said, default=str)).items()}


def _data(config: RunSettings) -> dict[str, DataSettings]:
    """The settings among `config` that name data."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, DataSettings)}


def run_to_resume(config: RunSettings, fixed: tuple[str, ...]) -> dict:
    """Return what run.json holds of the run that is saved in `out`.

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
    return run


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
