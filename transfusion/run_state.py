"""A training run on disk: what it saves to go on from, and how it is stopped.

A run's directory holds its checkpoint, log.jsonl and resume/, with state.safetensors (weights, the optimizer's moments) and run.json (step, settings).
Directories are replaced by renaming, so that a crash at any moment leaves the state before whole.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@contextlib.contextmanager
def plain_errors(resumes: bool = False):
    """End a command with one line in place of a traceback where its input is wrong, its loss is not finite or it was stopped.

    `resumes`: the same command goes on from there.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt as stop:
        raise SystemExit(f"stopped: {str(stop) or ('the same command goes on' if resumes else 'by Ctrl-C')}") from None


class Interrupt:
    """The first Ctrl-C asks the loop to save and stop; a second one stops at once."""

    asked = False
    previous = None

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


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


def save_state(config, state: dict[str, torch.Tensor], step: int) -> None:
    """Write tensors and settings to `config.out`/resume, for `load_state`; a crash while writing leaves those before whole."""
    fresh, kept = config.out / "resume.new", config.out / "resume"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_file({name: x.detach().contiguous().cpu().clone() for name, x in state.items()}, fresh / "state.safetensors")
    (fresh / "run.json").write_text(json.dumps({"step": step, "config": dataclasses.asdict(config)}, default=str, indent=2))
    replace_directory(fresh, kept)


def replace_directory(fresh: Path, kept: Path) -> None:
    """Put `fresh` where `kept` is; at any moment one of them, or what `saved_directory` finds, is whole."""
    old = kept.with_name(kept.name + ".old")
    if kept.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(kept, old)
    os.replace(fresh, kept)
    shutil.rmtree(old, ignore_errors=True)


def saved_directory(out: Path) -> Path:
    """The directory that `save_state` wrote last; the one before where a crash left no other."""
    return next((path for path in (out / "resume", out / "resume.old") if (path / "run.json").is_file()), out / "resume")


def saved_step(out: Path) -> int | None:
    """Steps of the run that is saved in `out`, None where there is none."""
    path = saved_directory(out) / "run.json"
    return json.loads(path.read_text())["step"] if path.is_file() else None


def check_out(config) -> None:
    """Refuse to go on with a run that is not there, and to write over one that is."""
    step = saved_step(config.out)
    if config.resume and step is None:
        raise ValueError(f"train: resume is set and out is {str(config.out)!r}, which holds no saved run; a directory that train has saved into fits")
    if not config.resume and step is not None:
        raise ValueError(f"train: out is {str(config.out)!r}, which holds a run of {step:,} steps; --resume goes on with it, another --out starts anew")


def load_state(config, parts: tuple[str, ...], device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Return what `save_state` wrote and its step, and cut the log there; `parts` of the settings must be what they were."""
    kept = saved_directory(config.out)
    saved = json.loads((kept / "run.json").read_text())
    ours = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    changed = [key for part in parts for key in ours[part] if saved["config"][part].get(key) != ours[part][key]]
    changed += [key for key in ("seed", "autocast") if saved["config"][key] != ours[key]]
    if changed:
        raise ValueError(f"train: {', '.join(changed)} differ from the run saved in {str(config.out)!r}; the same settings fit; start anew with another --out")
    state = load_file(kept / "state.safetensors", device=str(device))
    lines = (config.out / "log.jsonl").read_text().splitlines()[:saved["step"]]
    (config.out / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    return state, saved["step"]


def logged_seconds(log: Path) -> float:
    """Seconds of training so far, by a log's last line; interruptions do not count."""
    lines = log.read_text().splitlines()
    return json.loads(lines[-1])["seconds"] if lines else 0.0
