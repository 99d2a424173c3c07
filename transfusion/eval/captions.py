"""Captions against references, in plain Python: `transfusion eval captions --answers FILE --references FILE`.

    BLEU-4     brevity * exp(mean of log precisions of 1- to 4-grams), over all captions together, counts clipped by the
               references, brevity min(1, exp(1 - r / c)) with the reference nearest in length (Papineni et al. 2002)
    ROUGE-L    (1 + b^2) P R / (R + b^2 P), b = 1.2, P and R the best over references of the longest common
               subsequence over the caption's and the reference's length; its mean over captions (Lin 2004)
    CIDEr-D    mean over n = 1..4 and references of 10 exp(-(l_c - l_r)^2 / (2 6^2)) min(g_c, g_r) . g_r /
               (|g_c| |g_r|), g the counts of n-grams times log(captions / captions with the n-gram in a reference)
               (Vedantam et al. 2015, equation 6; counts as in its authors' code)

Published numbers take their words from the Penn Treebank tokenizer of Stanford, which is a Java program. The words here
are `words` below: lower case, punctuation left out, endings such as "n't" and "'s" split off as there; words that the
Treebank parts without a sign, such as "cannot", stay whole. METEOR needs WordNet and Java, and is left out.
"""
import math
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transfusion.eval.results import Result, version_of, weights_hash, write_result
from transfusion.files import check_writable, read_json_lines, read_json_value
from transfusion.settings import check

GRAMS, SIGMA, BETA = 4, 6.0, 1.2
TOKENISER = "split into lower-case words without punctuation by our own rule, not by Stanford's PTB tokenizer"
CONTRACTION = re.compile(r"(?<=[a-z])(n't|'(?:s|re|ve|ll|d|m))(?![a-z])")
MARKS = "".join(chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "M")
LETTERS = rf"(?:[^\W_]|[{MARKS}])+"  # with the marks that belong to them, such as Hindi's vowels
WORD = re.compile(rf"n't|'(?:s|re|ve|ll|d|m)(?![a-z])|\d+(?:[.,]\d+)+|{LETTERS}(?:-{LETTERS})*")
IDS, TEXTS = ("image_id", "question_id", "id"), ("caption", "captions", "text")


@dataclass(frozen=True)
class CaptionsSettings:
    """Score captions against references: BLEU-4, ROUGE-L and CIDEr-D."""

    answers: Path
    """a .json list or a .jsonl of objects with "image_id" and "caption" (or LLaVA's "question_id" and "text")"""
    references: Path
    """COCO's captions (.json), or as the answers, several for each id or a list in "captions" """
    out: Path
    """directory for results/"""
    model: Path | None = None
    """directory of the checkpoint that wrote the captions, to be named in the results"""


def captions(settings: CaptionsSettings) -> list[Result]:
    """Run `transfusion eval captions`: write and print a result for each number.

    Raises:
        ValueError: files that do not fit, or answers without references.
    """
    check("eval captions", settings)
    check_writable("eval captions", settings.out)
    began = time.perf_counter()
    answers, references = (_read(path) for path in (settings.answers, settings.references))
    ids = list(answers)
    for number in ids:
        if len(answers[number]) != 1 or number not in references:
            raise ValueError(f"eval captions: {number!r} of {settings.answers} has {len(answers[number])} captions and "
                             f"{len(references.get(number, []))} references; one caption and one or more references "
                             "fit")
    given = [words(answers[number][0]) for number in ids]
    true = [[words(text) for text in references[number]] for number in ids]
    scores = {"BLEU-4": 100 * bleu(given, true), "ROUGE-L": 100 * rouge_l(given, true),
              "CIDEr-D": 100 * sum(cider_d(given, true)) / len(ids)}
    writer = {} if settings.model is None else {"model": str(settings.model),
                                                "weights_hash": weights_hash(settings.model)}
    found = [Result("captions", name, value, len(ids), "transfusion", version_of("transfusion"),
                    time.perf_counter() - began, note=TOKENISER, **writer,
                    details={"answers": str(settings.answers), "references": str(settings.references)})
             for name, value in scores.items()]
    for result in found:
        print(f"{result.metric:<12}{result.value:>9.2f}   {write_result(settings.out, result)}")
    return found


