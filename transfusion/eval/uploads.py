"""Answers in files: as LLaVA's scripts write them, and as a benchmark's server or own script wants them."""
import csv
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from transfusion.eval.benchmarks import needed
from transfusion.files import read_json_lines, write_text, written

Answered = list[tuple[dict, str]]
"""a row of rows.jsonl and the answer, for each question"""
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
"""columns of MMBench's table that its server does not want"""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
"""characters that no cell of a workbook may hold"""


def write_answers(out: Path, name: str, answers: Answered, model: str) -> Path:
    """Write OUT/answers/NAME.jsonl, which LLaVA's own scripts read, such as eval_gpt_review_bench.py."""
    path = out / "answers" / f"{name}.jsonl"
    lines = (json.dumps({"question_id": row["id"], "prompt": row["prompt"], "text": text, "answer_id": f"{name}-{at}",
                         "model_id": model, "metadata": {}}, ensure_ascii=False)
             for at, (row, text) in enumerate(answers))
    write_text(path, "\n".join(lines) + "\n")
    return path


def write_upload(out: Path, name: str, answers: Answered, folder: Path) -> Path | None:
    """Write what a benchmark's server wants into OUT/upload, as LLaVA's conversion scripts do; None: there is none.

    folder: the benchmark's, whose questions or table are copied where the server wants them all.
    """
    makers = {"vqav2": _vqav2, "vizwiz": _vizwiz, "mmvet": _mmvet, "mmbench": _mmbench, "mmbench_cn": _mmbench}
    return makers[name](out / "upload", name, answers, folder) if name in makers else None


def _vqav2(out: Path, name: str, answers: Answered, folder: Path) -> Path:
    """convert_vqav2_for_submission.py: every question of test2015, those that were not asked with an empty answer."""
    said, clean = {row["id"]: text for row, text in answers}, _cleaner()
    whole = folder / "llava_vqav2_mscoco_test2015.jsonl"
    ids = [held["question_id"] for _, held in read_json_lines(whole)] if whole.is_file() else list(said)
    return _json(out / f"{name}.json",
                 [{"question_id": one, "answer": clean(said[one]) if one in said else ""} for one in ids])


def _vizwiz(out: Path, name: str, answers: Answered, folder: Path) -> Path:
    """convert_vizwiz_for_submission.py."""
    clean = _cleaner()
    return _json(out / f"{name}.json", [{"image": row["image"], "answer": clean(text)} for row, text in answers])


def _mmvet(out: Path, name: str, answers: Answered, folder: Path) -> Path:
    """convert_mmvet_for_eval.py."""
    return _json(out / f"{name}.json", {row["key"]: text for row, text in answers}, indent=2)


def _mmbench(out: Path, name: str, answers: Answered, folder: Path) -> Path:
    """convert_mmbench_for_submission.py: the table without some columns, and with the answers as its seventh."""
    file = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}[name]
    said = {str(row["id"]): text for row, text in answers}
    with open(needed(folder / file, folder.parent / "mmbench" / file), encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t")
        columns = [column for column in table.fieldnames if column not in LEFT_OUT]
        columns.insert(6, "prediction")
        rows = [[int(held["index"]) if column == "index" else said.get(held["index"]) if column == "prediction"
                 else held[column] or None for column in columns] for held in table]
    try:
        workbook = importlib.import_module("openpyxl").Workbook(write_only=True)
    except ImportError as error:
        raise ValueError(f"eval vqa: MMBench's server wants an .xlsx, which needs openpyxl ({error}); "
                         "pip install openpyxl") from error
    sheet = workbook.create_sheet("Sheet1")
    for row in [columns, *rows]:
        sheet.append([CONTROL.sub("", cell) if isinstance(cell, str) else cell for cell in row])
    with written(out / f"{name}.xlsx") as aside:
        workbook.save(aside)
    return out / f"{name}.xlsx"


def _cleaner():
    """EvalAI's cleaning of short answers, which LLaVA's scripts use, too: case, punctuation, articles, numbers."""
    return importlib.import_module("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()


def _json(path: Path, held: Iterable, **options) -> Path:
    write_text(path, json.dumps(held, **options))
    return path
