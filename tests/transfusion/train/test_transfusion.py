"""The trainer: losses fall, a stopped run goes on as if it had not stopped, and wrong settings are answered well."""
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.kills import in_a_child
from transfusion import Transfusion
from transfusion.command import ENDS, Interrupt, plain_errors, saved_step
from transfusion.device import choose_device
from transfusion.locks import locked
from transfusion.model.lora import TuneSettings
from transfusion.recipes.command_line import PRESETS
from transfusion.recipes.digits import DigitsSettings
from transfusion.train.log import start_log
from transfusion.train.optimizer import learning_rate
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig, train, train_to_end


def small(out, **changes):
    base = TrainConfig(out=out, model=ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64),
                       data=DigitsSettings(caption_first=0.5, story=0.2),
                       optim=OptimSettings(steps=12, rows=2, seq_len=64, lr=3e-3, warmup=2, ema=0.9), device="cpu")
    return dataclasses.replace(base, **changes)


def losses(out):
    return [{key: record[key] for key in ("step", "loss", "text_loss", "diffusion_loss", "grad_norm", "lr")}
            for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("objective", ["flow", "eps", "v"])
def test_losses_fall(tmp_path, objective):
    config = small(tmp_path)
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, objective=objective),
                              optim=dataclasses.replace(config.optim, steps=40)))
    records = losses(tmp_path)
    mean = lambda key, part: sum(r[key] for r in part) / len(part)  # noqa: E731
    for key in ("text_loss", "diffusion_loss"):
        assert mean(key, records[-5:]) < 0.9 * mean(key, records[:5])


def test_a_run_that_breaks_leaves_ctrl_c_as_it_was(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no batch")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("transfusion.data.training_data.draw_batch", broken)
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


@pytest.mark.parametrize("before,after", [(0.0, 0.9), (0.9, 0.0), (0.0, 0.0)])
def test_a_run_without_averages_saves_none_and_goes_on_with_or_without_them(tmp_path, before, after):
    optim = small(tmp_path).optim
    train(small(tmp_path, stop_after=5, optim=dataclasses.replace(optim, ema=before)))
    saved = load_file(tmp_path / "resume" / "state.safetensors")
    assert any(name.startswith("averaged.") for name in saved) == (before > 0)
    train(small(tmp_path, resume=True, optim=dataclasses.replace(optim, ema=after)))
    assert [record["step"] for record in losses(tmp_path)] == list(range(12))
    saved, written = (load_file(tmp_path / name) for name in ("resume/state.safetensors", "model.safetensors"))
    assert all(torch.equal(x, saved[f"averaged.{name}" if after else f"model.{name}"]) for name, x in written.items())
    assert all(torch.equal(x, saved[f"model.{name}"]) for name, x in written.items()) == (after == 0)


def test_a_crash_after_the_last_save_loses_only_the_steps_after_it(tmp_path):
    train(small(tmp_path, stop_after=5, save_every=5))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "half a rec')
    train(small(tmp_path, resume=True, save_every=5))
    assert [record["step"] for record in losses(tmp_path)] == list(range(12))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(tmp_path, signum):
    command = [sys.executable, "-m", "transfusion.train", "digits", "--out", str(tmp_path / "run"), "--save-every", "3",
               "--model.hidden", "32", "--model.layers", "1", "--model.mlp", "64", "--optim.rows", "1",
               "--optim.seq-len", "64", "--optim.steps", "100000"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        # steps are being taken
        while process.poll() is None and not (tmp_path / "run" / "resume" / "run.json").exists():
            time.sleep(0.05)
        process.send_signal(signum)
        process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()
    said, tmp_path = (tmp_path / "errors").read_text(), tmp_path / "run"
    assert process.returncode == 0 and "add --resume to the same command to go on" in said, said
    saved = json.loads((tmp_path / "resume" / "run.json").read_text())["step"]
    assert saved >= 1 and len(losses(tmp_path)) == saved and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_a_command_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, signum):
    monkeypatch.setattr("transfusion.train.transfusion.build_model", lambda *_: os.kill(os.getpid(), signum))
    before = [signal.getsignal(number) for number in (signal.SIGINT, *ENDS)]
    with pytest.raises(SystemExit, match=f"^stopped: by {signum.name}$"), plain_errors():
        train(small(tmp_path / "run"))
    assert (not (tmp_path / "run").exists()
            and before == [signal.getsignal(number) for number in (signal.SIGINT, *ENDS)])


def test_signals_that_are_ignored_stay_so_and_a_second_one_stops_at_once():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with plain_errors(), Interrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt, match="at once, by SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_sigusr1_asks_to_stop_as_often_as_it_comes_also_where_a_launcher_ignores_it():
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with plain_errors(), Interrupt() as stop:
            for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), signum)
                assert stop.asked
            with pytest.raises(KeyboardInterrupt, match="at once, by SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_run_resumes_only_with_its_own_settings(tmp_path):
    with pytest.raises(ValueError, match="holds no saved run"):
        train(small(tmp_path, resume=True))
    train(small(tmp_path, stop_after=1))
    other = small(tmp_path, resume=True, data=DigitsSettings(caption_first=0.5),
                  optim=dataclasses.replace(small(tmp_path).optim, lr=1.0, rows=3))
    with pytest.raises(ValueError, match="data.story is 0.0 and was 0.2, optim.rows is 3 and was 2 in the run"):
        train(other)
    with pytest.raises(ValueError, match="seed is 1 and was 0 in the run saved"):
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


def test_a_finished_run_goes_on_with_more_steps_and_another_learning_rate(tmp_path, capsys):
    train(small(tmp_path))
    before, capsys_ = losses(tmp_path), capsys.readouterr()
    more = dataclasses.replace(small(tmp_path).optim, steps=14, lr=1e-4, warmup=1, weight_decay=0.0, betas=(0.8, 0.9),
                               clip=0.5)
    train(small(tmp_path, resume=True, save_every=1, optim=more))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("going on with"))
    assert ("optim.steps 14 (was 12)" in said and "optim.lr 0.0001 (was 0.003)" in said
            and "save_every 1 (was 500)" in said and "out" not in said.split())
    after = losses(tmp_path)
    assert (after[:12] == before
            and [record["lr"] for record in after[12:]] == [learning_rate(step, more) for step in (12, 13)])
    assert "going on with" not in capsys_.out


