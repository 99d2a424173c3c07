"""Learning rates: of each step by the schedule, and of parts of a model by a factor."""
import math

import pytest

from transfusion.train.optimizer import learning_rate
from transfusion.train.transfusion import OptimSettings


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
