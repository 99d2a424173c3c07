"""Tars of pictures with their captions, equal to what tarfile reads."""
import io
import json
import tarfile

import pytest

from tests.transfusion.data.sources.conftest import check_source, png
from transfusion.data.sources import DataError, WebDatasetSettings


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


MEMBERS = [
    ("000000.png", png(0)),
    ("000000.txt", "eine 猫 ".encode()),
    ("000000.json", b'{"caption": "not asked"}'),
    ("sub/000000.JPG", b"jpg"),
    ("sub/000000.json", json.dumps({"caption": "two", "text": ["three", "four"], "n": 1}).encode()),
    ("000002.seg.png", b"mask"),
    ("000002.webp", b"webp"),
    ("000003.txt", b"late"),
    ("000002.txt", b"behind another"),
    ("000003.png", png(3)),
]


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "shard-00.tar", MEMBERS)
    write_tar(tmp_path / "shard-01.tar", [("000000.png", png(9)), ("000000.txt", b"nine")])
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "shard-*.tar", "shard-{00..01}.tar"])
def test_records_are_the_members_of_one_name_in_all_tars(shards, pattern):
    records = check_source(WebDatasetSettings(shards / pattern).open(), 5)
    assert [record.captions for record in records] == [
        ("eine 猫",),
        ("three", "four", "two"),
        ("behind another",),
        ("late",),
        ("nine",),
    ]
    read = []
    for shard, names in (
        ("shard-00", ("000000.png", "sub/000000.JPG", "000002.webp", "000003.png")),
        ("shard-01", ("000000.png",)),
    ):
        with tarfile.open(shards / f"{shard}.tar") as tar:
            read += [tar.extractfile(name).read() for name in names]
    assert [record.picture.read() for record in records] == read
    assert len({record.picture.file for record in records}) == 5 and all(record.picture.loss for record in records)
    assert records[1].where.endswith("shard-00.tar, sub/000000") and records[4].picture.file.path.endswith(
        "shard-01.tar"
    )


@pytest.mark.parametrize("members, words, kind", [
    ([("1.png", b"x")], "there is no caption; the record has png", "missing caption"),
    ([("1.txt", b"x")], "there is no picture; the record has txt", "missing picture"),
    ([("1.png", b"x"), ("1.txt", b" \n")], "there is no caption", "missing caption"),
    ([("1.png", b"x"), ("1.txt", b"caf\xe9")], "is not UTF-8", "bad encoding"),
    ([("1.png", b"x"), ("1.json", b"{")], "is no JSON", "bad json"),
    ([("1.png", b"x"), ("1.json", b'{"caption": 3}')], "the caption in column 'caption' is int 3", "no text"),
    ([("1.png", b"x"), ("1.json", b'{"title": "x"}')], "no column 'text' or 'caption'", "missing column"),
])
def test_a_record_that_does_not_fit_is_an_error_with_tar_and_name(tmp_path, fails, members, words, kind):
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("0.txt", b"fine"), *members])
    source = WebDatasetSettings(tmp_path / "a.tar").open()
    fails(source, 1, [words, "a.tar, 1"], kind)
    assert source[0].captions == ("fine",) and len(source) == 2


def test_a_tar_cut_off_or_missing_is_named(shards):
    whole = (shards / "shard-01.tar").read_bytes()
    (shards / "shard-01.tar").write_bytes(whole[:550])
    with pytest.raises(DataError, match="shard-01.tar, byte 0: the tar ends at byte 550, inside a member"):
        WebDatasetSettings(shards).open()
    with pytest.raises(ValueError, match="webdataset: path is .*, where no file is; .tar files"):
        WebDatasetSettings(shards / "no-*.tar").open()


def test_a_tar_that_changes_is_noticed_when_a_caption_is_read(shards, fails):
    source = WebDatasetSettings(shards / "shard-01.tar").open()
    first = source.fingerprint()
    write_tar(shards / "shard-01.tar", [("000000.png", png(9)), ("000000.txt", b"another")])
    fails(source, 0, "shard-01.tar: changed since it was opened", "changed file")
    again = WebDatasetSettings(shards / "shard-01.tar").open()
    assert again[0].captions == ("another",) and again.fingerprint() != first


def test_marks_of_editors_are_no_text_and_an_empty_txt_hides_no_caption(tmp_path):
    path = write_tar(tmp_path / "a.tar", [
        ("0.png", png(0)), ("0.txt", b"\xef\xbb\xbfa cat"), ("1.png", png(1)),
        ("1.json", b'\xef\xbb\xbf{"caption": "a dog"}'), ("2.png", png(2)), ("2.txt", b" \n"),
        ("2.json", b'{"caption": "a bus"}')])
    source = WebDatasetSettings(path).open()
    assert [source[number].captions for number in range(3)] == [("a cat",), ("a dog",), ("a bus",)]
