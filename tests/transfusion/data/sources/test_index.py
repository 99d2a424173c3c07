"""Indices hold bytes' offsets, follow the data's changes, and never trust what is damaged."""
import json
import os
import pickle
import random

import numpy as np
import pytest

from transfusion.data.sources import DataError, index
from transfusion.data.sources.index import (
    find_csv_rows,
    find_json_objects,
    find_lines,
    find_paragraphs,
    index_names,
    name_at,
    open_index,
    read_piece,
    stamp_of,
)


@pytest.fixture(params=[5, 64, 2**24])
def chunks(request, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", request.param)


def awkward_rows(count, seed=0):
    """Objects whose strings hold brackets, quotes, backslashes and characters of one to four bytes."""
    generator = random.Random(seed)
    signs = ['"', "\\", "{", "}", "[", "]", ",", "\n", "ä", "猫", "🐈", "x", " ", ":"]

    def text():
        return "".join(generator.choices(signs, k=generator.randint(0, 12)))
    return [{"id": i, text(): [text(), {"deep": [text(), {}]}, []], "s": text()} for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (",", ":")}])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b" \n\t"])
def test_objects_of_a_json_list_are_found_by_bytes(tmp_path, chunks, options, begin):
    rows, path = awkward_rows(60), tmp_path / "rows.json"
    path.write_bytes(begin + json.dumps(rows, **options).encode() + b" \n")
    data, (table, _) = path.read_bytes(), find_json_objects(path)
    assert [json.loads(data[start:stop]) for start, stop in table] == rows


