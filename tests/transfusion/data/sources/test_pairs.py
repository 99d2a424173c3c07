"""Pictures and captions in the columns of parquet, JSON lines and CSV."""
import json

import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from tests.transfusion.data.sources.test_tables import write_parquet
from transfusion.data.sources import PairsSettings

ROWS = [
    {"image": {"bytes": png(i), "path": f"{i}.png"}, "caption": f"猫 {i}", "captions": ["x", f"y {i}"]}
    for i in range(9)
]


@pytest.fixture(autouse=True)
def pyarrow():
    return pytest.importorskip("pyarrow", reason="parquet files need the extra [data]")


def test_parquet_holds_bytes_and_captions_in_several_columns(tmp_path):
    records = check_source(PairsSettings(write_parquet(tmp_path / "a.parquet", ROWS)).open(), 9)
    assert [record.captions for record in records] == [(f"猫 {i}", "x", f"y {i}") for i in range(9)]
    assert [record.picture.read() for record in records] == [png(i) for i in range(9)]
    assert [
        record.captions
        for record in map(PairsSettings(tmp_path, columns=("caption",), drawn=False).open().__getitem__, range(2))
    ] == [("猫 0",), ("猫 1",)]


def test_pictures_may_be_plain_bytes_or_names(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    for name, image in (("bytes", png(1)), ("name", "1.png"), ("struct", {"bytes": None, "path": "1.png"})):
        path = write_parquet(tmp_path / f"{name}.parquet", [{"jpg": image, "text": "one"}])
        record, = check_source(PairsSettings(path, tmp_path / "images").open(), 1)
        assert record.picture.read() == png(1) and record.picture.loss


def test_json_lines_lists_and_csv_of_image_and_caption_are_read_alike(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    write_json_lines(tmp_path / "a.jsonl", [{"image": "1.png", "caption": "one"}])
    (tmp_path / "a.json").write_text(json.dumps([{"image": "1.png", "caption": "one"}]))
    (tmp_path / "a.csv").write_text("image,caption\n1.png,one\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        record, = check_source(PairsSettings(tmp_path / name).open(), 1)
        assert record.captions == ("one",) and record.picture.read() == png(1) and record.picture.name == "1.png"


@pytest.mark.parametrize("row, words, kind", [
    ({"picture_": b"x", "caption": "x"}, "there is no column 'image' or 'jpg'", "missing column"),
    ({"image": b"x", "captoin": "x"}, "did you mean captoin?", "missing column"),
    ({"image": b"x", "caption": 4}, "the caption in column 'caption' is int 4; text fits", "no text"),
    ({"image": {"bytes": None, "path": None}, "caption": "x"}, "a picture is NoneType None", "no picture"),
    ({"image": b"", "caption": "x"}, "a picture is bytes b''", "no picture"),
])
def test_a_row_that_does_not_fit_is_an_error_with_its_place(tmp_path, fails, row, words, kind):
    fails(PairsSettings(write_parquet(tmp_path / "a.parquet", [row])).open(), 0, [words, "a.parquet, row 0"], kind)
