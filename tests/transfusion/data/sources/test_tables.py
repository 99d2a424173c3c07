"""Rows by number out of JSON, CSV, parquet and `datasets` directories, equal to what other readers find."""
import csv
import json
import pickle
import sys

import pytest

from tests.transfusion.data.sources.conftest import write_json_lines
from transfusion.data.sources import DataError, arrow
from transfusion.data.sources.tables import JsonList, Lines, matching, open_table

ROWS = [{"n": i, "text": f"übung {i}", "list": ["猫", i], "none": None} for i in range(25)]


def all_rows(table, columns=None):
    return [table.row(number, columns) for number in range(len(table))]


def test_json_lists_and_lines_are_told_apart_by_their_first_byte(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    write_json_lines(tmp_path / "lines.json", ROWS)
    for name, kind in (("list.jsonl", JsonList), ("lines.json", Lines)):
        table = open_table("op", tmp_path / name)
        assert type(table) is kind and all_rows(table) == ROWS
    assert open_table("op", tmp_path / "list.jsonl").where(17).endswith("list.jsonl, row 17")
    assert open_table("op", tmp_path / "lines.json").where(17).endswith("lines.json, line 18")


def test_several_files_are_one_table_in_the_order_of_their_names(tmp_path):
    for part in range(3):
        write_json_lines(tmp_path / f"part-{part}.jsonl", ROWS[part * 8:part * 8 + 8])
    for path in (tmp_path, tmp_path / "part-*.jsonl", tmp_path / "part-{0..2}.jsonl", tmp_path / "part-{0,1,2}.jsonl"):
        table = open_table("op", path)
        assert all_rows(table) == ROWS[:24] and table.where(9).endswith("part-1.jsonl, line 2")
    (tmp_path / "part-3.jsonl").write_text("[{}]")
    with pytest.raises(DataError, match="one is a JSON list and one JSON lines"):
        open_table("op", tmp_path)


def test_csv_rows_are_those_of_the_csv_module(tmp_path):
    rows = [["name", "text"], ["a", 'two\nlines, "quoted"'], ["b", ""], ["ü", "x"]]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    table = open_table("op", tmp_path / "t.csv")
    assert all_rows(table) == [
        {"name": "a", "text": 'two\nlines, "quoted"'},
        {"name": "b", "text": None},
        {"name": "ü", "text": "x"},
    ]
    assert table.where(1).endswith("t.csv, line 4")
    (tmp_path / "t.tsv").write_text("name\ttext\na\tb, c\n")
    (tmp_path / "T.TSV").write_text("name\ttext\na\tb, c\n")
    for name in ("t.tsv", "T.TSV"):
        assert all_rows(open_table("op", tmp_path / name)) == [{"name": "a", "text": "b, c"}]
    (tmp_path / "t.csv").write_text("name,text\n")
    with pytest.raises(DataError, match="t.csv: there is no record; at least one fits"):
        open_table("op", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("name,text\na,b,c\n")
    with pytest.raises(DataError, match="t.csv, line 2: the row has 3 columns and the header 2"):
        open_table("op", tmp_path / "t.csv").row(0)


@pytest.mark.parametrize("begin", ["", "\ufeff"])
@pytest.mark.parametrize("name, between", [("t.csv", ","), ("t.tsv", "\t")])
def test_a_quote_inside_a_field_is_a_character_and_costs_no_row(tmp_path, begin, name, between):
    lines = ['"name"|text', 'a|a 5" nail', "b|a cat", 'c|3" x 4"', 'd|"two\nlines, 3"" wide"', 'e|"so" it is said',
             "", 'f|"a ""word"""', 'g|6" \u00fc']
    path = tmp_path / name
    path.write_text(begin + "\r\n".join(lines).replace("|", between), encoding="utf-8", newline="")
    table = open_table("op", path)
    texts = ['a 5" nail', "a cat", '3" x 4"', 'two\nlines, 3" wide', None, 'a "word"', '6" \u00fc']
    assert len(table) == len(texts)
    assert [table.row(i)["text"] for i in range(len(texts)) if texts[i]] == list(filter(None, texts))
    assert [table.where(i).rpartition(" ")[2] for i in (0, 3, 6)] == ["2", "5", "10"]
    with pytest.raises(DataError, match="line 7: is no row of CSV"):
        table.row(4)


def test_a_csv_file_of_blank_lines_takes_no_row_from_the_others(tmp_path):
    (tmp_path / "a.csv").write_text("\n\n")
    (tmp_path / "b.csv").write_text("name\nx\ny\n")
    assert all_rows(open_table("op", tmp_path)) == [{"name": "x"}, {"name": "y"}]


@pytest.mark.parametrize("data, words, kind", [
    (b'{"a": 1', "is no JSON", "bad json"),
    (b"[1, 2]", "is a list in JSON; an object {...} fits", "bad json"),
    (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff", "bad encoding"),
    (b'{"a":' * 3000, "is no JSON", "bad json"),
    (b'{"a": ' + b"1" * 5000 + b"}", "is no JSON", "bad json"),
])
def test_a_broken_line_costs_that_line_alone(tmp_path, data, words, kind):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + data + b'\n{"a": 2}\n')
    table = open_table("op", path)
    assert len(table) == 3 and table.row(0) == {"a": 0} and table.row(2) == {"a": 2}
    with pytest.raises(DataError) as error:
        table.row(1)
    assert str(error.value).startswith(f"{path}, line 2: ") and words in str(error.value) and error.value.kind == kind


def test_a_file_that_is_emptied_deleted_or_changed_is_named(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", ROWS)
    table = open_table("op", path)
    write_json_lines(path, ROWS[1:])
    with pytest.raises(DataError, match="changed since it was opened; open the source again"):
        table.row(0)
    path.unlink()
    with pytest.raises(DataError, match="rows.jsonl: cannot be read any more"):
        table.row(0)
    path.touch()
    with pytest.raises(DataError, match="the file is empty"):
        open_table("op", path)
    path.write_text("  \n \n")
    with pytest.raises(DataError, match="begins with b''"):
        open_table("op", path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="begins with b'a'; a JSON list of objects, or one object a line, fits"):
        open_table("op", path)


def test_paths_that_name_no_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.json", tmp_path / "*.json"):
        with pytest.raises(ValueError, match="op: path is .*, where no file is; .json"):
            matching("op", path, (".json",))
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="where files of several kinds are; those of one kind fit"):
        open_table("op", tmp_path)


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow", reason="parquet and Arrow files need the extra [data]")


def write_parquet(path, rows, group=4):
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


PLAIN = [{"n": i, "text": f"übung {i}", "image": {"bytes": bytes([i]) * 5, "path": None}} for i in range(25)]


def test_parquet_rows_are_read_by_row_group_and_column(tmp_path, pyarrow, monkeypatch):
    import pyarrow.parquet
    for part in range(2):
        write_parquet(tmp_path / f"{part}.parquet", PLAIN[part * 13:part * 13 + 13])
    table = open_table("op", tmp_path)
    asked = []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, columns, **options: asked.append((group, columns)) or read(self, group, columns, **options),
    )
    assert all_rows(table) == PLAIN
    assert [group for group, _ in asked] == [0, 1, 2, 3, 0, 1, 2]
    assert table.row(14, frozenset(("text", "caption"))) == {"text": "übung 14"}
    assert asked[-1] == (0, ["text"]) and table.where(14).endswith("1.parquet, row 1")
    monkeypatch.setattr(arrow, "KEPT", 1)
    fresh = open_table("op", tmp_path)
    assert all_rows(fresh) == PLAIN and len(fresh._opened) == 1
    assert all_rows(pickle.loads(pickle.dumps(fresh))) == PLAIN


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_directories_of_save_to_disk_are_read_through_their_state(tmp_path, pyarrow, kind):
    import pyarrow.ipc
    new = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[kind]
    (tmp_path / "data" / "train").mkdir(parents=True)
    names = [f"data-{part:05d}-of-00002.arrow" for part in range(2)]
    for part, name in enumerate(names):
        batches = pyarrow.Table.from_pylist(PLAIN[part * 13:part * 13 + 13])
        with new(str(tmp_path / "data" / "train" / name), batches.schema) as writer:
            writer.write_table(batches, max_chunksize=3)
    (tmp_path / "data" / "train" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for path in (tmp_path / "data", tmp_path / "data" / "train"):
        table = open_table("op", path)
        assert all_rows(table) == PLAIN and table.row(3, frozenset(("n",))) == {"n": 3}
        assert all_rows(pickle.loads(pickle.dumps(table))) == PLAIN
    with pytest.raises(
        ValueError, match="split is 'tain', and .* has 'train', 'test'; one of these fits; did you mean train"
    ):
        open_table("op", tmp_path / "data", "tain")
    (tmp_path / "data" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json: has no list '_data_files'"):
        open_table("op", tmp_path / "data")


def test_files_named_after_splits_do_not_leak_into_training(tmp_path, pyarrow):
    for split, rows in (("train", PLAIN[:9]), ("test", PLAIN[9:])):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
    assert all_rows(open_table("op", tmp_path)) == PLAIN[:9]
    assert all_rows(open_table("op", tmp_path, "test")) == PLAIN[9:]
    with pytest.raises(ValueError, match="split is 'dev', and .* has 'test', 'train'"):
        open_table("op", tmp_path, "dev")


def test_a_file_s_own_name_counts_before_its_folder_s(tmp_path, pyarrow):
    names = ["train/dev-0.parquet", "train/part-0.parquet", "test/part-0.parquet"]
    for name, row in zip(names, PLAIN):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, [row])
    for split, rows in (("train", PLAIN[1:2]), ("dev", PLAIN[:1]), ("test", PLAIN[2:3])):
        assert all_rows(open_table("op", tmp_path, split)) == rows


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_that_is_not_utf_8_is_named_with_its_row(tmp_path, pyarrow, suffix):
    texts = pyarrow.Array.from_buffers(pyarrow.utf8(), 2, pyarrow.array([b"cat", b"\xff\xfe"]).buffers())
    table = pyarrow.table({"text": texts})
    if suffix == "parquet":
        import pyarrow.parquet
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
    found = open_table("op", tmp_path / f"a.{suffix}")
    assert found.row(0) == {"text": "cat"}
    with pytest.raises(DataError, match=f"a.{suffix}, row 1: is not UTF-8 .*write the file anew") as error:
        found.row(1)
    assert error.value.kind == "bad encoding"


def test_damaged_and_changed_parquet_files_are_named(tmp_path, pyarrow):
    path = write_parquet(tmp_path / "a.parquet", PLAIN)
    table, whole = open_table("op", path), path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="a.parquet: cannot be read .*copy it again"):
        open_table("op", path)
    with pytest.raises(DataError, match="a.parquet: changed since it was opened"):
        table.row(0)
    write_parquet(path, [], 4)
    with pytest.raises(DataError, match="the table has no row"):
        open_table("op", path)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"need pyarrow, which is not installed .*\[data\]"):
        open_table("op", tmp_path / "a.parquet")
