"""What a source gives: one record by its number, with its pictures not yet decoded.

A record is one of three things: a document (`parts`: text and pictures in the order they are trained on), a
conversation (`turns`, which a chat template makes into parts), or a pair (`picture` and its `captions`, whose order is
chosen later). Each picture says whether it is drawn or only read.
"""
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

from transfusion.files import spelled
from transfusion.sequence import Text


class DataError(ValueError):
    """A record or a file of data that cannot be read: `where` it stands, the `reason`, and its `kind` for counting.

    In training such a record is skipped and counted by `kind`, which is the same for all errors of one sort. Names of
    files may be bytes that are no UTF-8: what it cannot write is spelled out, so that every message can be printed.
    """

    def __init__(self, where: str, reason: str, kind: str = "unreadable record"):
        where, reason = spelled(where), spelled(reason)
        super().__init__(where, reason, kind)  # the arguments as they came: errors travel between processes by them
        self.where, self.reason, self.kind = where, reason, kind

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class PictureFile(NamedTuple):
    """Where a picture's bytes lie: a file, or a piece of one, such as a member of a tar."""

    path: str
    offset: int = 0
    size: int = -1
    """in bytes; -1: to the end of the file"""
    name: str = ""
    """for messages, such as the member's name in a tar; "" stands for the path"""

    def open(self) -> BinaryIO:
        """Return these bytes as a file that can be read and searched, so that a picture's header is read alone.

        Raises:
            DataError: there is no such file, or it may not be read.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - the caller closes it
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise DataError(self.name or self.path, f"the picture {self.path!r} cannot be opened ({error.strerror})",
                            "missing picture" if gone else "unreadable picture") from error
        return file if self.offset == 0 and self.size < 0 else io.BufferedReader(_Piece(file, self.offset, self.size))

    def read(self) -> bytes:
        """Return these bytes.

        Raises:
            DataError: there is no such file, it cannot be read, or it ends too early.
        """
        with self.open() as file:
            try:
                data = file.read()
            except OSError as error:
                raise DataError(self.name or self.path, f"the picture {self.path!r} cannot be read ({error.strerror})",
                                "unreadable picture") from error
        if len(data) < max(self.size, 1):
            raise DataError(self.name or self.path, f"the picture {self.path!r} has {len(data)} bytes; "
                            f"{max(self.size, 1)} or more fit", "unreadable picture")
        return data


class _Piece(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file of their own; closes that file when it is closed."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        end = file.seek(0, io.SEEK_END)
        self._file, self._start, self._stop = file, offset, end if size < 0 else min(offset + size, end)
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (self._start, self._file.tell(), self._stop)[whence]
        return self._file.seek(max(origin + offset, self._start)) - self._start

    def readinto(self, buffer) -> int:
        left = max(self._stop - self._file.tell(), 0)
        return self._file.readinto(memoryview(buffer)[:left])

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class PictureRef:
    """A picture that is not decoded yet.

    file: where its bytes lie, or the bytes.
    loss: whether it is drawn, with a time and a diffusion loss; otherwise it is only read, and stays clean.
    name: what it is called in messages.
    """

    file: PictureFile | bytes
    loss: bool
    name: str = ""

    def open(self) -> BinaryIO:
        """Return its bytes as a file; see `PictureFile.open`."""
        return io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file.open()

    def read(self) -> bytes:
        """Return its bytes; see `PictureFile.read`."""
        return self.file if isinstance(self.file, bytes) else self.file.read()


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks, "system", "user" or "assistant", and text and pictures in order."""

    role: str
    parts: tuple[str | PictureRef, ...]

    @property
    def text(self) -> str:
        """Its text, with `<image>` for each picture."""
        return "".join(part if isinstance(part, str) else "<image>" for part in self.parts)


def joined(parts: Iterable[str | PictureRef]) -> tuple[str | PictureRef, ...]:
    """Parts of a turn in which texts that follow one another are one, as a tokenizer is to see them."""
    return tuple(part for is_text, run in groupby(parts, lambda part: isinstance(part, str))
                 for part in (["".join(run)] if is_text else run))


@dataclass(frozen=True)
class Record:
    """One sample, as it lies in its source.

    where: file and row, for messages: "mix665k.json, row 17".
    parts: of a document, in order, each with its loss.
    turns: of a conversation.
    captions, picture: of a pair; a caption is chosen, placed or dropped later.
    """

    where: str
    parts: tuple[Text | PictureRef, ...] = ()
    turns: tuple[Turn, ...] = ()
    captions: tuple[str, ...] = ()
    picture: PictureRef | None = None

    def pictures(self) -> Iterator[PictureRef]:
        """Yield its pictures in order."""
        if self.picture is not None:
            yield self.picture
        yield from (part for part in self.parts if isinstance(part, PictureRef))
        yield from (part for turn in self.turns for part in turn.parts if isinstance(part, PictureRef))


@runtime_checkable
class Source(Protocol):
    """Records by number. It pickles in a few kilobytes, opens its files in each process anew and holds no record."""

    name: str

    def __len__(self) -> int:
        """How many records there are, those included that cannot be read."""

    def __getitem__(self, number: int) -> Record:
        """Return record `number`; its pictures are not read.

        Raises:
            DataError: the record cannot be read.
            IndexError: there is no such number.
        """

    def fingerprint(self) -> str:
        """Return what changes when the source's files or its settings change."""
