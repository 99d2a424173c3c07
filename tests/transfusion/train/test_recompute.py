"""Checkpointed layers keep what they say, and compiled ones are compiled once; neither changes a number."""
import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.test_plan import ROWS, InUse, rows_of, small
from transfusion import Image, Text
from transfusion.model.config import BACKBONES
from transfusion.model.lora import TuneSettings
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import encode, lay_out
from transfusion.train.activations import trace
from transfusion.train.recompute import checkpoint_layers, compile_layers


@functools.cache
def activations(backbone, layers):
    """What `transfusion plan` says."""
    config, tune = small(backbone, "dit", layers=layers), TuneSettings()
    found = trace(config, tune, rows_of(config, 1), rows_of(config, 2), dtype=torch.float32, autocast=False)
    return found.activations(ROWS)


@functools.cache
def step(backbone, recompute):
    """Bytes that are in use between forward and backward, the loss, and the gradients."""
    config = small(backbone, "dit", layers=4)
    torch.manual_seed(0)
    model, rows = Transfusion(config).train(), rows_of(config, ROWS)
    checkpoint_layers(model, recompute)
    times, seed = torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])
    with InUse() as used:
        loss = model(rows, times, seed).loss
        kept = used.now
        loss.backward()
    return kept, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_computed_again_is_not_kept_as_it_is_planned_and_numbers_stay(backbone, recompute):
    kept, loss, gradients = step(backbone, recompute)
    everything, expected_loss, expected = step(backbone, "none")
    assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    planned = activations(backbone, 4)
    layer = planned.everything - activations(backbone, 3).everything  # is made again when its turn comes
    others = everything - planned.everything                          # the rows, and what their mask is made of
    assert kept - others == pytest.approx(getattr(planned, recompute) - layer, rel=0.08)
    assert kept < {"selective": 0.65, "full": 0.2}[recompute] * everything


def drawn(model, images):
    """Two rows, one of them with so many images."""
    generator = torch.Generator().manual_seed(images)
    pictures = [Image(torch.rand(1, 8, 8, generator=generator) * 2 - 1) for _ in range(images)]
    documents = [[[Text("a handwritten seven"), *pictures]], [[Text("a" * (images + 1))]]]
    return lay_out([[encode(parts, model.tokenizer, model.config) for parts in row] for row in documents], 128,
                   model.config.patch_dim)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_layers_give_the_same_numbers_and_are_not_compiled_again_when_lengths_change(backbone, recompute):
    def losses(model):
        found = []
        for images in (1, 2, 3, 4, 2, 5):
            rows = drawn(model, images)
            model.zero_grad()
            loss = model(rows, torch.full((images,), 0.5), torch.tensor([1, 2, 0])).loss
            loss.backward()
            found.append((loss.detach(), torch.stack([p.grad.norm() for p in model.parameters()])))
            compiled.append(counter.frame_count)
        return found

    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("aot_eager"), []
    model = tiny_model(backbone=backbone).train()
    plain = copy.deepcopy(model)
    plain.tokenizer = model.tokenizer
    checkpoint_layers(model, recompute)
    compile_layers(model, counter)
    for found, expected in zip(losses(model), losses(plain)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 0 < compiled[0] <= compiled[1] == compiled[-1] <= 8, compiled
