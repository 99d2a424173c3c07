"""The patches' benchmark: right answers pass, and the bytes are those of the operators' tables."""
import importlib
import json
import re

import pytest
import torch

from benchmarks import patchify
from benchmarks.bandwidth import contenders
from benchmarks.harness import measure
from benchmarks.patchify import OPS, Case, cases, moved, problem
from tfkernels._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="images of 256 tokens take the interpreter minutes; the operators' own tests run in it")


@pytest.mark.parametrize("op", OPS)
def test_every_contender_is_right(op):
    case = Case(op, 512, 32, 48 if "embed" in op else 0)
    for result in measure(contenders(problem(case, "cpu", torch.float32)), device="cpu", seconds=0, warmup=0, least=1, most=1):
        assert result.error is None and result.checked and result.milliseconds.keys() == {"forward", "backward"}


def test_the_embedding_problems_hold_as_much_text_as_images():
    found = problem(Case("embed_patches", 512, 32, 48), "cpu", torch.float32)
    hidden, weight, condition = found.tensors.values()
    assert hidden.shape == (1024, 48) and weight.shape == (48, 32) and condition.shape == (2, 48)
    for function in found.functions.values():
        kept = (function(hidden, weight, condition) == hidden).all(1)
        assert torch.equal(kept, torch.arange(1024) // 256 % 2 == 0)


def table(module, op, **sizes):
    """Forward and backward bytes of `op` in the table of a module's docstring."""
    line = next(line for line in importlib.import_module(f"tfkernels.{module}").__doc__.splitlines() if line.split()[:1] == [op])
    forward, _, backward = re.split(r" {2,}", line.strip())[1:4]
    return [eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), dict(sizes)) for formula in (forward, backward)]


def test_the_bytes_are_those_that_the_modules_tables_name():
    patches = dict(E=512 * 32, e=2)
    sizes = dict(T=1024, P=512, C=48, D=32, e=2)
    noise, embedding = table("patchify", "noise_patchify", **patches), table("embed", "embed_patches", **sizes)
    assert noise == [2 * 512 * 32 * 2] * 2
    for op, expected in (("patchify", table("patchify", "patchify", **patches)), ("noise_patchify", noise), ("embed_patches", embedding),
                         ("noise_patchify_embed", [noise[0] + embedding[0], embedding[1]])):  # x0 without a gradient
        assert list(moved(Case(op, 512, 32, 48 if "embed" in op else 0), 2).values()) == expected


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0
    assert {c.op for c in quick} == set(OPS)


def test_the_command_writes_a_complete_file(tmp_path):
    assert patchify.main(["--cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "patchify-cpu.json").read_text())["rows"]
    assert len(rows) == 12 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)
