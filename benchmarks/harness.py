"""Timing of contenders that do the same work: interleaved, with a cold L2 cache, and only after each has proven correct.

A contender is a list of phases over one state (build the mask, run forward, run backward) and a check of that state.
Each in turn, ours first, is checked and gets a few numbers of its own, so that a run that is cut keeps what it has;
then every round runs every phase of every contender once, so that a drifting clock hits all alike. What a time means,
and how the host's is kept out of it, is told in benchmarks/timing.py.
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

from benchmarks.timing import FLUSH_BYTES, Sample, chosen, make_timer

# dense bf16, vendors' data sheets; the first name that the device's holds counts
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "xformers",
    "flash-attn",
    "liger-kernel",
    "cut-cross-entropy",
    "transfusion-pytorch",
)


class LeftOut(Exception):
    """A contender cannot take part here; its text says why."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more: no later number would mean anything."""

    contender: str | None = None  # whose phase it was lost in


@dataclass(frozen=True)
class Contender:
    """Phases that run in order on one state dict, and a check of the state after them, which raises AssertionError.

    With `wall` the phases are timed as a user waits for them, the host's time included.
    """

    name: str
    phases: dict[str, Callable[[dict], object]]
    check: Callable[[dict], None]
    wall: bool = False

    def __post_init__(self):
        if not callable(self.check):
            raise ValueError(
                f"Contender: check of {self.name} is {self.check}; a function of the state that asserts "
                "the results fits; "
                "no number is recorded without one"
            )


@dataclass
class Result:
    """What `measure` found: milliseconds per phase as {p20, p50, p80, repetitions}, or why there are none.

    That is the error that stopped the contender, or why it was left out. `timing` says what each phase's milliseconds
    are (benchmarks/timing.py), `host_us` holds the host's own median, and `interleaved` says whether the numbers come
    from rounds with the others or from the contender's first ones alone.
    """

    name: str
    checked: bool = False
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: str | None = None
    left_out: str | None = None
    timing: dict[str, str] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    interleaved: bool = False

    def take(self, rounds: list[dict[str, Sample]]) -> None:
        """Set the numbers from the contender's rounds: {phase: Sample} each."""
        for phase in rounds[0]:
            samples, self.timing[phase] = chosen([r[phase] for r in rounds])
            self.milliseconds[phase] = quantiles(s.milliseconds for s in samples)
            self.host_us[phase] = quantiles(s.host_us for s in samples)["p50"]


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


def measure(
    contenders: list[Contender],
    *,
    device: str,
    seconds: float = 1.0,
    warmup: int = 3,
    least: int = 5,
    most: int = 100,
    record: Callable[[Result], object] | None = None,
    until: float = math.inf,
    without: Iterable[str] = (),
    timer=None,
) -> list[Result]:
    """Check every contender, then time those that passed in interleaved rounds of about `seconds` in all.

    With `record` each contender is timed alone as soon as it has passed, and `record` gets what is known of it; after
    `until`, a time of time.monotonic(), no other contender begins and the rounds end. Those named in `without` are
    left out.
    """
    race = _Race(contenders, device, timer or make_timer(device), until)
    try:
        for contender in contenders:
            race.start(contender, warmup, frozenset(without))
            if record:
                race.alone(contender, least, seconds / len(contenders))
                record(race.results[contender.name])
        if not record or time.monotonic() <= until:
            race.together(seconds, least, most)
    except DeviceLost:
        if record:
            for result in race.results.values():
                record(result)
        raise
    return list(race.results.values())


