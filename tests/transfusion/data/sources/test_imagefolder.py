"""Folders of pictures with metadata, texts beside the files, or labels for folders."""
import csv
from pathlib import Path

import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from transfusion.data.sources import DataError, ImageFolderSettings


def put(folder, **files):
    for name, red in files.items():
        path = folder / name.replace("__", "/").replace("_png", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(red))


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, a_png=1, b_png=2, train__c_png=3)
    return tmp_path


def test_metadata_in_json_lines_names_pictures_and_any_number_of_captions(folder):
    write_json_lines(
        folder / "metadata.jsonl",
        [
            {"file_name": "a.png", "text": "die 猫"},
            {"file_name": "train/c.png", "caption": ["one", "two", "one", ""], "text": "zero", "n": 3},
        ],
    )
    one, two = check_source(ImageFolderSettings(folder).open(), 2)
    assert (one.captions, one.picture.name, one.picture.read()) == (("die 猫",), "a.png", png(1)) and one.picture.loss
    assert two.captions == ("zero", "one", "two") and two.picture.read() == png(3)


def test_metadata_in_csv_and_in_the_folders_of_the_pictures(folder):
    for place, rows in ((folder, [["a.png", "x, y"], ["b.png", "two\nlines"]]), (folder / "train", [["c.png", "z"]])):
        with open(place / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "prompt"], *rows])
    records = check_source(ImageFolderSettings(folder, columns=("prompt",), drawn=False).open(), 3)
    assert [record.captions[0] for record in records] == ["x, y", "two\nlines", "z"]
    assert [record.picture.read() for record in records] == [png(1), png(2), png(3)]
    assert not any(record.picture.loss for record in records)


def test_a_text_beside_each_picture(folder):
    for name in ("a", "b", "train/c"):
        (folder / f"{name}.txt").write_text(f" eine 猫 in {name}\n", encoding="utf-8")
    source = ImageFolderSettings(folder).open()
    records = check_source(source, 3)
    assert [(record.picture.name, record.captions) for record in records] == [
        (f"{name}.png", (f"eine 猫 in {name}",)) for name in ("a", "b", "train/c")]
    first = source.fingerprint()
    (folder / "a.txt").write_text("another")
    assert ImageFolderSettings(folder).open().fingerprint() != first


def test_texts_that_are_missing_empty_or_no_utf8_are_errors_of_their_picture(folder, fails):
    (folder / "a.txt").write_text(" \n")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    source = ImageFolderSettings(folder).open()
    fails(source, 0, ["a.png: its caption 'a.txt' is empty"], "missing caption")
    fails(source, 1, ["b.txt: is not UTF-8: byte 3 is 0xe9"], "bad encoding")
    fails(source, 2, ["train/c.png: its caption 'c.txt' cannot be read (No such file"], "missing caption")


def test_a_text_is_no_picture_however_its_suffix_is_written(tmp_path):
    put(tmp_path, a_png=1)
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "READ ME.TXT").write_text("of these pictures")
    assert check_source(ImageFolderSettings(tmp_path).open(), 1)[0].captions == ("a dog",)


def test_names_of_folders_are_labels_and_a_template_makes_captions_of_them(tmp_path):
    put(tmp_path, tabby_cat__1_png=1, tabby_cat__2_png=2, animals__dog__1_png=3)
    records = check_source(ImageFolderSettings(tmp_path, template="a photo of a {label}").open(), 3)
    assert [record.captions[0] for record in records] == ["a photo of a dog"] + ["a photo of a tabby cat"] * 2
    assert check_source(ImageFolderSettings(tmp_path).open(), 3)[0].captions == ("dog",)


def test_a_picture_beside_the_folders_that_are_labels_is_counted_as_one_without_a_caption(tmp_path):
    put(tmp_path, cat__1_png=1, lost_png=2)
    source = ImageFolderSettings(tmp_path).open()
    assert len(source) == 2 and source[0].captions == ("cat",)
    with pytest.raises(DataError, match="it lies in no folder that is a label; move it into one") as error:
        source[1]
    assert error.value.kind == "missing caption"


@pytest.mark.parametrize(
    "row, words, kind",
    [
        ({"file_name": "a.png", "text": 3}, "the caption in column 'text' is int 3; text fits", "no text"),
        ({"file_name": "a.png", "text": ["x", None]}, "the caption in column 'text' is NoneType None", "no text"),
        ({"file_name": "a.png", "text": " "}, "column 'text' holds no caption", "missing caption"),
        (
            {"file_name": "a.png", "texts": "x"},
            "there is no column 'text' or 'caption' or 'captions' or 'prompt' for the caption; the row has "
            "'file_name', 'texts'; did you mean texts?",
            "missing column",
        ),
        (
            {"filename": "a.png", "text": "x"},
            "there is no column 'file_name' or 'image' or 'file' or 'path' for the picture",
            "missing column",
        ),
        ({"file_name": ["a.png"], "text": "x"}, "a picture's name is list ['a.png']; text fits", "no text"),
    ],
)
def test_a_row_of_metadata_that_does_not_fit_is_an_error_with_its_line(folder, fails, row, words, kind):
    write_json_lines(folder / "metadata.jsonl", [{"file_name": "b.png", "text": "b"}, row])
    source = ImageFolderSettings(folder).open()
    fails(source, 1, [words, "metadata.jsonl, line 2"], kind)
    assert source[0].captions == ("b",)


def test_folders_without_pictures_or_captions_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    put(tmp_path / "bare", a_png=1)
    for path, words in ((tmp_path / "no", "which is no folder"), (tmp_path / "empty", "in which no picture lies"),
                        (tmp_path / "bare", "whose 1 pictures have no captions; metadata.jsonl")):
        with pytest.raises(ValueError, match=words):
            ImageFolderSettings(path).open()
    with pytest.raises(ValueError, match="template is 'cat'; text with {label} in it fits"):
        ImageFolderSettings(folder, template="cat").open()
    with pytest.raises(ValueError, match="captions is 'metadata', and in .* lies no metadata.jsonl or metadata.csv"):
        ImageFolderSettings(folder, captions="metadata").open()
    with pytest.raises(ValueError, match="captions is 'text'; one of .* fits; did you mean 'txt'"):
        ImageFolderSettings(Path("."), captions="text").open()


def test_new_pictures_are_found_when_the_folder_is_opened_again(tmp_path):
    put(tmp_path, cat__1_png=1)
    assert len(ImageFolderSettings(tmp_path).open()) == 1
    put(tmp_path, cat__0_png=2)
    assert [record.picture.read() for record in check_source(ImageFolderSettings(tmp_path).open(), 2)] == [
        png(2),
        png(1),
    ]
