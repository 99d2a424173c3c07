"""The diffusion losses' benchmark: right answers pass, and the bytes are those of the operators' tables."""
import json

import pytest
import torch

import tfkernels
from benchmarks import diffusion_loss
from benchmarks.bandwidth import contenders
from benchmarks.diffusion_loss import OPS, Case, cases, problem
from benchmarks.harness import measure


@pytest.mark.parametrize("op", OPS)
def test_every_contender_is_right(op):
    case = Case(op, 512, 16, 0 if op == "diffusion_loss" else 64)
    for result in measure(contenders(problem(case, "cpu", torch.float32)), device="cpu", seconds=0, warmup=0, least=1, most=1):
        assert result.error is None and result.checked and result.milliseconds.keys() == {"forward", "backward"}


def test_the_bytes_are_those_that_the_modules_tables_name():
    line, = (line for line in tfkernels.diffusion_loss.__globals__["__doc__"].splitlines() if line.strip().startswith("diffusion_loss "))
    assert line.split()[1:4] == ["2", "E", "e"] and line.split("8 e,")[1].split()[:3] == ["3", "E", "e"]
    line, = (line for line in tfkernels.head_loss.__doc__.splitlines() if line.strip().startswith("norm, head, loss"))
    assert line.split("loss")[1].startswith("   P C e  ") and "(P + T) C e" in line
    e, d = 4, 16
    assert problem(Case("diffusion_loss", 512, d), "cpu", torch.float32).moved == {"forward": 2 * 512 * d * e, "backward": 3 * 512 * d * e}
    found = problem(Case(OPS[1], 512, d, 64), "cpu", torch.float32).moved
    assert found == {"forward": 512 * 64 * e, "backward": (512 + 1024) * 64 * e}


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_the_command_writes_a_complete_file(tmp_path):
    assert diffusion_loss.main(["--cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "diffusion_loss-cpu.json").read_text())["rows"]
    assert len(rows) == 9 and all(row["checked"] and row["gb_per_s"]["forward"] > 0 for row in rows)
