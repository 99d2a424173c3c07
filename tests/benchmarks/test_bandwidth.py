"""What benchmarks of memory-bound operators share: wrong answers are refused, bytes kept for the backward counted."""
import torch

from benchmarks.bandwidth import EAGER, OURS, contenders, copy_contender, run_problem, saved_bytes
from benchmarks.harness import Contender
from benchmarks.norm import Case, problem
from benchmarks.report import Report
from tests.benchmarks.measuring import measured_once


def test_a_contender_whose_gate_gets_another_images_gradient_is_refused():
    ours = contenders(problem(Case("gated_residual", 1100, 64), "cpu", torch.float32))[0]

    def swapped(state):
        ours.phases["backward"](state)
        *others, dgate = state["grads"]
        state["grads"] = *others, dgate.flip(0)

    result, = measured_once([Contender("swapped", {**ours.phases, "backward": swapped}, ours.check)])
    assert result.error.startswith("AssertionError: dgate") and not result.milliseconds


def test_every_problem_compiles_anew(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    report = Report("norm", {}, {})
    for op in ("gated_residual", "modulated_rms_norm"):
        case = Case(op, 300, 32)
        run_problem(problem(case, "cpu", torch.float32), case._asdict(), report, "cpu", 0.0)
    assert len(resets) == 2 and all(row["percent_of_copy"] for row in report.rows)


def test_a_copy_that_does_not_copy_is_refused():
    copy = copy_contender(64, "cpu")
    assert measured_once([copy])[0].checked
    idle = Contender("idle", {"forward": lambda state: None}, copy_contender(2**20, "cpu").check)
    assert measured_once([idle])[0].error


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(8, 4, requires_grad=True)
    assert saved_bytes(lambda x: x * x, [x]) == 0
    assert saved_bytes(lambda x: x.exp() + x, [x]) == 8 * 4 * 4                            # exp keeps its result
    # y, exp(y) and sin(y), each by two operators
    assert saved_bytes(lambda x: (lambda y: y.exp() * y.sin())(x.exp()), [x]) == 3 * 8 * 4 * 4


def test_the_norm_keeps_less_than_the_reference():
    chosen = problem(Case("modulated_rms_norm", 600, 64), "cpu", torch.float32)
    kept = {name: saved_bytes(chosen.functions[name], list(chosen.tensors.values())) for name in (OURS, EAGER)}
    assert kept[OURS] <= 600 * (8 + 4) < 2 * 600 * 64 * 4 < kept[EAGER]  # index and 1 / std; whole streams
