"""Benchmarks through lmms-eval's own scoring: full marks for the truths, none for a failed judge. Needs lmms-eval.

`pip install lm-eval`, then `pip install --no-deps lmms-eval tenacity "filelock<4" openpyxl`.
"""
import json
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import setuptools
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import in_training, tiny_model
from tests.transfusion.eval import llava_data
from tests.transfusion.eval.llava_data import TRUTHS
from transfusion.cli import main
from transfusion.eval.asking import Asker
from transfusion.eval.report import llava_rows
from transfusion.eval.results import Result, read_results, write_result

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; docs/evaluation.md says how")
lmms_model = import_module("transfusion.eval.lmms_model")
judged = import_module("transfusion.eval.judged")
SHORT = ["--max-new-tokens", "4", "--batch", "3"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a tiny model in model/ and all twelve benchmarks in prepared/."""
    folder = tmp_path_factory.mktemp("lmms")
    tiny_model().save_pretrained(folder / "model")
    main(["eval", "prepare", "--data", str(llava_data.make(folder / "eval")), "--out", str(folder / "prepared")])
    return folder


def evaluate(prepared, out, *arguments):
    """Run `transfusion eval vqa`; return its results."""
    main(["eval", "vqa", "--model", str(prepared / "model"), "--data", str(prepared / "prepared"), "--out", str(out),
          *arguments])
    return read_results(out)


@pytest.fixture
def knowing(monkeypatch):
    """The model gives the true answers; a list of the batches that it was asked."""
    batches = []

    def answers(self, questions, **options):
        batches.append(questions)
        names = [question.where.removesuffix(f"_local, row {question.where.split()[-1]}") for question in questions]
        return [TRUTHS[name][int(question.where.split()[-1]) % len(TRUTHS[name])]
                for name, question in zip(names, questions)]

    monkeypatch.setattr(Asker, "answers", answers)
    return batches


def test_true_answers_get_full_marks_from_the_scoring_of_every_benchmark(prepared, tmp_path, knowing, capsys):
    results = evaluate(prepared, tmp_path)
    scores = {name: result.value for name, result in results.items()}
    assert scores == {
        "gqa-exact_match": 1.0, "scienceqa_img-exact_match": 1.0, "textvqa-exact_match": 1.0, "pope-pope_accuracy": 1.0,
        "pope-pope_precision": 1.0, "pope-pope_recall": 1.0, "pope-pope_f1_score": 1.0, "pope-pope_yes_ratio": 0.5,
        "mme-mme_perception_score": 400.0, "mmbench-accuracy": 100.0, "mmbench_cn-accuracy": 100.0,
        "seedbench-seed_all": 1.0, "seedbench-seed_image": 1.0, "seedbench-seed_video": 1.0,
        "vqav2-score": None, "vizwiz-score": None, "llava_wild-score": None, "mmvet-score": None}
    assert all(result.library == "lmms-eval" and result.weights_hash and result.prompts for result in results.values())
    assert "a judge scores it, and none was asked" in results["llava_wild-score"].note
    assert "eval.ai, challenge 830 scores upload/vqav2.json" in results["vqav2-score"].note
    assert "POPE: pope_f1_score 1.0000 of 4" in capsys.readouterr().out
    published, own = llava_rows(results)
    assert [cell.rstrip("*") for cell in own[1:]] == ["no score", "100.0", "no score", "100.0", "100.0", "100.0",
                                                     "400.0", "100.0", "100.0", "100.0", "no score", "no score"]


def test_what_servers_want_is_written_as_llavas_scripts_write_it(prepared, tmp_path, knowing):
    evaluate(prepared, tmp_path, "--tasks", "vqav2", "vizwiz", "mmvet", "mmbench", "llava_wild")
    upload = tmp_path / "upload"
    assert json.loads((upload / "vqav2.json").read_text()) == [  # the third is of test2015, not of test-dev
        {"question_id": 262144005, "answer": "cat"}, {"question_id": 262144006, "answer": "2"},
        {"question_id": 262144007, "answer": ""}]
    assert json.loads((upload / "vizwiz.json").read_text()) == [
        {"image": "VizWiz_test_0.jpg", "answer": "unanswerable"}, {"image": "VizWiz_test_1.jpg", "answer": "coke"}]
    assert json.loads((upload / "mmvet.json").read_text()) == {"v1_0": "red", "v1_1": "4"}
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed; the eval extra brings it")
    rows = list(openpyxl.load_workbook(upload / "mmbench.xlsx").active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [(row[0], row[6]) for row in rows[1:]] == [(241, "B"), (242, "A")]
    answers = [json.loads(line) for line in (tmp_path / "answers" / "llava_wild.jsonl").read_text().splitlines()]
    assert [(answer["question_id"], answer["prompt"], answer["text"]) for answer in answers] == [
        (0, "Describe 0.", "A red square."), (1, "Describe 1.", "It is a square.")]


def test_wrong_answers_get_none(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Asker, "answers", lambda self, questions, **_: ["dunno"] * len(questions))
    results = evaluate(prepared, tmp_path, "--tasks", "gqa", "scienceqa_img", "textvqa", "mme", "mmbench", "mmbench_cn",
                       "seedbench")
    scores = {name: result.value for name, result in results.items()}
    assert len(scores) == 9 and not any(scores.values())


def test_of_pope_an_answer_is_yes_that_does_not_say_no_and_empty_ones_too(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Asker, "answers", lambda self, questions, **_: [
        "There is not." if question.where.endswith((" 0", " 1")) else "Yes." for question in questions])
    results = evaluate(prepared, tmp_path, "--tasks", "pope")
    scores = {name.removeprefix("pope-pope_"): result.value for name, result in results.items()}
    # known are yes, no and no, yes: the first part is right about its no, the second about its yes
    assert scores == {"accuracy": 0.5, "precision": 0.25, "recall": 0.5, "f1_score": pytest.approx(1 / 3),
                      "yes_ratio": 0.5}


def test_an_evaluation_that_was_stopped_goes_on_where_it_stood(prepared, tmp_path, knowing, monkeypatch):
    real, stops = Asker.answers, iter([False, False, True])

    def answers(self, questions, **options):
        if next(stops, False):
            raise KeyboardInterrupt
        return real(self, questions, **options)

    monkeypatch.setattr(Asker, "answers", answers)
    with pytest.raises(SystemExit, match="stopped"):
        evaluate(prepared, tmp_path, "--tasks", "pope", "--batch", "1")
    assert len(knowing) == 2
    (tmp_path / "kept" / "answers-0.jsonl").open("ab").write(b'{"key": "torn')
    scores = evaluate(prepared, tmp_path, "--tasks", "pope", "--batch", "1")
    assert len(knowing) == 4 and scores["pope-pope_accuracy"].value == 1.0
    evaluate(prepared, tmp_path, "--tasks", "pope", "--batch", "1")
    assert len(knowing) == 4, "all answers are kept"


def test_a_limit_is_said_and_cuts_no_pair_of_questions(prepared, tmp_path, knowing):
    results = evaluate(prepared, tmp_path, "--tasks", "pope", "mme", "--limit", "1")
    pope, mme = results["pope-pope_accuracy"], results["mme-mme_perception_score"]
    assert (pope.n, pope.note) == (1, "the first 1 of 4 questions alone")
    assert (mme.n, mme.value, mme.note) == (2, 200.0, "the first 2 of 4 questions alone")


def test_a_random_model_really_answers_alone_and_in_two_processes(prepared, tmp_path):
    tasks = ["--tasks", "gqa", "pope", "--limit", "3", *SHORT]  # of POPE one process has two questions, one has one
    evaluate(prepared, tmp_path / "one", "--device", "cpu", *tasks)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671", "-m",
         "transfusion.cli", "eval", "vqa", "--model", str(prepared / "model"), "--data", str(prepared / "prepared"),
         "--out", str(tmp_path / "two"), "--device", "cpu", *tasks],
        check=True, timeout=300, cwd=Path(__file__).parents[3])
    for name in ("gqa", "pope"):
        one, two = ((tmp_path / run / "answers" / f"{name}.jsonl").read_text() for run in ("one", "two"))
        assert one == two and all(json.loads(line)["text"] for line in one.splitlines())
    assert {path.name for path in (tmp_path / "two" / "kept").iterdir()} == {"answers-0.jsonl", "answers-1.jsonl"}


def test_a_judge_that_fails_at_one_answer_makes_no_score(prepared, tmp_path, knowing, monkeypatch):
    """lmms-eval's own MM-Vet counts 0 for it, and its LLaVA-Wild -1 of -1."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    mmvet = import_module(judged.MMVET)
    monkeypatch.setattr(mmvet, "get_chat_response", lambda prompt, **_: ("0.8", "judge") if "| red |" in prompt
                        else ("", ""))
    wild = import_module(judged.WILD)

    def reviewed(doc, results):
        scores = [8.0, 6.0] if doc["category"] == "conv" else [-1, -1]
        kinds = {kind: {"scores": scores if kind in (doc["category"], "all") else [-999, -999]}
                 for kind in ("all", "conv", "detail", "complex")}
        return {f"gpt_eval_llava_{kind}": held for kind, held in kinds.items()}

    monkeypatch.setattr(wild, "llava_process_results", reviewed)
    results = evaluate(prepared, tmp_path, "--tasks", "mmvet", "llava_wild", "--judge", "judge-1")
    assert results["mmvet-gpt_eval_score"].value is None
    assert "the judge failed" in results["mmvet-gpt_eval_score"].note
    assert results["mmvet-gpt_eval_score"].judge == "judge-1"
    wild = {name.removeprefix("llava_wild-gpt_eval_llava_"): result.value for name, result in results.items()
            if name.startswith("llava_wild")}
    assert wild == {"all": None, "conv": 75.0, "detail": None}, "no question is of complex reasoning"


def test_a_result_counts_the_questions_that_its_metric_is_of(prepared, tmp_path, knowing):
    results = evaluate(prepared, tmp_path, "--tasks", "seedbench")
    counts = {name.removeprefix("seedbench-seed_"): result.n for name, result in results.items()}
    assert counts["all"] == counts["image"] + counts["video"] and 0 < counts["image"] < counts["all"]


def test_questions_that_fill_the_models_positions_have_empty_answers_and_are_counted(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Asker, "answers", lambda self, questions, **_: [
        None if question.where.endswith(" 1") else "yes" for question in questions])
    results = evaluate(prepared, tmp_path, "--tasks", "pope")
    assert {result.note for result in results.values()} == {"1 questions fill the model's positions: empty answers"}
    lines = (tmp_path / "answers" / "pope.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["yes", "", "yes", "yes"]


def test_answers_without_a_score_leave_no_older_score_beside_them(prepared, tmp_path, knowing):
    write_result(tmp_path, Result("mmvet", "gpt_eval_score", 31.1, 218, "lmms-eval", "0.7.3", 9.0, judge="judge-1"),
                 "mmvet-gpt_eval_score")
    assert set(evaluate(prepared, tmp_path, "--tasks", "mmvet")) == {"mmvet-score"}


def test_a_judge_that_answers_is_counted(monkeypatch):
    mmvet, asked = import_module(judged.MMVET), []

    def judge(prompt, temperature):
        asked.append(temperature)
        return ("perhaps" if temperature == 0 else "0.5 of it"), "judge"

    monkeypatch.setattr(mmvet, "get_chat_response", judge)
    doc = {"question": "what?", "answer": "a<AND>b", "question_id": "v1_0", "capability": "rec"}
    record = judged.mmvet(doc, ["a"])["gpt_eval_score"]
    assert record["score"] == 0.5 and asked == [0.0, 0.5]
    assert judged.mmvet_score([record, {**record, "score": 1.0}]) == 75.0


def test_lmms_eval_finds_the_model_class_by_the_entry_point_of_setup_py(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(Path(__file__).parents[3] / "setup.py"))
    entry, = given["entry_points"]["lmms_eval.models"]
    name, _, target = entry.replace(" ", "").partition("=")
    module, _, function = target.partition(":")
    manifest, = getattr(import_module(module), function)()
    assert (name, manifest.model_id) == ("transfusion", "transfusion")
    module, _, cls = manifest.simple_class_path.rpartition(".")
    assert getattr(import_module(module), cls) is lmms_model.TransfusionModel


class Request:
    """One of lmms-eval's requests."""

    def __init__(self, *args):
        self.args = args


def a_model(prepared, **options):
    model = lmms_model.TransfusionModel(str(prepared / "model"), device="cpu", **options)
    red = llava_data.picture(prepared / "red.png")
    pictures = [Picture.open(red).convert("RGB"), Picture.new("RGB", (20, 30), "blue")]
    model.task_dict = {"task": {"test": [{"pictures": pictures[:i], "choice": word}
                                         for i, word in enumerate(("one", "two", "seven"))]}}
    return model


def test_requests_of_any_options_come_back_in_order_with_their_pictures_in_order(prepared, monkeypatch):
    model, seen = a_model(prepared, batch_size=2), []

    def answers(self, questions, max_new_tokens, stop, **sampling):
        seen.append((len(questions), max_new_tokens, stop, sampling))
        return [f"{question.text}: {[picture.getpixel((0, 0)) for picture in question.pictures]}"
                for question in questions]

    monkeypatch.setattr(Asker, "answers", answers)
    options = [{"until": ["\n\n"], "max_new_tokens": 3, "num_beams": 1, "image_aspect_ratio": "original"},
               {"until": "x", "do_sample": True, "temperature": 0.5}, {"until": ["\n\n"], "max_new_tokens": 3}]
    requests = [Request(f"question {i}", options[i], lambda doc: doc["pictures"], i, "task", "test") for i in range(3)]
    assert model.generate_until(requests) == [
        "question 0: []", "question 1: [(255, 0, 0)]", "question 2: [(255, 0, 0), (0, 0, 255)]"]
    assert sorted(seen, key=str) == [(1, 1024, ("x",), {"temperature": 0.5, "top_p": 1.0}),
                                     (2, 3, ("\n\n",), {})]


CHOICE = """include: {task}
task: choice_local
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
lmms_eval_specific_kwargs: null
"""


@pytest.mark.parametrize("right,accuracy", [(-1.0, 1.0), (-9.0, 0.0)])
def test_of_given_answers_lmms_eval_takes_the_one_that_is_likeliest_by_its_tokens(prepared, tmp_path, monkeypatch,
                                                                                 right, accuracy):
    task = Path(import_module("lmms_eval").__path__[0]) / "tasks" / "seedbench" / "seedbench_ppl.yaml"
    (tmp_path / "choice.yaml").write_text(CHOICE.format(task=task, data=prepared / "prepared" / "seedbench"))

    def likelihoods(self, questions, answers):
        truths = [TRUTHS["seedbench"][int(question.where.split()[-1])].lower() for question in questions]
        return [lmms_model.Likelihood(3 * (right if answer == truth else -5.0), False, 3)
                for truth, answer in zip(truths, answers)]

    monkeypatch.setattr(Asker, "likelihoods", likelihoods)
    manager = import_module("lmms_eval.tasks").TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = import_module("lmms_eval.evaluator").simple_evaluate(
        lmms_model.TransfusionModel(str(prepared / "model"), batch_size=3, device="cpu"), tasks=["choice_local"],
        task_manager=manager, bootstrap_iters=0)
    assert found["results"]["choice_local"]["acc,none"] == accuracy


def test_losses_of_given_answers_are_those_of_the_asker(prepared):
    model = a_model(prepared, batch_size=2)
    requests = [Request("which?", lambda doc: doc["choice"], lambda doc: doc["pictures"], i, "task", "test")
                for i in range(3)]
    found = model.loglikelihood(requests)
    asked = [lmms_model.Question("which?", tuple(model.task_dict["task"]["test"][i]["pictures"])) for i in range(3)]
    expected = [model.asker.likelihoods([question], [answer])[0]
                for question, answer in zip(asked, ("one", "two", "seven"))]
    for (loss, greedy), one in zip((result.text for result in found), expected):
        assert loss == pytest.approx(-one.log_probability / one.tokens, rel=1e-4) and greedy == one.greedy


@pytest.mark.parametrize("options,message", [
    ({"sides": 8}, "sides is no option of the model; .* fit; did you mean side"),
    ({"batch_size": 0}, "batch_size is 0; a whole number of at least 1 fits"),
    ({"dtype": "int8"}, "dtype is 'int8'; one of 'float32'"),
    ({"template": "vicuna"}, "template is 'vicuna'; one of 'vicuna_v1'"),
])
def test_an_option_of_the_model_that_does_not_fit_is_named(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        lmms_model.TransfusionModel(str(prepared / "model"), device="cpu", **options)


def test_an_adapters_directory_is_a_model_with_the_adapter_in_it(prepared, tmp_path):
    tuned = in_training(tiny_model(), "lora")
    tuned.peft_config["default"].base_model_name_or_path = str(prepared / "model")
    tuned.save_pretrained(tmp_path / "adapter")
    question = lmms_model.Question("a seven?", (Picture.new("RGB", (20, 30), "blue"),))
    adapter, base = (lmms_model.TransfusionModel(str(path), device="cpu").asker.likelihoods([question], ["two"])[0]
                     for path in (tmp_path / "adapter", prepared / "model"))
    merged = tuned.eval().merge_and_unload()
    expected, = Asker(merged, a_model(prepared).asker.asking).likelihoods([question], ["two"])
    assert adapter.log_probability == pytest.approx(expected.log_probability, rel=1e-5)
    assert abs(adapter.log_probability - base.log_probability) > 1e-3


def test_weights_are_loaded_in_the_type_that_is_asked_for(prepared):
    assert a_model(prepared, dtype="bfloat16").asker.model.dtype == torch.bfloat16
