"""The twelve benchmarks of LLaVA-1.5 in the folders of LLaVA's own instructions.

A benchmark's folder lies in `playground/data/eval` and holds a file of questions, whose `text` is the whole prompt as
LLaVA puts it, the pictures, and mostly the answers (haotian-liu/LLaVA, docs/Evaluation.md). A reader yields a `Row` for
each question, with the columns that lmms-eval's scoring of the benchmark asks for.
"""
import base64
import binascii
import csv
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transfusion.data.sources.record import DataError
from transfusion.files import read_json, read_json_lines, read_json_value
from transfusion.settings import nearest

STRING, NUMBER, STRINGS, PICTURE, PICTURES = "string", "int64", "strings", "image", "images"
DIRECTLY = "Answer with the option's letter from the given choices directly."
RELEASED = "the file of the benchmark's release fits"
SHORTLY = "Answer the question using a single word or phrase."


class Missing(ValueError):
    """A file of a benchmark that is not where it was looked for."""


class Row(NamedTuple):
    """One question.

    id: as the benchmark's file has it.
    picture: a file's path, or its bytes.
    columns: what is asked for in scoring, of the kinds in `Benchmark.columns`.
    upload: what a server wants beside the answer.
    """

    where: str
    id: str | int
    prompt: str
    picture: Path | bytes
    columns: dict[str, Any]
    upload: dict[str, Any] = {}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where it lies, how it is read, and what scores it.

    folders: below the folder of all; the first that is there counts.
    task: lmms-eval's task that scores it; None: a server does.
    server: that takes the answers; "" none.
    judge: a language model scores the answers.
    pairs: a question whose partner is missing is left out.
    group: of a row's id, what the rows that are scored together share; None: each row is scored alone.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    read: Callable[[Path], Iterator[Row]]
    columns: dict[str, str]
    task: str | None
    server: str = ""
    judge: bool = False
    pairs: bool = False
    group: Callable[[Any], Any] | None = None
    picture: str = PICTURE
    max_new_tokens: int = 128

    def find(self, data: Path) -> Path:
        """Return the benchmark's folder.

        Raises:
            Missing: there is none; the message names where it was looked for.
        """
        for name in self.folders:
            if (data / name).is_dir():
                return data / name
        raise Missing(f"{self.title}: there is no folder {' or '.join(str(data / name) for name in self.folders)}; "
                      "docs/evaluation.md says what lies there")


def needed(*paths: Path) -> Path:
    """Return the first of these files or folders that is there.

    Raises:
        Missing: none is.
    """
    for path in paths:
        if path.exists():
            return path
    raise Missing(f"{' or '.join(map(str, paths))} is missing; docs/evaluation.md says where it comes from")


def read_list(path: Path, name: str | None = None) -> Iterator[tuple[str, dict]]:
    """Yield the objects of a JSON list, or of the list `name` of an object, each with its file and row for messages.

    Raises:
        ValueError: the file is no JSON.
        DataError: there is no list of objects.
    """
    held = read_json_value(path, RELEASED)
    rows = held if name is None else value(held, name, str(path), (list,))
    if not isinstance(rows, list):
        raise DataError(str(path), f"this is a {type(rows).__name__}; a list fits")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def value(row: dict, name: str, where: str, kinds: tuple[type, ...] = (str,)):
    """Return a field of a row.

    Raises:
        DataError: it is missing or of another kind.
    """
    if not isinstance(row, dict) or name not in row:
        raise DataError(where, f"there is no {name!r}; one fits")
    if not isinstance(row[name], kinds):
        raise DataError(where, f"{name!r} is {row[name]!r:.60}; a {' or '.join(kind.__name__ for kind in kinds)} fits")
    return row[name]


def _asked(path: Path, pictures: Path) -> Iterator[tuple[str, dict, Row]]:
    """Yield the rows of a file of LLaVA's questions, each with its object."""
    for where, held in read_json_lines(path):
        row = Row(where, value(held, "question_id", where, (str, int)), value(held, "text", where),
                  pictures / value(held, "image", where), {})
        yield where, held, row


def _answer_of(answers: dict, key, where: str, source: Path):
    if key not in answers:
        raise DataError(where, f"{source} has no answer to {key!r}; the files of one release fit")
    return answers[key]


