"""Documents of text and pictures in any order, in JSON lines or another table; three layouts, told apart by columns.

Our own:  {"parts": [{"text": "A cat."}, {"image": "cat.jpg"}, {"text": "It sleeps.", "loss": false}]}
OBELICS:  {"texts": ["A cat.", null], "images": [null, "cat.jpg"]}: at each place one of the two
MMC4:     {"text_list": ["A cat.", ...], "image_info": [{"image_name": "cat.jpg", "matched_text_index": 0}, ...]}:
          a picture stands before the sentence it matches
"""
from dataclasses import dataclass
from pathlib import Path

from transfusion.data.sources.fields import column, listed, picture_in, string
from transfusion.data.sources.record import DataError, PictureRef, Record
from transfusion.data.sources.tables import TableSource
from transfusion.sequence import Text
from transfusion.settings import check


@dataclass(frozen=True)
class InterleavedSettings:
    """Documents of text and pictures."""

    path: Path
    """JSON lines, a JSON list, parquet or a `datasets` directory; several files by a pattern or a folder"""
    images: Path | None = None
    """the folder that pictures' names start from; without it, the one that `path` lies in"""
    drawn: bool = True
    """whether pictures are drawn; otherwise they are only read; a part's own "loss" comes first"""
    loss: bool = True
    """whether text is a target; otherwise it is only read; a part's own "loss" comes first"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> "Interleaved":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or nothing to open.
            DataError: a file that cannot be read.
        """
        check("interleaved", self)
        return Interleaved(self)


class Interleaved(TableSource):
    """Documents of a table, by number."""

    def __init__(self, settings: InterleavedSettings):
        super().__init__("interleaved", settings, ("parts", "texts", "images", "text_list", "image_info"))

    def read(self, row: dict, where: str) -> Record:
        """As `TableSource.read`."""
        layout = next((read for name, read in _LAYOUTS.items() if row.get(name) is not None), None)
        if layout is None:
            raise DataError(
                where,
                f"the row has {', '.join(map(repr, row)) or 'no column'}; {', '.join(map(repr, _LAYOUTS))} fit",
                "missing column",
            )
        parts = [self._part(kind, value, loss, where) for kind, value, loss in layout(row, where)]
        if not parts:
            raise DataError(where, "the document is empty; at least one text or picture fits", "empty text")
        return Record(where, parts=tuple(parts))

    def _part(self, kind: str, value, loss: bool | None, where: str) -> Text | PictureRef:
        if kind == "text":
            return Text(string(value, where, "a text"), loss=self.settings.loss if loss is None else loss)
        return picture_in(value, where, self.folder, self.settings.drawn if loss is None else loss)


def _own(row: dict, where: str) -> list[tuple]:
    """(kind, value, loss) of each part, None where the part does not say whether it is a target."""
    parts = []
    for i, part in enumerate(_list(row["parts"], where, "parts")):
        given = [kind for kind in ("text", "image") if isinstance(part, dict) and part.get(kind) is not None]
        if len(given) != 1:
            raise DataError(where, f"part {i} is {part!r:.60}; an object with 'text' or 'image' fits", "bad part")
        loss = part.get("loss")
        if loss is not None and not isinstance(loss, bool):
            raise DataError(where, f"the loss of part {i} is {loss!r}; true or false fits", "bad part")
        if part[given[0]] != "":
            parts.append((given[0], part[given[0]], loss))
    return parts


def _obelics(row: dict, where: str) -> list[tuple]:
    """As `_own`; paragraphs with nothing between them are joined by a blank line."""
    texts, images = (
        _list(row["texts"], where, "texts"),
        _list(column(row, ("images",), where, "pictures"), where, "images"),
    )
    if len(texts) != len(images):
        raise DataError(
            where,
            f"there are {len(texts)} texts and {len(images)} images; as many fit, with null in one of them "
            "at each place",
            "bad part",
        )
    parts = []
    for i, (text, image) in enumerate(zip(texts, images)):
        if text and image:
            raise DataError(where, f"at place {i} stand a text and an image; one of them fits, and null for the other",
                            "bad part")
        parts += [("image", image, None)] if image else [("text", text, None)] if text else []
    return _joined(parts, "\n\n", where)


def _mmc4(row: dict, where: str) -> list[tuple]:
    """As `_own`; sentences with nothing between them are joined by a space."""
    sentences = _list(row["text_list"], where, "text_list")
    before = [[] for _ in sentences]
    for image in listed(row.get("image_info")):
        if not isinstance(image, dict):
            raise DataError(
                where,
                f"an image is {image!r:.60}; an object with 'image_name' and 'matched_text_index' fits",
                "bad part",
            )
        at = image.get("matched_text_index")
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(sentences):
            raise DataError(where, f"matched_text_index is {at!r}; 0 to {len(sentences) - 1} fit", "bad part")
        before[at].append(("image", column(image, ("image_name", "image"), where, "picture"), None))
    parts = [part for pictures, text in zip(before, sentences) for part in (*pictures, ("text", text, None))]
    return _joined([part for part in parts if part[1]], " ", where)


def _joined(parts: list[tuple], between: str, where: str) -> list[tuple]:
    """Make one text of those with no picture between them."""
    joined = []
    for kind, value, loss in parts:
        if kind == "text" and joined and joined[-1][0] == "text":
            joined[-1] = "text", joined[-1][1] + between + string(value, where, "a text"), loss
        else:
            joined.append((kind, string(value, where, "a text") if kind == "text" else value, loss))
    return joined


def _list(value, where: str, name: str) -> list:
    if not isinstance(value, list):
        raise DataError(where, f"{name} is {value!r:.60}; a list fits", "bad part")
    return value


_LAYOUTS = {"parts": _own, "text_list": _mmc4, "texts": _obelics}