@pytest.mark.parametrize("damage", ["missing", "empty", "half a line", "not text"])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, damage, capsys):
    train(small(tmp_path, stop_after=5))
    log, whole = tmp_path / "log.jsonl", losses(tmp_path)
    data = {"missing": None, "empty": b"", "half a line": log.read_bytes()[:-30],
            "not text": b"\xff\x00\n" + log.read_bytes()}[damage]
    log.unlink() if data is None else log.write_bytes(data)
    capsys.readouterr()
    train(small(tmp_path, resume=True))
    kept = {"missing": [], "empty": [], "half a line": whole[:4], "not text": whole}[damage]
    assert (losses(tmp_path)[:len(kept)] == kept
            and [record["step"] for record in losses(tmp_path)[len(kept):]] == list(range(5, 12)))
    assert (f"holds {len(kept)} of the 5 steps" in capsys.readouterr().out) == (damage != "not text")


def test_a_run_cannot_stop_where_it_has_been(tmp_path):
    train(small(tmp_path, stop_after=3))
    with pytest.raises(ValueError, match="stop_after is 3 and the run saved in .* has 3 steps; a later step fits"):
        train(small(tmp_path, stop_after=3, resume=True))
    train(small(tmp_path, stop_after=4, resume=True))
    assert saved_step(tmp_path) == 4


