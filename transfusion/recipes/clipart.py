"""Fetch Open Clip Art, pictures in the public domain: `python -m transfusion.recipes.clipart --out DIR`.

apt fetches Debian's packages openclipart-png and openclipart-svg (156 MB) and checks them; nothing is
installed, and no root is needed. The pictures come from the first, shrunk and on white, titles and keywords from the
second. One that lies in several folders is written once.

    DIR/pictures/metadata.jsonl and DIR/pictures/animals/...png     what `format: imagefolder` reads
    DIR/mix.yaml                                                    a mixture of it, for `transfusion data check`
"""
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image as Picture
from PIL import ImageOps
from tqdm import tqdm

from transfusion.command import plain_errors
from transfusion.data.picture_files import open_picture
from transfusion.files import replacing
from transfusion.settings import Count, check, nearest

PACKAGES = ("openclipart-png", "openclipart-svg")
TITLE, SUBJECT, ITEM = (
    "{http://purl.org/dc/elements/1.1/}title", "{http://purl.org/dc/elements/1.1/}subject",
    "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
NO_WORDS = {"hash", "externalsource", "unsorted", "clipart", "clip art", "image", "media", "png", "svg",
            "public domain", "contour", "jpg", "inkscape", "vector", "title"}
"""Keywords and titles that say nothing of what a picture shows."""
SHARED = 3
"""pictures that may have a title in common; where there are more it names a set of them, not what one shows"""
MIXTURE = """\
# {count:,} pictures of Open Clip Art, in the public domain
pictures: {{side: {side}}}
flip: 0.5
sources:
  - {{format: imagefolder, path: pictures, name: clipart}}
"""


@dataclass(frozen=True)
class ClipArt:
    """Fetch Open Clip Art through apt and write it as a folder of pictures with captions, and a mixture of it."""

    out: Path
    """directory to write"""
    size: Count = 256
    """longest side of a picture in pixels; larger ones are shrunk"""
    packages: Path | None = None
    """directory in which the two .deb files lie already; none: apt fetches them"""
    folders: tuple[str, ...] | None = None
    """only pictures of these, such as `animals food plants`; none: all"""
    square: bool = False
    """fit each picture into the middle of a white square of `size`; small ones are enlarged"""


def fetch(options: ClipArt) -> Path:
    """Fetch the packages and write the folder, which appears whole or not at all; return it.

    Raises:
        ValueError: apt or dpkg-deb is missing, the packages cannot be fetched, or they hold no picture.
    """
    check("clipart", options)
    with tempfile.TemporaryDirectory() as scratch:
        tree = _unpacked(options.packages, Path(scratch))
        pictures = sorted((tree / "png").rglob("*.png"))
        if not pictures:
            raise ValueError("clipart: the packages hold no picture below usr/share/openclipart/png; those of "
                             "Debian 12 fit")
        pictures = _once(_inside(pictures, tree / "png", options.folders))
        with replacing(options.out, weights=False) as fresh:
            rows, skipped = _write_pictures(pictures, tree, fresh / "pictures", options)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (fresh / "pictures" / "metadata.jsonl").write_text(lines, encoding="utf-8")
            (fresh / "mix.yaml").write_text(MIXTURE.format(count=len(rows), side=options.size))
            for copyright in tree.parent.glob("doc/openclipart-png/copyright"):
                shutil.copyfile(copyright, fresh / "COPYRIGHT")
    left = f"; {len(skipped)} could not be read, {skipped[0]} first" if skipped else ""
    print(f"{len(rows):,} pictures with captions: {options.out}{left}\n"
          f"look at them: transfusion data check {options.out / 'mix.yaml'}")
    return options.out


def _inside(pictures: list[Path], root: Path, folders: tuple[str, ...] | None) -> list[Path]:
    """Return the pictures of the folders that are asked for, all where none is."""
    there = sorted({path.relative_to(root).parts[0] for path in pictures if path.parent != root})
    for name in folders or ():
        if name not in there:
            raise ValueError(f"clipart: folders holds {name!r}; {', '.join(there)} fit{nearest(name, there)}")
    return [path for path in pictures if folders is None or path.relative_to(root).parts[0] in folders]


def _once(pictures: list[Path]) -> list[Path]:
    """Return pictures without those whose bytes an earlier one has: many lie in several folders."""
    first = {hashlib.sha256(path.read_bytes()).digest(): path for path in reversed(pictures)}
    return sorted(first.values())


def _unpacked(packages: Path | None, scratch: Path) -> Path:
    """Unpack the packages below `scratch`; return the directory of their pictures."""
    if shutil.which("dpkg-deb") is None:
        raise ValueError("clipart: dpkg-deb is not on the PATH; a Debian or Ubuntu machine fits")
    if packages is None:
        packages = scratch / "packages"
        packages.mkdir()
        _download(packages)
    for name in PACKAGES:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            raise ValueError(f"clipart: packages is {str(packages)!r}, which holds no {name}_*.deb; "
                             f"`apt-get download {' '.join(PACKAGES)}` writes both")
        _run(["dpkg-deb", "-x", str(found[-1]), str(scratch / "tree")], scratch, f"{found[-1]} cannot be unpacked")
    return scratch / "tree" / "usr" / "share" / "openclipart"


def _download(folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise ValueError("clipart: apt-get is not on the PATH; a Debian or Ubuntu machine fits, or --packages DIR with "
                         f"the .deb files of {' and '.join(PACKAGES)}, which packages.debian.org has")
    print(f"fetching {' and '.join(PACKAGES)} (156 MB) ...", flush=True)
    _run(["apt-get", "download", *PACKAGES], folder, "apt cannot fetch the packages; `apt-get update` first, on a "
         "machine that reaches a mirror of Debian or Ubuntu")


def _run(command: list[str], folder: Path, problem: str) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"clipart: {problem} ({' '.join(run.stderr.split())[-300:]})")


def _write_pictures(pictures: list[Path], tree: Path, out: Path, options: ClipArt) -> tuple[list[dict], list[str]]:
    """Write all pictures; return a row of the metadata for each, and the names of those that cannot be read."""
    def write(path: Path) -> dict | str:
        name = path.relative_to(tree / "png")
        try:
            picture = open_picture(path)
        except ValueError:
            return str(name)
        if picture.mode == "RGBA":
            picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        picture.thumbnail((options.size, options.size), Picture.Resampling.LANCZOS)
        if options.square:
            picture = ImageOps.pad(picture, (options.size, options.size), color="white")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(out / name)
        title, words = describe(tree / "svg" / name.with_suffix(".svg"), name)
        captions = [title, f"{title}: {', '.join(words)}"] if words else [title]
        return {"file_name": name.as_posix(), "captions": captions}

    with ThreadPoolExecutor() as threads:
        found = list(tqdm(threads.map(write, pictures), desc="clipart", total=len(pictures), unit="picture"))
    return _tell_apart([row for row in found if isinstance(row, dict)]), [row for row in found if isinstance(row, str)]


def _tell_apart(rows: list[dict]) -> list[dict]:
    """Put its file's name in front of a title that many pictures share, such as that of a set of icons."""
    shared = Counter(row["captions"][0] for row in rows)
    for row in rows:
        title = row["captions"][0]
        own = _plain(re.sub(r"[\s\d_]+$", "", Path(row["file_name"]).stem))
        if shared[title] > SHARED and own and own.lower() != title.lower():
            row["captions"] = [f"{own}, {caption}" for caption in row["captions"]]
    return rows


def describe(drawing: Path, name: Path) -> tuple[str, list[str]]:
    """Return a picture's title and keywords, from its SVG's metadata; without a title, from its file's name."""
    title, words = "", []
    try:
        work = ElementTree.parse(drawing).getroot()
        people = {title for one in work.iter() if one.tag.endswith("}Agent") for title in one}
        title = next((_plain(one.text) for one in work.iter(TITLE) if one not in people and _plain(one.text)), "")
        words = [_plain(item.text) for subject in work.iter(SUBJECT) for item in subject.iter(ITEM)]
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        pass  # no SVG, or one that is no XML: the file's name has to do
    title = re.sub(r"^clipart by [^-]+ - ", "", title, flags=re.IGNORECASE)
    if len(title) < 2 or title.lower() in NO_WORDS:
        title = re.sub(r"[\s\d]+$", "", _plain(name.stem.removesuffix(".svg"))) or name.parent.name
    words = dict.fromkeys(word.lower() for word in words)
    left_out = {*NO_WORDS, title.lower()}
    return title, [word for word in words
                   if 1 < len(word) < 40 and word not in left_out and not re.match(r"hash\(|0x", word)]


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("_", " ").split())


def main() -> None:
    """Entry point of `python -m transfusion.recipes.clipart`."""
    with plain_errors():
        fetch(tyro.cli(ClipArt, prog="python -m transfusion.recipes.clipart"))


if __name__ == "__main__":
    main()
