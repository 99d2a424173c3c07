"""A run of several processes learns what a run of one learns, prints and writes once, and ends as one."""
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture
from PIL import ImageChops

from tests.transfusion.model.test_vae import autoencoder
from tests.transfusion.train.own_data import paint, write_lines, write_mixture
from tests.transfusion.train.several import digits, layouts, runs
from transfusion import Transfusion
from transfusion.command import claim, saved_step
from transfusion.train import processes
from transfusion.train.log import CLOCKED
from transfusion.train.processes import ParallelSettings, start_processes
from transfusion.train.transfusion import train

LIMIT = 480  # seconds for processes that torchrun starts; compiling without a cache took 65 of them on a loaded machine


def torchrun(count, *command, limit=LIMIT):
    """What a command gives that torchrun starts `count` times; where it takes too long, all of it is killed.

    The failure then says where each of its processes was.
    """
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd()),
                 "PYTHONFAULTHANDLER": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone", *command],
        env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        return (*started.communicate(timeout=limit), started.returncode)
    except subprocess.TimeoutExpired:
        end(started, signal.SIGABRT)
        said = "and did not say where"
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = started.communicate(timeout=60)
        pytest.fail(f"{count} processes took more than {limit} s\n{said[-20000:]}")
    finally:
        end(started, signal.SIGKILL)
        started.kill()


def end(started, number):
    """Send a signal to all that a process started."""
    for child in descendants(started.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def descendants(parent):
    """The numbers of the processes that a process started, and those that these did; torchrun's lead sessions."""
    lines = subprocess.run(["ps", "-eo", "ppid=,pid="], capture_output=True, text=True).stdout.splitlines()
    children = [int(child) for above, child in map(str.split, lines) if int(above) == parent]
    return children + [one for child in children for one in descendants(child)]


def log(out):
    return list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))


