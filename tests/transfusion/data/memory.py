"""Sources of records in memory, and pictures in bytes, for the tests of what stands behind sources."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image as Picture

from transfusion.data.documents import Documents, Kind
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.sources.record import DataError, PictureRef, Record
from transfusion.sequence import Text
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer

WORDS = (
    "a",
    "the",
    "red",
    "green",
    "blue",
    "bus",
    "dog",
    "cat",
    "runs",
    "sleeps",
    "under",
    "over",
    "two",
    "three",
    "small",
    "large",
    "picture",
    "of",
    "and",
    "with",
)


class MemorySource:
    """Records in a list; an error in it is raised."""

    def __init__(self, name, records):
        self.name, self.records = name, records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        record = self.records[number]
        if isinstance(record, Exception):
            raise record
        return record

    def fingerprint(self):
        return str(hash(tuple(map(repr, self.records))))


def tokenizer_of_words():
    return train_tokenizer([" ".join(WORDS)] * 3, 320)


def kind_of(tokenizer, channels=3, patch_size=4, factor=1):
    ids = (tokenizer.convert_tokens_to_ids(name) for name in (BOI, EOI))
    return Kind.of(
        SimpleNamespace(
            **dict(zip(("boi_token_id", "eoi_token_id"), ids)), image_channels=channels, patch_size=patch_size
        ),
        factor,
    )


def documents_of(tokenizer=None, grids=None, kind=None, **options):
    tokenizer = tokenizer or tokenizer_of_words()
    kind = kind or kind_of(tokenizer)
    grids = grids or Grids(GridSettings(side=16 * kind.factor), kind.patch_size * kind.factor)
    return Documents(tokenizer, kind, grids, **options)


def picture(seed, width=20, height=16, loss=True, name=None):
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, "PNG")
    return PictureRef(file.getvalue(), loss, name or f"{seed}.png")


def sentence(random, low=2, high=30):
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def mixed_records(count, seed=0):
    """Text, pairs with several captions, editing triples and interleaved documents in turn; some records are broken."""
    random, records = np.random.default_rng(seed), []
    for i in range(count):
        where, look = f"memory, row {i}", picture(seed * 10_000 + i, *random.integers(8, 40, 2))
        read = PictureRef(look.file, False, look.name)
        records.append(
            (
                Record(where, parts=(Text(sentence(random)),)),
                Record(where, captions=tuple(sentence(random, 2, 12) for _ in range(1 + i % 3)), picture=look),
                Record(where, parts=(read, Text(sentence(random, 2, 9), loss=False), look)),
                Record(where, parts=(Text(sentence(random)), look, Text(sentence(random)), read, Text("the end"))),
                DataError(where, "it is broken", "broken record")
                if i % 25 == 4
                else Record(where, captions=("a dog",), picture=read),
            )[i % 5]
        )
    return records
