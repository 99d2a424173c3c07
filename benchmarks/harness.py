"""Timing of contenders that do the same work: interleaved, with a cold L2 cache, and only after each has proven correct.

A contender is a list of phases over one state (build the mask, run forward, run backward) and a check of that state. Every
round runs every phase of every contender once, so that a drifting clock hits all alike; before each phase a buffer larger than
any L2 is written, which also keeps the device busy while the host launches. Times are CUDA events (on a CPU, wall time).
"""
import argparse
import gc
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

FLUSH_BYTES = 2**29
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}  # dense bf16, vendors' data sheets
_PACKAGES = ("torch", "triton", "numpy", "transformers", "xformers", "flash-attn", "liger-kernel", "cut-cross-entropy")


class DeviceLost(RuntimeError):
    """The device answers nothing any more: no later number would mean anything."""


@dataclass(frozen=True)
class Contender:
    """`phases` run in order on one state dict; `check` gets the state after them and raises AssertionError where it is wrong."""

    name: str
    phases: dict[str, Callable[[dict], object]]
    check: Callable[[dict], None]

    def __post_init__(self):
        if not callable(self.check):
            raise ValueError(f"Contender: check of {self.name} is {self.check}; a function of the state that asserts the results fits; "
                             "no number is recorded without one")


@dataclass
class Result:
    """What `measure` found: milliseconds per phase as {p20, p50, p80, repetitions}, or the error that stopped the contender."""

    name: str
    checked: bool = False
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: str | None = None


def quantiles(samples: Iterable[float]) -> dict[str, float]:
    """Return p20, p50 and p80 by linear interpolation, and the number of samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("quantiles: samples is empty; at least one fits")

    def at(q: float) -> float:
        below, part = divmod(q * (len(ordered) - 1), 1)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        return low + part * (high - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8), "repetitions": len(ordered)}


def measure(contenders: list[Contender], *, device: str, seconds: float = 1.0, warmup: int = 3, least: int = 5, most: int = 100) -> list[Result]:
    """Check every contender, then time those that passed in interleaved rounds of about `seconds` in all."""
    results = {c.name: Result(c.name) for c in contenders}
    states = {}
    for contender in contenders:
        with _Guard(results[contender.name], device):
            states[contender.name] = _checked_state(contender, results[contender.name], device)
    running = [c for c in contenders if results[c.name].checked]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    for _ in range(warmup):
        running = [c for c in running if _round([c], results, states, device, flush) is not None]
    start = time.perf_counter()
    samples = _round(running, results, states, device, flush) or {}
    rounds = max(least, min(most, math.ceil(seconds / max(time.perf_counter() - start, 1e-9))))
    collected = [samples] + [_round(running, results, states, device, flush) or {} for _ in range(rounds - 1)]
    for contender in running:
        result = results[contender.name]
        if result.error is None:
            result.milliseconds = {phase: quantiles(r[contender.name][phase] for r in collected) for phase in contender.phases}
    return list(results.values())


class _Guard:
    """Turn a contender's exception into its `error`, and stop everything where the device itself is gone."""

    def __init__(self, result: Result, device: str):
        self.result, self.device = result, device

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not issubclass(kind, Exception):
            return False
        self.result.error = f"{kind.__name__}: {str(error).strip()[:500]}"
        self.result.checked = self.result.checked and kind is not AssertionError
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{self.result.name}: {self.result.error}") from lost
            gc.collect()
            torch.cuda.empty_cache()
        return True


def _checked_state(contender: Contender, result: Result, device: str) -> dict:
    for _ in range(2):  # the first run compiles, and its memory is not the contender's
        state = {}
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for phase in contender.phases.values():
            phase(state)
        if device == "cuda":
            torch.cuda.synchronize()
            result.peak_bytes = torch.cuda.max_memory_allocated() - before
    contender.check(state)
    result.checked = True
    return state


