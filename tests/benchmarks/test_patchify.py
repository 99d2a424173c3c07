"""The patches' benchmark: right answers pass, and the bytes are those of the operators' tables."""

import pytest
import torch

from benchmarks import patchify
from benchmarks.bandwidth import EAGER, OWN_NOISE, contenders
from benchmarks.patchify import OPS, Case, cases, moved, problem
from tests.benchmarks.documentation import bytes_moved
from tests.benchmarks.measuring import measured_once, rows_of
from tfkernels._library import INTERPRET

pytestmark = pytest.mark.skipif(
    INTERPRET, reason="images of 256 tokens take the interpreter minutes; the operators' own tests run in it")


@pytest.mark.parametrize("op", OPS)
def test_every_contender_is_right(op):
    case = Case(op, 512, 32, 48 if "embed" in op else 0)
    for result in measured_once(contenders(problem(case, "cpu", torch.float32))):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward"}


def test_the_embedding_problems_hold_as_much_text_as_images():
    found = problem(Case("embed_patches", 512, 32, 48), "cpu", torch.float32)
    hidden, weight, condition = found.tensors.values()
    assert hidden.shape == (1024, 48) and weight.shape == (48, 32) and condition.shape == (2, 48)
    for function in found.functions.values():
        kept = (function(hidden, weight, condition) == hidden).all(1)
        assert torch.equal(kept, torch.arange(1024) // 256 % 2 == 0)


def test_the_bytes_are_those_that_the_modules_tables_name():
    elements, sizes = dict(E=512 * 32, e=2), dict(T=1024, P=512, C=48, D=32, e=2)
    tables = {op: bytes_moved("patches", op, **elements) for op in ("patchify", "noise_patchify")}
    tables["embed_patches"] = bytes_moved("patches", "embed_patches", **sizes)
    noise, embedding = tables["noise_patchify"], tables["embed_patches"]
    tables["noise_patchify_embed"] = [noise[0] + embedding[0], embedding[1]]  # x0 without a gradient
    assert noise == [2 * 512 * 32 * 2] * 2 and tables.keys() == set(OPS)
    for op, expected in tables.items():
        assert list(moved(Case(op, 512, 32, 48 if "embed" in op else 0), 2).values()) == expected


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0
    assert {c.op for c in quick} == set(OPS)


def test_the_command_writes_a_complete_file(tmp_path):
    assert patchify.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "patchify")
    assert len(rows) == 14 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)


def test_pytorch_draws_noise_anew_where_it_is_not_given():
    chosen = problem(Case("noise_patchify", 512, 16), "cpu", torch.float32)
    (x0,) = chosen.tensors.values()
    ready, drawn = (chosen.functions[name] for name in (EAGER, OWN_NOISE[0]))
    assert torch.equal(ready(x0), ready(x0)) and not torch.equal(drawn(x0), drawn(x0))
    assert abs(drawn(x0).std() / ready(x0).std() - 1) < 0.1


def test_results_that_are_not_finite_fail_beside_another_noise():
    chosen = problem(Case("noise_patchify", 512, 16), "cpu", torch.float32)
    chosen.functions[OWN_NOISE[0]] = lambda x0: chosen.functions[EAGER](x0) / 0
    last = measured_once(contenders(chosen))[-1]
    assert last.name == OWN_NOISE[0] and last.error and not last.checked
