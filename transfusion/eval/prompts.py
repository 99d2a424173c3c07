"""Prompts to draw: lines of a text, COCO's captions, GenEval's prompts; and where the picture of each is kept.

    FILE.txt     a prompt on each line that is not empty
    FILE.jsonl   an object on each line, with its "prompt"; GenEval's evaluation_metadata.jsonl is one, known by the
                 "tag" and "include" of every line (arXiv:2310.11513)
    FILE.json    COCO's captions ("images" and "annotations"), one for each of the pictures that are chosen

COCO's pictures are ordered by the SHA-256 of their ids in decimal digits, which no program and no version changes, and
the first of them are taken, each with its caption of the lowest id: fewer prompts are the first of more.
"""
import hashlib
from pathlib import Path
from typing import NamedTuple

from transfusion.files import read_json, read_json_lines

COCO_PROMPTS, GENEVAL_SAMPLES = 30_000, 4
COCO_RULE = "the pictures whose ids have the lowest SHA-256, with their captions of the lowest id"
FITS = "a .txt of lines, a .jsonl of objects with a \"prompt\", and COCO's captions in a .json fit"


class Prompts(NamedTuple):
    """What a file of prompts holds."""

    rows: list[dict]
    """of each prompt its "prompt" and what else the file says of it"""
    rule: str
    """which of the file's prompts these are"""
    is_geneval: bool = False


class Entry(NamedTuple):
    """One picture that is to be drawn."""

    number: int
    prompt: str
    file: str
    """below the folder of pictures"""
    about: dict


def read_prompts(path: Path, count: int | None = None) -> Prompts:
    """Return the prompts of a file: `count` of them, or 30,000 of COCO's captions and all of any other file.

    Raises:
        ValueError: a file of another kind, a damaged one, or one of fewer prompts; the message names it.
    """
    path = Path(path)
    readers = {".txt": _lines, ".jsonl": _objects, ".json": _coco}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"read_prompts: path is {str(path)!r}; {FITS}")
    prompts = readers[path.suffix](path, count)
    for number, row in enumerate(prompts.rows):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{path}: the prompt of number {number} is {row.get('prompt')!r}; some text fits")
    if not prompts.rows or count is not None and len(prompts.rows) < count:
        raise ValueError(f"{path} holds {len(prompts.rows)} prompts; {count or 'one'} or more fit")
    return prompts


def entries(prompts: Prompts, samples: int) -> list[Entry]:
    """Return the pictures to draw, `samples` of each prompt: number i of n is sample i % samples of its prompt."""
    name = "{prompt:05}/samples/{sample:04}.png" if prompts.is_geneval else "{number:06}.png"
    return [Entry(number, row["prompt"], name.format(number=number, prompt=number // samples, sample=number % samples),
                  {key: value for key, value in row.items() if key != "prompt"})
            for number, row in enumerate(row for row in prompts.rows for _ in range(samples))]


def read_drawn(out: Path) -> list[dict]:
    """Return the lines of OUT/prompts.jsonl, as `transfusion eval draw` writes it.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    path = Path(out) / "prompts.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(out)!r} holds no prompts.jsonl; a directory that `transfusion eval draw` wrote fits")
    return [row for _, row in read_json_lines(path)]


def _lines(path: Path, count: int | None) -> Prompts:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Prompts([{"prompt": line} for line in lines[:count]], _first(path, count))


def _objects(path: Path, count: int | None) -> Prompts:
    rows = [row for _, row in read_json_lines(path)][:count]
    return Prompts(rows, _first(path, count), bool(rows) and all("tag" in row and "include" in row for row in rows))


def _first(path: Path, count: int | None) -> str:
    return f"all of {path.name}" if count is None else f"the first {count:,} of {path.name}"


def _coco(path: Path, count: int | None) -> Prompts:
    held = read_json(path, "COCO's captions fit, e.g. captions_val2014.json")
    try:
        files = {image["id"]: image["file_name"] for image in held["images"]}
        captions = {}
        for row in sorted(held["annotations"], key=lambda row: row["id"]):
            captions.setdefault(row["image_id"], row["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of COCO's captions ({error!r} is missing or of another kind); "
                         "captions_val2014.json is one") from error
    wanted = COCO_PROMPTS if count is None else count
    if len(captions) < wanted:
        raise ValueError(f"{path} has captions of {len(captions):,} pictures, and {wanted:,} are asked for; "
                         f"--count {len(captions)} fits")
    ids = sorted(captions, key=lambda image: hashlib.sha256(str(image).encode()).hexdigest())[:wanted]
    rows = [{"prompt": captions[image], "image_id": image, "image_file": files.get(image)} for image in ids]
    return Prompts(rows, f"{wanted:,} of {path.name}: {COCO_RULE}")
