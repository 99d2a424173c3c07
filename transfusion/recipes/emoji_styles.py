"""Emoji in nine styles by six families of artists, fetched through npm: `python -m transfusion.recipes.emoji_styles`.

    noto, noto classic          Apache-2.0, Google: shipped, and @iconify-json/noto-v1
    twemoji                     CC BY 4.0, Twitter and others: shipped
    emojione                    CC BY 4.0, Ranks.com: @iconify-json/emojione
    emojione classic            CC BY-SA 4.0, Ranks.com: @iconify-json/emojione-v1
    fluent flat, fluent solid   MIT, Microsoft: @iconify-json/fluent-emoji-flat, @lobehub/fluent-emoji-3d
    firefox                     Apache-2.0, Mozilla: @iconify-json/fxemoji
    openmoji                    CC BY-SA 4.0, OpenMoji: @iconify-json/openmoji

Names, categories and kinds are those of the shipped emoji; a set is searched by name and by code point, and lacks some.
Vector pictures are drawn by resvg (`pip install resvg-py`). What is written:

    OUT/STYLE.webp      a sheet of tiles for each style, in the order of names.json; a tile that is missing is white
    OUT/names.json      name, category, kind and the styles that have it
    OUT/LICENCES.txt    the list above
"""
import importlib
import io
import json
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm

from transfusion.command import plain_errors
from transfusion.data.picture_files import to_picture
from transfusion.files import read_json, replacing, write_text
from transfusion.recipes.emoji import CATEGORIES, COLUMNS, FETCHED, SHIPPED, STYLES, Emoji, read_sheet
from transfusion.recipes.emoji_fetch import fetch_package

SIZE = 32
THINGS = ("Animals & Nature", "Food & Drink")
"""Categories whose names are those of things. Names of faces are sentences, and of two that a few pixels part."""
DRAWN = tuple(name for name in CATEGORIES if name != "Flags")  # flags are the same in every style


class Package(NamedTuple):
    """An npm package of pictures, with the SHA-512 that npm published."""

    name: str
    published: str


