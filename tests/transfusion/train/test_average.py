"""The average of the weights: its decay, its place beside a model, and how it stands in the model for a while."""
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfusion.train.average import Average, average_decay, trained_parameters


def averaged_after(ema, steps):
    model = torch.nn.Linear(1, 1, bias=False).double()
    averaged = Average(model, ema)
    for step in range(steps):
        model.weight.data.fill_(step)
        averaged.update(model)
    return averaged.tensors["weight"].item()


@pytest.mark.parametrize("ema", [0.5, 0.99, 0.9999])
def test_the_average_follows_its_warmed_up_decay(ema):
    expected = 0.0
    for step in range(1, 120):
        decay = min(ema, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averaged_after(ema, 120) == pytest.approx(expected, rel=1e-12)


def test_the_average_of_a_short_run_is_of_its_last_steps_and_that_of_a_long_one_as_slow_as_asked():
    for steps in (20, 200, 1000):
        assert 0.8 * steps < averaged_after(0.9999, steps) < steps                           # without warm-up near 0
    assert averaged_after(0.9, 1000) == pytest.approx(999 - 0.9 / 0.1, abs=1e-6)
    assert average_decay(10**6, 0.999) == 0.999


def layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16())
    model[1].weight.requires_grad_(False)
    return model


def test_the_average_is_that_of_torch_to_the_bit_without_its_copy_of_what_is_frozen():
    model = layers()
    ours, theirs = Average(model, 0.99), AveragedModel(model)
    for step in range(20):
        theirs.multi_avg_fn = get_ema_multi_avg_fn(average_decay(step, 0.99))
        with torch.no_grad():
            for number, p in enumerate(trained_parameters(model).values()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number)))
        ours.update(model)
        theirs.update_parameters(model)
    expected = trained_parameters(theirs.module)
    assert ours.tensors.keys() == expected.keys() and "1.weight" not in ours.tensors
    assert all(torch.equal(x, expected[name]) for name, x in ours.tensors.items())
    assert torch.equal(ours.n_averaged, theirs.n_averaged) and ours.n_averaged.dtype == theirs.n_averaged.dtype


def test_without_a_decay_no_tensor_is_kept_and_the_weights_are_their_own_average():
    model = layers()
    averaged = Average(model, 0.0)
    averaged.update(model)
    with torch.no_grad():
        for p in trained_parameters(model).values():
            p.add_(1)
    averaged.update(model)
    trained = {name: x.detach().clone() for name, x in trained_parameters(model).items()}
    with averaged.applied(model):
        assert all(torch.equal(p, trained[name]) for name, p in trained_parameters(model).items())
    assert averaged.tensors == {} and averaged.n_averaged == 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_stands_in_the_model_for_a_while_and_the_trained_weights_come_back(fails):
    model = layers()
    averaged = Average(model, 0.9)
    with torch.no_grad():
        for p in trained_parameters(model).values():
            p.add_(1)
    trained, average = ({name: x.detach().clone() for name, x in tensors.items()}
                        for tensors in (trained_parameters(model), averaged.tensors))
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    try:
        with averaged.applied(model):
            assert all(torch.equal(p, average[name]) for name, p in trained_parameters(model).items())
            if fails:
                raise OSError("the disk is full")
    except OSError:
        assert fails
    assert all(torch.equal(p, trained[name]) for name, p in trained_parameters(model).items())
    assert all(torch.equal(x, average[name]) for name, x in averaged.tensors.items())
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