@pytest.mark.parametrize("text, words", [
    ('[{"a": 1}, {"b": 2}', "row 2: the list does not end: the file stops at byte 19"),
    ('[{"a": 1}, {"b": "x', "row 1: the list does not end: the file stops at byte 19 inside a string"),
    ('[{"a": 1}, {"b": [', "row 1: the list does not end"),
    ('[{"a": 1} {"b": 2}]', "row 1: b' {' stands at byte 9; objects"),
    ('[{"a": 1},, {"b": 2}]', "row 1: b',, {' stands at byte 9"),
    ('[{"a": 1},]', "row 1: b',]' stands at byte 9"),
    ('[3, {"a": 1}]', "row 0: b'3, {' stands at byte 1"),
    ('[{"a": 1}, [2]]', "row 1: b', [' stands at byte 9"),
    ('[{"a": 1}] {"b": 2}', "byte 10: b'{\"b\": 2}' stands behind the end of the list"),
    ("[]", "the list holds no object"),
    ("[1, 2]", "the list holds no object"),
])
def test_a_list_of_something_else_or_cut_off_is_named_with_row_and_byte(tmp_path, text, words):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        find_json_objects(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_cutting_a_list_anywhere_is_noticed(tmp_path):
    path = tmp_path / "rows.json"
    whole = json.dumps(awkward_rows(4), ensure_ascii=False).encode()
    for stop in range(1, len(whole)):
        path.write_bytes(whole[:stop])
        with pytest.raises(DataError):
            find_json_objects(path)


def test_lines_are_found_with_their_numbers_and_without_blank_ones(tmp_path, chunks):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{1}\r\n\n  \n{22}\n\t\r\n{333}")
    data, (table, _) = path.read_bytes(), find_lines(path)
    assert [(data[a:b].strip(), line) for a, b, line in table] == [(b"{1}", 1), (b"{22}", 4), (b"{333}", 6)]


def test_only_so_many_indices_are_mapped_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MAPPED", 3)
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n" * (i + 1))
    before = len(os.listdir("/proc/self/fd"))
    found = [open_index(tmp_path / f"{i}.txt", "lines", find_lines) for i in range(8)]
    for _ in range(2):
        assert [len(one) for one in found] == list(range(1, 9))
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_an_index_that_nobody_has_is_not_mapped(tmp_path):
    (tmp_path / "rows.txt").write_text("one\n")
    before = len(os.listdir("/proc/self/fd"))
    assert len(open_index(tmp_path / "rows.txt", "lines", find_lines)) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_blank_text_has_no_paragraph(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    assert find_paragraphs(tmp_path / "blank.txt")[0].shape == (0, 3)


def test_a_long_field_of_csv_is_one_field(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text('text\n5" nail\n"' + "a" * 140_000 + '\nsecond\nthird"\nlast\n')
    table, _ = find_csv_rows(path)
    assert table[:, 2].tolist() == [1, 2, 3, 6]


def test_lines_of_csv_go_on_inside_quotes(tmp_path, chunks):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,"two\nlines, ""quoted""\n"\n2,x\n')
    data, (table, _) = path.read_bytes(), find_csv_rows(path)
    assert [(data[a:b], line) for a, b, line in table] == [
        (b"a,b", 1), (b'1,"two\nlines, ""quoted""\n"', 2), (b"2,x", 5)]


def test_paragraphs_are_runs_of_lines_that_are_not_blank(tmp_path, chunks):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nstill one\n \n\ntwo\r\n\r\nthree")
    data, (table, _) = path.read_bytes(), find_paragraphs(path)
    assert [(data[a:b].strip(), line) for a, b, line in table] == [(b"one\nstill one", 3), (b"two", 7), (b"three", 9)]


@pytest.mark.parametrize("data, words", [(b"", "the file is empty"), ("[{}]".encode("utf-16"), "is UTF-16"),
                                         (b"\x1f\x8b\x08\x00", "is compressed")])
def test_files_that_are_plainly_something_else_are_refused(tmp_path, data, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        open_index(path, "lines", find_lines)


def counted(build):
    calls = []

    def build_and_count(path):
        calls.append(path)
        return build(path)
    return build_and_count, calls


def test_an_index_lies_beside_its_data_and_is_built_again_when_the_data_changes(tmp_path):
    path, (build, calls) = tmp_path / "rows.jsonl", counted(find_lines)
    path.write_text("a\nbb\n")
    first = open_index(path, "lines", build)
    assert first.path == tmp_path / "rows.jsonl.lines.index.npy" and len(first) == 2
    assert len(open_index(path, "lines", build)) == 2 and len(calls) == 1
    path.write_text("a\nbb\nccc\n")
    with pytest.raises(DataError, match="changed since it was opened") as error:
        read_piece(path, 0, 1, first.stamp)
    assert error.value.kind == "changed file"
    assert len(open_index(path, "lines", build)) == 3 and len(calls) == 2
    os.utime(path, ns=(5, 5))
    open_index(path, "lines", build)
    assert len(calls) == 3
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.lines.index.npy"]


def test_a_damaged_index_is_built_again(tmp_path):
    path, (build, calls) = tmp_path / "rows.jsonl", counted(find_lines)
    path.write_text("a\nbb\n")
    beside = open_index(path, "lines", build).path
    whole = beside.read_bytes()
    for damaged in (b"", b"no numpy file", whole[:-8], whole[:40], pickle.dumps([1])):
        beside.write_bytes(damaged)
        assert open_index(path, "lines", build).table.tolist() == [[0, 1, 1], [2, 4, 2]]
    np.save(beside, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert open_index(path, "lines", build).table.tolist() == [[0, 1, 1], [2, 4, 2]]
    assert len(calls) == 7


def test_where_the_data_cannot_be_written_the_index_lies_in_the_cache(tmp_path, monkeypatch):
    path, (build, calls) = tmp_path / "data" / "rows.jsonl", counted(find_lines)
    path.parent.mkdir()
    path.write_text("a\nbb\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written = index.written

    def refuses(place):
        if place.parent == path.parent:
            raise PermissionError(13, "Permission denied", str(place))
        return written(place)
    monkeypatch.setattr(index, "written", refuses)
    found = open_index(path, "lines", build)
    assert found.path.parent == tmp_path / "cache" / "transfusion" / "index" and len(found) == 2
    assert open_index(path, "lines", build).path == found.path and len(calls) == 1
    assert sorted(one.name for one in path.parent.iterdir()) == ["rows.jsonl"]


def test_no_place_for_an_index_is_an_error_that_names_them(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("a\n")

    def refuses(place):
        raise OSError(28, "No space left on device", str(place))
    monkeypatch.setattr(index, "written", refuses)
    with pytest.raises(DataError, match="its index cannot be written into .*No space left on device.* nor "):
        open_index(path, "lines", find_lines)


def test_names_of_a_folder_are_kept_whatever_they_are(tmp_path):
    names = ["a.png", "sub/ü.png", os.fsdecode(b"\xff.png"), "with\nbreak.png"]
    found = index_names(tmp_path, "names", names)
    assert [name_at(found, *row) for row in found.table.tolist()] == names
    assert (
        index_names(tmp_path, "names", names[:2]).stamp != found.stamp
        and len(index_names(tmp_path, "names", names[:2])) == 2
    )


def test_an_index_pickles_without_its_contents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("a\n" * 10000)
    opened = open_index(path, "lines", find_lines)
    assert len(opened) == 10000 and len(pickle.dumps(opened)) < 1000
    assert (pickle.loads(pickle.dumps(opened)).table == opened.table).all()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no.json: cannot be opened .No such file"):
        stamp_of(tmp_path / "no.json")
