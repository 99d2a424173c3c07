"""The cached-attention benchmark and the roofline: wrong answers are refused, predictions obey their own bounds."""

import pytest
import torch

from benchmarks import decode, roofline
from benchmarks.decode import Case, cases, contenders, paged
from benchmarks.harness import Contender
from tests.benchmarks.measuring import measured_once, rows_of


def test_every_contender_is_right_on_ragged_caches_and_counts_their_bytes():
    case = Case(2, 20, 100, 4, 2, 16)
    chosen, count = contenders(case, "cpu", torch.float32)
    assert count == 2 * (100 + 20 + 50 + 20) * 2 * 16 * 4
    for result in measured_once(chosen):
        assert result.error is None and result.checked and result.milliseconds["forward"]["p50"] > 0


def test_a_contender_that_sees_one_key_too_few_is_refused():
    chosen, _ = contenders(Case(2, 1, 100, 4, 2, 16), "cpu", torch.float32)
    dense = chosen[-1]

    def short(state):
        dense.phases["build"](state)
        state["mask"] = state["mask"] & (torch.arange(state["mask"].shape[-1]) < 100)

    result, = measured_once([Contender("short", {**dense.phases, "build": short}, dense.check)])
    assert result.error.startswith("AssertionError: out") and not result.milliseconds


def test_pages_hold_the_cache_in_another_order():
    x = torch.randn(2, 3, 4 * decode.PAGE, 5)
    store, table = paged(x)
    assert torch.equal(store[table.long()].flatten(1, 2).transpose(1, 2), x)
    assert not torch.equal(store.flatten(0, 1), x.transpose(1, 2).flatten(0, 1))


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path, capsys):
    assert decode.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "decode")
    assert len(rows) == 3 and all(row["checked"] and row["gb_per_s"] > 0 for row in rows)
    assert "tfkernels, paged" in capsys.readouterr().out


@pytest.mark.parametrize("dim", [64, 128])
def test_predictions_stay_below_the_peak_and_grow_with_length(dim):
    peak = roofline.PROCESSORS * roofline.TENSOR * roofline.GHZ / 1e3
    short, long = roofline.predict(1024, dim), roofline.predict(8192, dim)
    for phase in ("forward", "backward"):
        assert 0 < short[phase][0] < long[phase][0] < long[phase][1] < peak
        assert short[phase][0] < short[phase][1]


def test_a_products_cycles_are_its_operations_or_its_operands():
    assert roofline.Product(128, 128, 128, False).cycles() == 2 * 128**3 / roofline.TENSOR
    assert roofline.Product(128, 16, 128, True).cycles() == 2 * 8 * (2048 + 512) / roofline.SHARED
    one_each = [1] * roofline.PROCESSORS
    assert roofline.makespan(one_each, 1000.0, 1) * 2 == roofline.makespan(one_each, 1000.0, 2)
