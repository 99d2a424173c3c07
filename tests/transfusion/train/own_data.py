"""Pictures with captions in small files, mixtures of them, and tiny runs on them."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw

from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.train.log import CLOCKED
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


def paint(count, side=16):
    """(caption, picture) of circles and squares, wide, square and high in turn."""
    random, painted = np.random.default_rng(0), []
    for i in range(count):
        colour, shape = list(COLOURS)[i % 3], ("circle", "square")[i // 3 % 2]
        width, height = ((side * 3 // 2, side), (side, side), (side, side * 3 // 2))[i % 3]
        picture = Picture.new("RGB", (width, height), "white")
        left, top = (int(x) for x in random.integers(0, side // 3, 2))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)(
            (left, top, left + side // 2, top + side // 2), COLOURS[colour]
        )
        painted.append((f"a {colour} {shape}", picture))
    return painted


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_folder(folder, pairs):
    """Pictures with a .txt beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (caption, picture) in enumerate(pairs):
        (folder / f"{i:03}.png").write_bytes(png(picture))
        (folder / f"{i:03}.txt").write_text(caption)


def write_metadata(folder, pairs):
    """Hugging Face's imagefolder."""
    folder.mkdir(parents=True)
    for i, (_, picture) in enumerate(pairs):
        (folder / f"{i:03}.png").write_bytes(png(picture))
    rows = [{"file_name": f"{i:03}.png", "text": caption} for i, (caption, _) in enumerate(pairs)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tar(path, pairs):
    """webdataset."""
    with tarfile.open(path, "w") as tar:
        for i, (caption, picture) in enumerate(pairs):
            for suffix, data in (("png", png(picture)), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path, pairs):
    """Bytes and captions in columns, as `datasets` writes them."""
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": png(picture), "path": None} for _, picture in pairs]
    table = pyarrow.table({"image": images, "text": [caption for caption, _ in pairs]})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def write_lines(path, pairs):
    """JSON lines of names and captions, the pictures beside them."""
    (path.parent / "beside").mkdir(exist_ok=True)
    with path.open("w") as lines:
        for i, (caption, picture) in enumerate(pairs):
            (path.parent / "beside" / f"{i}.png").write_bytes(png(picture))
            lines.write(json.dumps({"image": f"beside/{i}.png", "caption": caption}) + "\n")


def write_interleaved(path, pairs):
    """JSON lines of documents, captions first, that use the pictures of `write_lines`."""
    parts = [[{"text": caption}, {"image": f"beside/{i}.png"}] for i, (caption, _) in enumerate(pairs)]
    path.write_text("".join(json.dumps({"parts": one}) + "\n" for one in parts))


def write_llava(path, pairs):
    """Conversations about pictures, and every fourth of text alone; the pictures lie in `path`'s folder images/."""
    (path.parent / "images").mkdir(exist_ok=True)
    rows = []
    for i, (caption, picture) in enumerate(pairs):
        asked = {"from": "human", "value": "What comes after one?" if i % 4 == 3 else "<image>\nWhat is this?"}
        answer = {"from": "gpt", "value": "Two." if i % 4 == 3 else caption}
        rows.append({"id": str(i), "conversations": [asked, answer]} | ({} if i % 4 == 3 else {"image": f"{i}.png"}))
        (path.parent / "images" / f"{i}.png").write_bytes(png(picture))
    path.write_text(json.dumps(rows))


def write_mixture(path, *sources, **settings):
    """A mixture's file, as JSON, which YAML reads as well."""
    path.write_text(
        json.dumps({"pictures": {"side": 16}, "held_out": 0.0, **settings, "sources": list(sources)}, indent=1)
    )
    return path


def tiny(out, file, data=None, **changes) -> TrainConfig:
    """A run of a few steps on a mixture."""
    config = TrainConfig(
        out=out,
        data=data or MixtureFileSettings(file=file, workers=0),
        device="cpu",
        model=ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64, patch_size=4, vocabulary=300),
        optim=OptimSettings(steps=6, rows=2, seq_len=96, lr=3e-3, min_lr=1e-4, warmup=2, ema=0.9),
    )
    return dataclasses.replace(config, **changes)


def losses(out: Path) -> list[dict]:
    """The numbers of a run's log that do not depend on the clock."""
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in CLOCKED} for record in records]
