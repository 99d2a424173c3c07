"""Answers that are kept as they come, so that an evaluation that was stopped goes on.

A directory holds one file of JSON lines for each process. A line is an answer with the key of its question: a hash of
the model's weights, of how it is asked, and of the question. What a kill left of a last line is passed over, and asked
again.
"""
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from transfusion.eval.asking import Asking
from transfusion.files import check_writable


class Answers:
    """Answers by key, kept in a directory or, without one, in memory.

    identity: of the model and of how it is asked; of another, nothing kept is taken.
    """

    def __init__(self, directory: Path | None, identity: str, rank: int = 0):
        self.identity, self.known, self.file = identity, {}, None
        if directory is None:
            return
        check_writable("eval: the directory of answers", directory)
        for path in sorted(directory.glob("answers-*.jsonl")):
            self.known |= dict(_lines(path.read_bytes()))
        own = directory / f"answers-{rank}.jsonl"
        torn = own.exists() and not own.read_bytes().endswith(b"\n")
        self.file = open(own, "ab")  # noqa: SIM115 - it is written to as long as the model answers
        self.file.write(b"\n" * torn)

    def key(self, *parts) -> str:
        """Return what a question of this model is known by: a hash of what it depends on, in JSON's kinds."""
        return hashlib.sha256(json.dumps([self.identity, *parts], sort_keys=True).encode()).hexdigest()

    def keep(self, answers: Iterable[tuple[str, object]]) -> None:
        """Keep answers by their keys, on the disk before this returns."""
        for key, answer in answers:
            self.known[key] = answer
            if self.file is not None:
                self.file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False).encode() + b"\n")
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())


def identity(weights_hash: str | None, asking: Asking, dtype: str, turn_end: str = "") -> str:
    """What answers depend on beside the question; `turn_end` is the text that ends them where EOS does not."""
    return json.dumps([weights_hash, str(asking), dtype, *([turn_end] if turn_end else [])])


def _lines(data: bytes) -> Iterable[tuple[str, object]]:
    for line in data.split(b"\n"):
        try:
            held = json.loads(line)
            yield held["key"], held["answer"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill, or empty
