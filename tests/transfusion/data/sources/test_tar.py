"""Members of tars are found where tarfile finds them; damaged tars are named."""
import io
import os
import tarfile

import numpy as np
import pytest

from transfusion.data.sources import DataError
from transfusion.data.sources.tar import find_tar_members

LONG = "folder/" * 30 + "name that is longer than a header"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_where_tarfile_finds_them(tmp_path, kind):
    path = tmp_path / "a.tar"
    names = [
        "1.jpg",
        "1.txt",
        "deep/2.jpg",
        "deep/2.seg.png",
        "dir.with.dots/3.jpg",
        "1.json",
        "ünï.png",
        "x" * 90 + ".txt",
    ]
    names += ["d" * 100 + "/" + "e" * 90 + ".txt"] + [LONG + ".jpg"] * (kind != tarfile.USTAR_FORMAT)
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = i * 300
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))
    table, blob = find_tar_members(path)
    found = {os.fsdecode(blob[a:b]): (start, stop - start) for _, start, stop, a, b in table.tolist()}
    with tarfile.open(path) as tar:
        assert found == {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
    record = {os.fsdecode(blob[a:b]): number for number, _, _, a, b in table.tolist()}
    assert record["1.jpg"] == record["1.txt"] == record["1.json"]
    assert record["deep/2.jpg"] == record["deep/2.seg.png"] and len(set(record.values())) == len(names) - 3
    assert (np.diff(table[:, 0]) >= 0).all()


def test_a_tar_cut_off_compressed_or_none_is_named(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    whole = path.read_bytes()
    for stop, words in ((2500, "inside a member that goes to"), (1700, "ends at byte 1700, between two members")):
        path.write_bytes(whole[:stop])
        with pytest.raises(DataError, match=words):
            find_tar_members(path)
    for data, words in ((b"\x1f\x8b" + whole, "is compressed"), (b"hello" * 400, "byte 0: here no tar header stands"),
                        (bytes(1024), "holds no files")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=words):
            find_tar_members(path)


@pytest.mark.parametrize("size", ["-512", "many", "1" * 60])
def test_a_pax_header_whose_size_cannot_be_is_named(tmp_path, size):
    """A negative one would lead back to the same header for ever."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"size": size}) as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(DataError, match="a.tar"):
        find_tar_members(path)
