"""The rotary benchmark: right answers pass, q and k lie as projections give them, bytes are those of the table."""

import pytest
import torch

from benchmarks import rotary
from benchmarks.bandwidth import EAGER, OURS, contenders, saved_bytes
from benchmarks.rotary import MOVED, Case, _Copied, cases, problem
from tests.benchmarks.documentation import bytes_moved
from tests.benchmarks.measuring import measured_once, rows_of


@pytest.mark.parametrize("op", MOVED)
def test_every_contender_is_right(op):
    chosen = problem(Case(op, 30, 4, 2, 16), "cpu", torch.float32)
    for x in (chosen.tensors["q"], chosen.arriving["k"]):
        assert x.stride() == (30 * x.shape[1] * 16, 16, x.shape[1] * 16, 1)
    for result in measured_once(contenders(chosen)):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward"}


def test_the_bytes_are_those_that_the_modules_table_names():
    for op, moved in MOVED.items():
        assert bytes_moved("rotary", op, T=30, H=4, K=2, D=16, e=4) == [n * 30 * (4 + 2) * 16 * 4 for n in moved]
        found = problem(Case(op, 30, 4, 2, 16), "cpu", torch.float32)
        assert found.moved["forward"] == moved[0] * 4 * (found.tensors["q"].numel() + found.tensors["k"].numel())


@pytest.mark.parametrize("op", MOVED)
def test_ours_keeps_the_angles_alone(op):
    chosen = problem(Case(op, 300, 4, 2, 16), "cpu", torch.float32)
    kept = {name: saved_bytes(chosen.functions[name], list(chosen.tensors.values())) for name in (OURS, EAGER)}
    assert kept[OURS] == 300 * 16 * 4 <= kept[EAGER]                                       # cos and sin


def test_what_works_in_place_gets_a_copy_both_ways():
    x, arriving = torch.ones(3, requires_grad=True), torch.ones(3)

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.data.mul_(2).view_as(x)

        @staticmethod
        def backward(ctx, dout):
            return dout.data.mul_(2)

    y = _Copied.apply(InPlace.apply(_Copied.apply(x, True)), False)
    (grad,) = torch.autograd.grad(y, x, arriving)
    assert torch.equal(y, 2 * torch.ones(3)) and torch.equal(grad, 2 * torch.ones(3))
    assert all(torch.equal(t, torch.ones(3)) for t in (x, arriving))


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) == 16 > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path):
    assert rotary.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "rotary")
    assert len(rows) == 6 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)
