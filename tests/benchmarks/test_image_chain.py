"""The image chain's benchmark: right answers pass, and the bytes are the sum of its three operators'."""

import torch

from benchmarks import diffusion_loss, image_chain, patchify
from benchmarks.bandwidth import contenders
from benchmarks.image_chain import DIM, Case, cases, moved, problem
from tests.benchmarks.measuring import measured_once, rows_of


def test_every_contender_is_right():
    for result in measured_once(contenders(problem(Case(512, 64), "cpu", torch.float32))):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward"}


def test_the_bytes_are_the_sum_of_the_operators():
    embed = patchify.moved(patchify.Case("noise_patchify_embed", 512, DIM, 256), 2)
    (of_patches, of_tokens), backward = diffusion_loss.MOVED["norm, head, loss"]
    head = {"forward": (of_patches * 512 + of_tokens * 1024) * 256 * 2,
            "backward": (backward[0] * 512 + backward[1] * 1024) * 256 * 2}
    assert moved(Case(512, 256), 2) == {phase: embed[phase] + head[phase] for phase in embed}


def test_the_quick_grid_is_the_beginning_and_the_command_writes_a_complete_file(tmp_path):
    assert cases(False)[:len(cases(True))] == cases(True)
    assert image_chain.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "image_chain")
    assert len(rows) == 4 and all(row["checked"] for row in rows)
    assert rows[1]["saved_bytes"] < 0.6 * rows[2]["saved_bytes"]
