"""Ranks that share rows compute, together, what one process computes: losses and every gradient.

One spawn of four processes makes all comparisons, most of them on the first two and the last two.
"""
import pytest
import torch

from tests.gloo_processes import needs_gloo, run_together
from tests.transfusion.model.ranks import EVERY_ROW, IN_FLOAT32, MODELS, ON_FOUR, ROWS, run
from tfkernels._library import INTERPRET
from transfusion.sequence import CONTEXT_ATTENTION

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="processes do not see which kernel runs; once, on PyTorch's, is enough"),
    needs_gloo]
SINGLE = "windows in some layers", "lora"  # Gemma's norms, and logits of an adapted head, are float32 in any model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_together(4, run, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name,kind", [(name, kind) for name in MODELS
                                       for kind in (ROWS if name in EVERY_ROW else ROWS[:1])])
def test_two_ranks_give_the_losses_and_gradients_of_one_process(name, kind, ranks):
    for rank, way in zip(ranks, ["gathered"] * 2 + ["ring"] * 2):
        found = rank[name, kind, way, 2]
        assert max(found.values()) <= (1e-6 if name in SINGLE else 1e-12), (way, found)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_give_the_losses_and_gradients_of_one_process(name, ranks):
    for rank in ranks:
        found = rank[name, "mixed", ON_FOUR[name], 4]
        assert max(found.values()) <= (1e-6 if name in SINGLE else 1e-12), found


@pytest.mark.parametrize("way", CONTEXT_ATTENTION)
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_single_precision_losses_and_gradients_are_off_by_a_millionth_at_most(name, way, ranks):
    for rank in ranks[:2] if way == "gathered" else ranks[2:]:
        assert max(rank[name, way, "float32"]) <= 1e-6
