"""A model's language: perplexity against transformers' own model and, where it is installed, lm-eval against both."""
import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.transfusion.conftest import tiny_model
from transfusion.cli import main
from transfusion.eval import text
from transfusion.eval.results import read_results
from transfusion.eval.text import TextSettings, perplexity

TEXT = ", ".join(["a handwritten seven and a handwritten two"] * 8)
QUESTIONS = [{"question": "a handwritten", "choices": ["seven", "two", "eight and one"], "gold": 1},
             {"question": "a", "choices": ["handwritten nine", "nine", "one"], "gold": 0}] * 3
TASK = """task: digits_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """task: digits_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=64)


@pytest.fixture(scope="module")
def plain(model):
    """The same language model as transformers has it."""
    plain = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation="eager").eval()
    plain.load_state_dict(model.backbone.decoder.state_dict())
    return plain


@torch.no_grad()
@pytest.mark.parametrize("text,window,batch", [(TEXT, None, 8), (TEXT, 32, 1), (TEXT, 32, 3), (TEXT[:20], None, 8)])
def test_perplexity_is_that_of_transformers_own_model(model, plain, text, window, batch):
    found = perplexity(model, text, window, batch)
    ids, total, width = model.tokenizer.encode(text, add_special_tokens=False), 0.0, window or 64
    given = [model.tokenizer.bos_token_id, *ids]
    for start in range(0, len(ids), width):
        end = min(start + width, len(ids))
        scores = plain(torch.tensor([given[max(0, end - width):end]])).logits[0].log_softmax(-1)
        total += sum(float(row[one]) for row, one in zip(scores[start - end:], ids[start:end]))
    assert found.tokens == len(ids) and found.log_probability == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-total / len(ids)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-5)


@torch.no_grad()
def test_perplexity_holds_the_logits_of_some_positions_at_once(model, monkeypatch):
    whole, seen, logits = perplexity(model, TEXT, 32, 3), [], model.backbone.logits
    monkeypatch.setattr(text, "POSITIONS", 7)
    monkeypatch.setattr(model.backbone, "logits", lambda states: seen.append(len(states)) or logits(states))
    assert perplexity(model, TEXT, 32, 3).log_probability == pytest.approx(whole.log_probability, rel=1e-6)
    assert max(seen) == 7 and sum(seen) == whole.tokens, "each token is scored once"


@torch.no_grad()
def test_without_the_ids_of_images_it_does_not_depend_on_their_rows(model):
    images = [model.config.boi_token_id, model.config.eoi_token_id]
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight[images] += 1.0
    apart = [perplexity(one, TEXT, 32, without=images).log_probability for one in (model, other)]
    assert apart[0] == apart[1] > perplexity(model, TEXT, 32).log_probability
    assert perplexity(other, TEXT, 32).log_probability != perplexity(model, TEXT, 32).log_probability


def test_a_model_that_gives_no_numbers_has_no_perplexity(model, monkeypatch):
    monkeypatch.setattr(model.backbone, "logits", lambda states: torch.full((len(states), 9999), torch.nan))
    with pytest.raises(ValueError, match="eval text: the model's outputs are not finite numbers; the dtype bf"):
        perplexity(model, TEXT)


def test_the_command_writes_three_results_of_a_file(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXT)
    main(["eval", "text", "--model", str(tmp_path / "model"), "--file", str(tmp_path / "a.txt"), "--window", "32",
          "--out", str(tmp_path / "out")])
    results = {result.metric: result for result in read_results(tmp_path / "out").values()}
    expected = perplexity(model, TEXT, 32)
    assert results["perplexity"].value == pytest.approx(expected.perplexity)
    assert results["word perplexity"].value == pytest.approx(expected.word_perplexity)
    assert results["bits per byte"].value == pytest.approx(expected.bits_per_byte)
    assert all(result.n == expected.tokens and result.weights_hash for result in results.values())
    assert "text a.txt: perplexity" in capsys.readouterr().out


def test_a_text_without_spaces_has_no_word_perplexity_and_ends_of_lines_count_as_the_files_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"an\r\n" + 400 * b"x")
    main(["eval", "text", "--model", str(tmp_path / "model"), "--file", str(tmp_path / "a.txt"),
          "--out", str(tmp_path / "out")])
    results = {result.metric: result for result in read_results(tmp_path / "out").values()}
    found = perplexity(model, "an\r\n" + 400 * "x")
    assert found.word_perplexity == math.inf and results["word perplexity"].value is None
    assert "too few words" in results["word perplexity"].note
    assert results["bits per byte"].value == pytest.approx(-found.log_probability / math.log(2) / 404)


