"""Fetch emoji of 64x64 through npm: `python -m transfusion.recipes.emoji_fetch`.

The packages are emoji-datasource-google and -twitter, checked against the SHA-512 that npm published. What is written
are the sheets that `transfusion.recipes.emoji` reads (`--data.size 64`).
"""
import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image as Picture
from tqdm import tqdm

from transfusion.command import plain_errors
from transfusion.files import replacing
from transfusion.recipes.emoji import COLUMNS, FETCHED, SHIPPED, STYLES

PACKAGES = {  # style: folder inside the package, package, its published SHA-512
    "noto": ("google", "emoji-datasource-google@16.0.0",
             "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "twemoji": ("twitter", "emoji-datasource-twitter@16.0.0",
                "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="),
}


@dataclass(frozen=True)
class Fetch:
    """Fetch the emoji through npm (136 MB) and write their sheets."""

    size: int = 64
    """side of a picture: 64 as they come, less to shrink them"""
    out: Path | None = None
    """directory for noto.webp, twemoji.webp, names.json and the licences; None: where `--data.size 64` looks, with the
    size in its name"""


def fetch(options: Fetch) -> Path:
    """Fetch both packages and write the sheets; return their directory."""
    if options.size not in (8, 16, 32, 64):
        raise ValueError(f"emoji: size is {options.size}; 8, 16, 32 or 64 fits")
    out = options.out or FETCHED / f"emoji-{options.size}"
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "sheets"
        shutil.copytree(SHIPPED / "licences", fresh / "licences")
        tables = {style: _write_sheet(fetch_package(*PACKAGES[style][1:], Path(scratch)), style, options.size,
                                      fresh) for style in STYLES}
        if tables["noto"] != tables["twemoji"]:
            raise ValueError("emoji: the two packages name different pictures; the versions in "
                             "transfusion/recipes/emoji_fetch.py fit each other")
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in tables["noto"])
        (fresh / "names.json").write_text(f'{{"size": {options.size}, "emoji": [\n{rows}\n]}}\n')
        with replacing(out, weights=False) as place:  # nothing is written before everything is there
            shutil.copytree(fresh, place, dirs_exist_ok=True)
    print(f"{len(tables['noto'])} pictures of {options.size}x{options.size} in each of {', '.join(STYLES)}: {out}")
    return out


def fetch_package(package: str, published: str, scratch: Path) -> Path:
    """Fetch a package's archive into `scratch` with `npm pack`, and check that it is the one that was published.

    Raises:
        ValueError: npm is missing or fails, or the archive has another SHA-512 than `published`.
    """
    if shutil.which("npm") is None:
        raise ValueError("emoji: npm is not on the PATH, which fetches the pictures; install Node.js (the emoji of "
                         "--data.size 32 are in this package)")
    print(f"fetching {package} ...", flush=True)
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(scratch)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"emoji: npm pack {package} failed ({run.stderr.strip()[-300:]}); a machine that reaches "
                         "the npm registry "
                         "fits")
    archive = scratch / run.stdout.strip().splitlines()[-1]
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != published:
        raise ValueError(f"emoji: {package} has SHA-512 {found}; {published} is what was published; nothing of it is "
                         "used")
    return archive


def _write_sheet(archive: Path, style: str, size: int, out: Path) -> list[tuple[str, str, str]]:
    """Write a style's sheet into `out`; return (name, category, kind) of each tile, in the emoji's own order."""
    folder, _, _ = PACKAGES[style]
    with tarfile.open(archive) as tar:
        rows = json.load(tar.extractfile("package/emoji.json"))
        rows = [row for row in rows
                if row["category"] != "Component" and row["has_img_google"] and row["has_img_twitter"]]
        rows.sort(key=lambda row: row["sort_order"])
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
        raise ValueError(f"emoji: {archive.name} lacks {len(places)} pictures, {next(iter(places))} first; the "
                         "versions in "
                         "transfusion/recipes/emoji_fetch.py hold them all")
    coarse = [min(255, (v + 4) // 8 * 8) if v < 252 else 255 for v in range(256)]  # half the bytes, 4 of 255 off
    sheet = sheet.point(coarse * 3)
    sheet.save(out / f"{style}.webp", lossless=True, quality=100, method=6)
    return [(_name(row), row["category"], row["subcategory"].replace("-", " ")) for row in rows]


def _name(row: dict) -> str:
    return row["name"].lower()


def main() -> None:
    """Entry point of `python -m transfusion.recipes.emoji_fetch`."""
    with plain_errors():
        fetch(tyro.cli(Fetch, prog="python -m transfusion.recipes.emoji_fetch"))


if __name__ == "__main__":
    main()
