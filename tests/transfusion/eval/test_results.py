"""Results: what is written is read back, and what does not fit is named by file and field."""
import dataclasses
import hashlib
import json
import subprocess

import pytest

import transfusion
from transfusion.eval.results import (
    Result,
    read_result,
    read_results,
    remove_results,
    result_name,
    version_of,
    weights_hash,
    write_result,
)
from transfusion.files import JOURNAL, SAVED, whole

RESULT = Result("images", "kernel distance", 0.0125, 200, "transfusion", "0.1.0", 3.5, model="runs/a", seed=0,
                standard_error=0.001, details={"subsets": 100}, date="2026-11-29T08:00:00+00:00")


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    path = write_result(tmp_path, RESULT)
    assert path == tmp_path / "results" / "images-kernel-distance.json"
    assert read_result(path) == RESULT and read_results(tmp_path) == {"images-kernel-distance": RESULT}


def test_a_later_result_of_the_same_name_takes_the_place_of_the_older_one(tmp_path):
    write_result(tmp_path, RESULT, "kid")
    later = dataclasses.replace(RESULT, value=0.5)
    write_result(tmp_path, later, "kid")
    assert read_results(tmp_path) == {"kid": later}


def test_all_results_of_a_task_are_removed_and_no_others(tmp_path):
    names = {(task, metric): result_name(task, metric) for task, metric in (
        ("mmvet", "gpt_eval_score"), ("mmvet", "score"), ("mmvet_2", "score"), ("gqa", "exact_match"))}
    for (task, metric), name in names.items():
        write_result(tmp_path, dataclasses.replace(RESULT, task=task, metric=metric), name)
    remove_results(tmp_path, "mmvet")
    assert set(read_results(tmp_path)) == {"mmvet_2-score", "gqa-exact_match"}
    remove_results(tmp_path / "nowhere", "mmvet")


def test_results_come_in_the_order_of_their_names_and_none_are_none(tmp_path):
    assert read_results(tmp_path) == {}
    for name in ("b", "a"):
        write_result(tmp_path, RESULT, name)
    assert list(read_results(tmp_path)) == ["a", "b"]


def test_what_a_kill_left_of_a_write_is_no_result(tmp_path):
    write_result(tmp_path, RESULT, "a")
    (tmp_path / "results" / ".new-1-a.json").write_text("{")
    assert list(read_results(tmp_path)) == ["a"]


def test_no_score_needs_a_reason(tmp_path):
    with pytest.raises(ValueError, match="write_result: value is None and note is empty"):
        write_result(tmp_path, dataclasses.replace(RESULT, value=None))
    without = dataclasses.replace(RESULT, value=None, note="3 of 60 answers have no verdict of the judge")
    assert read_result(write_result(tmp_path, without)) == without


@pytest.mark.parametrize("field, value, says", [
    ("value", "high", "value is 'high'"), ("n", -1, "n is -1; a whole number of at least 0 fits"),
    ("seconds", None, "seconds is None"), ("task", "", "task is empty"), ("seed", 0.5, "seed is 0.5"),
    ("details", [], r"details is \[\]"), ("date", "yesterday", "date is 'yesterday'"), ("judge", 4, "judge is 4"),
])
def test_a_field_that_does_not_fit_is_named_with_its_file(field, value, says, tmp_path):
    path = write_result(tmp_path, RESULT, "a")
    path.write_text(json.dumps({**dataclasses.asdict(RESULT), field: value}))
    with pytest.raises(ValueError, match=f"a.json: {says}"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match=f"write_result: {says}"):
        write_result(tmp_path, dataclasses.replace(RESULT, **{field: value}), "b")


def test_fields_that_are_missing_or_unknown_are_named_with_their_file(tmp_path):
    path = write_result(tmp_path, RESULT, "a")
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in held.items() if name != "library"}))
    with pytest.raises(ValueError, match="a.json: library is missing"):
        read_result(path)
    path.write_text(json.dumps(held | {"weight_hash": "0"}))
    with pytest.raises(ValueError, match="weight_hash is no field of a result.*did you mean weights_hash"):
        read_result(path)
    path.write_text("[1")
    with pytest.raises(ValueError, match="a.json is damaged"):
        read_result(path)


def test_nan_is_no_score(tmp_path):
    with pytest.raises(ValueError, match="value is nan"):
        write_result(tmp_path, dataclasses.replace(RESULT, value=float("nan")))


def test_names_hold_what_file_names_may(tmp_path):
    assert result_name("images", "Frechet distance (ResNet features)") == "images-Frechet-distance-ResNet-features"
    for name in ("../a", ".a", "", "a/b"):
        with pytest.raises(ValueError, match="write_result: name is"):
            write_result(tmp_path, RESULT, name)


def test_metrics_whose_names_differ_in_signs_alone_have_files_of_their_own(tmp_path):
    metrics = ["accuracy, C", "accuracy, C++", "accuracy, C#"]
    for value in (0.25, 0.5):  # the second time each takes its own place again
        for metric in metrics:
            write_result(tmp_path, dataclasses.replace(RESULT, metric=metric, value=value))
    found = read_results(tmp_path)
    assert {result.metric: result.value for result in found.values()} == dict.fromkeys(metrics, 0.5) and len(found) == 3
    (tmp_path / "results" / "images-accuracy-C.json").write_text("{")
    write_result(tmp_path, dataclasses.replace(RESULT, metric=metrics[0]))
    assert len(read_results(tmp_path)) == 3


def test_names_that_are_too_long_for_a_file_are_cut_and_stay_different(tmp_path):
    for metric in ("ü" * 300, "ü" * 301, "\udce9" * 300):
        write_result(tmp_path, dataclasses.replace(RESULT, metric=metric))
    assert {len(result.metric) for result in read_results(tmp_path).values()} == {300, 301}
    assert len(read_results(tmp_path)) == 3


def test_the_hash_of_weights_is_that_of_sha256sum(tmp_path):
    assert weights_hash(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    one = hashlib.sha256(b"abc").hexdigest()
    assert weights_hash(tmp_path) == weights_hash(tmp_path / "model.safetensors") == one
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"def")
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "optim.safetensors").write_bytes(b"ghi")
    shell = "sha256sum model.safetensors vae/diffusion_pytorch_model.safetensors | sha256sum"
    said = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()[0]
    assert weights_hash(tmp_path) == said


def test_versions_are_those_of_the_packages():
    assert version_of("transfusion") == transfusion.__version__ and version_of("pytest") == pytest.__version__


def test_the_hash_is_of_the_weights_that_are_loaded_where_a_kill_left_a_save_in_two_places(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"older")
    older = weights_hash(tmp_path)
    (tmp_path / SAVED).mkdir()
    (tmp_path / SAVED / "model.safetensors").write_bytes(b"newer")
    (tmp_path / SAVED / JOURNAL).write_text(json.dumps({"files": ["model.safetensors"], "obsolete": [], "keep": None}))
    with whole(tmp_path) as place:
        assert (place / "model.safetensors").read_bytes() == b"newer"
    assert weights_hash(tmp_path) == hashlib.sha256(b"newer").hexdigest() != older
