"""Settings that a run may go on with, those that it may not without `allow_changed`, and what is kept of changes."""
import dataclasses
import json

import pytest

from tests.transfusion.train.test_transfusion import losses, small
from transfusion.model.lora import TuneSettings
from transfusion.recipes.digits import DigitsSettings
from transfusion.train.resuming import changes, recorded
from transfusion.train.transfusion import train


def history(out):
    return json.loads((out / "resume" / "run.json").read_text()).get("history")


@pytest.mark.parametrize("changes,said", [
    ({"seed": 3}, "seed is 3 and was 0 in the run saved in"),
    ({"data": DigitsSettings(caption_first=0.5, story=0.4)}, "data.story is 0.4 and was 0.2 in the run saved in"),
    ({"seed": 3, "data": DigitsSettings(caption_first=1, story=0.2)},
     "seed is 3 and was 0, data.caption_first is 1 and was 0.5 in the run saved in")])
def test_what_decides_what_is_trained_on_changes_with_allow_changed_alone_and_is_kept(tmp_path, changes, said, capsys):
    train(small(tmp_path, stop_after=2))
    going_on = small(tmp_path, resume=True, stop_after=4, **changes)
    with pytest.raises(ValueError, match=f"{said}.*; --allow-changed goes on with these"):
        train(going_on)
    assert history(tmp_path) is None
    train(dataclasses.replace(going_on, allow_changed=True))
    names = [one.split(" ")[0] for one in said.split(", ")]
    assert [(entry["step"], list(entry["changed"])) for entry in history(tmp_path)] == [(2, names)]
    train(dataclasses.replace(going_on, stop_after=6))  # which are its settings now
    assert len(history(tmp_path)) == 1 and len(losses(tmp_path)) == 6


def test_what_does_not_matter_changes_without_a_flag_and_says_so(tmp_path, capsys):
    train(small(tmp_path / "whole"))
    train(small(tmp_path / "parts", stop_after=5))
    capsys.readouterr()
    train(small(tmp_path / "parts", resume=True, save_every=7, keep_last=1))
    assert "going on with save_every 7 (was 500), keep_last 1 (was 0)" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert history(tmp_path / "parts") == [{"step": 5, "changed": {"save_every": [500, 7], "keep_last": [0, 1]}}]


def test_another_model_is_refused_by_name_even_so(tmp_path):
    config = small(tmp_path, stop_after=1)
    train(config)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp=96), resume=True, stop_after=2)
    with pytest.raises(ValueError, match="model.mlp is 96 and was 64"):
        train(wider)
    with pytest.raises(ValueError, match=r"the saved run has no .*mlp.* of \(96, 32\), and this one has"):
        train(dataclasses.replace(wider, allow_changed=True))


def test_a_setting_that_is_newer_than_a_run_had_its_default_there(tmp_path):
    config = small(tmp_path)
    run = {"config": recorded(config)}
    del run["config"]["tune"]["frozen"]
    assert changes(config, run) == {}
    frozen = dataclasses.replace(config, tune=TuneSettings(frozen=("timestep",)))
    assert changes(frozen, run) == {"tune.frozen": (None, ["timestep"])}
    assert changes(frozen, {}) == {}
