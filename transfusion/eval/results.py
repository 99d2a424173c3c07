"""Results of evaluations: one number with all that makes it comparable, as OUT/results/NAME.json.

A file holds one `Result`. A value of None says that there is no score, and the note says why: a server scores the
answers, or a judge did not answer. Files are written in one piece and checked when they are read.
"""
import contextlib
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import transfusion
from transfusion.files import read_json, whole, write_text
from transfusion.settings import NotNegative, WholeNumber, check, nearest

FOLDER = "results"
NAME = re.compile(r"[\w.-]+")
MOST = 180  # bytes of task and metric in a file's name, which has room for 255
ADVICE = "delete it and evaluate again"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Result:
    """One number of an evaluation and what it takes to get it again."""

    task: str
    """what was evaluated: a benchmark's name, "images", "captions", ..."""
    metric: str
    """the number's name, such as "exact_match" or "Frechet distance (ResNet features)" """
    value: float | None
    """the score; None where there is none, and then `note` says why"""
    n: WholeNumber
    """pictures, questions or captions that the value is of"""
    library: str
    """the package whose code computed the value"""
    version: str
    """of that package"""
    seconds: NotNegative
    """that the evaluation took"""
    model: str = ""
    """directory or name of what was evaluated"""
    weights_hash: str | None = None
    """`weights_hash` of its weights, None where there are none at hand"""
    standard_error: NotNegative | None = None
    """of the value, where it was estimated"""
    prompts: str | None = None
    """which questions or captions were asked, and in which words"""
    resize: str | None = None
    """how pictures were brought to the size that a network takes"""
    judge: str | None = None
    """the model that scored, None: no judge"""
    seed: int | None = None
    """of the model's random numbers, None: there were none, or nobody wrote it down"""
    note: str = ""
    """what a reader must know beside the number"""
    details: dict = field(default_factory=dict)
    """further numbers and settings by name, in JSON's kinds"""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """when it was computed, UTC"""


FIELDS = {field.name: field for field in dataclasses.fields(Result)}
REQUIRED = [name for name, field in FIELDS.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]


