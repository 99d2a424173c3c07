"""Random choices without a generator: each is a hash of what it is made for, so it is the same for whoever asks.

    z = x + 0x9e3779b97f4a7c15;  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;  z = (z ^ z >> 27) * 0x94d049bb133111eb;
    splitmix64(x) = z ^ z >> 31                                       (Steele, Lea and Flood, OOPSLA 2014, figure 17)

The hash is folded over the seed, the purpose, the source, the pass over the source, and the record's number. The plan
asks for a million records at once and the loader for one: both call `choose`, so the plan's lengths are those of what
the loader reads.
"""
import zlib
from typing import NamedTuple

import numpy as np

GOLDEN, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
ORDER, MIX, IMAGE_FIRST, DROPOUT, CAPTION, FLIP, STEPS, LATENT = range(8)
"""Purposes: choices for different ones are independent."""


class Choice(NamedTuple):
    """How a pair is shown, each of n records: arrays (n,), or one number each where one record was asked for.

    image_first: the picture stands before the caption. dropped: the caption is left out. caption: which one.
    flipped: the picture is mirrored.
    """

    image_first: np.ndarray
    dropped: np.ndarray
    caption: np.ndarray
    flipped: np.ndarray


def splitmix64(x) -> np.ndarray:
    """Return the hash (n,) uint64 of x, integers (n,)."""
    with np.errstate(over="ignore"):
        z = np.asarray(x).astype(np.uint64) + GOLDEN
        z = (z ^ (z >> np.uint64(30))) * FIRST
        z = (z ^ (z >> np.uint64(27))) * SECOND
        return z ^ (z >> np.uint64(31))


def hashed(*words) -> np.ndarray:
    """Return uint64 that depend on every word; each is an integer or an array, and they broadcast."""
    state = np.uint64(0)
    for word in words:
        state = splitmix64(state ^ _unsigned(word))
    return state


def uniform(*words) -> np.ndarray:
    """Return float64 in [0, 1), a hash of the words; see `hashed`."""
    return (hashed(*words) >> np.uint64(11)) * 2.0**-53


def source_key(name: str) -> int:
    """Return what stands for a source in hashes: of its name, so that a new source changes no other's choices."""
    return zlib.crc32(name.encode(errors="surrogateescape"))


def choose(seed: int, key: int, passes, records, captions, *, caption_first: float, caption_dropout: float,
           flip: float) -> Choice:
    """Choose how records are shown.

    Args:
        seed: of the run.
        key: of the source; see `source_key`.
        passes, records: (n,) how often the source was read before, and the records' numbers in it.
        captions: (n,) how many captions there are to choose from.
        caption_first: share of pairs whose caption stands first.
        caption_dropout: share of those whose caption is left out.
        flip: share of records whose pictures are mirrored.
    """
    image_first, dropout, caption, flipped = (
        uniform(seed, purpose, key, passes, records) for purpose in (IMAGE_FIRST, DROPOUT, CAPTION, FLIP))
    image_first = image_first >= caption_first
    number = (caption * captions).astype(np.int64)
    return Choice(image_first, ~image_first & (dropout < caption_dropout), number, flipped < flip)


def _unsigned(word) -> np.ndarray:
    """An integer of any size, or integers, as uint64, modulo 2^64."""
    return np.uint64(word % 2**64) if isinstance(word, int) else np.asarray(word).astype(np.uint64)
