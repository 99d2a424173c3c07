"""A training run on disk: who may write it, what it saves to go on from, and how it is stopped.

A run's directory holds its checkpoint, log.jsonl and resume/, with state.safetensors (weights, the optimizer's moments) and run.json (step, settings).
Checkpoint and resume/ are replaced together (transfusion/files.py): a kill at any moment leaves the older or the newer of both.
"""
import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from transfusion.files import current, load_tensors, locked, read_json, settle, whole, written

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINT = ("config.json", "adapter_config.json", "cache.json", "classifier.json", "model.safetensors", "model.safetensors.index.json",
              "diffusion_pytorch_model.safetensors")
"""Files that show that a directory holds a checkpoint or a cache."""


@contextlib.contextmanager
def plain_errors(resumes: bool = False) -> Iterator[None]:
    """End a command with one line in place of a traceback where its input or a file is wrong, its loss is not finite or it was stopped.

    SIGTERM and SIGHUP stop a command as Ctrl-C does. `resumes`: the same command goes on from there.
    """
    with _signals(_stop, (signal.SIGTERM, signal.SIGHUP)):
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            raise SystemExit(f"error: {error}") from None
        except (OSError, SafetensorError) as error:
            raise SystemExit(f"error: {file_error(error)}") from None
        except KeyboardInterrupt as stop:
            raise SystemExit(f"stopped: {str(stop) or ('the same command goes on' if resumes else 'by Ctrl-C')}") from None


def file_error(error: Exception) -> str:
    """One line for an error of the file system: the file, what is wrong, and the way out."""
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    said = f"{name}: {error.strerror}" if name is not None and number is not None else " ".join(str(error).split()) or type(error).__name__
    ways = {**dict.fromkeys(FULL, "what was saved before stands; make room, or name a directory on another disk, and run the command again (train: with "
                            "--resume)"),
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "a file or directory that this user may read and write fits"),
            errno.ENOENT: "name one that is there"}
    return f"{said}; {ways[number]}" if number in ways else said


def _stop(number: int, _) -> None:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


@contextlib.contextmanager
def _signals(handler, numbers) -> Iterator[None]:
    """Handle signals in the main thread and put the handlers back; what is ignored, as by nohup, stays so."""
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupt:
    """The first Ctrl-C, SIGTERM or SIGHUP asks the loop to save and stop; a second one stops at once."""

    asked = False

    def __enter__(self):
        self.handlers = _signals(self.ask, STOPS)
        self.handlers.__enter__()
        return self

    def ask(self, number: int, _) -> None:
        """Take note of a signal."""
        if self.asked:
            raise KeyboardInterrupt(f"at once, by {'a second Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}; "
                                    "what was saved before stands")
        self.asked = True

    def __exit__(self, *error):
        self.handlers.__exit__(*error)


@contextlib.contextmanager
def claim(command: str, out: Path, inputs: Mapping[str, Path | None] | None = None, resume: bool | None = None) -> Iterator[None]:
    """Hold `out` for a command that will write there, having finished or cleared what killed saves left; nothing is written before all of this fits.

    `inputs` are directories, by the settings that name them, that the command reads. `resume`: True goes on with the run in `out`, False starts one,
    None leaves the contents of `out` to the command.

    Raises:
        ValueError: `out` is a file, cannot be written, is in use by another process, is or holds an input, or holds what is not this run; or the command
            is one of several that a launcher started.
    """
    out = Path(out)
    check_alone(command)
    check_apart(command, out, inputs or {})
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
            settle(out)
        except ValueError as error:
            raise ValueError(f"{command}: {error}") from None
        except OSError as error:
            raise ValueError(f"{command}: out is {str(out)!r}, which cannot be written ({error.strerror}: {error.filename}); a directory that can be made and "
                             "written fits") from error
        if resume is not None:
            check_out(command, out, resume)
        yield


