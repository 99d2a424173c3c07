"""The training step's benchmark: contenders run one model, wrong ones are refused, batches are as they should be."""
import sys

import pytest
import torch

from benchmarks import train_step
from benchmarks.model_peers import dense_mask, peer_samples, plain_loss, training_sequence
from benchmarks.report import Report
from benchmarks.train_step import DENSE, OURS, Case, Step, cases, configuration, contenders, losses
from tests.benchmarks.measuring import measured_once, rows_of
from transfusion.model.transfusion import Transfusion

TINY = Case("tiny", 2, 256)


@pytest.fixture(scope="module")
def sequence():
    return training_sequence(configuration(TINY), 2, 256)


def test_every_contender_is_right_and_leaves_the_weights_as_they_are():
    chosen, model = contenders(TINY, "cpu")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for result in measured_once(chosen):
        assert result.error is None and result.checked
        assert result.milliseconds.keys() == {"forward", "backward", "optimizer"}
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_contender_without_the_images_blocks_is_refused(monkeypatch):
    right = losses

    def causal(model, sequence, device, eps=None):
        times = torch.linspace(0.05, 0.95, sequence.image_count)
        seq_len = sequence.tokens.shape[1]
        mask = dense_mask(sequence) & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
        wrong = {OURS: lambda: plain_loss(model, sequence, times, mask, "sdpa", eps)}
        return right(model, sequence, device, eps) | wrong

    monkeypatch.setattr(train_step, "losses", causal)
    ours, dense = measured_once(contenders(TINY, "cpu")[0])
    assert ours.error.startswith("AssertionError: ") and not ours.milliseconds and dense.error is None


def test_the_dense_mask_is_the_models(sequence):
    assert torch.equal(dense_mask(sequence), sequence.mask().dense())


def test_rows_are_full_and_half_of_them_are_patches():
    config = configuration(TINY)
    sequence = training_sequence(config, 8, 2048)
    assert (sequence.documents >= 0).all() and sequence.tokens.max() < config.text_config.vocab_size
    assert 0.4 < len(sequence.patches) / sequence.tokens.numel() < 0.55
    assert len(sequence.patches) + len(sequence.text_targets) < sequence.tokens.numel()
    assert not torch.equal(sequence.tokens, training_sequence(config, 8, 2048, seed=1).tokens)


def test_samples_for_transfusion_pytorch_hold_every_token_but_the_brackets(sequence):
    for row, sample in zip(range(2), peer_samples(sequence)):
        images = [part[1] for part in sample if isinstance(part, tuple)]
        text = torch.cat([part for part in sample if not isinstance(part, tuple)])
        kept = sequence.tokens[row][sequence.image_ids[row] < 0]
        ids = sequence.image_ids[row]
        assert torch.equal(text, kept[(kept != 256) & (kept != 257)]) and len(images) == len(ids.unique()) - 1
        assert torch.equal(torch.cat(images), sequence.patches[torch.isin(sequence.layout.image_ids, ids)])


def test_the_peer_is_as_wide_and_deep(monkeypatch):
    peer = pytest.importorskip("transfusion_pytorch", reason="transfusion-pytorch is not installed")
    model = train_step.peer_contenders(TINY, "cpu")[1]
    ours = Transfusion(configuration(TINY))
    layers = ours.backbone.decoder.get_decoder().layers
    assert isinstance(model, peer.Transfusion) and len(model.transformer.layers) == len(layers)
    assert model.dim == ours.config.text_config.hidden_size
    widths = {tuple(m.weight.shape) for m in model.transformer.modules() if isinstance(m, torch.nn.Linear)}
    assert tuple(layers[0].mlp.down_proj.weight.shape) in widths


def test_a_peer_with_a_gradient_that_is_not_finite_is_refused(monkeypatch):
    layer = torch.nn.Linear(2, 1)

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, samples):
            return self.layer(torch.tensor([[torch.nan, 1.0]])).nan_to_num().sum()

    monkeypatch.setattr(train_step, "transfusion_pytorch", lambda *_, **__: Broken())
    result, = measured_once(train_step.peer_contenders(TINY, "cpu")[0])
    assert result.error.startswith("AssertionError") and not result.milliseconds


def test_a_missing_peer_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "transfusion_pytorch", None)
    report = Report("train_step", {}, {"device": "cpu"})
    train_step.run_case(TINY, report, "cpu", 0.0)
    peer = next(row for row in report.rows if row["contender"] == train_step.PEER)
    assert peer["left_out"].startswith("not installed: ") and peer["error"] is None and peer["step_ms"] is None


def test_phases_are_those_of_a_step():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step, state = Step(lambda: model(torch.ones(1, 1)).sum(), model, optimizer, "cpu"), {}
    before = model.weight.item()
    for phase in step.contender("x", lambda state: None).phases.values():
        phase(state)
    assert model.weight.item() == pytest.approx(before - 1) and model.weight.grad is None


def test_the_quick_grid_is_the_beginning_of_the_whole():
    quick, whole = cases(True), cases(False)
    assert whole[:len(quick)] == quick and len(set(whole)) == len(whole) > len(quick) > 0


def test_operations_grow_with_the_rows_and_the_command_writes_a_complete_file(tmp_path, capsys):
    assert train_step.main(["--cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = {row["contender"]: row for row in rows_of(tmp_path, "train_step")}
    assert all(row["timing"].get("forward", "wall") == "wall" for row in rows.values())
    for name in (OURS, DENSE):
        assert rows[name]["checked"] and rows[name]["tokens_per_s"] > 0 and rows[name]["tflops"] > 0
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # in two layers
    assert rows[OURS]["operations"] == rows[DENSE]["operations"] > 6 * rows[OURS]["tokens"] * weights
    assert OURS in capsys.readouterr().out
