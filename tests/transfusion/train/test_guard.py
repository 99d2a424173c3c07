"""The guard: a step far above the running medians is skipped or ends the run, and a resumed run knows what it knew."""
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.transfusion.train.test_loop import records
from tests.transfusion.train.test_transfusion import small
from transfusion.command import saved_step
from transfusion.train import transfusion as trainer
from transfusion.train.guard import Guard, Spike
from transfusion.train.optimizer import Player
from transfusion.train.settings import GuardSettings
from transfusion.train.transfusion import TransfusionTask, train


def guard(past=(), **settings):
    model = torch.nn.Linear(1, 1)
    return Guard("train", GuardSettings(**{"do": "skip", "window": 4, "factor": 3.0, "patience": 2} | settings),
                 [Player(model, torch.optim.SGD(model.parameters()))], past)


def step(loss=1.0, grad_norm=1.0):
    return {"loss": loss, "grad_norm": grad_norm}


def test_a_loss_or_a_gradient_norm_above_so_many_times_its_median_is_a_spike(capsys):
    for name in ("loss", "grad_norm"):
        looking = guard([step(*[value] * 2) for value in (1.0, 2.0, 2.0, 3.0)])  # median 2
        assert not looking.skips(4, step(2.0, 2.0) | {name: 6.0}) and not capsys.readouterr().out
        looking = guard([step(*[value] * 2) for value in (1.0, 2.0, 2.0, 3.0)])
        assert looking.skips(4, step(2.0, 2.0) | {name: 6.2})
        assert capsys.readouterr().out == (f"step 4 has a {name} of 6.2, 3.1 times its median over 4 steps, 2; it is "
                                           "skipped, as were 0 before\n")
        assert looking.notes(True) == {"skipped": 1}


def test_nothing_is_a_spike_before_the_window_is_full_and_nan_always_is():
    looking = guard([step()] * 3)
    assert not looking.skips(3, step(50.0, 50.0))
    assert guard().skips(0, step(math.nan)) and guard().skips(0, step(grad_norm=math.inf))


def test_skipped_steps_do_not_move_the_median_and_too_many_in_a_row_end_the_run():
    looking = guard([step()] * 4)
    for number in (4, 5):
        assert looking.skips(number, step(100.0))
    with pytest.raises(Spike, match="train: step 6 has a loss of 100, 100.0 times its median over 4 steps, 1, and the "
                                    "2 steps before it were skipped already; --resume with"):
        looking.skips(6, step(100.0))
    looking = guard([step()] * 4)
    for number in range(4, 24, 2):
        assert looking.skips(number, step(100.0)) and not looking.skips(number + 1, step())
    assert looking.skipped == 10


def test_what_the_guard_knows_is_in_the_log():
    past = [step(1.0 + number % 3) for number in range(9)]
    past[6] = step(80.0) | {"skipped": 1}
    past += [step(90.0) | {"skipped": 2}, step(70.0) | {"skipped": 3}]
    resumed, looking = guard(past), guard()
    for number, record in enumerate(past):
        assert ("skipped" in record) == looking.skips(number, {name: record[name] for name in step()})
    assert (resumed.past, resumed.skipped, resumed.in_a_row) == (looking.past, looking.skipped, looking.in_a_row)
    assert (resumed.skipped, resumed.in_a_row) == (3, 2)


def test_a_loss_that_may_be_negative_is_not_compared():
    assert not guard([step(-1.0)] * 4).skips(4, step(5.0))


def test_stop_and_none_leave_numbers_that_are_not_finite_to_the_loop():
    for do in ("stop", "none"):
        assert not guard([step()] * 4, do=do).skips(4, step(math.nan))
    assert not guard([step()] * 4, do="none").skips(4, step(1e9))
    with pytest.raises(Spike, match="train: step 4 has a loss of 7, .* it is not taken; --resume with --guard.do none"):
        guard([step()] * 4, do="stop").skips(4, step(7.0))


@pytest.fixture
def odd_batches(monkeypatch):
    """Steps whose losses, and so their gradients, are 1000 times as large; infinity where they are named so."""
    odd, losses = {}, TransfusionTask.losses

    def changed(self, number, batch):
        for player, terms in losses(self, number, batch):
            yield player, {name: term._replace(mean=term.mean * odd.get(number, 1.0)) for name, term in terms.items()}

    monkeypatch.setattr(trainer.TransfusionTask, "losses", changed)
    return odd


def guarded(out, **changes):
    return small(out, guard=GuardSettings(do=changes.pop("do", "skip"), window=4, factor=20.0, patience=1), **changes)


def weights(out):
    state = load_file(out / "resume" / "state.safetensors")
    return {name: x for name, x in state.items() if name.startswith(("model.", "optimizer.", "averaged."))}


def test_a_skipped_step_changes_neither_weights_nor_moments_nor_averages_and_is_counted(tmp_path, odd_batches):
    odd_batches |= {6: 1000.0, 9: math.inf}
    train(guarded(tmp_path / "before", stop_after=6))
    train(guarded(tmp_path / "after", stop_after=7))
    before, after = weights(tmp_path / "before"), weights(tmp_path / "after")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    train(guarded(tmp_path / "whole"))
    found = records(tmp_path / "whole")
    assert [record.get("skipped") for record in found] == [None] * 6 + [1, None, None, 2, None, None]
    assert found[6]["loss"] > 100 and all(record["loss"] < 20 for record in found[10:])


def test_a_resumed_run_skips_what_the_run_that_never_stopped_skips(tmp_path, odd_batches):
    odd_batches |= {5: 1000.0, 8: 1000.0}
    train(guarded(tmp_path / "whole"))
    train(guarded(tmp_path / "parts", stop_after=6))
    train(guarded(tmp_path / "parts", resume=True))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("do,said", [("stop", "is not taken"), ("skip", "the 1 steps before it were skipped already")])
def test_a_run_that_the_guard_ends_is_saved_and_goes_on_with_another_guard(tmp_path, odd_batches, do, said):
    odd_batches |= {6: 1000.0, 7: 1000.0}
    with pytest.raises(Spike, match=said):
        train(guarded(tmp_path, do=do))
    done = 6 if do == "stop" else 7
    assert saved_step(tmp_path) == done == len(records(tmp_path))
    train(guarded(tmp_path, do="none", resume=True))
    assert len(records(tmp_path)) == 12 and records(tmp_path)[7]["loss"] > 100


def test_the_guard_changes_no_number_of_a_run_without_spikes(tmp_path):
    train(small(tmp_path / "without"))
    train(small(tmp_path / "with", guard=GuardSettings(do="skip", window=4, factor=1e6)))
    assert records(tmp_path / "without") == records(tmp_path / "with")


def test_a_run_of_an_earlier_version_that_knew_no_guard_goes_on(tmp_path):
    train(small(tmp_path, stop_after=5))
    file = tmp_path / "resume" / "run.json"
    run = json.loads(file.read_text())
    for name in ("guard", "max_hours"):
        del run["config"][name]
    file.write_text(json.dumps(run))
    train(dataclasses.replace(guarded(tmp_path), resume=True))
    assert len(records(tmp_path)) == 12