def test_a_kill_while_resuming_loses_no_line_of_the_log(tmp_path):
    train(small(tmp_path, stop_after=5))
    before = (tmp_path / "log.jsonl").read_bytes()
    for kill_at in range(40):
        if in_a_child(lambda: start_log(tmp_path / "log.jsonl", 5), kill_at) == 0:
            break
        assert (tmp_path / "log.jsonl").read_bytes() == before
    assert 2 < kill_at < 39
    train(small(tmp_path, resume=True))
    assert not list(tmp_path.glob(".new-*")) and len(losses(tmp_path)) == 12


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch, where):
    """The run ends there; what was saved before stands and goes on with another learning rate.

    Where nothing was saved, the error says so.
    """
    forward, broken = Transfusion.forward, set()

    def spoilt(self, sequence, times, seed):
        output = forward(self, sequence, times, seed)
        if int(seed[1]) not in broken:
            return output
        loss = output.text_loss
        bad = (loss * float("nan")
               if where == "loss" else torch.where(torch.tensor(True), loss, (loss - loss.detach()) ** 0.5))
        return output._replace(text_loss=bad)

    monkeypatch.setattr(Transfusion, "forward", spoilt)
    broken.add(7)
    with pytest.raises(FloatingPointError,
                       match=r"in step 7 .*nan.*the save of 5 steps in .* stands; --resume with a lower optim.lr"):
        train(small(tmp_path / "run", save_every=5))
    state = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    assert all(torch.isfinite(x).all() for x in state.values()) and len(losses(tmp_path / "run")) == 7
    with pytest.raises(FloatingPointError, match="the save of 7 steps in .* holds the very weights that gave this"):
        train(small(tmp_path / "other", save_every=1))
    broken.clear()
    train(small(tmp_path / "run", resume=True, optim=dataclasses.replace(small(tmp_path).optim, lr=1e-4)))
    assert [record["step"] for record in losses(tmp_path / "run")] == list(range(12))
    broken.add(0)
    monkeypatch.setattr("transfusion.train.loop.cost", lambda *_: "")
    with pytest.raises(FloatingPointError, match="nothing was saved; start again with a lower optim.lr"):
        train(small(tmp_path / "new"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    train(small(tmp_path, stop_after=3))
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("transfusion.train.transfusion.learning_rate", lambda *_: 1e39)
    with pytest.raises(FloatingPointError,
                       match="after 4 steps .* tensors are not finite .* the save of 3 steps in .* stands"):
        train(small(tmp_path, resume=True, stop_after=4))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    with locked(tmp_path), ThreadPoolExecutor(1) as other, pytest.raises(
        ValueError, match=f"train: .* is in use by process {os.getpid()} on "
    ):
        other.submit(train, small(tmp_path)).result()


def test_an_out_that_does_not_fit_is_refused_before_the_model_is_built(tmp_path, monkeypatch):
    def build(*_):
        raise AssertionError("built")

    monkeypatch.setattr("transfusion.train.transfusion.build_model", build)
    monkeypatch.setattr("transfusion.train.transfusion.start_model", build)
    (tmp_path / "file").write_text("kept")
    tiny_model().save_pretrained(tmp_path / "start")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    start = TuneSettings(start=tmp_path / "start")
    for config, message in (
            (small(tmp_path / "file"), "which is a file; a directory fits"),
            (small(tmp_path / "file" / "in"), "cannot be written"),
            (small(Path("/proc/none")), "cannot be written"),
            (small(tmp_path / "start"), "holds config.json of something else"),
            (small(tmp_path / "start", tune=start), "what is read would be written over"),
            (small(tmp_path / "start" / "in", tune=start), "what is read would be written over"),
            (small(tmp_path, tune=start), "what is read would be written over")):
        with pytest.raises(ValueError, match=message):
            train(config)
    assert (kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            and not (tmp_path / "start" / "in").exists())


@pytest.mark.parametrize("name", ["resume/state.safetensors", "resume/run.json"])
@pytest.mark.parametrize("damage", ["flipped", "half", "empty", "missing"])
def test_a_damaged_resume_state_is_refused_by_the_files_name(tmp_path, name, damage):
    train(small(tmp_path, stop_after=2))
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2 if name.endswith("tensors") else 0] ^= 0x40
    (tmp_path / name).write_bytes(
        {"flipped": data, "half": data[:len(data) // 2], "empty": b"", "missing": b""}[damage]
    )
    if damage == "missing":
        (tmp_path / name).unlink()
    message = ("holds no saved run"
               if (name, damage) == ("resume/run.json", "missing") else rf"{tmp_path / name} is (damaged|missing)")
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path, resume=True))


def test_a_run_of_another_kind_is_not_gone_on_with(tmp_path):
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "run.json").write_text(json.dumps({"step": 1, "config": {"losses": {"kl": 1}, "seed": 0}}))
    with pytest.raises(ValueError, match="holds a run of another kind"):
        train(small(tmp_path, resume=True))


