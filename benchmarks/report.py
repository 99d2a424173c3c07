"""A benchmark's file: where and with what it ran, and a row for each configuration and contender."""
import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.harness import DeviceLost, Result, device_answers


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
