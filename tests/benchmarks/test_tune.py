"""The offline tuner: candidates fit, a table is as before after a trial, and what it reports was checked."""
import pytest
import torch

from benchmarks import tune
from benchmarks.attention import Case
from benchmarks.report import Report
from tfkernels._launch import Config


@pytest.mark.parametrize("kernel", tune.TABLES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_candidates_are_distinct_tiles_of_powers_of_two_and_hold_what_the_table_holds(kernel, dim):
    found = tune.candidates(kernel, dim)
    assert len(set(found)) == len(found) > 5
    held = "block_n" if kernel == "dkv" else "block_m"
    assert {getattr(c, held) for c in found} <= set(tune.ROWS) and all(x & (x - 1) == 0 for c in found for x in c[:3])


def test_a_row_is_replaced_for_one_block_only_even_where_it_fails():
    table, key = {("a",): Config(1, 2, 3, 4)}, ("a",)
    with pytest.raises(RuntimeError), tune.replaced(table, key, Config(5, 6, 7, 8)):
        assert table[key] == Config(5, 6, 7, 8)
        raise RuntimeError
    assert table == {key: Config(1, 2, 3, 4)}


def test_every_candidate_is_checked_and_timed(capsys, monkeypatch):
    monkeypatch.setattr(tune, "random_inputs", lambda case, device, dtype: tune_inputs(case, device))
    report, key = Report("tune", {}, {}), (90, 2, 64)
    before = dict(tune.TABLES["fwd"])
    tune.tune("fwd", Case(256, 16, 2, 1, 64), key, report, "cpu", 0.0, [Config(64, 32, 4, 2), before[key]])
    assert [row["contender"] for row in report.rows] == [str(before[key]), "(64, 32, 4, 2)"]
    assert all(row["checked"] and row["milliseconds"]["forward"]["p50"] > 0 for row in report.rows)
    assert tune.TABLES["fwd"] == before and "fwd (90, 2, 64) 256 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", tune.TABLES)
def test_the_quick_candidates_are_the_tables_tile_128_by_128_and_64_by_64_with_two_and_three_stages(kernel):
    for dim in (64, 128):
        own = tune.TABLES[kernel][90, 2, dim]
        found = tune.quick_candidates(own)
        assert (
            {c.num_stages for c in found} == {2, 3}
            and {c[:2] for c in found} == {(128, 128), (64, 64), own[:2]}
        )


def test_tma_is_tried_where_a_kernel_and_its_architecture_have_it():
    assert tune.by_tma("fwd", 90, [Config(64, 64, 4, 3)]) == [Config(64, 64, 4, 3, by_tma=True)]
    assert tune.by_tma("dkv", 90, [Config(64, 64, 4, 3)]) == tune.by_tma("fwd", 80, [Config(64, 64, 4, 3)]) == []


def test_a_wrong_row_gets_no_number_and_rows_are_saved_one_by_one(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "random_inputs", lambda case, device, dtype: tune_inputs(case, device))
    report, seen, record = Report("tune", {}, {}), [], Report.record
    monkeypatch.setattr(
        Report, "record", lambda self, *given, **more: seen.append(given[1].name) or record(self, *given, **more)
    )
    wrong, right = Config(64, 32, 4, 2), Config(32, 32, 4, 2)

    def attention(q, k, v, mask):
        table = tune.TABLES["fwd"]
        return right_attention(q, k, v, mask) * (1.5 if table[90, 2, 64] == wrong else 1.0)

    right_attention = tune.attention
    monkeypatch.setattr(tune, "attention", attention)
    tune.tune("fwd", Case(256, 16, 2, 1, 64), (90, 2, 64), report, "cpu", 0.0, [wrong, right])
    rows = {row["contender"]: row for row in report.rows}
    assert rows[str(wrong)]["error"].startswith("AssertionError") and not rows[str(wrong)]["milliseconds"]
    assert rows[str(right)]["checked"] and rows[str(right)]["milliseconds"] and seen[:3] == list(rows)


def tune_inputs(case, device):
    from benchmarks.attention import random_inputs

    return random_inputs(case, device, torch.float32)


def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is True: this is what a machine without one is told")
    assert tune.main(["--out", str(tmp_path)]) == 1 and "no CUDA device" in capsys.readouterr().out
