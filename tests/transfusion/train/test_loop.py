"""The loop: micro-batches change memory alone, and with any optimizer a run goes on as if it had not stopped."""
import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.test_autoencoder import tiny as tiny_autoencoder
from tests.transfusion.train.test_transfusion import small
from tfkernels import noise_patchify
from transfusion import Image, Text
from transfusion.command import saved_run
from transfusion.data.batches import Drawn
from transfusion.sequence import encode, lay_out, split_rows
from transfusion.train import transfusion as trainer
from transfusion.train.autoencoder import train as train_autoencoder
from transfusion.train.log import CLOCKED
from transfusion.train.loop import accumulate, clip_gradients
from transfusion.train.optimizer import Player
from transfusion.train.settings import OptimizerSettings, StepSettings, check_steps, defaults
from transfusion.train.transfusion import OptimSettings, TransfusionTask, train


def uneven_rows(model, count=4):
    """Rows with very different numbers of text targets and images: text or images alone, both, almost nothing."""
    generator = torch.Generator().manual_seed(2)
    images = [Image(torch.rand(1, 8, 8, generator=generator) * 2 - 1) for _ in range(4)]
    rows = [[[Text("a handwritten seven and a handwritten four and a handwritten two")]], [[images[0]], [images[1]]],
            [[Text("a"), images[2]], [images[3], Text("a handwritten two")]], [[Text("a")]]]
    return lay_out([[encode(parts, model.tokenizer, model.config) for parts in row] for row in rows[:count]], 64,
                   model.config.patch_dim)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_micro_batches_hold_the_rows_of_the_batch(parts):
    model = tiny_model()
    whole = uneven_rows(model)
    found = split_rows(whole, parts)
    assert len(found) == parts and sum(len(part.tokens) for part in found) == len(whole.tokens)
    for name in ("tokens", "positions", "documents", "text_targets", "patches", "image_first", "drawn"):
        assert torch.equal(torch.cat([getattr(part, name) for part in found]), getattr(whole, name))
    row = 0
    for part in found:
        rows = slice(row, row + len(part.tokens))
        assert torch.equal(part.mask().dense(), whole.mask().dense()[rows])
        assert (torch.equal(part.image_ids >= 0, (whole.image_ids >= 0)[rows])
                and part.image_ids.max() == part.image_count - 1)
        assert torch.equal(part.tokens.flatten()[part.target_places + 1], part.text_targets)
        assert torch.equal(part.layout.image_ids, part.image_ids.flatten()[part.patch_places].long())
        assert torch.equal(torch.cat([part.modality.text_places, part.patch_places]).sort().values,
                           torch.arange(part.tokens.numel()))
        row = rows.stop


def gradients(tmp_path, parts):
    """A step's losses and gradients in `parts` micro-batches."""
    config = small(tmp_path, optim=OptimSettings(rows=4, seq_len=64, accumulate=parts))
    model = tiny_model().train()
    rows = SimpleNamespace(draw=lambda step, generator: Drawn(uneven_rows(model), torch.ones(4), {}))
    means, playing, _ = accumulate(TransfusionTask(config, rows, model, model), 0)
    assert [player.model for player in playing] == [model]
    return means, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_losses_and_gradients_of_very_uneven_micro_batches_are_those_of_the_whole_batch(tmp_path, parts):
    (means, grads), (expected_means, expected) = (gradients(tmp_path, n) for n in (parts, 1))
    assert (means.keys() == expected_means.keys() == {"loss", "text_loss", "diffusion_loss"}
            and grads.keys() == expected.keys())
    for name, mean in means.items():
        torch.testing.assert_close(mean, expected_means[name], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
    assert max(grad.abs().max() for grad in expected.values()) > 0.01


def test_micro_batches_have_the_documents_the_times_and_the_noise_of_the_whole_batch(tmp_path):
    data, model = trainer.open_data(small(tmp_path).data), tiny_model()
    rows = data.rows(model.tokenizer, model.config, None, rows=4, seq_len=64, steps=12)
    configs = [small(tmp_path, optim=OptimSettings(rows=4, seq_len=64, accumulate=n)) for n in (1, 4)]
    whole, parts = (TransfusionTask(config, rows, model, model).batches(5) for config in configs)
    assert len(whole) == 1 and len(parts) == 4
    assert torch.equal(torch.cat([batch.inputs[0].tokens for batch in parts]), whole[0].inputs[0].tokens)
    assert torch.equal(torch.cat([batch.inputs[1] for batch in parts]), whole[0].inputs[1])

    def noise(batch):
        sequence, _, seed = batch.inputs
        still = torch.zeros(sequence.image_count)
        return noise_patchify(sequence.patches, still, still + 1, seed, offsets=sequence.layout.offsets)

    assert torch.equal(torch.cat([noise(batch) for batch in parts]), noise(whole[0]))
    assert len(noise(whole[0]).unique(dim=0)) == len(whole[0].inputs[0].patches)
    totals = Counter()
    for batch in parts:
        totals.update(batch.counts)
    assert totals == Counter(whole[0].counts) and totals["text_loss"] > 0 < totals["diffusion_loss"]


def records(out):
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKED}
            for line in (out / "log.jsonl").read_text().splitlines()]


