"""How long every record's document is, in every form that it may take, and why some cannot be used.

Text is tokenized as `encode` does it, and of pictures only the headers are read. A pool of processes counts chunks of
records; each finished chunk is a file, so a count that was stopped goes on. The result is a few memory-mapped arrays,
kept under a key made from the source, the tokenizer, the grids and the template: where one changes, it is made anew.

Records fall into splits by a hash of their pictures' names (or contents): one picture in two records is in one split. A
record whose pictures fall into both splits is in neither.
"""
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transfusion.data.arrays import Arrays, fingerprint, write_arrays
from transfusion.data.documents import Documents, extra_area, has_target
from transfusion.data.forking import forking
from transfusion.data.sources.record import DataError, PictureRef, Record, Source
from transfusion.files import written
from transfusion.locks import locked

VERSION = 3
CHUNK = 1000      # records in a chunk
EXAMPLES = 20     # failures that are kept with their words, of each kind
KEYS = ("name", "content")
NO_TARGET = "no target"
BAD_TEXT = "text that cannot be tokenized"
TYPES = {"starts": np.int64, "lengths": np.int32, "bare": np.int32, "extra": np.int64, "reason": np.uint8,
         "images": np.uint16, "patches": np.int32, "low": np.uint32, "high": np.uint32}


@dataclass(frozen=True)
class Lengths:
    """What is known of a source's N records without reading them.

    kinds: of failures.
    examples: kind -> (number, where, reason) of the first failures.
    arrays: by name
        starts (N + 1,), lengths: record i has lengths[starts[i]:starts[i + 1]] tokens with each of its captions
        bare (N,): tokens without a caption; 0 where it cannot be left out
        extra (N,): pairs of tokens that see each other beyond the causal ones
        reason (N,): 0 where the record can be used, else one more than the place of its kind in `kinds`
        images, patches (N,): how many there are
        low, high (N,): the least and the greatest of its pictures' hashes
    """

    arrays: Arrays
    kinds: tuple[str, ...]
    examples: dict[str, list]

    def __len__(self) -> int:
        return len(self.arrays["reason"])

    def failures(self) -> dict[str, int]:
        """How many records cannot be used, by kind."""
        counts = np.bincount(self.arrays["reason"], minlength=len(self.kinds) + 1)[1:]
        return {kind: int(count) for kind, count in zip(self.kinds, counts) if count}

    def records(self, split: str, held_out: float) -> np.ndarray:
        """Numbers (n,) of the records of a split, "train" or "held-out", that can be used."""
        limit = _limit(held_out)
        mine = self.arrays["high"] < limit if split == "held-out" else self.arrays["low"] >= limit
        return np.flatnonzero(mine & (self.arrays["reason"] == 0)).astype(np.int64)


def count_lengths(source: Source, documents: Documents, cache: Path, *, held_out_by: str = "name",
                  workers: int | None = None) -> Lengths:
    """Count a source, or open what was counted before.

    Args:
        source: records by number.
        documents: how they become documents.
        cache: directory in which counts are kept, one directory each.
        held_out_by: "name", the last two parts of a picture's path, or "content", the bytes of its file, all of which
            are read then.
        workers: processes; as many as there are processors, and none for small sources.

    Raises:
        ValueError: an option that does not fit, or a process of the pool was killed.
    """
    if held_out_by not in KEYS:
        raise ValueError(f"count_lengths: held_out_by is {held_out_by!r}; {' or '.join(map(repr, KEYS))} fits")
    count = len(source)
    key = fingerprint(VERSION, source.fingerprint(), documents.fingerprint(), held_out_by, count)
    directory = Path(cache) / f"lengths-{source.name}-{key}"
    if not Arrays(directory).stand(key):
        with locked(directory, wait=True):
            if not Arrays(directory).stand(key):
                _count(source, documents, held_out_by, directory, key, workers)
    arrays = Arrays(directory)
    about = arrays.about()
    return Lengths(arrays, tuple(about["kinds"]), about["examples"])


