"""Plain text: a column of a table, or files, paragraphs and lines."""
import pytest

from tests.transfusion.data.sources.conftest import check_source, write_json_lines
from transfusion.data.sources import DataError, TextSettings
from transfusion.sequence import Text


def texts(source, count):
    return [record.parts[0].text for record in check_source(source, count)]


def test_a_column_of_json_lines(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "die 猫 "}, {"content": "two", "id": 3}])
    assert texts(TextSettings(path).open(), 2) == ["die 猫", "two"]
    assert TextSettings(path, loss=False).open()[1].parts == (Text("two", loss=False),)


def test_files_paragraphs_and_lines_of_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffeins\nzwei\n\n\ndrei 猫\n", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("vier")
    assert texts(TextSettings(tmp_path).open(), 2) == ["eins\nzwei\n\n\ndrei 猫", "vier"]
    assert texts(TextSettings(tmp_path / "a.txt").open(), 1) == ["eins\nzwei\n\n\ndrei 猫"]
    assert texts(TextSettings(tmp_path, documents="paragraph").open(), 3) == ["eins\nzwei", "drei 猫", "vier"]
    assert texts(TextSettings(tmp_path, documents="line").open(), 4) == ["eins", "zwei", "drei 猫", "vier"]
    assert TextSettings(tmp_path, documents="line").open()[2].where.endswith("a.txt, line 5")
    assert texts(TextSettings(tmp_path / "*.txt").open(), 1) == ["eins\nzwei\n\n\ndrei 猫"]
    assert texts(TextSettings(tmp_path / "**" / "*.txt").open(), 2) == ["eins\nzwei\n\n\ndrei 猫", "vier"]


def test_a_readme_beside_tables_is_no_document_and_texts_beside_tables_are_refused(tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    assert texts(TextSettings(tmp_path).open(), 1) == ["about the data"]
    write_json_lines(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert texts(TextSettings(tmp_path).open(), 2) == ["one", "two"]
    (tmp_path / "a.txt").write_text("three")
    with pytest.raises(ValueError, match="holds texts .README.md. and tables .train.jsonl.; documents 'file'"):
        TextSettings(tmp_path).open()
    assert texts(TextSettings(tmp_path, documents="file").open(), 2) == ["about the data", "three"]


@pytest.mark.parametrize(
    "row, words, kind",
    [
        ({"text": 3}, "the text is int 3; text fits", "no text"),
        ({"text": " "}, "the text is empty", "empty text"),
        (
            {"txt": "a"},
            "no column 'text' or 'content' for the text; the row has 'txt'; did you mean txt?",
            "missing column",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_with_its_line(tmp_path, fails, row, words, kind):
    fails(
        TextSettings(write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}, row])).open(),
        1,
        [words, "a.jsonl, line 2"],
        kind,
    )


def test_files_that_are_no_utf8_gone_or_empty_are_named(tmp_path, fails):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").touch()
    source = TextSettings(tmp_path).open()
    fails(source, 0, "a.txt: is not UTF-8: byte 3 is 0xe9", "bad encoding")
    fails(source, 1, "b.txt: the text is empty", "empty text")
    (tmp_path / "a.txt").unlink()
    fails(source, 0, "a.txt: cannot be read (No such file", "missing file")
    with pytest.raises(DataError, match="b.txt: the file is empty"):
        TextSettings(tmp_path / "b.txt", documents="line").open()
    with pytest.raises(ValueError, match="text: path is .*, where no file is"):
        TextSettings(tmp_path / "c.txt").open()


def test_fingerprints_follow_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for documents in ("file", "line"):
        first = TextSettings(tmp_path, documents=documents).open().fingerprint()
        assert TextSettings(tmp_path, documents=documents).open().fingerprint() == first
        (tmp_path / "a.txt").write_text("three" if documents == "file" else "fourfold")
        assert TextSettings(tmp_path, documents=documents).open().fingerprint() != first
