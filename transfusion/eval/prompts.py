"""Prompts to draw: lines of a text, COCO's captions, GenEval's prompts; and where the picture of each is kept.

    FILE.txt     a prompt on each line that is not empty
    FILE.jsonl   an object on each line, with its "prompt" and, if it is drawn otherwise than the command says, its
                 "seed", "steps", "sampler", "guidance", "image_size" ([height, width]) or the "image" that it edits, a
                 file as seen from FILE.jsonl; what else it says is kept. GenEval's evaluation_metadata.jsonl is one,
                 known by the "tag" and "include" of every line (arXiv:2310.11513)
    FILE.json    COCO's captions ("images" and "annotations"), one for each of the pictures that are chosen

COCO's pictures are ordered by the SHA-256 of their ids in decimal digits, which no program and no version changes, and
the first of them are taken, each with its caption of the lowest id: fewer prompts are the first of more.
"""
import hashlib
from pathlib import Path
from typing import NamedTuple

from transfusion.files import read_json, read_json_lines, spelled
from transfusion.generate.sampling import Sampling
from transfusion.settings import shown

COCO_PROMPTS, GENEVAL_SAMPLES = 30_000, 4
COCO_RULE = "the pictures whose ids have the lowest SHA-256, with their captions of the lowest id"
FITS = "a .txt of lines, a .jsonl of objects with a \"prompt\", and COCO's captions in a .json fit"


OPTIONS = ("steps", "sampler", "guidance", "image_size")
"""Fields of `Sampling` that a line may set for its picture, beside its seed."""


class Prompts(NamedTuple):
    """What a file of prompts holds."""

    rows: list[dict]
    """of each prompt its "prompt" and what else the file says of it"""
    places: list[str]
    """of each prompt where it stands, for messages"""
    rule: str
    """which of the file's prompts these are"""
    is_geneval: bool = False


class Entry(NamedTuple):
    """One picture that is to be drawn."""

    number: int
    prompt: str
    file: str
    """below the folder of pictures"""
    seed: int
    """of its random numbers"""
    options: dict
    """those of OPTIONS that its line sets"""
    image: Path | None
    """a picture that stands before the prompt"""
    about: dict
    """what its line says beside the prompt"""


def read_prompts(path: Path, count: int | None = None) -> Prompts:
    """Return the prompts of a file: `count` of them, or 30,000 of COCO's captions and all of any other file.

    Raises:
        ValueError: a file of another kind, a damaged one, or one of fewer prompts; the message names it.
    """
    path = Path(path)
    readers = {".txt": _lines, ".jsonl": _objects, ".json": _coco}
    if path.suffix not in readers or not path.is_file():
        missing = "" if path.is_file() else ", where no file is"
        raise ValueError(f"read_prompts: path is {str(path)!r}{missing}; {FITS}")
    prompts = readers[path.suffix](path, count)
    for place, row in zip(prompts.places, prompts.rows):
        _check(place, row, path.parent)
    if not prompts.rows or count is not None and len(prompts.rows) < count:
        raise ValueError(f"{path} holds {len(prompts.rows)} prompts; {count or 'one'} or more fit")
    return prompts


def entries(prompts: Prompts, samples: int, seed: int = 0, folder: Path = Path()) -> list[Entry]:
    """Return the pictures to draw, `samples` of each prompt: number i of n is sample i % samples of its prompt.

    It draws its random numbers from `seed` + i or, where its line has a seed of its own, from this + i % samples.
    `folder` is where the names of pictures that are edited begin.
    """
    name = "{prompt:05}/samples/{sample:04}.png" if prompts.is_geneval else "{number:06}.png"
    made = []
    for number, row in enumerate(row for row in prompts.rows for _ in range(samples)):
        sample = number % samples
        made.append(Entry(
            number, row["prompt"], name.format(number=number, prompt=number // samples, sample=sample),
            row["seed"] + sample if "seed" in row else seed + number, _options(row),
            folder / row["image"] if "image" in row else None,
            {key: value for key, value in row.items() if key not in ("prompt", "seed")}))
    return made


def read_drawn(out: Path) -> list[dict]:
    """Return the lines of OUT/prompts.jsonl, as `transfusion eval draw` writes it.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    path = Path(out) / "prompts.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(out)!r} holds no prompts.jsonl; a directory that `transfusion eval draw` wrote fits")
    rows = []
    for place, row in read_json_lines(path):
        for name in ("file", "prompt"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{place}: {name} is {row.get(name)!r}; what `transfusion eval draw` wrote fits")
        rows.append(row)
    return rows


def _options(row: dict) -> dict:
    """The options of sampling that a line sets, as `Sampling` takes them."""
    return {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in OPTIONS if name in row}


def _check(place: str, row: dict, folder: Path) -> None:
    """Refuse a line that cannot be drawn."""
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{place}: prompt is {row.get('prompt')!r}; some text fits")
    if spelled(row["prompt"]) != row["prompt"]:
        raise ValueError(f"{place}: prompt is {shown(row['prompt'])}, which is no Unicode text; what UTF-8 can write "
                         "fits")
    if given := _options(row) | ({"seed": row["seed"]} if "seed" in row else {}):
        try:
            Sampling.of(given)
        except ValueError as error:
            raise ValueError(f"{place}: {str(error).removeprefix('generate: ')}") from None
    if "image" in row and not (isinstance(row["image"], str) and (folder / row["image"]).is_file()):
        raise ValueError(f"{place}: image is {row['image']!r}; a picture file fits, its name as seen from {folder}")


def _lines(path: Path, count: int | None) -> Prompts:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(f"{path}, line {at}", line.strip()) for at, line in enumerate(file, 1) if line.strip()][:count]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it as UTF-8") from error
    return Prompts([{"prompt": line} for _, line in lines], [place for place, _ in lines], _first(path, count))


def _objects(path: Path, count: int | None) -> Prompts:
    found = list(read_json_lines(path))[:count]
    rows = [row for _, row in found]
    return Prompts(rows, [place for place, _ in found], _first(path, count),
                   bool(rows) and all("tag" in row and "include" in row for row in rows))


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
    return Prompts(rows, [f"{path}, image {image}" for image in ids], f"{wanted:,} of {path.name}: {COCO_RULE}")
