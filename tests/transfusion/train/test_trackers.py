"""Numbers go to TensorBoard and Weights & Biases as they go to log.jsonl; these packages are small fakes here."""
import importlib.machinery
import importlib.util
import subprocess
import sys
import types

import pytest

from tests.transfusion.train.test_autoencoder import tiny as tiny_autoencoder
from tests.transfusion.train.test_transfusion import small
from transfusion.train import loop
from transfusion.train.autoencoder import train as train_autoencoder
from transfusion.train.log import read_log
from transfusion.train.transfusion import train


def install(monkeypatch, name, **contents):
    """Put a module in place of a package, for this test alone."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class Writer:
    """torch.utils.tensorboard's SummaryWriter, as far as it is used."""

    made = []

    def __init__(self, log_dir, purge_step=None):
        self.log_dir, self.purge_step, self.points, self.flushed, self.is_open = log_dir, purge_step, [], 0, True
        self.made.append(self)

    def add_scalar(self, tag, scalar_value, global_step):
        assert self.is_open
        self.points.append((tag, scalar_value, global_step))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.is_open = False


class Run:
    """A run of wandb, as far as it is used."""

    made = []

    def __init__(self, **options):
        self.options, self.records, self.exit_code, self.metrics = options, [], None, []
        self.made.append(self)

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, data):
        assert self.exit_code is None
        self.records.append(data)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def packages(monkeypatch):
    """Both packages, as fakes."""
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(Run, "made", [])
    install(monkeypatch, "tensorboard")
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    install(monkeypatch, "wandb", init=lambda **options: Run(**options))


def test_both_get_every_number_of_the_log_and_a_resumed_run_goes_on_in_the_same_curves(packages, tmp_path):
    both = ("tensorboard", "wandb")
    train(small(tmp_path / "run", log=both, stop_after=5))
    train(small(tmp_path / "run", log=both, resume=True))
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert len(records) == 12 and [len(run.records) for run in Run.made] == [5, 7]
    assert [record for run in Run.made for record in run.records] == records
    points = [(name, value, record["step"]) for record in records for name, value in record.items() if name != "step"]
    assert [point for writer in Writer.made for point in writer.points] == points
    assert [(writer.log_dir, writer.purge_step) for writer in Writer.made] == [
        (str(tmp_path / "run" / "tensorboard"), step) for step in (0, 5)]
    first, second = Run.made
    assert first.options["id"] == second.options["id"] == (tmp_path / "run" / "wandb.id").read_text().strip()
    assert first.options["resume"] == "allow" and first.options["name"] == "run"
    assert first.options["config"]["optim"]["lr"] == 3e-3 and first.metrics == [("*", "step")]
    assert [run.exit_code for run in Run.made] == [0, 0] and not any(writer.is_open for writer in Writer.made)
    assert all(writer.flushed for writer in Writer.made)


def test_runs_have_ids_of_their_own_and_a_run_that_fails_is_closed_as_such(packages, tmp_path, monkeypatch):
    train(small(tmp_path / "one", log=("wandb",), stop_after=1))
    monkeypatch.setattr(loop, "check_finite", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(small(tmp_path / "two", log=("wandb", "tensorboard", "wandb"), stop_after=1))
    assert [run.exit_code for run in Run.made] == [0, 1] and not Writer.made[0].is_open
    assert Run.made[0].options["id"] != Run.made[1].options["id"]


def test_of_several_processes_the_main_one_alone_tracks(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_main", lambda: False)
    train(small(tmp_path, log=("tensorboard", "wandb"), stop_after=1))
    assert not Writer.made and not Run.made and not (tmp_path / "log.jsonl").exists()


def test_other_trackers_may_be_asked_for_when_a_run_goes_on(packages, tmp_path):
    train(small(tmp_path, stop_after=5))
    train(small(tmp_path, log=("wandb",), resume=True))
    assert [record["step"] for record in Run.made[0].records] == list(range(5, 12))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed_is_named_before_anything_is_done(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    for trainer, settings, op in ((train, small, "train"), (train_autoencoder, tiny_autoencoder, "vae train")):
        with pytest.raises(ValueError, match=f"^{op}: log is '{name}', and the package {name} is not installed; "
                                             rf"install it \(pip install {name}\)"):
            trainer(settings(tmp_path / "run", log=(name,)))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_ends_the_run_in_one_line(packages, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)\nand more")

    install(monkeypatch, "wandb", init=refuse)
    with pytest.raises(ValueError, match=r"^train: log is 'wandb', which does not start: api_key not configured "
                                         r"\(no-tty\); .* WANDB_MODE=offline it needs neither network nor key$"):
        train(small(tmp_path, log=("wandb",)))
    assert not (tmp_path / "wandb.id").exists()


def test_flags_name_trackers_and_what_is_none_is_refused():
    command = [sys.executable, "-m", "transfusion.cli", "train", "digits", "--device", "cpu", "--log"]
    done = subprocess.run([*command, "tensorboard", "wanbd"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: train: log is ('tensorboard', 'wanbd'); one of 'tensorboard', 'wandb' fits" in done.stderr


def test_tensorboard_reads_what_its_own_writer_wrote(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(tmp_path, log=("tensorboard",), stop_after=5))
    train(small(tmp_path, log=("tensorboard",), resume=True))
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(record["step"], record["loss"]) for record in read_log(tmp_path / "log.jsonl")]
    assert [(event.step, pytest.approx(event.value)) for event in curves.Scalars("loss")] == losses