PACKAGES = {
    "emojione": Package("@iconify-json/emojione@1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    "emojione classic": Package("@iconify-json/emojione-v1@1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww=="),
    "fluent flat": Package("@iconify-json/fluent-emoji-flat@1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    "firefox": Package("@iconify-json/fxemoji@1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
    "noto classic": Package("@iconify-json/noto-v1@1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    "openmoji": Package("@iconify-json/openmoji@1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    "fluent solid": Package("@lobehub/fluent-emoji-3d@1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
}
SOLID = "fluent solid"  # pictures in files, named by code point; the other packages are Iconify's
ALL_STYLES = (*STYLES, *PACKAGES)
FAMILIES = {style: style.split()[0] for style in ALL_STYLES}
"""Who drew a style: two styles of one family may draw a thing alike."""

Find = Callable[[str, str], Picture.Image | None]  # the picture of (name, code points), if there is one


@dataclass(frozen=True)
class FetchStyles:
    """Fetch emoji of seven further styles through npm (28 MB) and write them and the shipped two as sheets."""

    out: Path = FETCHED / "emoji-styles"
    """directory to write"""


class Drawings(NamedTuple):
    """Pictures of named things in several styles.

    pictures: (N, 3, size, size) in [-1, 1]. labels, styles, kinds, categories: (N,) places in the names of each.
    held: (N,) those that training never shows.
    """

    pictures: Tensor
    labels: Tensor
    styles: Tensor
    kinds: Tensor
    categories: Tensor
    held: Tensor
    names: list[str]
    style_names: tuple[str, ...]
    kind_names: list[str]
    category_names: list[str]

    def of(self, chosen: Tensor) -> "Drawings":
        """Those at the places `chosen`, or where it is true; names keep their places."""
        return Drawings(*(x[chosen] for x in self[:6]), *self[6:])


def read_drawings(folder: Path) -> Drawings:
    """Read what this command wrote.

    One name in three of animals, plants, food and drink is held out in all styles of one family, chosen by the name.

    Raises:
        ValueError: a directory that holds none.
    """
    if not (Path(folder) / "names.json").is_file():
        raise ValueError(f"emoji styles: folder is {str(folder)!r}, which holds no names.json; run `python -m "
                         "transfusion.recipes.emoji_styles`")
    table = read_json(Path(folder) / "names.json", "delete the directory and fetch it anew")
    rows, size = table["emoji"], table["size"]
    has = torch.tensor([[style in row[3] for row in rows] for style in ALL_STYLES])                    # (styles, names)
    sheets = torch.stack([read_sheet(Path(folder) / f"{style}.webp", size, len(rows)) for style in ALL_STYLES])
    styles, labels = has.nonzero().unbind(1)
    held = held_out([row[0] if row[1] in THINGS else None for row in rows], has)[styles, labels]
    kind_names, category_names = (list(dict.fromkeys(row[i] for row in rows)) for i in (2, 1))
    kinds = torch.tensor([kind_names.index(row[2]) for row in rows])[labels]
    categories = torch.tensor([category_names.index(row[1]) for row in rows])[labels]
    return Drawings(sheets[styles, labels], labels, styles, kinds, categories, held, [row[0] for row in rows],
                    ALL_STYLES, kind_names, category_names)


def held_out(names: list[str | None], has: Tensor) -> Tensor:
    """Return (styles, names), true where a picture is held out: all of one name in three by one family of styles.

    Names alone, and who drew them (`has`), decide; None is held out nowhere.
    """
    held = torch.zeros_like(has)
    families = [FAMILIES[style] for style in ALL_STYLES]
    for label, name in enumerate(names):
        number = zlib.crc32((name or "").encode())
        if name is not None and number % 3 == 0:
            drew = list(dict.fromkeys(family for family, there in zip(families, has[:, label]) if there))
            chosen = drew[number // 3 % len(drew)]
            held[:, label] = torch.tensor([family == chosen for family in families]) & has[:, label]
    return held


def fetch_styles(options: FetchStyles) -> Path:
    """Fetch the packages, draw their pictures and write the sheets; return their directory.

    Raises:
        ValueError: no npm, no resvg, or a package that is not the one that was published.
    """
    emoji = Emoji("all", SHIPPED, DRAWN)
    category, kind = ({label: names[i] for label, i in zip(emoji.labels.tolist(), of.tolist())} for names, of in
                      ((emoji.category_names, emoji.categories), (emoji.kind_names, emoji.kinds)))
    shipped = {(STYLES[style], label): to_picture(picture) for style, label, picture in
               zip(emoji.styles.tolist(), emoji.labels.tolist(), emoji.pictures)}
    with tempfile.TemporaryDirectory() as scratch:
        archives = {style: fetch_package(*package, Path(scratch)) for style, package in PACKAGES.items()}
        finders = _finders(archives)
        with replacing(options.out, weights=False) as fresh:
            has: list[list[str]] = [[] for _ in emoji.names]
            for style in ALL_STYLES:
                sheet = Picture.new("RGB", (COLUMNS * SIZE, -(-len(emoji.names) // COLUMNS) * SIZE), "white")
                for i, name in enumerate(tqdm(emoji.names, desc=style, unit="picture")):
                    picture = shipped.get((style, i)) if style in STYLES else finders[style](name, code_points(name))
                    if picture is not None:
                        sheet.paste(picture.resize((SIZE, SIZE), Picture.Resampling.BOX),
                                    (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
                        has[i].append(style)
                sheet.save(fresh / f"{style}.webp", lossless=True)
            rows = [[name, category[i], kind[i], has[i]] for i, name in enumerate(emoji.names)]
            write_text(fresh / "names.json", json.dumps({"size": SIZE, "emoji": rows}, ensure_ascii=False))
            write_text(fresh / "LICENCES.txt", __doc__.split("\n\n")[1] + "\n")
    counts = ", ".join(f"{sum(style in styles for styles in has):,} {style}" for style in ALL_STYLES)
    print(f"{options.out}: {counts}")
    return options.out


def code_points(name: str) -> str:
    """The character of an emoji's name, as packages write it ("1f34e"); "" where Unicode knows it by another name."""
    try:
        return "-".join(f"{ord(one):x}" for one in unicodedata.lookup(name.upper()))
    except KeyError:
        return ""


def _finders(archives: dict[str, Path]) -> dict[str, Find]:
    """How each style's pictures are found in its package's archive."""
    vectors = {style: _members(archive, ".json") for style, archive in archives.items() if style != SOLID}
    words = json.loads(vectors["openmoji"]["chars.json"])  # Iconify's names by code points
    finders: dict[str, Find] = {
        style: VectorSet(json.loads(members["icons.json"]), words) for style, members in vectors.items()}
    finders[SOLID] = _solid(_members(archives[SOLID], ".webp"))
    return finders


def _members(archive: Path, suffix: str) -> dict[str, bytes]:
    """The files of an archive with this suffix, by their names without folders."""
    with tarfile.open(archive) as tar:
        return {Path(one.name).name: tar.extractfile(one).read() for one in tar if one.name.endswith(suffix)}


def _solid(files: dict[str, bytes]) -> Find:
    def find(_: str, points: str) -> Picture.Image | None:
        data = next((files[f"{one}.webp"] for one in _spellings(points) if f"{one}.webp" in files), None)
        if data is None:
            return None
        with Picture.open(io.BytesIO(data)) as picture:
            picture = picture.convert("RGBA")
            white = Picture.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            return white.convert("RGB")

    return find


def _spellings(points: str) -> Iterator[str]:
    """Code points without and with the selector that says: drawn in colour."""
    return iter((points, f"{points}-fe0f") if points else ())


class VectorSet:
    """The pictures of an Iconify package, drawn at twice the size that they are kept in."""

    def __init__(self, icons: dict, words: dict[str, str]):
        self.icons, self.words, self.draw = icons, words, _renderer()

    def __call__(self, name: str, points: str) -> Picture.Image | None:
        """As `Find`: by name first, and then by what its code points are called."""
        own = "-".join("".join(c for c in name if c not in "’':,.").split())
        for word in (own, *(self.words[one] for one in _spellings(points) if one in self.words)):
            icon = self._icon(word)
            if icon is not None:
                return self._drawn(icon)
        return None

    def _icon(self, word: str) -> dict | None:
        alias = self.icons.get("aliases", {}).get(word, {})
        word = alias["parent"] if set(alias) == {"parent"} else word
        return self.icons["icons"].get(word)

    def _drawn(self, icon: dict) -> Picture.Image:
        left, top, width, height = (icon.get(key, self.icons.get(key, 0)) for key in ("left", "top", "width", "height"))
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{2 * SIZE}" '
               f'height="{2 * SIZE}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')
        data = bytes(self.draw(svg_string=svg, background="white", skip_system_fonts=True))
        with Picture.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB")


def _renderer() -> Callable:
    try:
        return importlib.import_module("resvg_py").svg_to_bytes
    except ImportError as error:
        raise ValueError("emoji styles: resvg is missing, which draws vector pictures; `pip install resvg-py`") from \
            error


def main() -> None:
    """Entry point of `python -m transfusion.recipes.emoji_styles`."""
    with plain_errors():
        fetch_styles(tyro.cli(FetchStyles, prog="python -m transfusion.recipes.emoji_styles"))


if __name__ == "__main__":
    main()
