"""Small pictures and files of every format, and what every source must do."""
import functools
import io
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
from PIL import Image as Picture

from transfusion.data.sources import DataError, Source


def png(red, size=(3, 2)):
    """The bytes of a small picture."""
    file = io.BytesIO()
    Picture.new("RGB", size, (red, 10, 200)).save(file, "PNG")
    return file.getvalue()


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _read_all(source):
    records = [source[number] for number in range(len(source))]
    return [(record, [picture.read() for picture in record.pictures()]) for record in records]


@functools.cache
def _other_process():
    """A process that shares nothing with this one but what is pickled into it."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def check_source(source, count):
    """What holds for every source: numbers, random access, pickling into another process; return all records."""
    assert isinstance(source, Source) and len(source) == count
    records = [source[number] for number in range(count)]
    assert [source[number] for number in reversed(range(count))] == records[::-1]
    for number in (-1, count):
        with pytest.raises(IndexError, match=f"is {number}; 0 to {count - 1} fit"):
            source[number]
    assert len(pickle.dumps(source)) < 5000
    assert _other_process().submit(_read_all, source).result(timeout=300) == _read_all(source)
    assert len({record.where for record in records}) == count
    return records


@pytest.fixture
def fails():
    """Assert that reading a record raises DataError with these words and this kind."""
    def check(source, number, words, kind):
        with pytest.raises(DataError) as error:
            source[number]
        for word in [words] if isinstance(words, str) else words:
            assert word in str(error.value), str(error.value)
        assert error.value.kind == kind
        return error.value
    return check
