"""Learning rates: of each step by the schedule, and of parts of a model by a factor."""
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.test_loop import records
from tests.transfusion.train.test_transfusion import small
from transfusion.model.lora import TuneSettings, base_of, image_modules, is_of_images, prepare
from transfusion.train import transfusion as trainer
from transfusion.train.loop import accumulate
from transfusion.train.optimizer import Player, build_optimizer, learning_rate, scale_rates
from transfusion.train.parallel import shard
from transfusion.train.transfusion import OptimSettings, TransfusionTask, train


def rates(**settings):
    optim = OptimSettings(steps=100, lr=1.0, min_lr=0.1, warmup=10, **settings)
    return [learning_rate(step, optim) for step in range(optim.steps)]


def test_without_a_schedule_named_rates_follow_the_cosine():
    assert rates() == rates(schedule="cosine")
    assert rates()[10:] == [0.1 + (1.0 - 0.1) * 0.5 * (1 + math.cos(math.pi * ((step - 10) / 90)))
                            for step in range(10, 100)]


def test_every_schedule_has_the_same_warm_up():
    assert rates()[:10] == rates(schedule="wsd")[:10] == rates(schedule="constant")[:10] == [
        1.0 * (step + 1) / 10 for step in range(10)]


def test_constant_stays_at_lr():
    assert rates(schedule="constant")[10:] == [1.0] * 90


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_wsd_stays_at_lr_and_falls_by_a_square_root_over_the_last_share_of_the_steps(share):
    found, start = rates(schedule="wsd", decay_share=share), round(100 * (1 - share))
    assert found[10:start + 1] == [1.0] * (start + 1 - 10)
    for step in range(start, 100):
        assert found[step] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - start) / (100 - start))), abs=1e-7)
    assert found[start:] == sorted(found[start:], reverse=True) and found[-1] < found[start] - 0.5


def test_a_longer_run_with_wsd_has_the_same_rates_until_the_shorter_one_decays():
    """What WSD is for: a run is prolonged from a save before its decay."""
    short, long = (OptimSettings(steps=steps, warmup=10, schedule="wsd") for steps in (100, 400))
    assert [learning_rate(step, short) for step in range(91)] == [learning_rate(step, long) for step in range(91)]
    assert learning_rate(95, short) < learning_rate(95, long)


def image_names(model):
    """Trained parameters of image modules, found by module in place of by name."""
    base = base_of(model)
    inside = {id(p) for module in image_modules(base) for p in base.get_submodule(module).parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside and p.requires_grad}


@pytest.mark.parametrize("backbone", ["decoder", "adaln", "mixture_of_transformers"])
@pytest.mark.parametrize("trained", ["all", "images", "lora"])
def test_image_layers_and_nothing_else_get_a_learning_rate_of_their_own(backbone, trained):
    model = prepare(tiny_model(backbone=backbone), TuneSettings(start=Path("start"), trained=trained, lora_rank=2))
    names = {p: name for name, p in model.named_parameters()}
    expected = {name for name, p in model.named_parameters() if p.requires_grad and is_of_images(name)}
    if trained == "all":
        assert expected == image_names(model)
    plain = build_optimizer(model, OptimSettings())
    optimizer = build_optimizer(model, OptimSettings())
    scale_rates(optimizer, [p for p in names if names[p] in expected], 10.0)
    Player(model, optimizer).set_rate(0.5)
    rates = {names[p]: (group["lr"], group["weight_decay"])
             for group in optimizer.param_groups for p in group["params"]}
    decays = {names[p]: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert rates == {name: (5.0 if name in expected else 0.5, decay) for name, decay in decays.items()}
    assert expected and len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_without_a_factor_groups_stay_what_they_were():
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimSettings())
    before = [dict(group) for group in optimizer.param_groups]
    scale_rates(optimizer, model.parameters(), 1.0)
    assert [dict(group) for group in optimizer.param_groups] == before


def settings(out, **changes):
    config = small(out)
    optim = {name: changes.pop(name) for name in ("image_lr", "schedule") if name in changes}
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim), **changes)


def test_a_step_moves_image_layers_so_many_times_as_far(tmp_path):
    """After one step, AdamW has moved each weight by lr * sign(gradient) and lr * decay * weight."""
    torch.manual_seed(0)
    moved = {}
    for factor in (1.0, 4.0):
        model = tiny_model().train()
        data = trainer.open_data(small(tmp_path).data)
        rows = data.rows(model.tokenizer, model.config, None, rows=2, seq_len=64, steps=12)
        task = TransfusionTask(settings(tmp_path, image_lr=factor), rows, model, model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        task.player.set_rate(1e-3)
        accumulate(task, 0)
        task.player.optimizer.step()
        moved[factor] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, far in moved[1.0].items():
        torch.testing.assert_close(moved[4.0][name], (4.0 if is_of_images(name) else 1.0) * far, rtol=1e-3, atol=1e-7)
    assert any(is_of_images(name) and far.abs().max() > 1e-4 for name, far in moved[1.0].items())


def test_runs_with_and_without_a_factor_resume_from_each_other(tmp_path, capsys):
    """An optimizer's state is found by the parameters' names, whatever its groups."""
    train(settings(tmp_path / "whole", image_lr=3.0))
    train(settings(tmp_path / "parts", image_lr=3.0, stop_after=5))
    train(settings(tmp_path / "parts", image_lr=3.0, resume=True))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    train(settings(tmp_path / "changed", stop_after=5))
    train(settings(tmp_path / "changed", image_lr=3.0, resume=True))
    assert "going on with optim.image_lr 3.0 (was 1.0)" in capsys.readouterr().out
    before, after = records(tmp_path / "changed")[:6], records(tmp_path / "whole")[:6]
    assert before[0]["loss"] == after[0]["loss"] and before[5] != after[5]


def test_sharded_parameters_have_rates_of_their_own_as_well(tmp_path):
    """One process with a mesh of its own: names stay, and parameters are DTensors."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = shard(tiny_model(backbone="adaln"), init_device_mesh("cpu", (1,)))
        optimizer = build_optimizer(model, OptimSettings())
        scale_rates(optimizer, (p for name, p in model.named_parameters() if is_of_images(name)), 2.0)
        Player(model, optimizer).set_rate(0.5)
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert all(isinstance(p, DTensor) for p in rates) and len(rates) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            assert rates[p] == (1.0 if is_of_images(name) else 0.5), name
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_with_another_schedule_logs_its_rates(tmp_path):
    config = settings(tmp_path, schedule="wsd")
    train(config)
    expected = [learning_rate(step, config.optim) for step in range(12)]
    assert [record["lr"] for record in records(tmp_path)] == expected
    assert expected[1:11] == [3e-3] * 10 and expected[11] < 2e-3


def test_the_optimizer_has_the_settings_betas_and_decays_matrices_alone():
    model = tiny_model()
    groups = build_optimizer(model, OptimSettings(betas=(0.8, 0.9), weight_decay=0.3)).param_groups
    assert all(group["betas"] == (0.8, 0.9) for group in groups)
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {p: 0.3 if p.ndim >= 2 else 0.0 for p in model.parameters()}
