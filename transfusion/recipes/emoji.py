"""Named emoji in two styles: 1,905 pictures of Noto (Apache-2.0, Google) and as many of Twemoji (CC BY 4.0, Twitter and others), on white.

The package holds them at 32x32 (`assets/emoji`, with both licences): a sheet of tiles a style and a table of names. `python -m transfusion.recipes.emoji` fetches 64x64
pictures through npm (emoji-datasource-google and -twitter, checked against their published SHA-512) and writes the same sheets for the data set "emoji-64".
One name in ten is held out in one of its styles: a model has seen the thing and has seen the style, never both together. Names drawn as an earlier one are
left out: 1,870 are left.
"""
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm

from transfusion.files import replacing
from transfusion.sequence import Image, Part, Text

STYLES = ("noto", "twemoji")
PACKAGES = {
    "noto": ("google", "emoji-datasource-google@16.0.0", "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "twemoji": ("twitter", "emoji-datasource-twitter@16.0.0", "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="),
}
COLUMNS = 44  # tiles in a row of a sheet
SHIPPED = Path(__file__).parent / "assets" / "emoji"
FETCHED = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transfusion"
CATEGORIES = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols", "Flags")
LIVELY = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


class Emoji:
    """Emoji with captions made of their names and styles, "a red apple, noto style"; a tenth of the names is held out in one style.

    Args:
        split: "train", "held-out" (the pairs of name and style that training never shows), or "all".
        sheets: directory of noto.webp, twemoji.webp and names.json; those of the package by default.
        categories: those of `CATEGORIES` that are taken.
    """

    def __init__(self, split: str = "train", sheets: Path = SHIPPED, categories: tuple[str, ...] = CATEGORIES):
        if not (Path(sheets) / "names.json").is_file():
            raise ValueError(f"Emoji: sheets is {str(sheets)!r}, which holds no names.json; a directory that `python -m transfusion.recipes.emoji` wrote fits; run it")
        table = json.loads((Path(sheets) / "names.json").read_text())
        self.size = table["size"]
        pictures = torch.stack([read_sheet(Path(sheets) / f"{style}.webp", self.size, len(table["emoji"])) for style in STYLES])
        held = held_out_pairs([name for name, _, _ in table["emoji"]])
        chosen = [i for i in distinct(pictures) if table["emoji"][i][1] in categories]
        rows, pictures, held = [table["emoji"][i] for i in chosen], pictures[:, chosen], held[:, chosen]
        self.names = [name for name, _, _ in rows]
        self.category_names = list(dict.fromkeys(category for _, category, _ in rows))     # in the emoji's own order, as names and kinds
        self.kind_names = list(dict.fromkeys(kind for _, _, kind in rows))
        keep = {"train": ~held, "held-out": held, "all": torch.ones_like(held)}[split]
        self.styles, self.labels = keep.nonzero().unbind(1)                                # (N,) each
        self.images = pictures[self.styles, self.labels]                                   # (N, 3, size, size)
        self.image_shape = tuple(self.images.shape[1:])
        self.categories = torch.tensor([self.category_names.index(category) for _, category, _ in rows])[self.labels]
        self.kinds = torch.tensor([self.kind_names.index(kind) for _, _, kind in rows])[self.labels]

    @staticmethod
    def caption(name: str, style: str) -> str:
        """Return the words for a picture, e.g. "a red apple, noto style"."""
        plural, vowel = name.endswith("s") and not name.endswith("ss"), name[0] in "aeiou" and not name.startswith(("eu", "uni", "one", "u."))
        return f"{'' if plural else 'an ' if vowel else 'a '}{name}, {style} style"

    def caption_of(self, i: int) -> str:
        """Return the words for picture `i`."""
        return self.caption(self.names[self.labels[i]], STYLES[self.styles[i]])

    def texts(self) -> list[str]:
        """Every text that documents are made of."""
        named = [self.caption(name, style) for name in self.names for style in STYLES]
        return named + [f"{kind}, {style} style" for kind in self.kind_names for style in STYLES]

    def document(self, generator: torch.Generator, settings) -> list[Part]:
        """Draw one document: a caption and its image in either order, the kind in place of the name once in ten times, or an image alone."""
        i = int(torch.randint(len(self.labels), (), generator=generator))
        order, drop, vague = torch.rand(3, generator=generator).tolist()
        image = Image(self.images[i])
        if order >= settings.caption_first:
            return [image, Text(self.caption_of(i))]
        if drop < settings.caption_dropout:
            return [image]
        kind = f"{self.kind_names[self.kinds[i]]}, {STYLES[self.styles[i]]} style"
        return [Text(kind if vague < 0.1 else self.caption_of(i)), image]


def held_out_pairs(names: list[str]) -> Tensor:
    """(styles, names), true for one style of one name in ten: by the names alone, so that every choice of categories or size holds out the same."""
    numbers = torch.tensor([zlib.crc32(name.encode()) for name in names])
    held = torch.zeros(len(STYLES), len(names), dtype=torch.bool)
    held[numbers // 10 % len(STYLES), torch.arange(len(names))] = numbers % 10 == 0
    return held


def distinct(pictures: Tensor) -> list[int]:
    """Names whose pictures (styles, names, C, H, W) no earlier name has in the same style: some flags and families are drawn alike."""
    seen, kept = set(), []
    for i in range(pictures.shape[1]):
        drawn = [(style, picture.numpy().tobytes()) for style, picture in enumerate(pictures[:, i])]
        if not seen.intersection(drawn):
            kept.append(i)
        seen.update(drawn)
    return kept


def read_sheet(path: Path, size: int, count: int) -> Tensor:
    """Read the first `count` tiles of a sheet: (count, 3, size, size), values in [-1, 1]."""
    with Picture.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))                        # (rows * size, COLUMNS * size, 3)
    tiles = pixels.unflatten(0, (-1, size)).unflatten(2, (-1, size))                       # (rows, size, COLUMNS, size, 3)
    return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1)[:count].float() / 127.5 - 1


