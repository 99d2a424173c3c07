"""What training runs share: the average of the weights."""
from types import SimpleNamespace

import pytest
import torch

from transfusion.train.optimizer import average_decay, build_average


def averaged_after(ema, steps):
    model = torch.nn.Linear(1, 1, bias=False).double()
    averaged = build_average(model, SimpleNamespace(ema=ema))
    for step in range(steps):
        model.weight.data.fill_(step)
        averaged.update_parameters(model)
    return averaged.module.weight.item()


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.99, 0.9999])
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
