"""What a run left, read for a report: its log as arrays, its settings, and the numbers that sum it up."""
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transfusion.command import saved_run
from transfusion.files import spelled
from transfusion.settings import flat
from transfusion.train.log import LOG, read_log

BIN = re.compile(r"validation_diffusion_loss_(\d\.\d+)_(\d\.\d+)")


class Run(NamedTuple):
    """A run: its name, directory, records by step, flat settings ({} where nothing was saved) and damaged lines."""

    name: str
    path: Path
    records: Sequence[dict]
    settings: Mapping[str, object]
    damaged: int

    @property
    def done(self) -> int:
        """How many steps were taken."""
        return self.records[-1]["step"] + 1

    @property
    def seconds(self) -> float:
        """Seconds of training, all interruptions left out."""
        return float(self.records[-1].get("seconds") or 0.0)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, by their directories or their logs.

    Raises:
        ValueError: one is not there or holds no step.
    """
    places = [path.parent if path.name == LOG else path for path in map(Path, paths)]
    return [read_run(path, name) for path, name in zip(places, names_of(places))]


def read_run(path: Path, name: str) -> Run:
    """Read a run; see `read_runs`."""
    log = path / LOG
    if not log.is_file():
        raise ValueError(f"report: {path} holds no {LOG}; the directory of a training run, its --out, fits")
    records = [record for record in read_log(log) if isinstance(record.get("step"), int)]
    lines = sum(bool(line.strip()) for line in log.read_text(errors="replace").splitlines())
    if not records:
        problem = "is empty" if not lines else f"holds no step in {lines:,} lines: it is damaged, or no training log"
        raise ValueError(f"report: {log} {problem}; a run that has taken a step fits")
    by_step = {record["step"]: record for record in records}  # of a step that was taken twice, the later
    try:
        settings = flat((saved_run(path) or {}).get("config") or {})
    except ValueError as error:
        print(f"{error}; {name} is shown without its settings", flush=True)
        settings = {}
    return Run(name, path, [by_step[step] for step in sorted(by_step)], settings, lines - len(records))


def names_of(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [tuple(map(spelled, path.resolve().parts)) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def column(run: Run, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps done, and the finite numbers that the log has for the first of `keys` that it knows."""
    for key in keys:
        found = [(record["step"] + 1, record[key]) for record in run.records
                 if isinstance(record.get(key), int | float) and math.isfinite(record[key])]
        if found:
            steps, values = zip(*found)
            return np.array(steps), np.array(values, dtype=np.float64)
    return np.zeros(0, dtype=np.int64), np.zeros(0)


def bins(run: Run) -> dict[tuple[float, float], str]:
    """The ends of each bin of noise times, and the key of its held-out loss, where any was finite."""
    keys = {key for record in run.records for key in record if key.startswith("validation")}
    found = {(float(match[1]), float(match[2])): key for key in keys if (match := BIN.fullmatch(key))}
    return {ends: key for ends, key in sorted(found.items()) if len(column(run, key)[0])}


def unit(run: Run) -> str:
    """What speed is counted in: tokens, pictures or, where the log and the settings say neither, steps."""
    known = next((name for name in ("tokens", "pictures") if len(column(run, f"{name}_per_second")[0])), "steps")
    return "tokens" if known == "steps" and size_of_a_step(run) else known


def units(runs: Sequence[Run]) -> str:
    """The units of several runs."""
    return " or ".join(sorted({unit(run) for run in runs}))


def seen(run: Run) -> int | None:
    """Tokens or pictures that the run has seen, None where nothing says how many."""
    count, size = run.records[-1].get("tokens", run.records[-1].get("pictures")), size_of_a_step(run)
    return count if isinstance(count, int) else size and run.done * size


def _sizes(run: Run) -> list[tuple[int, int, float | None]]:
    """(step, its tokens or pictures, how many a second) of each record that says how many the run had seen by then."""
    found, before, fewer = [], -1, 0
    for record in run.records:
        count = record.get("tokens", record.get("pictures"))
        if isinstance(count, int) and count > fewer:
            rate = record.get("tokens_per_second", record.get("pictures_per_second"))
            found.append((record["step"], (count - fewer) // (record["step"] - before), rate))
            before, fewer = record["step"], count
    return found


def size_of_a_step(run: Run) -> int | None:
    """Tokens or pictures of a step, the last one, by the log or the settings; None where these do not say."""
    if sizes := _sizes(run):
        return sizes[-1][1]
    rows, length = run.settings.get("optim.rows"), run.settings.get("optim.seq_len")
    return rows * length if isinstance(rows, int) and isinstance(length, int) else None


def speed(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and tokens, pictures or steps a second."""
    steps, values = column(run, "tokens_per_second", "pictures_per_second")
    if len(values):
        return steps, values
    steps, seconds = _pauses(run)
    return steps, (size_of_a_step(run) or 1) / seconds


def step_seconds(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the seconds that each took, without saves and what watchers did where the log has the speed."""
    found = [(step + 1, size / rate) for step, size, rate in _sizes(run) if rate]
    return tuple(np.array(one) for one in zip(*found)) if found else _pauses(run)


def _pauses(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between the records of one step and the next, for logs without a speed."""
    pairs = [(record["step"] + 1, record["seconds"] - before["seconds"])
             for before, record in zip(run.records, run.records[1:])
             if record["step"] == before["step"] + 1 and all("seconds" in one for one in (before, record))]
    pairs = [(step, seconds) for step, seconds in pairs if seconds > 0]
    return np.array([step for step, _ in pairs], dtype=np.int64), np.array([seconds for _, seconds in pairs])