def words(text: str) -> list[str]:
    """Return the words of a text: lower case, no punctuation, "don't" as "do" and "n't"."""
    text = unicodedata.normalize("NFC", text)
    return WORD.findall(CONTRACTION.sub(r" \1", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")))


def bleu(answers: list[list[str]], references: list[list[list[str]]]) -> float:
    """Return BLEU-4, in [0, 1], of captions with references, all given as words."""
    right, possible, length, reference_length = [0] * GRAMS, [0] * GRAMS, 0, 0
    for answer, true in zip(answers, references):
        length += len(answer)
        reference_length += min((abs(len(x) - len(answer)), len(x)) for x in true)[1]
        for n in range(1, GRAMS + 1):
            ours, most = _grams(answer, n), Counter()
            for reference in true:
                most |= _grams(reference, n)
            right[n - 1] += (ours & most).total()
            possible[n - 1] += ours.total()
    if not all(right):
        return 0.0
    brevity = min(1.0, math.exp(1 - reference_length / length))
    return brevity * math.exp(sum(math.log(r / p) for r, p in zip(right, possible)) / GRAMS)


def rouge_l(answers: list[list[str]], references: list[list[list[str]]]) -> float:
    """Return the mean of ROUGE-L, in [0, 1], of captions with references, all given as words."""
    total = 0.0
    for answer, true in zip(answers, references):
        common = [(_common(answer, reference), len(reference)) for reference in true]
        recall = max((c / max(n, 1) for c, n in common), default=0)
        precision = max((c / max(len(answer), 1) for c, _ in common), default=0)
        if precision and recall:
            total += (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return total / len(answers)


def cider_d(answers: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Return CIDEr-D, in [0, 10], of each caption with references, all given as words."""
    holding = Counter()
    for true in references:
        holding.update({gram for reference in true for n in range(1, GRAMS + 1) for gram in _grams(reference, n)})
    count = math.log(len(answers))

    def vectors(text: list[str]) -> list[dict]:
        return [{gram: times * (count - math.log(max(1, holding[gram]))) for gram, times in _grams(text, n).items()}
                for n in range(1, GRAMS + 1)]

    scores = []
    for answer, true in zip(answers, references):
        ours, total = vectors(answer), 0.0
        for reference in true:
            penalty = math.exp(-(len(answer) - len(reference))**2 / (2 * SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, ours, vectors(reference)))
        scores.append(10 * total / len(true) / GRAMS)
    return scores


def _clipped_cosine(a: dict, b: dict) -> float:
    """min(a, b) . b / (|a| |b|), 0 where either is."""
    lengths = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(min(a.get(gram, 0), weight) * weight for gram, weight in b.items()) / lengths if lengths else 0.0


def _grams(text: list[str], n: int) -> Counter:
    return Counter(tuple(text[i:i + n]) for i in range(len(text) - n + 1))


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _read(path: Path) -> dict[object, list[str]]:
    """Texts by their ids, in the order of the file."""
    found = {}
    for number, row in enumerate(_rows(path)):
        key, text = (next((row[name] for name in names if name in row), None) for names in (IDS, TEXTS))
        texts = text if isinstance(text, list) else [text]
        if key is None or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: row {number} has the id {key!r} and the text {text!r}; one of {', '.join(IDS)} "
                             f"and one of {', '.join(TEXTS)} fit")
        found.setdefault(str(key), []).extend(texts)
    if not found:
        raise ValueError(f"{path} holds no captions; a .json or .jsonl of objects fits")
    return found


def _rows(path: Path) -> Iterator[dict]:
    if Path(path).suffix == ".jsonl":
        yield from (row for _, row in read_json_lines(path))
        return
    held = read_json_value(path, "a .json list, COCO's captions or a .jsonl fits")
    rows = held.get("annotations") if isinstance(held, dict) else held
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of objects; a .json list, COCO's captions or a .jsonl fits")
    yield from rows