class Counting(torch.optim.SGD):
    """Momentum, and what other optimizers keep besides tensors: numbers of each parameter, and of a group."""

    def step(self):
        super().step()
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            for p in group["params"]:
                if p in self.state:
                    self.state[p] |= {"count": self.state[p].get("count", 0) + 1, "unused": None}
                    p.data.mul_(1 - 1e-3 / self.state[p]["count"] / group["taken"])


def muon(model, optim):
    """torch's Muon on matrices alone; the rest stays as it is."""
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.ndim == 2], lr=optim.lr)


OPTIMIZERS = {
    "Muon": muon, "Adagrad": lambda model, optim: torch.optim.Adagrad(model.parameters(), lr=optim.lr),
    "SGD": lambda model, optim: torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=0.9),
    "Counting": lambda model, optim: Counting(model.parameters(), lr=optim.lr, momentum=0.9)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_one_that_never_stopped_whatever_its_optimizer(tmp_path, monkeypatch, name):
    if not hasattr(torch.optim, name) and name != "Counting":
        pytest.skip(f"this torch has no {name}")
    monkeypatch.setattr(trainer, "build_optimizer", OPTIMIZERS[name])
    train(small(tmp_path / "whole"))
    train(small(tmp_path / "parts", stop_after=5))
    train(small(tmp_path / "parts", resume=True))
    assert records(tmp_path / "whole") == records(tmp_path / "parts") and len(records(tmp_path / "parts")) == 12
    for file in ("model.safetensors", "resume/state.safetensors"):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("parts", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    kept = [saved_run(tmp_path / run)["optimizers"] for run in ("parts", "whole")]
    assert kept[0] == kept[1] and kept[0][""]["kind"] == name
    assert (name == "Counting") == bool(kept[0][""]["numbers"]) == bool(kept[0][""]["groups"][0])


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, monkeypatch):
    train(small(tmp_path, stop_after=2))
    monkeypatch.setattr(trainer, "build_optimizer", OPTIMIZERS["SGD"])
    with pytest.raises(
        ValueError, match="train: the saved run's optimizer is AdamW and this one SGD; the same one fits"
    ):
        train(small(tmp_path, resume=True))


def test_an_optimizer_whose_state_cannot_be_saved_is_refused(tmp_path, monkeypatch):
    class Listing(torch.optim.SGD):
        def step(self):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["past"] = [1]

    monkeypatch.setattr(trainer, "build_optimizer", lambda model, optim: Listing(model.parameters(), lr=optim.lr))
    with pytest.raises(ValueError,
                       match=r"train: the optimizer, Listing, keeps a list \(past\); tensors and numbers can be saved"):
        train(small(tmp_path, stop_after=1))


