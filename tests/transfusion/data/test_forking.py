"""Processes that read data: what waited for the garbage collector when they were forked never ends in them."""
import gc
import os

import pytest

from tests.transfusion.data.memory import MemorySource, documents_of, mixed_records, picture
from tests.transfusion.data.test_loader import mixture_of, rows_of
from tests.transfusion.data.test_posteriors import autoencoder_in, settings_of, write_mixture
from transfusion.data import lengths, posteriors
from transfusion.data.forking import forking
from transfusion.data.loader import Loader


class Ending:
    """Writes the process in which it ends; a cycle, which only the collector finds."""

    def __init__(self, file):
        self.file, self.own = file, self

    def __del__(self):
        with open(self.file, "a") as file:
            file.write(f"{os.getpid()}\n")


class Collecting(MemorySource):
    """Collects garbage before it gives a record."""

    def __getitem__(self, number):
        gc.collect()
        return super().__getitem__(number)


@pytest.fixture
def ended(tmp_path):
    """A file of processes in which something ended that is garbage here when the test begins."""
    file = tmp_path / "ended"
    gc.collect()
    gc.disable()
    Ending(file)
    yield file
    gc.enable()
    assert file.read_text() == f"{os.getpid()}\n"


def count(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 10)
    lengths.count_lengths(Collecting("read", mixed_records(45)), documents_of(), tmp_path / "cache", workers=2)


def load(tmp_path, monkeypatch):
    mixture = mixture_of(tmp_path / "cache", MemorySource("read", mixed_records(40)))
    mixture.sources[0].__class__ = Collecting
    assert len(list(Loader(rows_of(mixture), 0, 3, workers=2))) == 3


def encode(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i, 16, 16).file)
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"the red dog {i}")
    whole = posteriors._Unread.__getitem__
    monkeypatch.setattr(posteriors._Unread, "__getitem__", lambda self, number: (gc.collect(), whole(self, number))[1])
    settings = settings_of(autoencoder_in(tmp_path / "vae"), tmp_path / "latents", workers=2)
    posteriors.encode_mixture(write_mixture(tmp_path), settings)


@pytest.mark.parametrize("read", [count, load, encode])
def test_what_is_garbage_ends_in_the_process_that_made_it(ended, tmp_path, monkeypatch, read):
    read(tmp_path, monkeypatch)
    assert not ended.exists(), "collected by a process that reads"
    gc.collect()


def test_what_a_program_froze_stays_frozen():
    with forking():
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    gc.freeze()
    try:
        with forking():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
