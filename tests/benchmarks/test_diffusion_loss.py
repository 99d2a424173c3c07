"""The diffusion losses' benchmark: right answers pass, and the bytes are those of the operators' tables."""

import pytest
import torch

from benchmarks import diffusion_loss
from benchmarks.bandwidth import contenders
from benchmarks.diffusion_loss import OPS, Case, cases, problem
from tests.benchmarks.documentation import bytes_moved
from tests.benchmarks.measuring import measured_once, rows_of


@pytest.mark.parametrize("op", OPS)
def test_every_contender_is_right(op):
    case = Case(op, 512, 16, 0 if op == "diffusion_loss" else 64)
    for result in measured_once(contenders(problem(case, "cpu", torch.float32))):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward"}


def test_the_bytes_are_those_that_the_modules_tables_name():
    found = problem(Case("diffusion_loss", 512, 16), "cpu", torch.float32).moved
    assert list(found.values()) == bytes_moved("losses", "diffusion_loss", E=512 * 16, e=4)
    assert found == {"forward": 2 * 512 * 16 * 4, "backward": 3 * 512 * 16 * 4}
    found = problem(Case(OPS[1], 512, 16, 64), "cpu", torch.float32).moved
    assert list(found.values()) == bytes_moved("losses", "norm, head, loss", P=512, T=1024, C=64, e=4)
    assert found == {"forward": 512 * 64 * 4, "backward": (512 + 1024) * 64 * 4}


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path):
    assert diffusion_loss.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "diffusion_loss")
    assert len(rows) == 12 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)
