"""Scoring where lmms-eval's own would mislead, named by the tasks that `prepare` writes for it.

A judge that does not answer, or answers with no score, makes the whole score NaN: lmms-eval alone would count 0, or -1
out of -1, and go on. POPE is scored as LLaVA's `eval_pope.py` does: lmms-eval's recall leaves out what is neither "yes"
nor "no", of which "Yes." is one, and its share of "yes" is that of the labels.
"""
import importlib
import math
from collections.abc import Iterable

WILD, MMVET = "lmms_eval.tasks.llava-in-the-wild.utils", "lmms_eval.tasks.mmvet.utils"
TEMPERATURES = (0.0, 0.5, 1.0)
"""of a judge that is asked again where its answer was no score"""


def unscored(doc: dict, results: list[str]) -> dict:
    """Keep an answer that a server or somebody else's judge scores."""
    return {"bypass": results[0]}


def pope(doc: dict, results: list[str]) -> dict:
    """Read an answer as LLaVA does: "no" where its first sentence has the word "no", "No" or "not", else "yes"."""
    words = results[0].split(".")[0].replace(",", "").split(" ")
    record = {"category": doc["category"], "known": doc["answer"].strip().lower() == "yes",
              "said": not {"no", "No", "not"} & set(words)}
    return {f"pope_{name}": record for name in ("accuracy", "precision", "recall", "f1_score", "yes_ratio")}


def pope_accuracy(results: list[dict]) -> float:
    """The share of right answers, like all numbers of POPE the mean of its parts (adversarial, popular, random)."""
    return _mean_of_parts(results, lambda part: _share(one["said"] == one["known"] for one in part))


def pope_precision(results: list[dict]) -> float:
    """Of the questions that are answered "yes", the share that "yes" is right for; 0 where there are none."""
    return _mean_of_parts(results, _precision)


def pope_recall(results: list[dict]) -> float:
    """Of the questions that "yes" is right for, the share that is answered so; 0 where there are none."""
    return _mean_of_parts(results, _recall)


def pope_f1(results: list[dict]) -> float:
    """2 precision recall / (precision + recall) of each part."""
    def f1(part):
        precision, recall = _precision(part), _recall(part)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    return _mean_of_parts(results, f1)


def pope_yes(results: list[dict]) -> float:
    """The share of questions that are answered "yes"."""
    return _mean_of_parts(results, lambda part: _share(one["said"] for one in part))


def _precision(part: list[dict]) -> float:
    return _share(one["known"] for one in part if one["said"])


def _recall(part: list[dict]) -> float:
    return _share(one["said"] for one in part if one["known"])


def _mean_of_parts(results: list[dict], score) -> float:
    parts = {}
    for one in results:
        parts.setdefault(one["category"], []).append(one)
    return sum(map(score, parts.values())) / len(parts)


def _share(flags: Iterable[bool]) -> float:
    held = list(flags)
    return sum(held) / len(held) if held else 0.0


def llava_wild(doc: dict, results: list[str]) -> dict:
    """Ask lmms-eval's judge to compare an answer with GPT-4's; scores of all questions and of the answer's kind."""
    held = importlib.import_module(WILD).llava_process_results(doc, results)
    return {name: result for name, result in held.items() if -999 not in result["scores"]}  # its mark of other kinds


def llava_wild_all(results: list[dict]) -> float:
    """The answers' scores in per cent of those of GPT-4's answers, NaN where a judge failed."""
    return _llava_wild(results, "all")


def llava_wild_conv(results: list[dict]) -> float:
    """`llava_wild_all` of conversations."""
    return _llava_wild(results, "conv")


def llava_wild_detail(results: list[dict]) -> float:
    """`llava_wild_all` of detailed descriptions."""
    return _llava_wild(results, "detail")


def llava_wild_complex(results: list[dict]) -> float:
    """`llava_wild_all` of complex reasoning."""
    return _llava_wild(results, "complex")


def _llava_wild(results: list[dict], kind: str) -> float:
    if any(min(result["scores"]) < 0 for result in results):
        return math.nan
    return importlib.import_module(WILD).llava_aggregation(results, kind)


def mmvet(doc: dict, results: list[str]) -> dict:
    """Ask lmms-eval's judge for the score of an answer, from 0 to 1; NaN where it gives none."""
    task = importlib.import_module(MMVET)
    truth = doc["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{task.MM_VET_PROMPT}\n{doc['question']} | {truth} | {results[0]} |"
    score, judge = math.nan, ""
    for temperature in TEMPERATURES:
        said, judge = task.get_chat_response(prompt, temperature=temperature)
        score = _number(said)
        if not said or not math.isnan(score):
            break
    return {"gpt_eval_score": {"question_id": doc["question_id"], "capabilities": doc["capability"], "score": score,
                               "eval_model": judge}}


def mmvet_score(results: list[dict]) -> float:
    """MM-Vet's total in per cent, NaN where a judge failed."""
    if any(math.isnan(result["score"]) for result in results):
        return math.nan
    return importlib.import_module(MMVET).mmvet_aggregate_results(results)


def _number(said: str) -> float:
    """The number from 0 to 1 that a judge's answer begins with, NaN where it does not."""
    try:
        score = float(said.split()[0])
    except (ValueError, IndexError):
        return math.nan
    return score if 0 <= score <= 1 else math.nan
