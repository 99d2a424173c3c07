"""Tars of webdataset and img2dataset: `000017.jpg` with `000017.txt` or `000017.json`, any number of tars by a pattern.

Members with one name up to the first dot are one record, wherever in the tar they stand. Headers are read once, for the
index; a picture is then a piece of the tar.
"""
from dataclasses import dataclass
from pathlib import Path

from transfusion.data.sources.fields import CAPTIONS, captions_of, string
from transfusion.data.sources.index import Index, name_at, read_piece
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record
from transfusion.data.sources.tables import Pieces, begin, decoded, digest, matching, parse_object
from transfusion.data.sources.tar import find_tar_members
from transfusion.settings import check

PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class WebDatasetSettings:
    """Tars of pictures and captions."""

    path: Path
    """a tar, a folder of tars, or a pattern such as "shards/{00000..00041}.tar" or "shards/*.tar" """
    columns: tuple[str, ...] = CAPTIONS
    """of a .json member: every one of these that it has is a caption; a .txt member comes first"""
    drawn: bool = True
    """whether pictures are drawn, before or behind their caption; otherwise they are only read"""

    def open(self) -> "Tars":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or no tar.
            DataError: a tar that is cut off, compressed or none.
        """
        check("webdataset", self)
        return Tars(self)


class _Members(Pieces):
    """Records of tars: a record has one row of the index for each of its members."""

    def _rows(self, index: Index) -> int:
        return int(index.table[-1, 0]) + 1


class Tars:
    """Pictures and captions of tars, by number."""

    def __init__(self, settings: WebDatasetSettings):
        self.name, self.settings = begin("webdataset", settings.path)[0], settings
        self.tars = _Members(matching("webdataset", settings.path, (".tar",)), "tar", find_tar_members)

    def __len__(self) -> int:
        return len(self.tars)

    def __getitem__(self, number: int) -> Record:
        path, index, row = self.tars.find(number)
        first, last = index.table[:, 0].searchsorted([row, row + 1])
        members = {}
        for _, start, stop, name_start, name_stop in index.table[first:last].tolist():
            name = name_at(index, name_start, name_stop)
            begin_suffix = name.index(".", name.rfind("/") + 1)
            members.setdefault(name[begin_suffix + 1:].lower(), (name, start, stop))
        where = f"{path}, {name[:begin_suffix]}"
        suffix = next((one for one in PICTURES if one in members), None)
        if suffix is None:
            raise DataError(
                where,
                f"there is no picture; the record has {', '.join(members)}; {', '.join(PICTURES)} fit",
                "missing picture",
            )
        name, start, stop = members[suffix]
        picture = PictureRef(PictureFile(str(path), start, stop - start, f"{path}, {name}"), self.settings.drawn, name)
        captions = self._captions(path, index, members, where)
        return Record(where, captions=captions, picture=picture)

    def _captions(self, path: Path, index: Index, members: dict, where: str) -> tuple[str, ...]:
        found = []
        if "txt" in members:
            _, start, stop = members["txt"]
            found.append(
                string(decoded(read_piece(path, start, stop, index.stamp), where), where, "the caption").strip()
            )
        if "json" in members and not any(found):
            _, start, stop = members["json"]
            row = parse_object(read_piece(path, start, stop, index.stamp), where)
            return captions_of(row, self.settings.columns, where)
        if not any(found):
            raise DataError(
                where,
                f"there is no caption; the record has {', '.join(members)}; a txt or json with text fits",
                "missing caption",
            )
        return tuple(found)

    def fingerprint(self) -> str:
        return digest("webdataset", self.settings.columns, self.settings.drawn, self.tars.stamps())