def _vqav2(folder: Path) -> Iterator[Row]:
    questions = needed(folder / "llava_vqav2_mscoco_test-dev2015.jsonl")
    for _, _, row in _asked(questions, needed(folder / "test2015")):
        yield row


def _vizwiz(folder: Path) -> Iterator[Row]:
    for _, held, row in _asked(needed(folder / "llava_test.jsonl"), needed(folder / "test")):
        yield row._replace(upload={"image": held["image"]})


def _gqa(folder: Path) -> Iterator[Row]:
    source = needed(folder / "data" / "testdev_balanced_questions.json",
                    folder / "data" / "questions1.2" / "testdev_balanced_questions.json",
                    folder / "data" / "questions" / "testdev_balanced_questions.json")
    answers = read_json(source, RELEASED)
    for where, _, row in _asked(needed(folder / "llava_gqa_testdev_balanced.jsonl"),
                                needed(folder / "data" / "images")):
        truth = _answer_of(answers, str(row.id), where, source)
        yield row._replace(columns={"question": _question(row.prompt), "answer": value(truth, "answer", where)})


def _scienceqa(folder: Path) -> Iterator[Row]:
    """Of the test split the questions with pictures; the pictures lie in images/test."""
    source, asked = needed(folder / "problems.json"), needed(folder / "llava_test_CQM-A.json")
    problems, pictures = read_json(source, RELEASED), needed(folder / "images" / "test")
    for where, held in read_list(asked):
        key, turns = value(held, "id", where), value(held, "conversations", where, (list,))
        if not held.get("image"):
            continue
        question = value(turns[0] if turns else {}, "value", where).replace("<image>", "").strip()
        problem = _answer_of(problems, key, where, source)
        yield Row(where, key, f"{question}\n{DIRECTLY}", pictures / value(held, "image", where), {
            "question": value(problem, "question", where), "choices": value(problem, "choices", where, (list,)),
            "answer": value(problem, "answer", where, (int,)), "hint": problem.get("hint") or ""})


def _textvqa(folder: Path) -> Iterator[Row]:
    source = needed(folder / "TextVQA_0.5.1_val.json")
    truths = {(value(truth, "image_id", where), value(truth, "question", where).lower()): truth
              for where, truth in read_list(source, "data")}
    for where, _, row in _asked(needed(folder / "llava_textvqa_val_v051_ocr.jsonl"), needed(folder / "train_images")):
        question = next((line for line in row.prompt.split("\n") if not line.startswith("Reference OCR token:")), "")
        truth = _answer_of(truths, (row.id, question.lower()), where, source)
        yield row._replace(columns={"question": truth["question"],
                                    "question_id": value(truth, "question_id", where, (int,)),
                                    "answers": value(truth, "answers", where, (list,))})


def _pope(folder: Path) -> Iterator[Row]:
    """Labels stand in coco/coco_pope_KIND.json, in the order of the questions of each kind."""
    labels: dict[str, Iterator] = {}
    for where, held, row in _asked(needed(folder / "llava_pope_test.jsonl"), needed(folder / "val2014")):
        kind = value(held, "category", where)
        source = needed(folder / "coco" / f"coco_pope_{kind}.json")
        label = next(labels.setdefault(kind, read_json_lines(source)), None)
        if label is None:
            raise DataError(where, f"{source} has fewer labels than there are questions; one for each fits")
        place, truth = label
        if _words(value(truth, "text", place)) != _words(_question(row.prompt)):
            raise DataError(where, f"{place} asks {truth['text']!r}; the same question in both files fits")
        yield row._replace(columns={"question": truth["text"], "question_id": str(row.id), "category": kind,
                                    "answer": value(truth, "label", place)})


