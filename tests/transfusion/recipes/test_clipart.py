"""Open Clip Art from Debian's packages: pictures, captions, and errors where they cannot be had."""
import json
import shutil
import subprocess

import pytest
from PIL import Image as Picture

from transfusion.data.mixture import read_mixture
from transfusion.recipes import clipart
from transfusion.recipes.clipart import ClipArt, describe, fetch

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><dc:title>{title}</dc:title>
<dc:creator><cc:Agent xmlns:cc="http://web.resource.org/cc/"><dc:title>A. Painter</dc:title></cc:Agent></dc:creator>
<dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject></rdf:RDF></metadata></svg>"""


def drawing(path, title, *words):
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in words)
    path.write_text(SVG.format(title=title, words=items))


def package(folder, name, fill):
    """Build a .deb of what `fill` writes below usr/share/openclipart."""
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: a test\n")
    fill(tree / "usr" / "share" / "openclipart")
    command = ["dpkg-deb", "--build", str(tree), str(folder / f"{name}_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are built and unpacked by dpkg-deb")
def test_the_packages_become_a_folder_with_captions_and_a_mixture(tmp_path):
    def pictures(root):
        (root / "png" / "animals").mkdir(parents=True)
        Picture.new("RGBA", (40, 20), (255, 0, 0, 0)).save(root / "png" / "animals" / "cat_01.png")
        Picture.new("RGB", (10, 12), "blue").save(root / "png" / "animals" / "sea_dog.png")
        (root / "png" / "broken.png").write_bytes(b"no picture")

    package(tmp_path, "openclipart-png", pictures)
    package(tmp_path, "openclipart-svg",
            lambda root: drawing(root / "svg" / "animals" / "cat_01.svg", "A cat", "Cat", "animals", "HASH(0x8a1)"))
    out = fetch(ClipArt(tmp_path / "art", size=16, packages=tmp_path))
    rows = [json.loads(line) for line in (out / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": "animals/cat_01.png", "captions": ["A cat", "A cat: cat, animals"]},
                    {"file_name": "animals/sea_dog.png", "captions": ["sea dog"]}]
    with Picture.open(out / "pictures" / "animals" / "cat_01.png") as cat:
        assert cat.size == (16, 8) and cat.getpixel((3, 3)) == (255, 255, 255)
    source = read_mixture(out / "mix.yaml").sources[0].source.open()
    assert [source[i].captions[0] for i in range(len(source))] == ["A cat", "sea dog"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are built and unpacked by dpkg-deb")
def test_a_picture_that_lies_in_two_folders_counts_once_and_folders_can_be_chosen(tmp_path):
    def pictures(root):
        for folder, color in (("animals", "red"), ("animals/birds", "red"), ("animals/birds", "blue"), ("food", "red")):
            (root / "png" / folder).mkdir(parents=True, exist_ok=True)
            Picture.new("RGB", (6, 3), color).save(root / "png" / folder / f"{color}.png")

    package(tmp_path, "openclipart-png", pictures)
    package(tmp_path, "openclipart-svg", lambda root: drawing(root / "svg" / "food" / "red.svg", "Berry"))
    names = {}
    for folders in (None, ("food",)):
        out = fetch(ClipArt(tmp_path / f"art-{folders}", packages=tmp_path, folders=folders))
        rows = [json.loads(line) for line in (out / "pictures" / "metadata.jsonl").read_text().splitlines()]
        names[folders] = [row["file_name"] for row in rows]
    assert names == {None: ["animals/birds/blue.png", "animals/birds/red.png"], ("food",): ["food/red.png"]}
    with Picture.open(fetch(ClipArt(tmp_path / "square", size=12, packages=tmp_path, square=True))
                      / "pictures" / "animals" / "birds" / "blue.png") as blue:
        assert blue.size == (12, 12)
        assert [blue.getpixel((6, y)) for y in (0, 6, 11)] == [(255, 255, 255), (0, 0, 255), (255, 255, 255)]
    with pytest.raises(ValueError, match="folders holds 'foods'; animals, food fit; did you mean food"):
        fetch(ClipArt(tmp_path / "other", packages=tmp_path, folders=("foods",)))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("title, words, expected", [
    ("Clipart by Ann Author - red_jigsaw", ["", "jigsaw", "unsorted"], ("red jigsaw", ["jigsaw"])),
    ("", ["boat"], ("little boat", ["boat"])),
    ("hash", [], ("little boat", [])),
    ("Bell &amp; book", ["Bell", "bell"], ("Bell & book", ["bell"])),
])
def test_titles_and_keywords_are_read_from_the_drawing(tmp_path, title, words, expected):
    drawing(tmp_path / "x.svg", title, *words)
    assert describe(tmp_path / "x.svg", tmp_path / "little_boat_01.png") == expected


def test_a_drawing_that_is_no_xml_leaves_the_file_s_name(tmp_path):
    (tmp_path / "x.svg").write_text("<svg><broken")
    assert describe(tmp_path / "x.svg", tmp_path / "toys" / "12.png") == ("toys", [])


def test_a_title_of_a_whole_set_is_told_apart_by_the_file_s_name():
    names = "open", "close_01", "save", "7"
    rows = [{"file_name": f"icons/{name}.png", "captions": ["Lemon theme"]} for name in names]
    assert [row["captions"] for row in clipart._tell_apart(rows)] == [
        ["open, Lemon theme"], ["close, Lemon theme"], ["save, Lemon theme"], ["Lemon theme"]]


def test_a_machine_without_apt_is_told_what_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(clipart.shutil, "which", lambda name: None if name == "apt-get" else f"/usr/bin/{name}")
    with pytest.raises(ValueError, match="apt-get is not on the PATH; a Debian or Ubuntu machine fits, or --packages"):
        fetch(ClipArt(tmp_path / "art"))
    monkeypatch.setattr(clipart.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="dpkg-deb is not on the PATH"):
        fetch(ClipArt(tmp_path / "art"))


def test_an_apt_that_fails_is_quoted_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(clipart.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(clipart.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 100, "", "E: Unable to locate package"))
    with pytest.raises(ValueError, match="`apt-get update` first.*Unable to locate package"):
        fetch(ClipArt(tmp_path / "art"))
    assert not (tmp_path / "art").exists()


def test_a_folder_without_the_packages_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(clipart.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ValueError, match="packages is .* which holds no openclipart-png"):
        fetch(ClipArt(tmp_path / "art", packages=tmp_path))