def assert_same_losses(found, expected):
    """Equal in 6 digits: sums of another order round otherwise."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected):
        for name in ("loss", "text_loss", "diffusion_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=3e-6, abs=1e-6), f"step {one['step']}, {name}"


def write_data(folder):
    """A mixture of pictures, and the autoencoder of its latents."""
    write_lines(folder / "pairs.jsonl", paint(24))
    write_mixture(folder / "mix.yaml", {"format": "pairs", "path": "pairs.jsonl"})
    torch.manual_seed(0)
    autoencoder(latent_channels=4).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the runs of one process."""
    folder = write_data(tmp_path_factory.mktemp("alone"))
    for config in runs(folder).values():
        train(dataclasses.replace(config, parallel=ParallelSettings(), compile=False, recompute="none"))
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with the runs of two processes, and what they printed."""
    folder = write_data(tmp_path_factory.mktemp("together"))
    out, err, status = torchrun(2, "-m", "tests.transfusion.train.several", str(folder))
    assert status == 0, err
    return folder, out, err


@pytest.mark.parametrize("name", list(runs(Path("."))))
def test_two_processes_log_the_losses_of_one(alone, together, name):
    assert_same_losses(log(together[0] / name), log(alone / name))


@pytest.mark.parametrize("name", [name for name, config in runs(Path(".")).items() if config.validate.every])
def test_two_processes_find_on_held_out_rows_and_draw_what_one_does(alone, together, name):
    found, expected = (folder / name for folder in (together[0], alone))
    for one, other in zip(log(found), log(expected), strict=True):
        names = {key for key in other if key.startswith("validation") and key not in CLOCKED}
        assert names == {key for key in one if key.startswith("validation") and key not in CLOCKED}
        assert bool(names) == (other["step"] + 1 in (2, 3)) and "samples_failed" not in one
        for key in names:
            assert one[key] == pytest.approx(other[key], rel=1e-5), f"step {one['step']}, {key}"
    for path in sorted((expected / "samples").iterdir()):
        with Picture.open(path) as theirs, Picture.open(found / "samples" / path.name) as ours:
            assert ours.text == theirs.text
            difference = ImageChops.difference(ours, theirs)
            assert difference.getextrema()[1] <= 1, path.name  # a rounding of 1 in 255
    assert len(list((found / "samples").iterdir())) == len(list((expected / "samples").iterdir())) == 4


def test_two_processes_skip_the_steps_that_one_skips(alone, together):
    """The guard is so narrow here that common steps are spikes; image layers have a learning rate of their own."""
    found, expected = ([record.get("skipped") for record in log(folder / "guarded")] for folder in (together[0], alone))
    assert found == expected and 0 < sum(map(bool, found)) < len(found)


def test_four_processes_log_the_losses_of_one_in_every_layout(alone, tmp_path):
    _, err, status = torchrun(4, "-m", "tests.transfusion.train.several", str(tmp_path))
    assert status == 0, err
    for config in layouts(tmp_path).values():
        assert_same_losses(log(config.out), log(alone / "digits"))
    for found, expected in zip(log(tmp_path / "bfloat16"), log(alone / "digits")[:3], strict=True):
        for name in ("text_loss", "diffusion_loss"):
            assert 0 < abs(found[name] / expected[name] - 1) < 0.03


def test_accumulation_changes_no_loss(alone):
    assert_same_losses(log(alone / "accumulated"), log(alone / "digits"))
    assert_same_losses(log(alone / "mixture, accumulated"), log(alone / "mixture"))


def test_two_processes_save_the_checkpoint_of_one(alone, together):
    for name in ("digits", "mixture"):
        found, expected = (Transfusion.from_pretrained(folder / name) for folder in (together[0], alone))
        for (name, x), (_, y) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)
    assert not (together[0] / "digits" / ".lock").exists()


def test_one_process_prints(together):
    _, out, err = together
    assert out.count("a process speaks") == 2 and out.count("steps of 384 tokens at") == len(runs(Path("."))) + 4
    assert err.count("stopped after step 3 of 5") == 1


@pytest.mark.parametrize("name,said", [
    ("product", "train: parallel.replicate is 3 and parallel.context 1, and 2 processes were started; numbers whose"),
    ("rows", "train: optim.rows is 3, the rows of a step over all processes, and 2 of them take a part each; a multi"),
    ("device", "train: device is 'cpu:0' and there are 2 processes, each of which takes a GPU of its own; 'cpu' fits"),
    ("taken", "which holds a run of 5 steps; --resume goes on with it"),
    ("failed", "data: too many files are gone (said by process 1 of 2)"),
    ("mixture failed", "data: too many files are gone (said by process 1 of 2)"),
    ("tokenizers", "train: the processes have different tokenizers: some read other texts, or another checkpoint, tha"),
    ("differing", "train: processes that share rows (parallel.context) read different ones, as where one of them cann"),
])
def test_an_error_of_one_process_ends_all_of_them_and_the_main_one_says_it(together, name, said):
    folder = together[0]
    first, second = ((folder / f"{name} {rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("ValueError: ") and said in first and second == "SystemExit: 1"
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("name", ["failed", "mixture failed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_failed_leaves_its_readers_to_no_garbage_collector(together, name, rank):
    """It might come in a thread that saves, and would wait there for worker processes that no longer answer."""
    assert (together[0] / f"{name} {rank} held.txt").read_text() == "0"


def test_what_was_trained_before_the_data_ended_is_saved(together):
    assert {name: saved_step(together[0] / name) for name in ("failed", "mixture failed", "differing")} == {
        "failed": 3, "mixture failed": 2, "differing": 2}


def test_a_signal_to_one_process_stops_all_at_the_same_step(alone, together):
    assert saved_step(together[0] / "stopped") == 3
    assert_same_losses(log(together[0] / "stopped"), log(alone / "digits")[:3])


@pytest.mark.parametrize("flags,said", [
    (["--parallel.shard", "4"], "error: train: parallel.shard is 4, parallel.replicate is 1"),
    (["--parallel.shrad", "2"], "Unrecognized options: --parallel.shrad"),
])
def test_settings_that_do_not_fit_end_torchrun_with_one_message(tmp_path, flags, said):
    _, err, status = torchrun(2, "-m", "transfusion.train", "digits", "--out", str(tmp_path / "run"), "--device", "cpu",
                              *flags, limit=120)
    assert status and err.count(said) == 1, err
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_meet_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MEETING", processes.datetime.timedelta(seconds=2))
    for name, value in dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29677").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="train: WORLD_SIZE is 2, and its processes did not meet within 2 s"):
        train(digits(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_process_starts_no_communication_and_refuses_layouts_of_several(tmp_path):
    with start_processes("train", ParallelSettings()) as alone:
        assert alone == processes.Processes() and alone.is_main and not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="train: parallel.replicate is 1 and parallel.context 2, and one process was "
                                         "started; numbers whose product is 1 fit"):
        train(digits(tmp_path / "run", ParallelSettings(context=2)))


@pytest.mark.parametrize("backend,error,parts", [
    ("nccl", RuntimeError("out of memory"), False), ("nccl", processes.agreed(ValueError("data")), True),
    ("gloo", RuntimeError("out of memory"), True), ("nccl", None, True)])
def test_a_process_that_fails_alone_does_not_wait_for_the_others(monkeypatch, backend, error, parts):
    """NCCL's group ends when all of them end it, and they wait for the one that failed: its error would not be said."""
    ended = []
    monkeypatch.setattr(processes, "started", lambda: 2)
    monkeypatch.setattr(processes, "_meet", lambda *_: (0, SimpleNamespace(set=lambda *_: None)))
    monkeypatch.setattr(processes, "_place", lambda command, here, *_: here)
    monkeypatch.setattr(processes, "gather_text", lambda text: [text, ""])
    monkeypatch.setattr(processes.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: ended.append(backend))
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, start_processes("train", ParallelSettings()):
        if error:
            raise error
    assert bool(ended) == parts


@pytest.mark.parametrize("name,value", [("WORLD_SIZE", "2"), ("RANK", "1")])
def test_other_commands_refuse_to_be_one_of_several_processes(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    message = f"vae train: {name} is {value}, as torchrun sets it; this command is one "
    with pytest.raises(ValueError, match=message), claim("vae train", tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
