"""Questions with known answers: what is asked, what counts as right, and what stands beside it."""
import json

import pytest
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from transfusion.cli import main
from transfusion.eval import questions as command
from transfusion.eval.questions import Known, accuracies, is_right, majority, read_known, table
from transfusion.eval.results import Result, read_results, write_result

RED = {"id": "1", "image": "red.png", "kinds": ["colour", "count"], "conversations": [
    {"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red"},
    {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "one"}]}
BOTH = {"id": "2", "image": ["red.png", "blue.png"], "kinds": ["colour"], "conversations": [
    {"from": "human", "value": "<image>\n<image>\nWhich colour has the second?"}, {"from": "gpt", "value": "blue"}]}
TEXT = {"id": "3", "kinds": ["words"], "conversations": [
    {"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "word"}]}


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "blue"):
        Picture.new("RGB", (9, 7), name).save(tmp_path / f"{name}.png")
    (tmp_path / "held-out.json").write_text(json.dumps([RED, BOTH, TEXT]))
    return tmp_path


class FromTable:
    """Answers from a table of questions, and counts the pictures that it was shown."""

    def __init__(self, said):
        self.said, self.pictures, self.turn_end = said, [], ""

    def __call__(self, model, asking):
        self.asking = asking
        return self

    def answers(self, questions, *, max_new_tokens):
        self.pictures += [len(question.pictures) for question in questions]
        return [self.said[question.text] if question.pictures else "red" for question in questions]


def run(folder, monkeypatch, *flags, said=None):
    asker = FromTable(said or {"Which colour?": "red.", "How many?": "two", "Which colour has the second?": " Blue"})
    monkeypatch.setattr(command, "Asker", asker)
    monkeypatch.setattr(command, "load_model", lambda path, device: tiny_model())
    (folder / "model").mkdir(exist_ok=True)
    main(["eval", "questions", "--model", str(folder / "model"), "--data", str(folder / "held-out.json"),
          "--out", str(folder / "out"), *flags])
    return asker


def test_each_question_is_asked_alone_behind_all_pictures_of_its_conversation(folder):
    known = read_known(folder / "held-out.json", None)
    assert [(one.kind, one.text, len(one.pictures), one.answer) for one in known] == [
        ("colour", "Which colour?", 1, "Red"), ("count", "How many?", 1, "one"),
        ("colour", "Which colour has the second?", 2, "blue"), ("words", "Say a word.", 0, "word")]
    assert [picture.size for picture in known[2].question(True).pictures] == [(9, 7), (9, 7)]
    assert known[2].question(False).pictures == () and not any(one.question(True).shown_last for one in known[:3])


def test_accuracy_is_told_for_each_kind_beside_who_does_not_look(folder, monkeypatch, capsys):
    asker = run(folder, monkeypatch, "--blind")
    assert sorted(asker.pictures) == [0, 0, 0, 0, 1, 1, 2], "the question without pictures is asked once"
    results = {result.metric: result for result in read_results(folder / "out").values()}
    assert {metric: (result.value, result.n) for metric, result in results.items()} == {
        "accuracy, colour": (1.0, 2), "accuracy, count": (0.0, 1), "accuracy, words": (0.0, 1)}
    assert results["accuracy, colour"].details == {
        "data": str(folder / "held-out.json"), "majority": 0.5, "blind": 0.5}
    lines = [json.loads(line) for line in (folder / "out" / "questions.jsonl").read_text().splitlines()]
    assert lines[1] | {"where": ""} == {
        "where": "", "kind": "count", "question": "How many?", "answer": "one", "right": "two", "blind": "red",
        "majority": "one"}
    with Picture.open(folder / "out" / "questions.png") as sheet:
        assert sheet.width > 500
    assert "colour" in capsys.readouterr().out


def test_a_question_on_the_other_side_of_its_picture_is_another_question(folder, monkeypatch):
    rows = [{"id": text, "image": "red.png", "conversations": [
        {"from": "human", "value": text}, {"from": "gpt", "value": "red"}]}
            for text in ("<image>\nWhich colour?", "Which colour?\n<image>")]
    (folder / "held-out.json").write_text(json.dumps(rows))
    assert run(folder, monkeypatch).pictures == [1, 1]


def test_the_majoritys_answer_is_that_of_the_training_data_where_they_are_named():
    known = [Known("count", "", (), answer, "") for answer in ("one", "two", "two")]
    train = [Known("count", "", (), answer, "") for answer in ("three", "one", "one")]
    assert majority(known, known) == ["two"] * 3
    assert majority(known, train) == ["one"] * 3
    assert majority(known, [Known("place", "", (), "left", "")]) == [""] * 3


def test_the_majoritys_answer_counts_answers_as_one_that_are_right_for_each_other():
    said = ("No", "No", "No", "Yes", "yes", "yes.", " Yes.")
    known = [Known("there", "", (), answer, "") for answer in said]
    assert accuracies(known, {"majority": majority(known, known)})["there"]["majority"] == 4 / 7


def test_what_is_asked_is_never_written_over_and_kinds_that_are_gone_have_no_result(folder, monkeypatch):
    run(folder, monkeypatch)
    (folder / "held-out.json").write_text(json.dumps([TEXT]))
    run(folder, monkeypatch)
    assert [result.metric for result in read_results(folder / "out").values()] == ["accuracy, words"]
    (folder / "other").mkdir()
    (folder / "held-out.json").rename(folder / "other" / "held-out.json")
    for flags, said in ((("--data", str(folder / "other" / "held-out.json")), "of '.*held-out.json', and now the data"),
                        (("--data", str(folder / "out" / "questions.jsonl")), "data is .* would write over"),
                        (("--data", str(folder / "other" / "held-out.json"), "--train",
                          str(folder / "out" / "questions.jsonl")), "train is .* would write over")):
        before = {path: path.read_bytes() for path in (folder / "out").rglob("*.json*")}
        with pytest.raises(SystemExit, match=said):
            run(folder, monkeypatch, *flags)
        assert before == {path: path.read_bytes() for path in (folder / "out").rglob("*.json*")}


def test_results_of_a_benchmark_whose_name_the_file_has_stay(folder, monkeypatch):
    write_result(folder / "out", Result("pope", "pope_f1_score", 0.5, 4, "lmms-eval", "0.7.3", 1.0))
    (folder / "held-out.json").rename(folder / "pope.json")
    run(folder, monkeypatch, "--data", str(folder / "pope.json"))
    assert {result.task for result in read_results(folder / "out").values()} == {"pope", "questions pope"}


@pytest.mark.parametrize("answer,right", [("A  red apple.", True), ("a red apple", True), ("a red apple .", True),
                                          ("red apple", False), ("", False)])
def test_case_white_space_and_a_full_stop_are_no_errors(answer, right):
    assert is_right(answer, "a red apple") == right


def test_a_picture_that_cannot_be_read_leaves_its_questions_out(folder, monkeypatch, capfd):
    (folder / "blue.png").write_bytes(b"no picture")
    run(folder, monkeypatch)
    assert sum(result.n for result in read_results(folder / "out").values()) == 3
    said = capfd.readouterr()
    assert "left out: " in said.out + said.err and "blue.png" in said.out + said.err
    assert all("1 of 4 questions left out: a picture cannot be read, or" in result.note
               for result in read_results(folder / "out").values())


def test_a_question_that_fills_the_models_positions_is_left_out(folder, monkeypatch):
    long = dict.fromkeys(("Which colour?", "Which colour has the second?"), "red") | {"How many?": None}
    run(folder, monkeypatch, said=long)
    assert {(result.metric, result.n, "1 of 4 questions left out" in result.note)
            for result in read_results(folder / "out").values()} == {
        ("accuracy, colour", 2, True), ("accuracy, words", 1, True)}


def test_an_evaluation_that_was_stopped_asks_what_is_missing_alone(folder, monkeypatch):
    asked, stops = [], iter([False, False, True])

    def answers(self, questions, *, max_new_tokens):
        if next(stops, False):
            raise KeyboardInterrupt
        asked.extend(question.text for question in questions)
        return ["red"] * len(questions)

    monkeypatch.setattr(FromTable, "answers", answers)
    with pytest.raises(SystemExit, match="stopped"):
        run(folder, monkeypatch, "--batch", "1")
    run(folder, monkeypatch, "--batch", "1")
    assert sorted(asked) == sorted(one.text for one in read_known(folder / "held-out.json", None))
    run(folder, monkeypatch, "--batch", "1", "--side", "16")
    assert len(asked) == 8, "pictures of another size are other questions"


def test_pictures_are_shown_as_large_as_the_model_draws_and_the_results_say_how(folder, monkeypatch):
    asker = run(folder, monkeypatch)
    assert (asker.asking.pictures.side, asker.asking.pictures.mode) == (8, "pad")
    assert {(result.resize, result.prompts.split("; ")[1]) for result in read_results(folder / "out").values()} == {
        ("pad, side 8", "template vicuna_v1")}
    assert all("its conversation, behind them;" in result.prompts for result in read_results(folder / "out").values())
    run(folder, monkeypatch, "--side", "16", "--mode", "crop", "--template", "plain")
    assert {(result.resize, result.prompts.split("; ")[1]) for result in read_results(folder / "out").values()} == {
        ("crop, side 16", "template plain")}


def test_errors_are_compared_with_the_better_of_those_that_do_not_look():
    known = [Known("colour", "", (), answer, "") for answer in ("red", "red", "blue", "blue")]
    scores = accuracies(known, {"right": ["red", "red", "blue", "red"], "majority": ["red"] * 4,
                                "blind": ["blue", "blue", "red", "red"]})
    assert scores == {"colour": {"n": 4, "right": 0.75, "majority": 0.5, "blind": 0.0}}
    assert table(scores).splitlines()[1].split() == ["colour", "4", "75.0%", "50.0%", "0.0%", "0.50x"]


def test_kinds_that_are_not_one_for_each_question_are_refused_with_their_row(folder):
    (folder / "held-out.json").write_text(json.dumps([TEXT, RED | {"kinds": ["colour"]}]))
    with pytest.raises(ValueError, match=r"held-out.json, row 1: kinds is \['colour'\] and there are 2 questions"):
        read_known(folder / "held-out.json", None)


@pytest.mark.parametrize("kind", [None, 3, ["colour"], " ", "\udce9"])
def test_a_kind_that_is_no_word_is_refused_before_anything_is_asked(folder, kind):
    (folder / "held-out.json").write_text(json.dumps([RED, TEXT | {"kinds": [kind]}]))
    with pytest.raises(ValueError, match="held-out.json, row 1: a kind is "):
        read_known(folder / "held-out.json", None)


def test_training_data_that_cannot_be_read_are_refused_before_anything_is_asked(folder, monkeypatch):
    with pytest.raises(SystemExit, match="error: llava: path is .*none.json"):
        run(folder, monkeypatch, "--train", str(folder / "none.json"))
    assert not (folder / "out").exists()


def test_a_model_answers_from_a_checkpoint(folder, capsys):
    tiny_model().save_pretrained(folder / "tiny")
    (folder / "mix.yaml").write_text("pictures: {side: 8}\nsources: [{format: llava, path: held-out.json}]\n")
    main(["eval", "questions", "--model", str(folder / "tiny"), "--data", str(folder / "held-out.json"),
          "--out", str(folder / "out"), "--mixture", str(folder / "mix.yaml"), "--max-new-tokens", "3"])
    assert len(read_results(folder / "out")) == 3