def test_a_full_disk_ends_a_command_in_one_line_and_the_older_save_stands(tmp_path):
    train(small(tmp_path, stop_after=2))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(
            SystemExit, match=rf"^error: {tmp_path}.*: File too large; what was saved before stands; make room"
        ), plain_errors():
            train(small(tmp_path, resume=True))

    assert in_a_child(full) == 0
    assert saved_step(tmp_path) == 2 and not (tmp_path / ".saving").exists()
    Transfusion.from_pretrained(tmp_path)
    train(small(tmp_path, resume=True))
    assert len(losses(tmp_path)) == 12


@pytest.mark.parametrize("device", ["cuda:77", "foo", "meta", "cpu:5", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused_by_name(tmp_path, device):
    with pytest.raises(ValueError, match=f"device is '{device}', which this machine does not have; auto, cpu"):
        train(small(tmp_path / "run", device=device))
    assert not (tmp_path / "run").exists() and choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "error,line",
    [(OSError(28, "No space left on device", "/a/b"),
      "error: /a/b: No space left on device; what was saved before stands; make room, or name"),
     (PermissionError(13, "Permission denied", "/a/b"),
      "error: /a/b: Permission denied; a file or directory that this user may read and write fits"),
     (FileNotFoundError(2, "No such file or directory", "/a/b"),
      "error: /a/b: No such file or directory; name one that is there"),
     (OSError("no file named\nmodel.safetensors in x"), "error: no file named model.safetensors in x"),
     (SafetensorError("header too small"), "error: header too small")]
)
def test_an_error_of_the_file_system_ends_a_command_with_one_line(error, line):
    with pytest.raises(SystemExit) as stopped, plain_errors():
        raise error
    assert str(stopped.value).startswith(line) and "\n" not in str(stopped.value)
    with pytest.raises(RuntimeError), plain_errors():  # a defect keeps its traceback
        raise RuntimeError


@pytest.mark.parametrize("error,resumes,line",
                         [(ValueError("lr is 0"), False, "error: lr is 0"),
                          (FloatingPointError("nan"), True, "error: nan"),
                          (KeyboardInterrupt(), False, "stopped: by Ctrl-C"),
                          (KeyboardInterrupt(), True, "stopped: the same command goes on"),
                          (KeyboardInterrupt("3 of 12"), True, "stopped: 3 of 12")])
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


def test_help_lists_presets_and_explains_fields(monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    listed = cli("train", "--help")
    monkeypatch.delenv("PYTHONPROFILEIMPORTTIME")
    imported = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    slow = {"matplotlib.pyplot", "scipy.stats", "diffusers.models.unets"}  # what draws, and all models of diffusers
    assert "torch" in imported and not imported & slow
    assert all(name in listed.stdout for name in PRESETS)
    text = cli("train", "digits", "--help").stdout
    for words in ("--optim.steps", "optimizer steps in all", "--data.noise-limit", "largest noise time", "--resume"):
        assert words in text


def test_a_misspelt_field_is_answered_with_the_nearest_name():
    result = cli("train", "digits", "--optim.stepz", "3")
    assert result.returncode != 0 and "--optim.steps" in result.stdout + result.stderr
    result = cli("trian")
    assert result.returncode != 0 and "did you mean train?" in result.stderr