def test_a_run_in_micro_batches_goes_on_as_if_it_had_not_stopped(tmp_path):
    optim = dataclasses.replace(small(tmp_path).optim, rows=3, accumulate=2)
    train(small(tmp_path / "whole", optim=optim))
    train(small(tmp_path / "parts", optim=optim, stop_after=5))
    train(small(tmp_path / "parts", optim=optim, resume=True))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_an_autoencoder_and_its_discriminator_train_alike_in_micro_batches(tmp_path):
    """Samples of posteriors, 2 x 4 x 4 numbers a picture, are drawn in order.

    So four micro-batches of 2 pictures draw what one of 8 does.
    """
    base = tiny_autoencoder(tmp_path, stop_after=2)
    base = dataclasses.replace(base, losses=dataclasses.replace(base.losses, adversarial_from=1))
    for parts in (1, 4):
        train_autoencoder(dataclasses.replace(base, out=tmp_path / str(parts),
                                              optim=dataclasses.replace(base.optim, accumulate=parts)))
    for ours, theirs in zip(records(tmp_path / "4"), records(tmp_path / "1")):
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-6) for key in theirs)
    assert "discriminator" in records(tmp_path / "4")[-1] and records(tmp_path / "4") != records(tmp_path / "1")


@dataclasses.dataclass(frozen=True)
@defaults(steps=7, betas=(0.5, 0.9))
class Own(StepSettings):
    """Settings of a trainer."""

    batch: int = 2


def test_other_defaults_leave_the_other_options_and_the_base_class_as_they_are():
    assert Own() == Own(steps=7, lr=StepSettings().lr, betas=(0.5, 0.9)) and StepSettings().steps == 1000
    assert [f.name for f in dataclasses.fields(Own)] == [*(f.name for f in dataclasses.fields(StepSettings)), "batch"]


@pytest.mark.parametrize("optim,message", [
    (OptimSettings(lr=1e-5), "op: optim.min_lr is 1.5e-05 and optim.lr 1e-05; at most lr fits"),
    (OptimSettings(steps=100, warmup=90, schedule="wsd", decay_share=0.2),
     "op: optim.warmup is 90 and optim.decay_share 0.2 of 100 steps; at most 80 steps of warm-up fit"),
    (OptimSettings(steps=6, warmup=1, schedule="wsd", decay_share=0.9),
     "op: optim.warmup is 1 and optim.decay_share 0.9 of 6 steps; at most 0 steps of warm-up fit"),
    (OptimSettings(rows=2, accumulate=3), "op: optim.accumulate is 3 and optim.rows 2; at most rows fits")])
def test_settings_of_steps_that_do_not_fit_each_other_are_refused_by_name(optim, message):
    with pytest.raises(ValueError, match=message):
        check_steps("op", optim, "rows", "optim.")
    check_steps("op", OptimSettings(lr=1.5e-5, rows=2, accumulate=2), "rows", "optim.")
    check_steps("op", OptimSettings(lr=1e-5, schedule="constant"), "rows", "optim.")
    assert issubclass(OptimSettings, OptimizerSettings)


def test_players_are_told_apart_by_name():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    assert Player(model, optimizer).prefix(".") == "" and Player(model, optimizer, name="other").prefix(".") == "other."


def test_a_warm_up_may_last_until_the_decay_begins():
    check_steps("op", OptimSettings(steps=100, warmup=80, schedule="wsd", decay_share=0.2), "rows", "optim.")
    with pytest.raises(ValueError, match="warmup is 81"):
        check_steps("op", OptimSettings(steps=100, warmup=81, schedule="wsd", decay_share=0.2), "rows", "optim.")


@pytest.mark.parametrize("limit,norm", [(0.5, 0.5), (None, 2.0), (3.0, 2.0)])
def test_gradients_are_clipped_to_the_limit(limit, norm):
    layer = torch.nn.Linear(2, 2, bias=False)
    player = Player(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    layer.weight.grad = torch.ones(2, 2)
    assert float(clip_gradients(player, limit)) == pytest.approx(2.0)
    assert float(layer.weight.grad.norm()) == pytest.approx(norm, rel=1e-4)