def small_emoji(split: str = "train") -> Emoji:
    """All categories at 32x32, from the package."""
    return Emoji(split)


def lively_emoji(split: str = "train") -> Emoji:
    """At 32x32, from the package: 459 faces, animals, plants and dishes."""
    return Emoji(split, categories=LIVELY)


def large_emoji(split: str = "train") -> Emoji:
    """All categories at 64x64, as `python -m transfusion.recipes.emoji` fetched them."""
    return Emoji(split, FETCHED / "emoji-64")


@dataclass(frozen=True)
class Fetch:
    """Fetch the emoji through npm (136 MB) and write their sheets; the data set "emoji-64" finds those of 64x64."""

    size: int = 64
    """side of a picture: 64 as they come, less to shrink them"""
    out: Path | None = None
    """directory for noto.webp, twemoji.webp, names.json and the licences; None: where the data set "emoji-64" looks, with the size in its name"""


def fetch(options: Fetch) -> Path:
    """Fetch both packages and write the sheets; return their directory."""
    if options.size not in (8, 16, 32, 64):
        raise ValueError(f"emoji: size is {options.size}; 8, 16, 32 or 64 fits")
    if shutil.which("npm") is None:
        raise ValueError("emoji: npm is not on the PATH; install Node.js, or use the data set 'emoji', whose 32x32 pictures the package holds")
    out = options.out or FETCHED / f"emoji-{options.size}"
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "sheets"
        shutil.copytree(SHIPPED / "licences", fresh / "licences")
        tables = {style: _write_sheet(_download(style, Path(scratch)), style, options.size, fresh) for style in STYLES}
        if tables["noto"] != tables["twemoji"]:
            raise ValueError("emoji: the two packages name different pictures; the versions in transfusion/recipes/emoji.py fit each other")
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in tables["noto"])
        (fresh / "names.json").write_text(f'{{"size": {options.size}, "emoji": [\n{rows}\n]}}\n')
        with replacing(out, weights=False) as place:  # nothing is written before everything is there
            shutil.copytree(fresh, place, dirs_exist_ok=True)
    print(f"{len(tables['noto'])} pictures of {options.size}x{options.size} in each of {', '.join(STYLES)}: {out}")
    return out


def _download(style: str, scratch: Path) -> Path:
    """Fetch a package's archive with `npm pack` and check that it is the one that was published."""
    _, package, published = PACKAGES[style]
    print(f"fetching {package} ...", flush=True)
    run = subprocess.run(["npm", "pack", package, "--silent", "--pack-destination", str(scratch)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"emoji: npm pack {package} failed ({run.stderr.strip()[-300:]}); a machine that reaches the npm registry fits")
    archive = scratch / run.stdout.strip().splitlines()[-1]
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != published:
        raise ValueError(f"emoji: {package} has SHA-512 {found}; {published} is what was published; nothing of it is used")
    return archive


def _write_sheet(archive: Path, style: str, size: int, out: Path) -> list[tuple[str, str, str]]:
    """Write a style's sheet into `out`; return (name, category, kind) of each tile, in the emoji's own order."""
    folder, _, _ = PACKAGES[style]
    with tarfile.open(archive) as tar:
        rows = json.load(tar.extractfile("package/emoji.json"))
        rows = sorted((row for row in rows if row["category"] != "Component" and row["has_img_google"] and row["has_img_twitter"]),
                      key=lambda row: row["sort_order"])
        rows = list({_name(row): row for row in rows}.values())
        places = {f"package/img/{folder}/64/{row['image']}": i for i, row in enumerate(rows)}
        sheet = Picture.new("RGB", (COLUMNS * size, -(-len(rows) // COLUMNS) * size), "white")
        for member in tqdm(tar, desc=style, unit="file"):  # in the archive's order: compressed, it cannot be searched
            if member.name not in places:
                continue
            i = places.pop(member.name)
            with Picture.open(io.BytesIO(tar.extractfile(member).read())) as picture:
                picture = picture.convert("RGBA")
                tile = Picture.new("RGBA", picture.size, "white")
                tile.alpha_composite(picture)
                tile = tile.convert("RGB").resize((size, size), Picture.Resampling.BOX)
            sheet.paste(tile, (i % COLUMNS * size, i // COLUMNS * size))
    if places:
        raise ValueError(f"emoji: {archive.name} lacks {len(places)} pictures, {next(iter(places))} first; the versions in transfusion/recipes/emoji.py hold them all")
    sheet = sheet.point([min(255, (v + 4) // 8 * 8) if v < 252 else 255 for v in range(256)] * 3)  # half the bytes; at most 4 of 255 off
    sheet.save(out / f"{style}.webp", lossless=True, quality=100, method=6)
    return [(_name(row), row["category"], row["subcategory"].replace("-", " ")) for row in rows]


def _name(row: dict) -> str:
    return row["name"].lower()


def main() -> None:
    """Entry point of `python -m transfusion.recipes.emoji`."""
    try:
        fetch(tyro.cli(Fetch, prog="python -m transfusion.recipes.emoji"))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
