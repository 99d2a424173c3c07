"""A run's log, log.jsonl: one record a step, whole lines alone are read, and a resumed run goes on behind its last save."""
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from transfusion.command import FULL
from transfusion.files import written


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