class _Race:
    """The contenders' results and states, and the rounds that they run."""

    def __init__(self, contenders: list[Contender], device: str, timer, until: float):
        self.device, self.timer, self.until = device, timer, until
        self.results = {c.name: Result(c.name) for c in contenders}
        self.states: dict[str, dict] = {}
        self.running: list[Contender] = []

    def start(self, contender: Contender, warmup: int, without: frozenset[str]) -> None:
        """Check a contender and warm it up."""
        result = self.results[contender.name]
        if contender.name in without:
            result.left_out = "it lost the device in another case"
        elif time.monotonic() > self.until:
            result.left_out = "the time was over"
        if result.left_out:
            return
        with _Guard(result, self.device):
            self.states[contender.name] = _checked_state(contender, result, self.device)
        if contender.name in self.states:
            self.rounds([contender], warmup)
        if contender.name in self.states:
            self.running.append(contender)

    def alone(self, contender: Contender, least: int, seconds: float) -> None:
        """Give a contender that runs its first numbers."""
        if contender in self.running:
            for samples in self.rounds([contender], least, seconds).values():
                self.results[contender.name].take(samples)

    def together(self, seconds: float, least: int, most: int) -> None:
        """Interleave all that run, in rounds of about `seconds` in all."""
        begin = time.perf_counter()
        found = self.rounds(self.running, 1)
        count = max(least, min(most, math.ceil(seconds / max(time.perf_counter() - begin, 1e-9))))
        rest = self.rounds(self.running, count - 1)
        for name, samples in found.items():
            if self.results[name].error is None:
                self.results[name].take(samples + rest.get(name, []))
                self.results[name].interleaved = True

    def rounds(
        self, contenders: list[Contender], count: int, seconds: float = math.inf
    ) -> dict[str, list[dict[str, Sample]]]:
        """Run every phase of every contender that has no error `count` times: {name: [{phase: Sample}, ...]}.

        After `seconds`, or when the time is over, no other round begins; an error costs a contender all its numbers.
        """
        found, begin = {c.name: [] for c in contenders}, time.monotonic()
        for number in range(count):
            if number and (time.monotonic() > self.until or time.monotonic() - begin > seconds):
                break
            for contender in contenders:
                if contender.name in self.states:
                    self.run(contender, found[contender.name])
        return {name: samples for name, samples in found.items() if samples and name in self.states}

    def run(self, contender: Contender, found: list[dict[str, Sample]]) -> None:
        """Run a contender once, adding to `found`."""
        result, state = self.results[contender.name], self.states[contender.name]
        try:
            with _Guard(result, self.device):
                found.append(self.timer.run(contender.name, contender.phases, state, contender.wall))
        finally:
            if result.error is not None:
                del self.states[contender.name]
                result.milliseconds, result.timing, result.host_us = {}, {}, {}


def present(makers: dict[str, Callable[[], object]]) -> tuple[dict[str, object], list[Result]]:
    """Call every maker: what they made by name, and a Result for each that made nothing.

    One whose package is missing, or whose maker raised LeftOut, is left out, with the reason; any other exception is an
    error.
    """
    made, others = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        except LeftOut as why:
            others.append(Result(name, left_out=str(why)))
        except ImportError as error:
            others.append(Result(name, left_out=f"not installed: {error}"))
        except DeviceLost:
            raise
        except Exception as error:
            others.append(Result(name, error=f"{type(error).__name__}: {str(error).strip()[:500]}"))
    return made, others


def device_answers() -> bool:
    """Whether the CUDA device, if this process uses one, still does what it is told."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Guard:
    """Turn a contender's exception into its `error`, and stop everything where the device itself is gone."""

    def __init__(self, result: Result, device: str):
        self.result, self.device = result, device

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not issubclass(kind, Exception):
            return False
        if issubclass(kind, LeftOut):
            self.result.left_out = str(error)
            return True
        self.result.error = f"{kind.__name__}: {str(error).strip()[:500]}"
        self.result.checked = self.result.checked and kind is not AssertionError
        if self.device == "cuda":
            if not device_answers():
                gone = DeviceLost(f"{self.result.name}: {self.result.error}")
                gone.contender = self.result.name
                raise gone from error
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


