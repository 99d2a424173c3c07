"""What a run measures of itself, and when it stops before its time is over."""
import dataclasses
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tests.transfusion.train.test_loop import records
from tests.transfusion.train.test_transfusion import losses, small
from transfusion.command import saved_step
from transfusion.train import loop, meter
from transfusion.train.estimates import work
from transfusion.train.gpus import GPUS, gpu_named
from transfusion.train.log import CLOCKED, read_log
from transfusion.train.meter import Meter, TimeLimit
from transfusion.train.transfusion import train


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(meter, "time", clock)
    return clock


def test_a_step_is_measured_from_its_drawing_to_its_log(clock):
    measured = Meter(500, "tokens", torch.device("cpu"))
    for done in (1, 2):
        with measured.begin():
            clock.now += 0.5
        clock.now += 1.5
        found = measured.after(done)
        assert found.pop("memory") > 10**7
        assert found == {"tokens": 500 * done, "tokens_per_second": 250.0, "data_share": 0.25}
        clock.now += 60.0  # a save, samples


def test_the_share_of_a_known_gpu_is_of_operations_that_are_counted_once(clock, monkeypatch):
    monkeypatch.setattr(meter, "gpu_of", lambda device: GPUS["H100"])
    counted = []
    measured = Meter(500, "tokens", torch.device("cpu"), lambda: counted.append(1) or 989e12)
    for done in (1, 2):
        with measured.begin():
            clock.now += 4.0
        assert measured.after(done)["mfu"] == 0.25
    assert counted == [1]


@pytest.mark.parametrize("name,kind", [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80"),
    ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA B200", "B200")])
def test_gpus_are_known_by_the_names_that_cuda_gives(name, kind):
    assert gpu_named(name) is GPUS[kind]


@pytest.mark.parametrize("name", [
    "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100"])
def test_a_gpu_of_another_peak_is_not_taken_for_a_known_one(name):
    assert gpu_named(name) is None


def test_the_log_has_these_numbers_of_every_step(tmp_path):
    train(small(tmp_path, stop_after=3))
    for number, record in enumerate(read_log(tmp_path / "log.jsonl"), 1):
        assert record["tokens"] == number * 2 * 64
        assert record["tokens_per_second"] > 0 and 0 <= record["data_share"] <= 1 and record["memory"] > 10**7
        clocked = {"seconds", "tokens_per_second", "data_share", "memory"}
        assert record.keys() & set(CLOCKED) == clocked and "mfu" not in record


def test_a_transfusions_operations_are_those_that_a_plan_counts(tmp_path, monkeypatch):
    """The peak is so low that the share is large; it is in the log, and the progress bar is told."""
    monkeypatch.setattr(meter, "gpu_of", lambda device: GPUS["H100"]._replace(teraflops=1e-6))
    asked, shown = [], []

    def counting(model, plain, rows):
        asked.append((rows, work(model, plain, rows)))
        return asked[-1][1]

    monkeypatch.setattr("transfusion.train.transfusion.work", counting)
    monkeypatch.setattr(loop, "shown", lambda *arguments: shown.append(SHOWN(*arguments)) or shown[-1])
    config = small(tmp_path, stop_after=3)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=2)))
    operations = sum(part.step for _, one in asked for part in one.values())
    assert [len(rows.tokens) for rows, _ in asked] == [2] and operations > 1e6
    for record in read_log(tmp_path / "log.jsonl"):
        seconds = 2 * 64 / record["tokens_per_second"]
        assert record["mfu"] == pytest.approx(operations / seconds / 1e6, rel=1e-3)
    assert all(said["MFU"].endswith("%") and "tokens/s" in said for said in shown) and len(shown) == 3


SHOWN = loop.shown


