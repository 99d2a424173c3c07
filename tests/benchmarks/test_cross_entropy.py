"""The cross-entropy's benchmark: right answers pass, wrong ones do not, and operations are those of the equations."""
import importlib.util
import inspect

import pytest
import torch

from benchmarks import cross_entropy
from benchmarks.bandwidth import EAGER, OURS, contenders, results, saved_bytes
from benchmarks.cross_entropy import Case, cases, operations, problem, with_evaluation
from tests.benchmarks.measuring import measured_once, rows_of

SMALL = Case(64, 16, 100)


def run(chosen, names=None):
    tensors = list(chosen.tensors.values())
    wanted = [c for c in contenders(chosen) if names is None or c.name in names]
    return measured_once([with_evaluation(c, chosen.functions[c.name], tensors) for c in wanted])


def test_every_contender_is_right():
    for result in run(problem(SMALL, "cpu", torch.float32)):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"evaluation", "forward", "backward"}


def test_a_contender_that_forgets_which_rows_have_a_target_is_refused():
    chosen = problem(SMALL, "cpu", torch.float32)
    chosen.functions["first rows"] = lambda hidden, weight: chosen.functions[EAGER](hidden.roll(1, 0), weight)
    result, = run(chosen, ["first rows"])
    assert result.error.startswith("AssertionError: loss") and not result.milliseconds


def test_the_exact_results_by_parts_are_those_at_once(monkeypatch):
    monkeypatch.setattr(cross_entropy, "EXACT_ROWS", 24)  # 64 rows: two parts and a rest
    chosen = problem(SMALL, "cpu", torch.float32)
    wide = (
        [x.detach().double().requires_grad_() for x in chosen.tensors.values()],
        [x.double() for x in chosen.arriving.values()],
    )
    for parts, whole in zip(chosen.exact(*wide), results(chosen.functions[EAGER], *wide), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_what_this_torch_lacks_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    chosen = problem(SMALL, "cpu", torch.float32)
    assert [(r.name, r.left_out) for r in chosen.others] == [
        ("torch-chunked", f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    ]
    assert "torch-chunked" not in chosen.functions


def test_the_evaluation_wants_no_gradient():
    chosen, seen = problem(SMALL, "cpu", torch.float32), []

    def function(*tensors):
        seen.append(torch.is_grad_enabled() or any(x.requires_grad for x in tensors))

    with_evaluation(contenders(chosen)[0], function, list(chosen.tensors.values())).phases["evaluation"]({})
    assert seen == [False]


def test_ours_keeps_less_than_the_reference_where_the_vocabulary_is_large():
    chosen = problem(Case(64, 16, 2000), "cpu", torch.float32)
    kept = {name: saved_bytes(chosen.functions[name], list(chosen.tensors.values())) for name in (OURS, EAGER)}
    assert (
        kept[OURS] <= 4 * 16 * (64 + 2000) + 16 * 64 < 4 * 64 * 2000 < kept[EAGER]
    )  # dhidden's rows, dweight, the rows and their targets; the logits


def test_operations_are_two_for_each_product_of_a_row_a_word_and_a_column():
    assert operations(Case(3, 5, 7)) == {"evaluation": 210, "training": 630}


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[: len(quick)] == quick and len(set(whole)) == len(whole) == 8 > len(quick) > 0


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_kernels_arguments_stand_where_the_benchmark_puts_them():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    names = list(inspect.signature(Liger.forward).parameters)[1:13]
    assert names == [
        "_input",
        "weight",
        "target",
        "bias",
        "ce_weight",
        "ignore_index",
        "lse_square_scale",
        "label_smoothing",
        "reduction",
        "softcap",
        "return_z_loss",
        "accum_dtype",
    ]


def test_the_command_writes_a_complete_file(tmp_path):
    assert cross_entropy.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "cross_entropy")
    assert len(rows) >= 2 and all(
        row["checked"] and row["tflops"]["training"] > 0 and row["saved_bytes"] > 0
        for row in rows
        if not row["left_out"]
    )
    assert {row["contender"] for row in rows if row["checked"]} >= {OURS, EAGER}