def test_results_of_another_file_of_the_same_name_are_not_written_over(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(TEXT + name)
    arguments = ["eval", "text", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--file"]
    main([*arguments, str(tmp_path / "one" / "a.txt")])
    before = read_results(tmp_path / "out")
    with pytest.raises(SystemExit, match="text-a.txt-bits-per-byte.json is of '.*one/a.txt', and now the data are"):
        main([*arguments, str(tmp_path / "two" / "a.txt")])
    assert read_results(tmp_path / "out") == before
    main([*arguments, str(tmp_path / "one" / "a.txt")])


def test_a_group_of_lm_eval_has_a_result_beside_those_of_its_tasks(model, monkeypatch):
    found = {"results": {"group": {"acc,none": 0.5, "sample_len": 12, "alias": "group"},
                         "task": {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "task"}},
             "n-samples": {"task": {"original": 12, "effective": 9}}, "n-shot": {"task": 0}}
    library = SimpleNamespace(simple_evaluate=lambda *_, bootstrap_iters, **__: bootstrap_iters > 0 and found)
    monkeypatch.setitem(sys.modules, "lm_eval", library)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **_: None))
    monkeypatch.setattr(text, "version_of", lambda package: "0.4.13")
    results = text._of_task(TextSettings(Path("model"), Path("out"), tasks=("group",)), model, None, "group")
    assert [(one.task, one.value, one.n, one.standard_error) for one in results] == [
        ("group", 0.5, 12, None), ("task", 0.25, 9, 0.1)]


@pytest.mark.parametrize("arguments,message", [
    ([], "there are no tasks and no file"),
    (["--file", "words.txt", "--window", "65"], "window is 65 and the model has 64 positions"),
    (["--file", "spaces.txt"], "the text is empty"),
    (["--file", "nowhere.txt"], "nowhere.txt: No such file"),
    (["--file", "binary.txt"], "binary.txt', which is no UTF-8 text"),
    (["--file", "empty.txt"], "the text is empty"),
])
def test_what_does_not_fit_ends_in_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, said in (("empty", ""), ("spaces", " \n"), ("words", TEXT)):
        (tmp_path / f"{name}.txt").write_text(said)
    with pytest.raises(SystemExit, match=message):
        main(["eval", "text", "--model", "model", "--out", "out", *arguments])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks of lm-eval on local rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(TASK % (tmp_path / "questions.jsonl"))
    (tmp_path / "tasks" / "text.yaml").write_text(ROLLING % (tmp_path / "texts.jsonl"))
    return tmp_path / "tasks"


def test_a_task_that_does_not_exist_is_named_before_the_model_is_loaded(tasks, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; docs/evaluation.md says how")
    monkeypatch.setattr(text, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match="'digits_choise' is no task of lm-eval"):
        main(["eval", "text", "--model", str(tmp_path), "--tasks", "digits_text", "digits_choise", "--include",
              str(tasks), "--out", str(tmp_path / "out")])


def test_results_of_a_task_are_written_before_the_next_one_runs(model, tasks, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; docs/evaluation.md says how")
    real, asked = lm_eval.simple_evaluate, []

    def evaluate(decoder, tasks, **options):
        asked.append((tasks, len(read_results(tmp_path / "out"))))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(decoder, tasks=tasks, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="stopped"):
        main(["eval", "text", "--model", str(tmp_path / "model"), "--tasks", "digits_choice", "digits_text",
              "--include", str(tasks), "--out", str(tmp_path / "out")])
    assert asked == [(["digits_choice"], 0), (["digits_text"], 2)]


def test_lm_eval_gives_the_decoder_the_numbers_of_the_same_model_in_transformers(model, plain, tasks, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; docs/evaluation.md says how")
    model.save_pretrained(tmp_path / "model")
    main(["eval", "text", "--model", str(tmp_path / "model"), "--tasks", "digits_choice", "digits_text", "--include",
          str(tasks), "--out", str(tmp_path / "out")])
    results = {(result.task, result.metric): result for result in read_results(tmp_path / "out").values()}
    ours = {name: result.value for name, result in results.items()}
    assert results["digits_choice", "acc"].standard_error is not None
    theirs = lm_eval.simple_evaluate(
        lm_eval.models.huggingface.HFLM(pretrained=plain, tokenizer=model.tokenizer, batch_size=1),
        tasks=["digits_choice", "digits_text"], bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False))["results"]
    expected = {(task, key.split(",")[0]): value for task, metrics in theirs.items() for key, value in metrics.items()
                if "," in key and "stderr" not in key}
    assert len(ours) == 4 and ours == pytest.approx(expected, rel=1e-5)
    rolled = perplexity(model, TEXT)
    assert ours["digits_text", "word_perplexity"] == pytest.approx(rolled.word_perplexity, rel=1e-5)