def _count(source: Source, documents: Documents, held_out_by: str, directory: Path, key: str,
           workers: int | None) -> None:
    count, parts = len(source), directory / "parts"
    chunks = [(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
    missing = [chunk for chunk in chunks if not (parts / f"{chunk[0]}.npz").is_file()]
    if workers is None:
        workers = min(len(missing) // 4, os.cpu_count() or 1)
    done = count - sum(stop - start for start, stop in missing)
    progress = tqdm(total=count, initial=done, desc=f"lengths of {source.name}", unit="record",
                    disable=count < 2 * CHUNK, dynamic_ncols=True)
    found = _counted(_Job(source, documents, held_out_by), missing, workers)
    with progress, contextlib.closing(found):
        for (start, stop), piece in zip(missing, found):
            with written(parts / f"{start}.npz") as aside, open(aside, "wb") as file:
                np.savez(file, **piece)
            progress.update(stop - start)
    arrays, kinds, examples = _merged([parts / f"{start}.npz" for start, _ in chunks])
    write_arrays(directory, key, {"source": source.name, "kinds": kinds, "examples": examples}, **arrays)
    shutil.rmtree(parts, ignore_errors=True)


class _Job:
    """Counts records `start` to `stop`; what a process of the pool holds."""

    def __init__(self, source: Source, documents: Documents, held_out_by: str):
        self.source, self.documents, self.held_out_by = source, documents, held_out_by

    def __call__(self, start: int, stop: int) -> dict[str, np.ndarray]:
        rows, lengths, failures = [], [], []
        for number in range(start, stop):
            try:
                record = self.source[number]
                forms, *row = self._measure(record)
            except (DataError, ValueError) as error:
                forms, row = [0], [0, 0, 0, 0, 0, 0]
                failures.append((number, *_reason(error, f"{self.source.name}, record {number}")))
            rows.append((len(forms), *row))
            lengths += forms
        table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
        names = ("forms", "bare", "extra", "images", "patches", "low", "high")
        text = "\0".join("\1".join(str(word).translate({0: None, 1: None}) for word in failure) for failure in failures)
        return {**{name: table[:, i] for i, name in enumerate(names)}, "lengths": np.array(lengths, dtype=np.int64),
                "failures": np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)}

    def _measure(self, record: Record) -> tuple:
        """(lengths with each caption, bare, extra, images, patches, lowest and highest hash)."""
        is_pair = not record.turns and not record.parts
        forms, first = [], None
        for caption in range(max(1, len(record.captions)) if is_pair else 1):
            parts = self.documents.parts(record, caption=caption)
            outline = self.documents.outline(parts)
            if not has_target(outline, self.documents.tokenizer.eos_token_id):
                raise DataError(record.where, "no text with a loss and no picture that is drawn is left in it; "
                                "at least one fits", NO_TARGET)
            forms.append(len(outline.tokens))
            first = first or outline
        bare = 0
        if is_pair and record.captions and record.picture is not None and record.picture.loss:
            bare = len(self.documents.outline(self.documents.parts(record, dropped=True)).tokens)
        hashes = list(_hashes(record, self.held_out_by))
        patches = sum(len(x) for _, x, *_ in first.images)
        return forms, bare, extra_area(first), len(first.images), patches, min(hashes), max(hashes)


_job: _Job | None = None


def _start(job: _Job) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the process that waits for the pool, and it the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends those that are left when one was killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is what runs in parallel
    is_forked = multiprocessing.get_start_method() == "fork"  # else the parent may be a server, which ends with the run
    parent = multiprocessing.parent_process().pid if is_forked else os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _job = job


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a worker of a killed one would wait for its next chunk for good."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(chunk: tuple[int, int]) -> dict[str, np.ndarray]:
    return _job(*chunk)


def _counted(job: _Job, chunks: list, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """What each chunk holds, in order."""
    if workers < 2:
        yield from (job(*chunk) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _start, (job,))
    try:
        with forking():
            found = pool.map(_run, chunks)
        yield from found
    except BrokenProcessPool as error:
        raise ValueError(f"count_lengths: one of {workers} processes was killed, perhaps for want of memory; start "
                         "again, it goes on from here; fewer workers take less") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _merged(paths: list[Path]) -> tuple[dict[str, np.ndarray], list[str], dict[str, list]]:
    """All chunks as one: arrays, kinds of failures, and examples of each kind."""
    found, failures = {name: [] for name in (*TYPES, "forms")}, []
    for path in paths:
        with np.load(path, allow_pickle=False) as piece:
            for name in found.keys() & set(piece.files):
                found[name].append(piece[name].astype(TYPES.get(name, np.int64)))
            text = piece["failures"].tobytes().decode()
        failures += [failure.split("\1") for failure in text.split("\0") if failure]
    arrays = {name: np.concatenate([np.zeros(0, dtype), *found[name]]).astype(dtype) for name, dtype in TYPES.items()}
    forms = np.concatenate([np.zeros(0, np.int64), *found["forms"]])
    arrays["starts"] = np.concatenate([[0], np.cumsum(forms)]).astype(np.int64)
    arrays["reason"] = np.zeros(len(forms), dtype=np.uint8)
    kinds, examples = [], {}
    for number, kind, where, reason in failures:
        if kind not in examples and len(kinds) == 255:
            kind = kinds[-1]
        if kind not in examples:
            kinds.append(kind)
            examples[kind] = []
        arrays["reason"][int(number)] = kinds.index(kind) + 1
        if len(examples[kind]) < EXAMPLES:
            examples[kind].append((int(number), where, reason))
    return arrays, kinds, examples


def _reason(error: ValueError, where: str) -> tuple[str, str, str]:
    """(kind, where, reason) of a failure."""
    if isinstance(error, DataError):
        return error.kind, error.where, error.reason
    return BAD_TEXT, where, " ".join(str(error).split())


def is_trained_on(record: Record, held_out: float, held_out_by: str = "name") -> bool:
    """Whether a record is in the split "train", as `Lengths.records` has it.

    Raises:
        DataError: by "content", a picture of it cannot be read.
    """
    return min(_hashes(record, held_out_by)) >= _limit(held_out)


def _limit(held_out: float) -> int:
    """Hashes below it are held out."""
    return round(held_out * 2**32)


def _hashes(record: Record, held_out_by: str) -> Iterator[int]:
    """A hash, 32 bits, of each picture; of text, the hash of all of it."""
    pictures = list(record.pictures())
    for picture in pictures:
        by_content = held_out_by == "content" or isinstance(picture.file, bytes)
        yield _hash(picture.read() if by_content else picture_name(picture).encode(errors="surrogateescape"))
    if not pictures:
        texts = [*record.captions, *(part.text for part in record.parts), *(turn.text for turn in record.turns)]
        yield _hash("\n".join(texts).encode(errors="replace"))


def picture_name(picture: PictureRef) -> str:
    """What tells a picture apart wherever its data set lies: its file's folder and name, or a tar's and its own.

    The folder is the one that holds the file, wherever a relative path is read from.
    """
    file = picture.file
    name = "/".join(Path(os.path.abspath(file.path)).parts[-2:])
    if file.size < 0 and not file.offset:
        return name
    return f"{Path(file.path).name}/{picture.name or file.offset}"


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