def check_alone(command: str) -> None:
    """Refuse to be one of several processes that train the same."""
    for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)):
        value = os.environ.get(name, "").strip()
        if value.isdigit() and int(value) > alone:
            raise ValueError(f"{command}: {name} is {value}, as torchrun sets it; one process trains a run; start it without a launcher of several")


def check_apart(command: str, out: Path, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an `out` that is a file, is one of `inputs`, lies in one or holds one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{command}: out is {str(out)!r}, which is a file; a directory fits")
    ours = out.resolve()
    for name, path in inputs.items():
        theirs = None if path is None else Path(path).resolve()
        if theirs is not None and (ours == theirs or ours in theirs.parents or theirs in ours.parents):
            raise ValueError(f"{command}: out is {str(out)!r} and {name} {str(path)!r}; what is read would be written over; a directory of its own fits "
                             "for --out")


def check_out(command: str, out: Path, resume: bool) -> None:
    """Refuse to go on with a run that is not there, and to write over a run or a checkpoint that is."""
    step = saved_step(out)
    if resume and step is None:
        raise ValueError(f"{command}: resume is set and out is {str(out)!r}, which holds no saved run; a directory that train has saved into fits")
    if not resume and step is not None:
        raise ValueError(f"{command}: out is {str(out)!r}, which holds a run of {step:,} steps; --resume goes on with it, another --out starts anew")
    found = next((name for name in CHECKPOINT if (out / name).exists()), None)
    if not resume and found is not None:
        raise ValueError(f"{command}: out is {str(out)!r}, which holds {found} of something else; a new or an empty directory fits; take another --out")


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
    (kept / "run.json").write_text(json.dumps({"step": step, "config": dataclasses.asdict(config)}, default=str, indent=2))


def saved_run(out: Path) -> dict | None:
    """What resume/run.json says of the run that is saved in `out`, None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    old = out / "resume.old" / "run.json"  # where a kill between two renames of earlier versions left it
    path = next((path for path in (current(out, "resume/run.json"), old) if path.is_file()), None)
    if path is None:
        return None
    advice = "restore it, or start anew with another --out"
    run = read_json(path, advice)
    if not isinstance(run.get("step"), int):
        raise ValueError(f"{path} is damaged (it names no step); {advice}")
    return run


def saved_step(out: Path) -> int | None:
    """Steps of the run that is saved in `out`, None where there is none."""
    run = saved_run(Path(out))
    return None if run is None else run["step"]


def load_state(config, fixed: tuple[str, ...], device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Return what `write_state` wrote and its step; the settings that `fixed` names, single ones or groups, must be what they were.

    Others may change, and one line says which do.
    """
    run, out = saved_run(config.out), str(config.out)
    theirs, ours = _flat(run.get("config") or {}), _flat(json.loads(json.dumps(dataclasses.asdict(config), default=str)))
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


def read_log(log: Path) -> list[dict]:
    """A log's records; lines that are damaged, as a kill leaves the last one, are left out."""
    records = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) else []
    return records


def start_log(log: Path, step: int) -> float:
    """Make a log ready for step `step`, with the records of the steps before alone; return the seconds of training that they say were spent."""
    records = [record for record in read_log(log) if isinstance(record.get("step"), int) and record["step"] < step]
    if len(records) < step:
        print(f"{log} holds {len(records):,} of the {step:,} steps so far; the run goes on without the others' records", flush=True)
    with written(log) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records[-1].get("seconds", 0.0) if records else 0.0


@contextlib.contextmanager
def open_log(log: Path) -> Iterator[TextIO]:
    """Open a log to add records; a full disk is said with its name."""
    try:
        with log.open("a") as file:
            yield file
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(log)) from error


def logged_seconds(log: Path) -> float:
    """Seconds of training so far, by a log's last line; interruptions do not count."""
    records = read_log(log)
    return records[-1].get("seconds", 0.0) if records else 0.0
