"""The trainer: losses fall, a stopped run goes on as if it had not stopped, and wrong settings are answered well."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from transfusion.optim import learning_rate
from transfusion.run_state import plain_errors
from transfusion.train import PRESETS, DataSettings, ModelSettings, OptimSettings, TrainConfig, train, train_to_end


def small(out, **changes):
    base = TrainConfig(out=out, model=ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64), data=DataSettings(caption_first=0.5, story=0.2),
                       optim=OptimSettings(steps=12, rows=2, seq_len=64, lr=3e-3, warmup=2, ema=0.9), device="cpu")
    return dataclasses.replace(base, **changes)


def losses(out):
    return [{key: record[key] for key in ("step", "loss", "text_loss", "diffusion_loss", "grad_norm", "lr")}
            for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("objective", ["flow", "eps", "v"])
def test_losses_fall(tmp_path, objective):
    config = small(tmp_path)
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, objective=objective), optim=dataclasses.replace(config.optim, steps=40)))
    records = losses(tmp_path)
    mean = lambda key, part: sum(r[key] for r in part) / len(part)  # noqa: E731
    for key in ("text_loss", "diffusion_loss"):
        assert mean(key, records[-5:]) < 0.9 * mean(key, records[:5])


def test_a_run_that_breaks_leaves_ctrl_c_as_it_was(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no batch")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("transfusion.train.draw_batch", broken)
    with pytest.raises(RuntimeError, match="no batch"):
        train(small(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(tmp_path):
    train(small(tmp_path / "whole"))
    train(small(tmp_path / "parts", stop_after=5))
    assert len(losses(tmp_path / "parts")) == 5
    train(small(tmp_path / "parts", resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_crash_after_the_last_save_loses_only_the_steps_after_it(tmp_path):
    train(small(tmp_path, stop_after=5, save_every=5))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "half a rec')
    train(small(tmp_path, resume=True, save_every=5))
    assert [record["step"] for record in losses(tmp_path)] == list(range(12))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "transfusion.train", "digits", "--out", str(tmp_path), "--model.hidden", "32", "--model.layers", "1", "--model.mlp", "64",
               "--optim.rows", "1", "--optim.seq-len", "64", "--optim.steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while time.time() < deadline and not ((tmp_path / "log.jsonl").exists() and "step/s" in process.stderr.read(200)):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "add --resume to the same command to go on" in errors
    saved = json.loads((tmp_path / "resume" / "run.json").read_text())["step"]
    assert saved >= 1 and len(losses(tmp_path)) == saved and (tmp_path / "model.safetensors").is_file()


def test_a_run_resumes_only_with_its_own_settings(tmp_path):
    with pytest.raises(ValueError, match="holds no saved run"):
        train(small(tmp_path, resume=True))
    train(small(tmp_path, stop_after=1))
    other = small(tmp_path, resume=True, optim=dataclasses.replace(small(tmp_path).optim, lr=1.0))
    with pytest.raises(ValueError, match="lr differ"):
        train(other)
    with pytest.raises(ValueError, match="seed differ"):
        train(small(tmp_path, resume=True, seed=1))
    whole = losses(tmp_path)
    (tmp_path / "resume").rename(tmp_path / "resume.old")  # where a crash between two renames leaves it
    train(small(tmp_path, resume=True, stop_after=2))
    assert losses(tmp_path)[:1] == whole and not (tmp_path / "resume.old").exists()


def test_a_run_is_not_written_over_unasked(tmp_path):
    train(small(tmp_path, stop_after=1))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run of 1 steps; --resume goes on with it, another --out starts anew"):
        train(small(tmp_path, stop_after=1))
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_train_to_end_goes_on_and_says_where_it_was_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="3 of 12 steps are done; the same command goes on"):
        train_to_end(small(tmp_path, stop_after=3))
    assert train_to_end(small(tmp_path)) == tmp_path and len(losses(tmp_path)) == 12
    log = (tmp_path / "log.jsonl").read_bytes()
    train_to_end(small(tmp_path))
    assert (tmp_path / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("error,resumes,line", [
    (ValueError("lr is 0"), False, "error: lr is 0"), (FloatingPointError("nan"), True, "error: nan"), (KeyboardInterrupt(), False, "stopped: by Ctrl-C"),
    (KeyboardInterrupt(), True, "stopped: the same command goes on"), (KeyboardInterrupt("3 of 12"), True, "stopped: 3 of 12")])
def test_a_command_ends_with_one_line(error, resumes, line):
    with pytest.raises(SystemExit) as stopped, plain_errors(resumes):
        raise error
    assert stopped.value.code == line
    with pytest.raises(KeyError), plain_errors(resumes):  # a defect keeps its traceback
        raise KeyError


def test_the_learning_rate_warms_up_and_ends_at_its_minimum():
    optim = OptimSettings(steps=100, lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(step, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def cli(*args):
    return subprocess.run([sys.executable, "-m", "transfusion.cli", *args], capture_output=True, text=True)


def test_help_lists_presets_and_explains_fields():
    text = cli("train", "--help").stdout
    assert all(name in text for name in PRESETS)
    text = cli("train", "digits", "--help").stdout
    for words in ("--optim.steps", "optimizer steps in all", "--data.noise-limit", "largest noise time", "--resume"):
        assert words in text


def test_a_misspelt_field_is_answered_with_the_nearest_name():
    result = cli("train", "digits", "--optim.stepz", "3")
    assert result.returncode != 0 and "--optim.steps" in result.stdout + result.stderr
    result = cli("trian")
    assert result.returncode != 0 and "did you mean train?" in result.stderr
