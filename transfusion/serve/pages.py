"""Pages of a pool of cached tokens: who has which, and which hold the beginning of a prompt that may come again.

A full page of a prompt is known by a digest of all tokens and images up to its end. A request whose prompt begins alike
takes it as it is, together with others, and the model reads only the rest. A page that nobody has any more stays known
until its room is wanted; the one that was given back first goes first.
"""
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator

from transfusion.sequence import Document

PAGE = 16  # tokens


class Pages:
    """`count` pages."""

    def __init__(self, count: int):
        self.users = [0] * count
        self._free = list(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody has them, but they are known
        self._known: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """How many may be taken."""
        return len(self._free) + len(self._idle)

    def take(self, size: int, document: Document | None = None) -> tuple[list[int], int]:
        """Pages for `size` tokens, and how many tokens of the document that they will begin with are read already.

        At least the document's last token is left to read. An image is never cut, for its patches see each other.
        """
        shared, read = [], 0
        found = []
        for end, digest in () if document is None else _digests(document):
            if digest not in self._known or end >= len(document.tokens):
                break
            found.append(self._known[digest])
            if not any(start < end < start + len(patches) for start, patches, *_ in document.images):
                shared, read = list(found), end
        for page in shared:
            self.users[page] += 1
            self._idle.pop(page, None)
        return shared + [self._fresh() for _ in range(math.ceil(size / PAGE) - len(shared))], read

    def give_back(self, pages: list[int]) -> None:
        """Leave pages that were taken: the last first, for the end of a prompt is of no use without its beginning."""
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                if page in self._digests:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def remember(self, pages: list[int], document: Document) -> None:
        """Know the full pages of a prompt that the model has read."""
        for page, (_, digest) in zip(pages, _digests(document)):
            if digest not in self._known:
                self._known[digest], self._digests[page] = page, digest

    def _fresh(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._digests.pop(page)]
        self.users[page] = 1
        return page


def _digests(document: Document) -> Iterator[tuple[int, bytes]]:
    """(end, digest) of each full page of a document: of all tokens before its end and all images that begin there."""
    so_far, images = hashlib.sha256(), list(document.images)
    for end in range(PAGE, len(document.tokens) + 1, PAGE):
        so_far.update(repr(document.tokens[end - PAGE:end]).encode())
        while images and images[0][0] < end:
            start, patches, grid, _ = images.pop(0)
            so_far.update(repr((start, grid)).encode() + patches.contiguous().numpy().tobytes())
        yield end, so_far.digest()
