"""Emoji in nine styles: packages become sheets that read back, and who drew a thing decides what is held out."""
import io
import json
import tarfile

import pytest
import torch
from PIL import Image as Picture

from transfusion.recipes import emoji_styles
from transfusion.recipes.emoji_styles import (
    ALL_STYLES,
    FAMILIES,
    PACKAGES,
    SOLID,
    FetchStyles,
    VectorSet,
    fetch_styles,
    held_out,
    read_drawings,
)


def png(color, suffix="PNG"):
    stream = io.BytesIO()
    Picture.new("RGBA", (64, 64), color).save(stream, suffix, **{"lossless": True} if suffix == "WEBP" else {})
    return stream.getvalue()


def package(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def archive(name, _, scratch):
    """A package that has a banana by its name and grapes by an alias, or both by their code points."""
    path = scratch / f"{name.split('/')[1]}.tgz"
    if name == PACKAGES[SOLID].name:
        return package(path, {"assets/1f34c.webp": png("lime", "WEBP"), "assets/1f347.webp": png("navy", "WEBP")})
    icons = {"width": 8, "height": 8, "icons": {"banana": {"body": "yellow"}, "some-grapes": {"body": "purple"}},
             "aliases": {"bunch": {"parent": "some-grapes"}, "lemon": {"parent": "banana", "hFlip": True}}}
    return package(path, {"icons.json": json.dumps(icons).encode(),
                          "chars.json": json.dumps({"1f347": "bunch"}).encode()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_styles, "fetch_package", archive)
        patch.setattr(emoji_styles, "_renderer", lambda: lambda svg_string, **_: png(svg_string.split(">")[1][:-5]))
        patch.setattr(emoji_styles, "DRAWN", ("Food & Drink",))
        return fetch_styles(FetchStyles(out=tmp_path_factory.mktemp("styles") / "out"))


def test_pictures_are_found_by_name_by_alias_and_by_code_point(folder):
    drawings = read_drawings(folder)
    of = {(drawings.names[label], drawings.style_names[style]): picture for label, style, picture in
          zip(drawings.labels, drawings.styles, drawings.pictures)}
    for style in PACKAGES:
        banana, grapes = ((0, 255, 0), (0, 0, 128)) if style == SOLID else ((255, 255, 0), (128, 0, 128))
        for name, color in (("banana", banana), ("grapes", grapes)):
            assert torch.equal(((of[name, style][:, 5, 5] + 1) * 127.5).round(), torch.tensor(color).float())
    assert {name for name, style in of if style in PACKAGES} == {"banana", "grapes"}, "a mirrored alias is another icon"
    assert len({name for name, style in of if style == "noto"}) == len(drawings.names)
    assert "CC BY-SA" in (folder / "LICENCES.txt").read_text()


def test_one_name_in_three_is_held_out_by_one_family_of_styles():
    names = [f"thing {i}" for i in range(300)] + [None]
    has = torch.rand(len(ALL_STYLES), len(names), generator=torch.Generator().manual_seed(0)) < 0.7
    held = held_out(names, has)
    assert not (held & ~has).any() and not held[:, -1].any()
    assert 70 < held.any(0).sum() < 130
    for label in held.any(0).nonzero()[:, 0].tolist():
        families = {FAMILIES[style] for style, one in zip(ALL_STYLES, held[:, label]) if one}
        assert len(families) == 1, "no two hold out the same name"
        left = {FAMILIES[style] for style, there, out in zip(ALL_STYLES, has[:, label], held[:, label])
                if there and not out}
        assert not left & families, "a family that is held out draws the thing nowhere else"


def test_a_directory_without_drawings_and_a_missing_renderer_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no names.json; run"):
        read_drawings(tmp_path)

    def missing(name):
        raise ImportError(name)
    monkeypatch.setattr(emoji_styles.importlib, "import_module", missing)
    with pytest.raises(ValueError, match="pip install resvg-py"):
        VectorSet({}, {})
