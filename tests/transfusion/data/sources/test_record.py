"""Pictures as pieces of files, and errors that travel between processes."""
import pickle

import pytest
from PIL import Image as Picture

from tests.transfusion.data.sources.conftest import png
from transfusion.data.sources import DataError, PictureFile, PictureRef, Record, Turn


def test_a_piece_of_a_file_is_read_like_a_file_of_its_own(tmp_path):
    inner, path = png(7), tmp_path / "pack"
    path.write_bytes(b"before" + inner + b"behind")
    piece = PictureFile(str(path), 6, len(inner))
    assert piece.read() == inner
    with piece.open() as file, Picture.open(file) as picture:
        assert picture.size == (3, 2) and picture.convert("RGB").getpixel((0, 0)) == (7, 10, 200)
    with piece.open() as file:
        assert file.seek(-4, 2) == len(inner) - 4 and file.read() == inner[-4:]
        assert file.seek(2) == 2 and file.read(3) == inner[2:5] and file.tell() == 5
        assert file.read() == inner[5:] and file.read() == b""
    assert PictureFile(str(path), 6).read() == inner + b"behind"


def test_pictures_that_are_missing_or_empty_or_cut_off_are_errors_with_file_and_row(tmp_path):
    missing = PictureFile(str(tmp_path / "no.png"), name="mix.json, row 3")
    with pytest.raises(DataError, match="mix.json, row 3: the picture '.*no.png' cannot be opened") as error:
        missing.read()
    assert error.value.kind == "missing picture"
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="has 0 bytes; 1 or more fit"):
        PictureFile(str(tmp_path / "empty.png")).read()
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(DataError, match="has 2 bytes; 9 or more fit"):
        PictureFile(str(tmp_path / "short"), 2, 9).read()


def test_errors_of_data_survive_pickling():
    error = pickle.loads(pickle.dumps(DataError("a.json, row 2", "is no JSON", "bad json")))
    assert (str(error), error.where, error.reason, error.kind) == (
        "a.json, row 2: is no JSON",
        "a.json, row 2",
        "is no JSON",
        "bad json",
    )


def test_a_record_lists_its_pictures_in_order():
    one, two, three = (PictureRef(bytes([i]), loss=False) for i in range(3))
    record = Record("r", turns=(Turn("user", (one, "a", two)), Turn("assistant", ("b", three))))
    assert list(record.pictures()) == [one, two, three]
    assert list(Record("r", parts=(two,)).pictures()) == list(Record("r", picture=two).pictures()) == [two]
    assert [turn.text for turn in record.turns] == ["<image>a<image>", "b<image>"]
