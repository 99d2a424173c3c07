"""Accuracy on questions of one's own whose answers are known: `transfusion eval questions --model DIR --data FILE`.

The file is what training reads, rows in LLaVA's format (`transfusion.data.sources.llava`). Each question is asked
alone, behind the pictures of its conversation, or before them if its first question stands there and the chat keeps
pictures in their places. An answer is right if it equals the known one but for case, white space and a full stop. A row
may name the kinds of its questions, `"kinds": ["count", "place"]`; accuracy is told for each.

Two that do not look stand beside the model: the answer that is the most frequent of its kind (in `train`, where that is
named), and with --blind the model itself without the pictures.

    OUT/results/...json         accuracy of each kind, as `transfusion eval report` reads it
    OUT/questions.jsonl         every question with its answers
    OUT/questions.png           some that were answered right, and some that were not
    OUT/kept/                   answers as they come: the same command goes on after a stop
"""
import hashlib
import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from PIL import Image as Picture
from tqdm import tqdm
from tyro.conf import arg

from transfusion.command import check_not_written, claim
from transfusion.data.picture_files import open_picture
from transfusion.data.sources.fields import string
from transfusion.data.sources.llava import LLaVASettings
from transfusion.data.sources.record import DataError, PictureRef, Record
from transfusion.eval.asking import Asker, AskingSettings, Question
from transfusion.eval.kept_answers import Answers, identity
from transfusion.eval.picture_grids import answer_sheet
from transfusion.eval.results import (
    Result,
    check_same_data,
    remove_results,
    version_of,
    weights_hash,
    write_result,
)
from transfusion.eval.settings import ModelSettings
from transfusion.files import write_text
from transfusion.model.loading import load_model
from transfusion.settings import Count, check

SHOWN = 12  # questions answered right on the sheet, and as many answered wrong
LONGEST = 32  # tokens of an answer, where the settings do not say it
LEFT = "a picture cannot be read, or the question fills the model's positions"
PROMPTS = "each question alone, with the pictures of its conversation, "
SIDES = {"keep": "on the side of them where its first one is", "front": "behind them"}  # by the chat's image_position


@dataclass(frozen=True)
class QuestionsSettings:
    """Ask a model questions whose answers are known, in LLaVA's format, and count what it answers right."""

    model: Path
    """directory of a checkpoint"""
    data: Path
    """a JSON list or JSON lines of conversations, as training reads them"""
    out: Path
    """directory for results/, questions.jsonl and questions.png"""
    images: Path | None = None
    """the folder that pictures' names start from; none: the one that `data` lies in"""
    train: Path | None = None
    """conversations whose most frequent answer is the majority's; none: those of `data`"""
    blind: bool = False
    """ask everything a second time, without the pictures"""
    batch: Count = 32
    """questions asked at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    loading: Annotated[ModelSettings, arg(name="")] = field(default_factory=ModelSettings)
    asking: Annotated[AskingSettings, arg(name="")] = field(default_factory=AskingSettings)


class Known(NamedTuple):
    """A question and the answer to it."""

    kind: str
    text: str
    pictures: tuple[PictureRef, ...]
    answer: str
    where: str
    shown_last: bool = False
    """the conversation's first question stands before its pictures"""

    def question(self, sees: bool) -> Question:
        """As it is put, with its pictures decoded, or without them.

        Raises:
            DataError: a picture cannot be read.
        """
        if not sees:
            return Question(self.text, (), self.where)
        pictures = tuple(_opened(one, self.where) for one in self.pictures)
        return Question(self.text, pictures, self.where, self.shown_last)