def test_a_run_stops_where_a_step_and_a_save_might_not_fit_any_more(clock):
    limit = TimeLimit(1.0)
    for minute in range(10, 60, 10):
        clock.now = 100.0 + 60 * minute
        assert limit.is_near() == (minute >= 50)  # 10 minutes a step and 72 s for the first save
    limit = TimeLimit(1.0)
    clock.now += 60
    assert not limit.is_near()
    with limit.saving():
        clock.now += 1200
    clock.now += 60
    assert not limit.is_near()  # 22 of 60 minutes are over, and 1 + 30 may be needed
    clock.now += 600
    assert limit.is_near()
    assert not TimeLimit(None).is_near()


def test_the_longest_step_and_half_as_much_again_as_the_longest_save_must_fit(clock):
    def near(*minutes, saving=None, saved=0.0):
        limit = TimeLimit(1.0)
        if saving:
            with limit.saving():
                clock.now += 60 * saving
        for minute in minutes:
            clock.now += 60 * minute
            found = limit.is_near(saved=60 * saved)
        return found

    assert not near(20, 1) and near(20, 1, 19)      # 40 + 20 + 1.2 of 60: the longest step counts, not the last
    assert near(58) and not near(29)                # 58 + 1.2 > 60 - 58; 29 + 29 + 1.2: a fiftieth for the first save
    assert not near(4, saving=20) and near(6, saving=20)                      # 26 + 6 + 30 > 60
    assert not near(1, saving=1, saved=37) and near(1, saving=1, saved=39)    # 2 + 1 + 58.5


def test_a_resumed_run_s_seconds_go_on(tmp_path):
    train(small(tmp_path, stop_after=3))
    train(small(tmp_path, resume=True, stop_after=6))
    seconds = [record["seconds"] for record in read_log(tmp_path / "log.jsonl")]
    assert len(seconds) == 6 and seconds == sorted(seconds)


def test_max_hours_saves_and_stops_and_the_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, capsys):
    train(small(tmp_path / "whole"))
    near = iter([False] * 4 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.TimeLimit, "is_near", lambda *_: next(near))
        train(small(tmp_path / "parts", max_hours=2.0))
    assert saved_step(tmp_path / "parts") == 5 == len(losses(tmp_path / "parts"))
    assert "stopped after step 5 of 12" in capsys.readouterr().err
    train(small(tmp_path / "parts", resume=True, max_hours=4.0))
    assert "max_hours" not in capsys.readouterr().out and records(tmp_path / "whole") == records(tmp_path / "parts")


def test_a_run_with_next_to_no_time_takes_one_step_and_saves_it(tmp_path):
    began = time.monotonic()
    train(small(tmp_path, max_hours=1e-9))
    assert saved_step(tmp_path) == 1 and time.monotonic() - began < 60


def test_sigusr1_saves_and_stops_as_sigterm_does(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    take_step = loop.take_step

    def signalled(player, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        take_step(player, **options)

    monkeypatch.setattr(loop, "take_step", signalled)
    train(small(tmp_path))
    assert saved_step(tmp_path) == 1 and "add --resume to the same command to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is before


def test_what_comes_before_the_steps_is_no_step(clock):
    limit = TimeLimit(1.0)
    clock.now += 900  # loading, compiling
    with limit.steps():
        clock.now += 60
        assert not limit.is_near() and limit.step == 60
        clock.now += 60 * 40
        assert limit.is_near()


def test_what_a_run_has_seen_goes_on_where_it_was_with_batches_of_another_size():
    measured = Meter(100, "tokens", torch.device("cpu"), start=5, seen=50)
    with measured.begin():
        pass
    assert measured.after(6)["tokens"] == 150
    assert loop.seen_before([{"step": 4, "tokens": 50}], 5, "tokens") == 50
    assert loop.seen_before([{"step": 3, "tokens": 40}], 5, "tokens") is None


def test_a_task_says_where_it_computes(tmp_path):
    layer = torch.nn.Linear(1, 1)
    task = SimpleNamespace(players=[SimpleNamespace(model=layer)])
    assert loop.device_of(task) == torch.device("cpu")
    task.device = torch.device("meta")
    assert loop.device_of(task) == torch.device("meta")
