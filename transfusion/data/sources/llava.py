"""Conversations as LLaVA keeps them: `llava_v1_5_mix665k.json` and its like, a JSON list or JSON lines.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red"}]}

`image` is absent in rows of text, one file's name, or a list of them. `<image>` stands where the author put it, once
for each picture. A first turn of the assistant is dropped, as LLaVA does; after it the roles alternate.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.data.sources.fields import column, listed, picture_in, string
from transfusion.data.sources.record import DataError, Record, Turn
from transfusion.data.sources.tables import TableSource, digest
from transfusion.settings import OneOf, check

PLACEHOLDER = "<image>"
DRAWN = ("assistant", "all", "none")
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
           "bot": "assistant", "chatgpt": "assistant", "bard": "assistant", "system": "system"}


@dataclass(frozen=True)
class LLaVASettings:
    """Conversations in LLaVA's format."""

    path: Path
    """a JSON list, JSON lines, or a table with these columns; several files by a pattern or a folder"""
    images: Path | None = None
    """the folder that pictures' names start from (LLaVA's --image_folder); without it, the one that `path` lies in"""
    drawn: Annotated[str, OneOf(DRAWN)] = "assistant"
    """whose pictures are drawn: those of the assistant's turns, "all" or "none"; others are only read"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> "Conversations":
        """Open the source.

        Raises:
            ValueError: settings that do not fit, or nothing to open.
            DataError: a file that cannot be read.
        """
        check("llava", self)
        return Conversations("llava", self, turns=("conversations",), images=("image", "images"))


class Conversations(TableSource):
    """Rows of turns and pictures, by number."""

    def __init__(self, op: str, settings, turns: tuple[str, ...], images: tuple[str, ...]):
        super().__init__(op, settings, (*turns, *images, "id", "system"))
        self.turns, self.images = turns, images

    def read(self, row: dict, where: str) -> Record:
        """As `TableSource.read`."""
        images = next((listed(row[name]) for name in self.images if row.get(name) is not None), [])
        said = [("system", row["system"])] if row.get("system") else []
        said += [_said(turn, where, i) for i, turn in enumerate(_turns(row, self.turns, where))]
        turns = place_pictures(_in_order(said, where), images, where, self.folder, self.settings.drawn)
        return Record(where, turns=turns)

    def fingerprint(self) -> str:
        return digest(self.op, self.settings.drawn, str(self.folder), self.table.stamps())


def _turns(row: dict, names: tuple[str, ...], where: str) -> list:
    turns = column(row, names, where, "turns")
    if not isinstance(turns, list) or not turns:
        raise DataError(where, f"the turns are {turns!r:.60}; a list of at least one fits", "no turns")
    return turns


def _said(turn, where: str, number: int) -> tuple[str, object]:
    """(role, content) of a turn in LLaVA's or OpenAI's words."""
    if not isinstance(turn, dict):
        raise DataError(where, f"turn {number} is {turn!r:.60}; an object with a role and a text fits", "no turns")
    role = column(turn, ("from", "role"), f"{where}, turn {number}", "role")
    if not isinstance(role, str) or role.lower() not in ROLE_OF:
        raise DataError(
            where, f"turn {number} is said by {role!r}; {', '.join(map(repr, ROLE_OF))} fit", "unknown role"
        )
    content = column(turn, ("value", "content"), f"{where}, turn {number}", "text")
    return ROLE_OF[role.lower()], content


def _in_order(said: list, where: str) -> list:
    """Drop a leading turn of the assistant; then user and assistant alternate behind what the system says."""
    begins = [role for role, _ in said[:1]] == ["system"]
    head, rest = said[:begins], said[begins:]
    rest = rest[1:] if rest and rest[0][0] == "assistant" else rest
    if not rest:
        raise DataError(where, "there is no turn of the user; at least one fits", "no turns")
    for i, (role, _) in enumerate(rest):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise DataError(
                where,
                f"turn {i + len(head)} is the {role}'s and the {wanted}'s is due; turns that alternate, "
                "the user's first, fit",
                "roles do not alternate",
            )
    return head + rest


def place_pictures(
    said: Sequence[tuple[str, object]], images: list, where: str, folder: Path, drawn: str
) -> tuple[Turn, ...]:
    """Put each picture where its `<image>` stands; (role, content) with content a text or OpenAI's list of parts.

    Raises:
        DataError: there are more placeholders than pictures or the reverse, or a text that is none.
    """
    split = [(role, _split(content, where)) for role, content in said]
    holes = sum(part is None for _, parts in split for part in parts)
    if holes != len(images):
        raise DataError(
            where,
            f"{PLACEHOLDER} stands in the text {holes} times and the row has {len(images)} pictures; as many fit",
            "placeholders and pictures differ",
        )
    left, turns = iter(images), []
    for role, parts in split:
        loss = drawn == "all" or drawn == role
        placed = [picture_in(next(left) if part is None else part, where, folder, loss)
                  if part is None or isinstance(part, dict) else part for part in parts]
        if not any(not isinstance(part, str) or part.strip() for part in placed):
            raise DataError(where, f"turn {len(turns)}, the {role}'s, is empty; text or a picture fits", "empty turn")
        turns.append(Turn(role, tuple(part for part in placed if part != "")))
    return tuple(turns)


def _split(content, where: str) -> list[str | dict | None]:
    """Texts, None for each placeholder, and dicts for pictures that a part brings itself."""
    if isinstance(content, list):
        parts = []
        for one in content:
            if not isinstance(one, dict):
                raise DataError(
                    where,
                    f"a part of a turn is {one!r:.60}; an object such as {{'type': 'text', 'text': ...}} fits",
                    "no turns",
                )
            parts += _split_part(one, where)
        return parts
    texts = string(content, where, "a turn's text").split(PLACEHOLDER)
    return [part for text in texts for part in (text, None)][:-1]


def _split_part(part: dict, where: str) -> list[str | dict | None]:
    if part.get("type") == "text":
        return [string(part.get("text"), where, "a part's text")]
    if part.get("type") in ("image", "image_url"):
        given = part.get("image") or part.get("path") or part.get("image_url")
        given = given.get("url") if isinstance(given, dict) and "url" in given else given
        return [given if isinstance(given, dict) else {"path": given} if given else None]
    raise DataError(where, f"a part's type is {part.get('type')!r}; 'text' or 'image' fits", "no turns")
