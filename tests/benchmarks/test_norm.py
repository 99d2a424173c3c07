"""The norms' benchmark: right answers pass, and the bytes are those of the operators' table."""

import pytest
import torch

from benchmarks import norm
from benchmarks.bandwidth import contenders
from benchmarks.norm import ARGUMENTS, Case, cases, problem
from tests.benchmarks.documentation import bytes_moved
from tests.benchmarks.measuring import measured_once, rows_of


@pytest.mark.parametrize("op", ARGUMENTS)
def test_every_contender_is_right(op):
    for result in measured_once(contenders(problem(Case(op, 600, 64), "cpu", torch.float32))):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward"}


def test_the_bytes_are_those_that_the_modules_table_names():
    for op, moved in norm.MOVED.items():
        row = "modulated norms" if op.startswith("modulated") else op
        assert bytes_moved("norm", row, T=600, C=64, e=4) == [n * 600 * 64 * 4 for n in moved]


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path):
    assert norm.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "norm")
    assert len(rows) == 12 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)
