"""Answers that are kept, files that servers want, and tasks for lmms-eval, without lmms-eval."""
import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.transfusion.conftest import tiny_model
from tests.transfusion.eval import llava_data
from transfusion.cli import main
from transfusion.eval import uploads
from transfusion.eval.asking import AskingSettings
from transfusion.eval.benchmarks import BENCHMARKS
from transfusion.eval.kept_answers import Answers, identity
from transfusion.eval.prepare import task_yaml


def test_answers_are_there_again_for_every_process_and_of_this_model_alone(tmp_path):
    for rank in range(2):
        kept = Answers(tmp_path, "a model", rank)
        kept.keep([(kept.key("gqa", rank), f"answer {rank}")])
    again = Answers(tmp_path, "a model")
    assert [again.known[again.key("gqa", rank)] for rank in range(2)] == ["answer 0", "answer 1"]
    assert Answers(tmp_path, "another").key("gqa", 0) not in again.known


def test_a_torn_line_is_asked_again_and_spoils_no_later_one(tmp_path):
    kept = Answers(tmp_path, "a model")
    kept.keep([("one", "1"), ("two", "2")])
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = Answers(tmp_path, "a model")
    assert again.known == {"one": "1"}
    again.keep([("three", "über")])
    assert Answers(tmp_path, "a model").known == {"one": "1", "three": "über"}


def test_answers_change_with_the_weights_the_way_of_asking_and_the_numbers_type():
    padded, cropped = (AskingSettings(mode=mode, side=8).asking(tiny_model()) for mode in ("pad", "crop"))
    ways = [identity("a", padded, "float32"), identity("b", padded, "float32"), identity("a", cropped, "float32"),
            identity("a", padded, "bfloat16")]
    assert len(set(ways)) == 4


def test_a_mixtures_file_says_how_questions_are_put(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "mix.json").write_text(json.dumps({
        "sources": [{"format": "llava", "path": "rows.json"}], "chat": {"template": "llama_2"},
        "pictures": {"side": 16, "mode": "centre"}}))
    asking = AskingSettings(mixture=tmp_path / "mix.json").asking(tiny_model())
    assert (asking.chat.template, asking.chat.image_position) == ("llama_2", "keep")
    assert (asking.pictures.side, asking.pictures.mode) == (16, "centre")
    with pytest.raises(ValueError, match="mixture is .*; leave template, mode and side out"):
        AskingSettings(mixture=tmp_path / "mix.json", side=8).asking(tiny_model())
    assert AskingSettings().asking(tiny_model()).pictures.side == 8, "without one: the size that the model draws"


def test_servers_get_every_question_cleaned_and_judges_the_answers_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "_cleaner", lambda: str.lower)
    data = llava_data.make(tmp_path / "eval")
    answers = [({"id": 262144006, "prompt": "What?", "image": "x.jpg", "key": "v1_6"}, "A Cat")]
    path = uploads.write_upload(tmp_path, "vqav2", answers, data / "vqav2")
    assert json.loads(path.read_text()) == [
        {"question_id": 262144005, "answer": ""}, {"question_id": 262144006, "answer": "a cat"},
        {"question_id": 262144007, "answer": ""}]
    path = uploads.write_upload(tmp_path, "vizwiz", answers, data / "vizwiz")
    assert json.loads(path.read_text()) == [{"image": "x.jpg", "answer": "a cat"}]
    path = uploads.write_upload(tmp_path, "mmvet", answers, data / "mm-vet")
    assert json.loads(path.read_text()) == {"v1_6": "A Cat"}
    assert uploads.write_upload(tmp_path, "gqa", answers, data / "gqa") is None
    held = json.loads(uploads.write_answers(tmp_path, "gqa", answers, "m").read_text())
    assert (held["question_id"], held["prompt"], held["text"], held["model_id"]) == (262144006, "What?", "A Cat", "m")


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's `!function` as its name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("judge", [False, True])
def test_a_judged_task_is_scored_only_with_a_judge_and_a_servers_never(judge):
    tasks = {name: yaml.load(task_yaml(benchmark, Path("/data"), Path("/tasks"), judge), Loader)
             for name, benchmark in BENCHMARKS.items()}
    unscored = {name for name, task in tasks.items() if task.get("process_results", "").endswith("unscored")}
    assert unscored == {"vqav2", "vizwiz"} | (set() if judge else {"llava_wild", "mmvet"})
    for name, task in tasks.items():
        assert task["task"] == f"{name}_local" and task["dataset_path"] == f"/data/{name}"
        assert task["doc_to_text"] == "prompt" and task["process_docs"] is None
        assert task["generation_kwargs"]["until"] == [], "lmms-eval would stop at an empty line"
        assert "submission" not in str(task.get("metric_list", "")), "it would write into the working directory"


@pytest.mark.parametrize("arguments,message", [
    (["--tasks", "pope"], "POPE is not in .*pope'; transfusion eval prepare --tasks pope writes it there"),
    (["--tasks", "llava12"], "which holds no prepared benchmark"),
    (["--tasks", "gga"], "'gga' is no benchmark; .*did you mean gqa"),
    (["--batch", "0"], "batch is 0; a whole number of at least 1 fits"),
])
def test_settings_that_do_not_fit_end_in_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["eval", "vqa", "--model", "m", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize("verb,package", [("vqa", "lmms_eval"), ("text", "lm_eval")])
def test_without_its_library_a_command_says_how_to_install_it(tmp_path, monkeypatch, verb, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.evaluator", None)
    main(["eval", "prepare", "--data", str(llava_data.make(tmp_path / "eval")), "--out", str(tmp_path / "prepared"),
          "--tasks", "gqa"])
    (tmp_path / "model").mkdir()  # without a model in it: the library is looked for first
    arguments = {"vqa": ["--data", str(tmp_path / "prepared")], "text": ["--tasks", "llama2"]}[verb]
    with pytest.raises(SystemExit, match=r'cannot be imported .*; pip install "tfkernels\[eval\]"'):
        main(["eval", verb, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *arguments])


def test_a_judge_without_a_key_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    main(["eval", "prepare", "--data", str(llava_data.make(tmp_path / "eval")), "--out", str(tmp_path / "prepared"),
          "--tasks", "mmvet"])
    with pytest.raises(SystemExit, match="judge is 'gpt' and OPENAI_API_KEY is not set"):
        main(["eval", "vqa", "--model", "m", "--data", str(tmp_path / "prepared"), "--out", str(tmp_path / "out"),
              "--judge", "gpt"])