@dataclass
class Report:
    """One benchmark's file: where and with what it ran, and a row per configuration and contender.

    While `run` runs, the file is written after each row. `lost` says in which case and by whom the device was lost,
    where it was: another process may go on there, with `skip` cases passed over and the contenders in `without` left
    out.
    """

    benchmark: str
    settings: dict
    environment: dict
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: dict | None = None

    def __post_init__(self):
        self.path, self.skip, self.limits = None, 0, {}  # no fields: they are not written

    def obey(self, options: argparse.Namespace) -> None:
        """Go on where another process lost the device, if the options say so."""
        self.skip, self.limits = options.skip, {"without": tuple(options.without)}

    def record(self, configuration: dict, result: Result, **derived) -> dict:
        """Add a row, or replace this configuration and contender's; `derived` are numbers computed from the times.

        Refuses numbers that no check stands behind.
        """
        if not isinstance(result, Result):
            raise ValueError(
                f"Report.record: result is a {type(result).__name__}; a Result of measure() fits; "
                "time the contender with measure()"
            )
        if (result.milliseconds or any(value is not None for value in derived.values())) and not result.checked:
            raise ValueError(
                f"Report.record: {result.name} has numbers and passed no correctness check; a Result of measure() fits"
            )
        key = {**configuration, "contender": result.name}
        row = {**key, **{k: v for k, v in asdict(result).items() if k != "name"}, **derived}
        for place, old in enumerate(self.rows):
            if all(name in old and old[name] == value for name, value in key.items()):
                if not (old["error"] and result.left_out):  # that it lost the device says more
                    self.rows[place] = row
                break
        else:
            self.rows.append(row)
        if self.path:
            self.save(self.path)
        return row

    def run(self, cases: Iterable, measure_case: Callable[[object], None], path: Path, seconds: float) -> int:
        """Call `measure_case` on each case until `seconds` are over, the file complete after each row.

        Returns 1 where a case failed, which becomes a note.
        """
        status, self.path = 0, path
        self.limits = {**self.limits, "until": time.monotonic() + seconds}
        if (self.skip or self.limits.get("without")) and path.exists():
            earlier = Report.load(path)
            self.rows, self.notes = earlier.rows, earlier.notes
        for number, case in enumerate(cases):
            if number < self.skip:
                continue
            if time.monotonic() > self.limits["until"]:
                self.notes.append(f"cut before {case}: the time was over")
                break
            try:
                measure_case(case)
            except DeviceLost as lost:
                self.notes.append(f"stopped at {case}, the device was lost: {lost}")
                self.lost, status = {"case": number, "contender": lost.contender}, 1
                break
            except Exception as error:
                self.notes.append(f"{case} failed: {type(error).__name__}: {str(error)[:500]}")
                status = 1
                if not device_answers():
                    self.lost = {"case": number, "contender": None}
                    break
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


def make_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `quick` says what that one does."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no case and no contender after this many seconds"
    )
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    parser.add_argument("--skip", type=int, default=0, help="go on in the file that is there, behind so many cases")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="NAME",
        help="go on in the file that is there, without these contenders",
    )
    return parser


def run_command(
    name: str,
    description: str,
    settings: dict,
    cases: Callable[[bool], Iterable],
    cpu_cases: Iterable,
    measure_case: Callable[[object, Report, str], None],
    arguments: list[str] | None,
) -> int:
    """Command line of a benchmark: run its cases until they end or `--seconds` are over.

    The file is complete after each row.
    `cases` gets whether the run is quick, `measure_case` a case, the report and the device. Returns 1 where a case,
    or a contender of ours, failed.
    """
    parser = make_parser(description, "the first cases only")
    parser.add_argument("--cpu", action="store_true", help="small cases on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.{name}: no CUDA device; pass --cpu for small cases on the CPU")
        return 1
    report = Report(name, {"quick": options.quick, **settings}, environment(device, options.commit))
    report.obey(options)
    status = report.run(
        cpu_cases if options.cpu else cases(options.quick),
        lambda case: measure_case(case, report, device),
        options.out / f"{name}{'-cpu' * options.cpu}.json",
        options.seconds,
    )
    return status or int(any(row["error"] for row in report.rows if row["contender"].startswith("tfkernels")))


def environment(device: str, commit: str | None = None) -> dict:
    """Return the device, versions, commit and clocks that a number needs beside it."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"CPU: {_cpu_name()}, {torch.get_num_threads()} threads", None
    return {
        "device": name,
        "device_memory_bytes": memory,
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": commit or _commit(),
        "flush_bytes": FLUSH_BYTES if device == "cuda" else 0,
        "clocks": clocks(),
    }


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
    names = [
        line.split(":", 1)[1].strip()
        for line in (_output("cat", "/proc/cpuinfo") or "").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
