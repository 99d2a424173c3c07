"""Which settings a run may go on with: what is saved of them, and what must be equal."""
import dataclasses
import json
from collections.abc import Mapping

from transfusion.command import saved_run, saved_step
from transfusion.data.dataset import DataSettings
from transfusion.model.config import present_backbone
from transfusion.settings import flat
from transfusion.train.settings import RunSettings

OF_A_CALL = "out", "resume", "auto_resume", "stop_after", "max_hours", "allow_changed"
"""settings of one call, which say nothing of the run"""


def found_resume(config: RunSettings) -> RunSettings:
    """Return settings whose `resume` says whether there is a run to go on with, where `auto_resume` asks for that."""
    if not config.auto_resume:
        return config
    return dataclasses.replace(config, resume=saved_step(config.out) is not None, auto_resume=False)


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

    The settings that `fixed` names, single ones or groups, must be what they were, or `allow_changed` be set. Others
    may change, and one line says which do.

    Raises:
        ValueError: no run of this kind or of these settings, or a damaged one.
    """
    run, out = saved_run(config.out), str(config.out)
    if not _groups(recorded(config), fixed) <= set(run.get("config") or {}):
        raise ValueError(f"train: out is {out!r}, which holds a run of another kind; --resume goes on with the same "
                         "command's; take another --out")
    found = changes(config, run)
    free = {f"{name}.{one}" for name, value in _data(config).items() for one in value.free}
    other = [key for key in found
             if key not in free and any(key == name or key.startswith(f"{name}.") for name in fixed)]
    if other and not config.allow_changed:
        said = ", ".join(f"{key} is {found[key][1]} and was {found[key][0]}" for key in other)
        raise ValueError(f"train: {said} in the run saved in {out!r}; the same settings fit, as they decide what is "
                         "trained on; --allow-changed goes on with these all the same, another --out starts anew")
    if config.resume and config.stop_after is not None and config.stop_after <= run["step"]:
        raise ValueError(f"train: stop_after is {config.stop_after} and the run saved in {out!r} has {run['step']:,} "
                         "steps; a later step fits, or leave it out")
    if found:
        print(f"going on with {', '.join(f'{key} {new} (was {old})' for key, (old, new) in found.items())}", flush=True)
    return run


def changes(config: RunSettings, run: Mapping) -> dict[str, tuple[object, object]]:
    """Settings that differ from those of a saved run, but for those of a single call: name -> (old, new).

    A setting that is newer than the run had its default there.
    """
    if not run.get("config"):
        return {}
    theirs, ours = _defaults(config) | flat(run["config"]), flat(recorded(config))
    if theirs.get("data.folder") is not None:
        theirs.pop("data.name", None)  # earlier versions wrote a data set's name beside a folder, too
    if "model.backbone" in theirs:
        theirs["model.backbone"] = present_backbone(theirs["model.backbone"])
    return {key: (theirs[key], ours[key]) for key in ours
            if key in theirs and theirs[key] != ours[key] and key not in OF_A_CALL}


def _defaults(config) -> dict[str, object]:
    """Defaults of all settings that have one, as `flat` names them and JSON gives them back."""
    found = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{one.name}.{name}": default for name, default in _defaults(value).items()}
        elif one.default is not dataclasses.MISSING:
            found[one.name] = one.default
        elif one.default_factory is not dataclasses.MISSING:
            found[one.name] = one.default_factory()
    return json.loads(json.dumps(found, default=str))


def history(config: RunSettings) -> dict[str, list]:
    """What `run.json` keeps of settings that changed while a run went on: {"history": [...]}, or {} where none did.

    Each entry holds the steps done before, and for each setting its old and its new value.
    """
    run = saved_run(config.out) or {}
    before, found = run.get("history", []), changes(config, run)
    after = [*before, {"step": run["step"], "changed": found}] if found else before
    return {"history": after} if after else {}


def _groups(settings: Mapping, fixed: tuple[str, ...]) -> set[str]:
    """Groups of settings that a run of the same kind has; settings that are new since it was saved are in none."""
    return {name for name, value in settings.items() if isinstance(value, Mapping)
            and name in {one.partition(".")[0] for one in fixed}}


def same_run(config: RunSettings, names: tuple[str, ...]) -> bool:
    """Whether `out` holds a run that was stopped and whose settings of these names were equal; one line says so."""
    saved, ours = saved_run(config.out) or {}, recorded(config)
    theirs = saved.get("config", {})
    same = bool(theirs) and all(theirs.get(name) == ours[name] for name in names)
    if same:
        print(f"going on from step {saved['step']} of the run kept in {config.out / 'resume'}", flush=True)
    return same
