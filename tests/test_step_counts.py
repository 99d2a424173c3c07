"""A training step and a denoising step waste nothing: what is once per mask or index is made once, nothing grows with
the square of the tokens, and nothing waits for the device."""
import pytest
import torch

from tests.conftest import DEVICE, INTERPRET, KERNEL_RUNS
from tests.step_counts import BACKBONES, IMAGE_LAYERS, LENGTHS, STEPS, counted, model_of, training_step

pytestmark = pytest.mark.skipif(KERNEL_RUNS or INTERPRET, reason="the launches are counted in place of run")


@pytest.mark.parametrize("image_layers", IMAGE_LAYERS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_never_waits_and_nothing_in_it_grows_with_the_square_of_the_tokens(step, backbone, image_layers):
    model = model_of(backbone, image_layers)
    short, middle, long = (STEPS[step](model, seq_len) for seq_len in LENGTHS[step])
    assert short.waits == middle.waits == long.waits == []
    assert short.launches == middle.launches == long.launches and short.launches
    assert short.calls == middle.calls == long.calls
    for size in (sum, max):
        first, second, third = (size(counts.allocations) for counts in (short, middle, long))
        assert third - second <= 2.05 * (second - first) + 4096  # twice as many tokens more; a square is four times
    assert len(short.allocations) == len(long.allocations)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_once_per_mask_or_index_is_made_once_for_all_layers(backbone):
    two, four = (training_step(model_of(backbone, "linear", layers), LENGTHS["training"][0]) for layers in (2, 4))
    assert two.launches["_mask_intervals"] == four.launches["_mask_intervals"] == 1
    sorts = {"decoder": 0, "adaln": 1, "mixture_of_transformers": 2}[backbone]  # one for each index: text and patches
    assert two.calls["aten::sort"] == four.calls["aten::sort"] == sorts
    assert two.calls["aten::searchsorted"] == four.calls["aten::searchsorted"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_bounds_of_tiles_are_made_once_for_all_denoising_steps(backbone):
    assert STEPS["denoising"](model_of(backbone, "linear"), LENGTHS["denoising"][0]).launches["_tile_bounds"] == 0


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.tolist(),
    lambda x: x.cpu(), lambda x: x.numpy(), lambda x: torch.masked_select(x, x > 0), lambda x: x.unique()])
def test_a_wait_is_seen(wait):
    x = torch.ones(3, device=DEVICE)
    with counted() as counts:
        wait(x)
    assert counts.waits


def test_a_square_of_the_tokens_is_seen():
    sizes = []
    for tokens in (256, 512, 1024):
        with counted() as counts:
            torch.ones(tokens, 1) * torch.ones(1, tokens)
        sizes.append(max(counts.allocations))
    assert sizes[2] - sizes[1] > 2.05 * (sizes[1] - sizes[0]) + 4096