def _mme(folder: Path) -> Iterator[Row]:
    """Answers stand beside each picture, KIND/NAME.txt or KIND/questions_answers_YN/NAME.txt: question, tab, answer."""
    pictures = needed(folder / "MME_Benchmark_release_version")
    for where, held, row in _asked(needed(folder / "llava_mme.jsonl"), pictures):
        kind, name = str(row.id).split("/")[0], Path(str(row.id)).stem
        source = needed(pictures / kind / "questions_answers_YN" / f"{name}.txt", pictures / kind / f"{name}.txt")
        said = [line.split("\t") for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        truths = {_words(pair[0]): pair[1].strip() for pair in said if len(pair) == 2}
        question = _question(row.prompt)
        yield row._replace(columns={"question": question, "question_id": str(row.id),
                                    "category": held.get("category") or kind,
                                    "answer": _answer_of(truths, _words(question), where, source)})


def _mmbench(file: str, request: str) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        path = needed(folder / file, folder.parent / "mmbench" / file)
        csv.field_size_limit(2**31 - 1)
        with open(path, encoding="utf-8", newline="") as lines:
            table = csv.DictReader(lines, delimiter="\t")
            try:
                for held in table:
                    yield _mmbench_row(held, f"{path}, line {table.line_num}", request)
            except csv.Error as error:
                raise DataError(f"{path}, line {table.line_num}", f"this is no row of a table ({error})") from error

    return read


def _question_number(index: int) -> int:
    """The number of a question that is right if it is with its options in every order; orders count millions."""
    return index % 1_000_000


def _mmbench_row(held: dict, where: str, request: str) -> Row:
    given = {name: "" if _is_none(text) else text for name, text in held.items() if name}
    choices = [f"{letter}. {given[letter]}" for letter in "ABCD" if given.get(letter)]
    prompt = "\n".join(filter(None, (given.get("hint"), value(held, "question", where), *choices, request)))
    try:
        index, picture = int(value(held, "index", where)), base64.b64decode(value(held, "image", where), validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(where, f"its index or picture cannot be read ({error}); a number and base64 fit") from error
    columns = {name: given.get(name, "") for name in ("question", "hint", "A", "B", "C", "D", "answer", "category",
                                                      "source", "split")}
    for letter in "ABCD":
        columns[letter] = columns[letter] or "nan"  # lmms-eval's word for an option that is not there
    return Row(where, index, prompt, picture, columns | {"index": index, "L2-category": given.get("l2-category", "")})


def _seedbench(folder: Path) -> Iterator[Row]:
    source = needed(folder / "SEED-Bench.json")
    truths = {str(value(truth, "question_id", where, (str, int))): truth
              for where, truth in read_list(source, "questions")}
    for where, _, row in _asked(needed(folder / "llava-seed-bench.jsonl"), folder):
        truth = _answer_of(truths, str(row.id), where, source)
        names = "question", "answer", "data_type", "choice_a", "choice_b", "choice_c", "choice_d"
        yield row._replace(columns={"question_id": str(row.id), **{
            name: str(value(truth, name, where, (str, int, float))) for name in names}})


def _llava_wild(folder: Path) -> Iterator[Row]:
    contexts = {value(held, "image", where): value(held, "caption", where)
                for where, held in read_json_lines(needed(folder / "context.jsonl"))}
    source = needed(folder / "answers_gpt4.jsonl")
    references = {value(held, "question_id", where, (str, int)): value(held, "text", where)
                  for where, held in read_json_lines(source)}
    for where, held, row in _asked(needed(folder / "questions.jsonl"), needed(folder / "images")):
        yield row._replace(columns={
            "question": row.prompt, "question_id": str(row.id), "category": value(held, "category", where),
            "gpt_answer": _answer_of(references, row.id, where, source),
            "caption": _answer_of(contexts, held["image"], where, folder / "context.jsonl")})


def _mmvet(folder: Path) -> Iterator[Row]:
    source = needed(folder / "mm-vet.json", folder / "mm-vet" / "mm-vet.json")
    truths = read_json(source, RELEASED)
    for where, _, row in _asked(needed(folder / "llava-mm-vet.jsonl"),
                                needed(folder / "images", folder / "mm-vet" / "images")):
        key = f"v1_{str(row.id).removeprefix('v1_')}"
        truth = _answer_of(truths, key, where, source)
        yield row._replace(upload={"key": key}, columns={
            "question": row.prompt, "question_id": key, "answer": value(truth, "answer", where),
            "capability": ",".join(value(truth, "capability", where, (list,)))})


def _question(prompt: str) -> str:
    """A prompt without LLaVA's request for a short answer."""
    return prompt.replace(SHORTLY, "").strip()


def _words(question: str) -> tuple[str, ...]:
    """What two spellings of one question of MME or POPE share."""
    return tuple(re.findall(r"\S+", question.replace("Please answer yes or no.", "")))


def _is_none(text: str | float | None) -> bool:
    return text is None or isinstance(text, float) and math.isnan(text) or str(text).lower() in ("", "nan", "none")


ID, TEXT = {"question_id": STRING}, {"question": STRING, "answer": STRING}
MMBENCH = {**dict.fromkeys(("question", "hint", "A", "B", "C", "D", "answer", "category", "source", "split",
                            "L2-category"), STRING), "index": NUMBER}
BENCHMARKS = {one.name: one for one in (
    Benchmark("vqav2", "VQAv2", ("vqav2",), _vqav2, {}, None, "eval.ai, challenge 830"),
    Benchmark("gqa", "GQA", ("gqa",), _gqa, TEXT, "gqa/gqa.yaml"),
    Benchmark("vizwiz", "VizWiz", ("vizwiz",), _vizwiz, {}, None, "eval.ai, challenge 1911"),
    Benchmark("scienceqa_img", "ScienceQA-IMG", ("scienceqa",), _scienceqa,
              {"question": STRING, "choices": STRINGS, "answer": NUMBER, "hint": STRING},
              "scienceqa/scienceqa_img.yaml", max_new_tokens=1024),
    Benchmark("textvqa", "TextVQA", ("textvqa",), _textvqa,
              {"question": STRING, "question_id": NUMBER, "answers": STRINGS}, "textvqa/textvqa_val.yaml"),
    Benchmark("pope", "POPE", ("pope",), _pope, {**ID, **TEXT, "category": STRING}, "pope/pope.yaml"),
    Benchmark("mme", "MME", ("MME", "mme"), _mme, {**ID, **TEXT, "category": STRING}, "mme/mme.yaml", pairs=True,
              group=str),
    Benchmark("mmbench", "MMBench", ("mmbench",), _mmbench("mmbench_dev_20230712.tsv", DIRECTLY), MMBENCH,
              "mmbench/mmbench_en_dev_static.yaml", "opencompass.org.cn", max_new_tokens=1024, group=_question_number),
    Benchmark("mmbench_cn", "MMBench-CN", ("mmbench_cn", "mmbench"),
              _mmbench("mmbench_dev_cn_20231003.tsv", "请直接回答选项字母。"), MMBENCH,
              "mmbench/mmbench_cn_dev.yaml", "opencompass.org.cn", max_new_tokens=1024, group=_question_number),
    Benchmark("seedbench", "SEED-Bench", ("seed_bench",), _seedbench,
              {**ID, **TEXT, **dict.fromkeys(("data_type", "choice_a", "choice_b", "choice_c", "choice_d"), STRING)},
              "seedbench/seedbench.yaml", picture=PICTURES),
    Benchmark("llava_wild", "LLaVA-Wild", ("llava-bench-in-the-wild",), _llava_wild,
              {**ID, **dict.fromkeys(("question", "category", "gpt_answer", "caption"), STRING)},
              "llava-in-the-wild/llava-in-the-wild.yaml", judge=True, max_new_tokens=1024),
    Benchmark("mmvet", "MM-Vet", ("mm-vet", "mmvet"), _mmvet, {**ID, **TEXT, "capability": STRING},
              "mmvet/mmvet.yaml", "MM-Vet's notebook or its server", judge=True, max_new_tokens=1024),
)}
GROUP = "llava12"


def chosen(op: str, names: tuple[str, ...]) -> list[Benchmark]:
    """Return the benchmarks of these names; "llava12" is all of them.

    Raises:
        ValueError: an unknown name; the message has the nearest.
    """
    for name in names:
        if name != GROUP and name not in BENCHMARKS:
            raise ValueError(f"{op}: {name!r} is no benchmark; {GROUP}, {', '.join(BENCHMARKS)} "
                             f"fit{nearest(name, (GROUP, *BENCHMARKS))}")
    return [one for name, one in BENCHMARKS.items() if name in names or GROUP in names]