def evaluate_questions(settings: QuestionsSettings) -> dict[str, dict[str, float]]:
    """Run `transfusion eval questions`; return for each kind its accuracies: "right", "majority" and "blind".

    Questions whose pictures cannot be read, or that fill the model's positions, are left out, and their number stands
    in the results' notes.

    Raises:
        ValueError: settings that do not fit, or no question in the data.
    """
    check("eval questions", settings)
    for name in ("data", "train"):
        check_not_written("eval questions", name, getattr(settings, name), settings.out / "questions.jsonl")
    known = read_known(settings.data, settings.images)
    train = None if settings.train is None else read_known(settings.train, None)
    with claim("eval questions", settings.out, {"model": settings.model}, alone=False):
        check_same_data("eval questions", settings.out, _task(settings), settings.data)
        begun = time.monotonic()
        model = settings.loading.cast(load_model(settings.model, settings.device))
        asker = Asker(model, settings.asking.asking(model))
        hashed = weights_hash(settings.model)
        kept = Answers(settings.out / "kept", identity(hashed, asker.asking, str(model.dtype), asker.turn_end))
        answers = {"right": ask(asker, known, True, settings, kept)}
        if settings.blind:
            answers["blind"] = ask(asker, known, False, settings, kept)
        asked = [i for i, answer in enumerate(answers["right"]) if answer is not None]
        if not asked:
            raise ValueError(f"eval questions: data is {str(settings.data)!r}, of which no question can be asked; "
                             "pictures in --images, the folder that their names start from, and questions shorter than "
                             "the model's positions fit")
        left = len(known) - len(asked)
        known = [known[i] for i in asked]
        answers = {name: [said[i] for i in asked] for name, said in answers.items()}
        answers["majority"] = majority(known, train or known)
        scores = accuracies(known, answers)
        note = f"{left:,} of {left + len(known):,} questions left out: {LEFT}" if left else ""
        about = {"weights_hash": hashed, "seconds": time.monotonic() - begun,
                 **asker.asking.about(PROMPTS + SIDES[asker.asking.chat.image_position])}
        _write(settings, known, answers, scores, note, about)
    return scores


def read_known(path: Path, images: Path | None) -> list[Known]:
    """Return the questions of a file of conversations.

    Raises:
        ValueError: a row that is no conversation, with its file and number, `kinds` that do not fit its questions, or
            no question at all.
    """
    source = LLaVASettings(path, images, drawn="none").open()
    known = [one for i in range(len(source))
             for one in _known(source[i], source.table.row(i, frozenset({"kinds"})).get("kinds"))]
    if not known:
        raise ValueError(f"eval questions: {path} has no question with an answer in words; one at least fits")
    return known


def _known(record: Record, kinds: list[str] | None) -> list[Known]:
    """The questions of a conversation that are answered in words."""
    pictures = tuple(part for turn in record.turns for part in turn.parts if isinstance(part, PictureRef))
    said = [turn for turn in record.turns if turn.role != "system"]
    pairs = list(zip(said[::2], said[1::2]))
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != len(pairs)):
        raise DataError(record.where, f"kinds is {kinds!r:.60} and there are {len(pairs)} questions; a list of as many "
                        "words fits")
    for kind in kinds or ():
        if not string(kind, record.where, "a kind").strip():
            raise DataError(record.where, f"a kind is {kind!r}; a word fits")
    words = [["".join(part for part in turn.parts if isinstance(part, str)).strip() for turn in pair]
             for pair in pairs]
    first = [part for turn in said[:1] for part in turn.parts if not isinstance(part, str) or part.strip()]
    shown_last = bool(first) and isinstance(first[0], str) and isinstance(first[-1], PictureRef)
    return [Known(kind, question, pictures, answer, record.where, shown_last)
            for kind, (question, answer) in zip(kinds or ["all"] * len(pairs), words) if answer]


def ask(asker: Asker, known: list[Known], sees: bool, settings: QuestionsSettings, kept: Answers) -> list[str | None]:
    """Return the answer to each question, None where it is left out; those that are kept are not asked."""
    answers: list[str | None] = [None] * len(known)
    most = settings.asking.max_new_tokens or LONGEST
    order = sorted(range(len(known)), key=lambda i: (len(known[i].pictures), len(known[i].text)))  # alike in length
    title = "questions" if sees else "questions, blind"
    with tqdm(total=len(known), desc=title, unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(order), settings.batch):
            batch = order[start:start + settings.batch]
            put = {}
            for i in batch:
                try:
                    put[i] = known[i].question(sees)
                except DataError as error:
                    bar.write(f"left out: {error}")
            keys = {i: kept.key(question.text, [_digest(picture) for picture in question.pictures], most,
                                question.shown_last) for i, question in put.items()}
            new = {keys[i]: question for i, question in put.items() if keys[i] not in kept.known}
            if new:
                kept.keep(zip(new, asker.answers(list(new.values()), max_new_tokens=most)))
            for i, key in keys.items():
                answers[i] = kept.known[key]
            bar.update(len(batch))
    return answers


