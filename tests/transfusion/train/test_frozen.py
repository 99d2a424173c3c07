"""Frozen weights in bfloat16 change nothing that autocast computes, and nothing that is saved."""
import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import transfusion.train.transfusion as trainer
from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.test_plan import rows_of, small
from transfusion import Transfusion
from transfusion.model.lora import TuneSettings, base_of, prepare
from transfusion.recipes.digits import digits
from transfusion.train.frozen import FrozenLinear, narrow_frozen
from transfusion.train.recompute import checkpoint_layers, compile_layers

KINDS = [("decoder", "dit", "lora"), ("mixture_of_transformers", "unet", "images"), ("adaln", "linear", "lora")]


def two(backbone, image_layers, trained, start):
    """The same model to be tuned, twice; the frozen weights of the second are narrow."""
    torch.manual_seed(0)
    plain = prepare(Transfusion(small(backbone, image_layers)), TuneSettings(start=start, trained=trained)).train()
    narrow = copy.deepcopy(plain)
    narrow_frozen(base_of(narrow))
    return plain, narrow


@pytest.mark.parametrize("layers", ["as they are", "checkpointed", "compiled"])
@pytest.mark.parametrize("backbone,image_layers,trained", KINDS)
def test_losses_and_gradients_are_those_of_copies_to_the_bit(backbone, image_layers, trained, layers, tmp_path):
    torch._dynamo.reset()
    found = []
    for model in two(backbone, image_layers, trained, tmp_path):
        if layers == "checkpointed":
            checkpoint_layers(base_of(model), "selective")
        if layers == "compiled":
            compile_layers(base_of(model), "eager")
        rows = rows_of(base_of(model).config, 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, torch.full((rows.image_count,), 0.5), torch.tensor([1, 2])).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (narrow_loss, narrow_gradients) = found
    assert torch.equal(loss, narrow_loss) and gradients.keys() == narrow_gradients.keys() and gradients
    assert all(torch.equal(gradient, narrow_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("backbone,image_layers,trained", KINDS)
def test_what_is_trained_and_what_stands_outside_the_blocks_stays_float32(backbone, image_layers, trained, tmp_path):
    plain, model = two(backbone, image_layers, trained, tmp_path)
    inside = {module for block in base_of(plain).backbone.blocks() for module in block.modules()}
    expected = {f"{name}.weight" for name, module in plain.named_modules()
                if module in inside and type(module) is torch.nn.Linear and not module.weight.requires_grad}
    assert expected == {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} != set()
    assert {p.dtype for name, p in model.named_parameters() if name not in expected} == {torch.float32}


def test_outside_of_autocast_it_computes_in_the_numbers_of_its_input_with_rounded_weights():
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    rounded = copy.deepcopy(layer)
    rounded.weight.data = layer.weight.data.bfloat16().float()
    layer.__class__, layer.weight = FrozenLinear, torch.nn.Parameter(layer.weight.data.bfloat16(), requires_grad=False)
    assert torch.equal(layer(x), rounded(x)) and layer(x).dtype == torch.float32
    assert torch.equal(layer(x.double()), rounded.double()(x.double()))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_run_saves_what_one_with_copies_saves_and_draws_on_the_way(autocast, tmp_path, monkeypatch):
    start = tmp_path / "start"
    tiny_model().save_pretrained(start)
    seen = []

    def run(name, **more):
        config = digits()
        config = dataclasses.replace(
            config, out=tmp_path / name, autocast=autocast, device="cpu", **more,
            tune=TuneSettings(start=start, trained="lora"),
            optim=dataclasses.replace(config.optim, steps=2, rows=1, seq_len=64, ema=0.0),
            samples=dataclasses.replace(config.samples, every=1, count=1, steps=2))
        trainer.train(config)
        assert list((tmp_path / name / "samples").glob("*.png")) and '"samples_failed"' not in (
            tmp_path / name / "log.jsonl").read_text()
        return load_file(tmp_path / name / "adapter_model.safetensors")

    run("narrow", stop_after=1)
    narrowed = run("narrow", resume=True)
    monkeypatch.setattr(trainer, "narrow_frozen", seen.append)
    plain = run("plain")
    assert len(seen) == autocast
    assert narrowed.keys() == plain.keys() and all(torch.equal(x, plain[name]) for name, x in narrowed.items())
    assert all(x.dtype == torch.float32 for x in narrowed.values())
    assert Transfusion.from_pretrained(tmp_path / "narrow").dtype == torch.float32
