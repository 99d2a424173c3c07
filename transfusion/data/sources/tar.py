"""Which records a tar holds and where its members lie: ustar, GNU long names and pax headers, read by hand."""
import os
import re
import zlib
from pathlib import Path

import numpy as np

from transfusion.data.sources.index import Contents, mapped
from transfusion.data.sources.record import DataError

_BLOCK = 512
_PAX = re.compile(rb"(\d+) ([^=]+)=")


def find_tar_members(path: Path) -> Contents:
    """(record, start, stop, name start, name stop) of each file in a tar; those of one record stand together.

    A record is what shares its name up to the first dot behind the last slash, as webdataset has it. ustar, GNU long
    names and pax headers are read.

    Raises:
        DataError: it is no tar, is compressed, or ends inside a member.
    """
    mapped(path)  # refuses compressed ones
    records, rows, names = {}, [], bytearray()
    with open(path, "rb", buffering=0) as file:
        for name, start, size in _members(path, file.fileno(), os.fstat(file.fileno()).st_size):
            folder, _, base = name.rpartition(b"/")
            key, dot, _ = base.partition(b".")
            if not dot or not key:  # hidden files, and those without a suffix
                continue
            number = records.setdefault((folder, key), len(records))
            rows.append((number, start, start + size, len(names), len(names) + len(name)))
            names += name
    if not rows:
        raise DataError(str(path), "the tar holds no files; at least one record fits", "empty file")
    table = np.array(rows, np.int64)
    return table[np.argsort(table[:, 0], kind="stable")], bytes(names)


def _members(path: Path, handle: int, end: int):
    """Yield (name, start, size) of each regular file in a tar."""
    at, long_name, pax, shared = 0, None, {}, {}
    while at + _BLOCK <= end:
        header = os.pread(handle, _BLOCK, at)
        if not header.strip(b"\0"):  # the end's zeros
            return
        size = _check_header(path, header, at)
        kind, start = header[156:157], at + _BLOCK
        fields = {**shared, **pax}
        if kind not in b"xgLK" and b"size" in fields:
            size = _pax_size(path, fields[b"size"], at)
        stop = start + size
        if stop > end:
            raise DataError(
                f"{path}, byte {at}",
                f"the tar ends at byte {end}, inside a member that goes to {stop}; it is cut off; copy it again",
                "truncated file",
            )
        if kind == b"L":
            long_name = os.pread(handle, size, start).rstrip(b"\0")
        elif kind == b"x":
            pax = _pax_fields(os.pread(handle, size, start))
        elif kind == b"g":
            shared = {**shared, **_pax_fields(os.pread(handle, size, start))}
        elif kind != b"K":
            if kind in b"0\x007":
                yield fields.get(b"path") or long_name or _ustar_name(header), start, size
            long_name, pax = None, {}
        at = start + -(-size // _BLOCK) * _BLOCK if kind not in b"123456" else start
    if at != end:
        raise DataError(
            f"{path}, byte {at}",
            f"the tar ends at byte {end}, between two members; it is cut off; copy it again",
            "truncated file",
        )


def _check_header(path: Path, header: bytes, at: int) -> int:
    """Return a member's size; refuse a header whose checksum is wrong."""
    try:
        total = int(header[148:156].strip(b"\0 ") or b"0", 8)
        size = (
            int.from_bytes(header[125:136], "big")
            if header[124] & 0x80
            else int(header[124:136].strip(b"\0 ") or b"0", 8)
        )
    except ValueError:
        total = size = -1
    summed = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF  # 1 and the sum of the bytes, modulo 65521
    if summed != (total + 1) % 65521 or size < 0:
        raise DataError(f"{path}, byte {at}", "here no tar header stands; an uncompressed tar fits", "bad tar")
    return size


def _pax_size(path: Path, field: bytes, at: int) -> int:
    """A member's size as a pax header has it."""
    if not field.isdigit():
        raise DataError(f"{path}, byte {at}", f"a pax header gives a member the size {field[:40]!r}; a number of bytes "
                        "fits; copy it again", "bad tar")
    return int(field[:20])


def _ustar_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    fields, at = {}, 0
    while match := _PAX.match(data, at):
        stop = at + int(match[1])
        fields[match[2]] = data[match.end():stop - 1]
        if stop <= at:
            break
        at = stop
    return fields
