"""The benchmark of several processes: what one process can see of it. Layouts are tested where they are made."""
import math

import pytest
import torch

from benchmarks import train_processes
from benchmarks.report import Report
from benchmarks.train_processes import Case, Step, earlier_rows, layouts, main
from tests.benchmarks.measuring import rows_of
from transfusion.train.processes import ALONE

TINY = Case("tiny", 2, 256)


@pytest.fixture
def tiny(monkeypatch):
    """The grid is one small case."""
    monkeypatch.setattr(train_processes, "cases", lambda quick, device: [TINY])


def test_a_row_has_times_and_memory_and_stays_beside_those_of_other_layouts(tiny, tmp_path):
    for _ in range(2):
        assert main(["--cpu", "--out", str(tmp_path), "--seconds", "0", "--commit", "0123456789"]) == 0
    row, = rows_of(tmp_path, "train_processes")
    assert (row["layout"], row["processes"], row["checked"]) == ("one process", 1, True)
    assert row["milliseconds"]["step"]["p50"] > 0 and row["tokens_per_s"] > 0
    model = Step(TINY, layouts(1)["one process"], ALONE, "cpu").model
    assert row["state_bytes"] == 16 * sum(p.numel() for p in model.parameters()) and row["kept_bytes"] > 2**20


def test_rows_of_another_commit_are_neither_mixed_with_these_nor_lost(tmp_path):
    path, (one, other) = tmp_path / "train_processes.json", (Report("x", {}, {"commit": name}) for name in "ab")
    one.rows = [{"processes": 1}]
    one.save(path)
    assert earlier_rows(tmp_path / "none", other) == [] and earlier_rows(path, Report("x", {}, {"commit": "a"}))
    with pytest.raises(SystemExit, match="rows of commit a, and this is b; another --out fits"):
        earlier_rows(path, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_a_line_says_what_to_do(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device; pass --cpu" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_layout_whose_loss_is_another_is_refused(tiny, tmp_path, monkeypatch, factor):
    right = Step.loss

    def wrong(self, rows, alone=False):
        return right(self, rows, alone) * (1 if alone else factor)

    monkeypatch.setattr(Step, "loss", wrong)
    with pytest.raises(AssertionError, match="loss: .* on one process"):
        main(["--cpu", "--out", str(tmp_path), "--seconds", "0"])


def test_layouts_are_of_all_processes():
    assert list(layouts(4)) == ["shard", "replicate", "context, gathered", "context, ring"]
    assert all(settings.replicate * settings.context in (1, 4) for settings in layouts(4).values())