def write_result(out: Path, result: Result, name: str | None = None) -> Path:
    """Write OUT/results/NAME.json in one piece, over an older one of the name, and return its path.

    The name is that of task and metric, as `result_name` makes it, where none is given; where the result of another
    task or metric has this name, as "accuracy, C" and "accuracy, C++" do, a hash of both stands behind it.

    Raises:
        ValueError: a field that does not fit, a name of other characters than letters, digits, ".", "_" and "-".
    """
    name = _free_name(Path(out) / FOLDER, result) if name is None else name
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ValueError(f"write_result: name is {name!r}; letters, digits, '.', '_' and '-' fit, and no dot at its "
                         "beginning")
    _check("write_result", result)
    path = Path(out) / FOLDER / f"{name}.json"
    write_text(path, json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _free_name(folder: Path, result: Result) -> str:
    """The name of a result, which no result of another task or metric has."""
    name, own = result_name(result.task, result.metric), [result.task, result.metric]
    path = folder / f"{name}.json"
    with contextlib.suppress(ValueError):  # of a damaged file, whose place is free
        held = read_json(path, ADVICE) if path.is_file() else {}
        if held and [held.get("task"), held.get("metric")] != own:
            return f"{name}-{_short_hash(*own)}"
    return name


def check_same_data(command: str, out: Path, task: str, data: Path) -> None:
    """Refuse to write results of a task where those of the same name are of another file, which they say in "data".

    Raises:
        ValueError: as the first line says, or a file of such a name is damaged.
    """
    for path in _of_name(out, task):
        held = read_json(path, ADVICE)
        other = held.get("details", {}).get("data", str(data.resolve()))
        if held.get("task") == task and other != str(data.resolve()):
            raise ValueError(f"{command}: out is {str(out)!r}, where {path.relative_to(out)} is of {other!r}, and now "
                             f"the data are {str(data)!r}; another --out, or another file's name, fits")


def remove_results(out: Path, task: str) -> None:
    """Remove the results of a task in OUT/results, of whatever metrics.

    Raises:
        ValueError: a file of such a name is damaged; the message names it.
    """
    for path in _of_name(out, task):
        if read_json(path, ADVICE).get("task") == task:
            path.unlink()


def _of_name(out: Path, task: str) -> list[Path]:
    """Files whose names are those of a task's results, or of another one's that begins alike."""
    return sorted((Path(out) / FOLDER).glob(f"{result_name(task, '')}*.json"))


def result_name(task: str, metric: str) -> str:
    """The name of a result's file: task and metric with "-" for all that a file's name should not hold.

    A longer name than `MOST` bytes is cut, and a hash of both stands behind it.
    """
    name = re.sub(r"[^\w.]+", "-", f"{task}-{metric}").strip("-.")
    if len(name.encode()) <= MOST:
        return name
    return f"{name.encode()[:MOST].decode(errors='ignore')}-{_short_hash(task, metric)}"


def _short_hash(task: str, metric: str) -> str:
    return hashlib.sha256(f"{task}\0{metric}".encode(errors="backslashreplace")).hexdigest()[:8]


def read_results(out: Path) -> dict[str, Result]:
    """Return the results in OUT/results by their files' names, in the order of these; {} where there are none.

    Raises:
        ValueError: a file that is no result; the message names the file and the field.
    """
    return {path.stem: read_result(path) for path in sorted((Path(out) / FOLDER).glob("[!.]*.json"))}


def read_result(path: Path) -> Result:
    """Return the result that a file holds.

    Raises:
        ValueError: it holds none; the message names the file and the field.
    """
    held = read_json(path, ADVICE)
    for name in REQUIRED:
        if name not in held:
            raise ValueError(f"{path}: {name} is missing; {ADVICE}")
    for name in held:
        if name not in FIELDS:
            raise ValueError(f"{path}: {name} is no field of a result; {', '.join(FIELDS)} fit{nearest(name, FIELDS)}")
    result = Result(**held)
    _check(str(path), result)
    return result


def _check(where: str, result: Result) -> None:
    check(where, result)
    for name in ("task", "metric", "library", "version"):
        if not getattr(result, name).strip():
            raise ValueError(f"{where}: {name} is empty; a name fits")
    if result.value is None and not result.note:
        raise ValueError(f"{where}: value is None and note is empty; a note that says why there is no score fits")
    if not isinstance(result.details, dict):
        raise ValueError(f"{where}: details is {result.details!r}; an object of names and values fits")
    try:
        datetime.fromisoformat(result.date)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: date is {result.date!r}; a date and time in ISO 8601 fits") from None


def version_of(package: str) -> str:
    """The version of an installed package; of this one, which runs without being installed, its own."""
    return transfusion.__version__ if package == "transfusion" else metadata.version(package)


def weights_hash(path: Path) -> str | None:
    """Return the SHA-256 of a file of weights or of a directory's, None for a directory that holds none.

    Of one file it is what `sha256sum FILE` prints; of several, the SHA-256 of the lines "HASH  NAME" that
    `sha256sum` prints in the order of their names. An autoencoder in vae/ counts, what resuming needs does not. Of a
    save that a kill left in two places it is the newest one's, as `load_model` reads it.
    """
    path = Path(path)
    if path.is_file():
        return _sha256(path)
    with whole(path) as place:
        return _hash_of_all(place)


def _hash_of_all(path: Path) -> str | None:
    """`weights_hash` of a directory."""
    files = sorted({file for folder in (path, path / "vae") for pattern in WEIGHTS for file in folder.glob(pattern)},
                   key=lambda file: file.relative_to(path).as_posix())
    if len(files) < 2:
        return _sha256(files[0]) if files else None
    lines = "".join(f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