def _round(contenders, results, states, device, flush):
    """Run every phase of every contender that has no error once: {name: {phase: milliseconds}}; None where nothing ran."""
    times = {}
    for contender in contenders:
        result = results[contender.name]
        if result.error is None:
            with _Guard(result, device):
                times[contender.name] = {name: _time(phase, states[contender.name], device, flush) for name, phase in contender.phases.items()}
        if result.error is not None:
            states.pop(contender.name, None)
    return times or None


def _time(phase, state, device, flush):
    if device != "cuda":
        start = time.perf_counter()
        phase(state)
        return (time.perf_counter() - start) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    phase(state)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@dataclass
class Report:
    """One benchmark's file: where and with what it ran, and a row per configuration and contender."""

    benchmark: str
    settings: dict
    environment: dict
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record(self, configuration: dict, result: Result, **derived) -> dict:
        """Append a row; `derived` are numbers computed from the result's times. Refuses numbers that no check stands behind."""
        if not isinstance(result, Result):
            raise ValueError(f"Report.record: result is a {type(result).__name__}; a Result of measure() fits; time the contender with measure()")
        if (result.milliseconds or any(value is not None for value in derived.values())) and not result.checked:
            raise ValueError(f"Report.record: {result.name} has numbers and passed no correctness check; a Result of measure() fits")
        row = {**configuration, "contender": result.name, **{k: v for k, v in asdict(result).items() if k != "name"}, **derived}
        self.rows.append(row)
        return row

    def run(self, cases: Iterable, measure_case: Callable[[object], None], path: Path, seconds: float) -> int:
        """Call `measure_case` on each case until `seconds` are over, the file complete after each; 1 where a case failed, which becomes a note."""
        begin, status = time.monotonic(), 0
        for case in cases:
            if time.monotonic() - begin > seconds:
                self.notes.append(f"cut before {case}: the time was over")
                break
            try:
                measure_case(case)
            except DeviceLost as lost:
                self.notes.append(f"stopped at {case}, the device was lost: {lost}")
                status = 1
                break
            except Exception as error:
                self.notes.append(f"{case} failed: {type(error).__name__}: {str(error)[:500]}")
                status = 1
            self.save(path)
        self.save(path)
        print("\n".join(self.notes))
        return status

    def save(self, path: Path) -> None:
        """Write the report as JSON; a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def run_command(name: str, description: str, settings: dict, cases: Callable[[bool], Iterable], cpu_cases: Iterable,
                measure_case: Callable[[object, Report, str], None], arguments: list[str] | None) -> int:
    """Command line of a benchmark: run its cases until they end or `--seconds` are over; the file is complete after each.

    `cases` gets whether the run is quick, `measure_case` a case, the report and the device. Returns 1 where a case, or a contender of ours, failed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the first cases only")
    parser.add_argument("--cpu", action="store_true", help="small cases on the CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    options = parser.parse_args(arguments)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.{name}: no CUDA device; pass --cpu for small cases on the CPU")
        return 1
    report = Report(name, {"quick": options.quick, **settings}, environment(device, options.commit))
    status = report.run(cpu_cases if options.cpu else cases(options.quick), lambda case: measure_case(case, report, device),
                        options.out / f"{name}{'-cpu' * options.cpu}.json", options.seconds)
    return status or int(any(row["error"] for row in report.rows if row["contender"].startswith("tfkernels")))


def environment(device: str, commit: str | None = None) -> dict:
    """Return the device, versions, commit and clocks that a number needs beside it."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"CPU: {_cpu_name()}, {torch.get_num_threads()} threads", None
    return {"device": name, "device_memory_bytes": memory, "cuda": torch.version.cuda, "versions": versions, "commit": commit or _commit(),
            "flush_bytes": FLUSH_BYTES if device == "cuda" else 0, "clocks": clocks()}


def clocks() -> dict | None:
    """Return what nvidia-smi says about clocks (MHz), power (W) and temperature (C); None without it."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    answer = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")))) if answer else None


def peak_tflops(device_name: str) -> float | None:
    """Return the device's dense bf16 peak; None for a device that the table lacks."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if changed else commit


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in (_output("cat", "/proc/cpuinfo") or "").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
