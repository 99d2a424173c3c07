"""A run's log, log.jsonl: one record a step. Damaged lines are skipped; a resumed run goes on after its last save."""
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transfusion.command import FULL
from transfusion.files import written
from transfusion.train.trackers import Tracker

LOG = "log.jsonl"
CLOCKED = ("seconds", "waited", "tokens_per_second", "pictures_per_second", "data_share", "memory", "mfu",
           "validation_seconds", "samples_seconds")
"""Numbers of a record that are the machine's. All others are equal in two runs of equal settings."""


class Log:
    """A log to add records to. Its file is made with the first record: a run that fails before leaves none.

    What is in the file goes to `trackers` as well. Without a path nothing is written.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()):
        self.path, self.trackers, self.file = path, trackers, None

    def __enter__(self) -> "Log":
        return self

    def write(self, record: dict) -> None:
        """Add a record."""
        if self.path is None:
            return
        with self._named():
            if self.file is None:
                self.file = self.path.open("a")
            self.file.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.write(record)

    def sync(self) -> None:
        """Wait until the records of the file are on the disk."""
        with self._named():
            if self.file is not None:
                self.file.flush()
                os.fsync(self.file.fileno())
        for tracker in self.trackers:
            tracker.sync()

    def __exit__(self, kind: type | None, *error) -> None:
        with self._named():
            if self.file is not None:
                self.file.close()
        for tracker in self.trackers:
            tracker.close(failed=kind is not None)

    @contextlib.contextmanager
    def _named(self):
        """Say the log's name where the disk is full."""
        try:
            yield
        except OSError as error:
            if error.filename is not None or error.errno not in FULL:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error


def read_log(log: Path) -> list[dict]:
    """A log's records, without damaged lines: a kill may leave half of the last one."""
    records = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) else []
    return records


def records_before(log: Path, step: int) -> list[dict]:
    """Return a log's records of the steps before `step`."""
    return [record for record in read_log(log) if isinstance(record.get("step"), int) and record["step"] < step]


def start_log(log: Path, step: int) -> float:
    """Drop the records from `step` on, which the run takes again; return the seconds of training before it."""
    records = records_before(log, step)
    if len(records) < step:
        print(f"{log} holds {len(records):,} of the {step:,} steps so far; the run goes on without the others' records",
              flush=True)
    if records or log.is_file():
        with written(log) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records[-1].get("seconds", 0.0) if records else 0.0


def logged_seconds(log: Path) -> float:
    """Seconds of training so far, by a log's last record; interruptions do not count."""
    records = read_log(log)
    return records[-1].get("seconds", 0.0) if records else 0.0