def majority(known: list[Known], train: list[Known]) -> list[str]:
    """Return for each question the most frequent answer to questions of its kind in `train`, the first of equals.

    Answers count as one that `is_right` takes for one.
    """
    counts = defaultdict(Counter)
    for one in train:
        counts[one.kind][_plain(one.answer)] += 1
    return [counts[one.kind].most_common(1)[0][0] if counts[one.kind] else "" for one in known]


def is_right(answer: str, known: str) -> bool:
    """Whether an answer is the known one but for case, white space and a full stop."""
    return _plain(answer) == _plain(known)


def accuracies(known: list[Known], answers: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Return for each kind the share of right answers of each that answered, and "n", the questions."""
    scores = {}
    for kind in dict.fromkeys(one.kind for one in known):
        places = [i for i, one in enumerate(known) if one.kind == kind]
        right = {name: sum(is_right(said[i], known[i].answer) for i in places) / len(places)
                 for name, said in answers.items()}
        scores[kind] = {"n": len(places), **right}
    return scores


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _task(settings: QuestionsSettings) -> str:
    """The results' task, which no other command's results have: a benchmark, too, may be in a file pope.json."""
    return f"questions {settings.data.stem}"


def _digest(picture: Picture.Image) -> str:
    """What a picture is known by: a hash of what is shown."""
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


def _opened(picture: PictureRef, where: str):
    try:
        return open_picture(picture.open(), picture.name or where)
    except ValueError as error:
        raise DataError(where, str(error), "unreadable picture") from error


def _write(settings: QuestionsSettings, known: list[Known], answers: dict[str, list[str]],
           scores: dict[str, dict[str, float]], left: str, about: dict) -> None:
    """Write results, answers and the sheet, and print the table."""
    lines = ({"where": one.where, "kind": one.kind, "question": one.text, "answer": one.answer,
              **{name: said[i] for name, said in answers.items()}} for i, one in enumerate(known))
    write_text(settings.out / "questions.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    remove_results(settings.out, _task(settings))  # kinds that are no longer asked
    for kind, score in scores.items():
        others = {name: score[name] for name in ("majority", "blind") if name in score}
        write_result(settings.out, Result(
            task=_task(settings), metric=f"accuracy, {kind}", value=score["right"], n=score["n"],
            library="transfusion", version=version_of("transfusion"), model=str(settings.model), **about,
            note="; ".join([*(f"{name} {share:.1%}" for name, share in others.items()), *([left] if left else [])]),
            details={"data": str(settings.data.resolve()), **others}))
    _draw(settings.out / "questions.png", known, answers["right"])
    print(table(scores))


def table(scores: dict[str, dict[str, float]]) -> str:
    """The accuracies as a table, and each kind's errors against those of the better of majority and blind."""
    names = [name for name in ("right", "majority", "blind") if name in next(iter(scores.values()))]
    lines = [f"{'kind':<12}{'n':>7}" + "".join(f"{name:>10}" for name in names) + f"{'errors':>10}"]
    for kind, score in scores.items():
        other = 1 - max(score[name] for name in names[1:])
        errors = f"{(1 - score['right']) / other:>9.2f}x" if other else f"{'-':>10}"
        lines.append(f"{kind:<12}{score['n']:>7,}" + "".join(f"{score[name]:>10.1%}" for name in names) + errors)
    return "\n".join(lines)


def _draw(path: Path, known: list[Known], said: list[str]) -> None:
    """Some questions that were answered right and some that were not, chosen at random."""
    order = random.Random(0).sample(list(zip(known, said)), len(known))
    right = [(one, answer, "") for one, answer in order if is_right(answer, one.answer)]
    wrong = [(one, answer, one.answer) for one, answer in order if not is_right(answer, one.answer)]
    answer_sheet(path, [(one.question(True).pictures, one.text, answer, correction)
                        for one, answer, correction in (*right[:SHOWN], *wrong[:SHOWN])])
