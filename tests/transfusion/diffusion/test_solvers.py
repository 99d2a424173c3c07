"""Solvers against a model that knows the answer: one image, or Gaussian data whose path from noise is known."""
import math

import pytest
import torch

from transfusion.diffusion.objective import OBJECTIVES, shift_times
from transfusion.diffusion.solvers import SOLVERS, make_solver

MODELS = pytest.mark.parametrize("objective", OBJECTIVES)


def run(sampler, noise, predict):
    x = sampler.start(noise)
    for number, t in enumerate(sampler.times.double()):
        x = sampler.advance(x, predict(sampler.input(x, number), t), number)
    return x


def knowing(objective, x0):
    """The prediction of a model that knows the image."""
    def predict(x, t):
        (signal, noise), (p, q) = objective.path(t), objective.target(t)
        return p * x0 + q * (x - signal * x0) / noise

    return predict


@MODELS
@pytest.mark.parametrize("name", SOLVERS)
def test_a_model_that_knows_the_image_leads_to_it(name, objective):
    objective, x0 = OBJECTIVES[objective], torch.randn(16, 4, dtype=torch.float64)

    drawn = run(make_solver(name, objective, 12, 16), torch.randn_like(x0), knowing(objective, x0))
    torch.testing.assert_close(drawn, x0, rtol=0, atol=1e-5 if name in ("ddim", "heun") else 2e-2)


def gaussian_error(name, objective, steps, deviation=0.5, shift_tokens=None):
    """Largest relative error of samples of N(0, deviation^2).

    Their x_t is N(0, (signal deviation)^2 + noise^2), and on the exact path x_t over its deviation stays what it was.
    """
    def predict(x, t):
        (signal, noise), (p, q) = objective.path(t), objective.target(t)
        power = (signal * deviation)**2 + noise**2
        return (p * signal * deviation**2 + q * noise) / power * x

    noise = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = make_solver(name, objective, steps, 64, shift_tokens)
    signal, level = objective.path(sampler.times[0].double())
    exact = noise * deviation / math.sqrt((signal * deviation)**2 + level**2)
    return ((run(sampler, noise, predict) - exact).abs() / exact.abs()).max().item()


@MODELS
def test_solvers_of_higher_order_need_fewer_steps(objective):
    objective = OBJECTIVES[objective]
    plain = gaussian_error("ddim", objective, 20)
    for name in ("dpm++", "unipc", "heun"):
        assert gaussian_error(name, objective, 20) < plain
    assert gaussian_error("ddim", objective, 200) < 0.15 * plain


@MODELS
@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_of_few_steps_none_is_worse_than_ddim_s(objective, steps):
    objective = OBJECTIVES[objective]
    plain = gaussian_error("ddim", objective, steps)
    for name in ("dpm++", "unipc", "heun"):
        assert gaussian_error(name, objective, steps) < 1.01 * plain, name


@MODELS
def test_heun_s_method_is_of_second_order_and_shifts_its_times(objective):
    objective = OBJECTIVES[objective]
    assert gaussian_error("heun", objective, 5) < 0.02
    few, many = (gaussian_error("heun", objective, steps, shift_tokens=16) for steps in (10, 40))
    assert many < 0.15 * few < 0.15 * 0.05


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_many_shifted_steps_lead_to_the_image(name):
    """Their first times have the same number in the scheduler's table."""
    assert gaussian_error(name, OBJECTIVES["flow"], 500, shift_tokens=1) < 0.02


def test_shifted_times_keep_their_ends_and_leave_more_noise_in_larger_images():
    t = torch.linspace(0, 1, 11)
    shifted = shift_times(t, 1024, 256)
    torch.testing.assert_close(shifted, 2 * t / (1 + t))
    assert (
        (shifted[1:-1] > t[1:-1]).all()
        and torch.equal(shift_times(t, 256, 256), t)
        and torch.equal(shift_times(t, 1024, None), t)
    )
    for name in SOLVERS:
        plain, shifted = (make_solver(name, OBJECTIVES["flow"], 10, 1024, base).times for base in (None, 256))
        torch.testing.assert_close(shifted, shift_times(plain, 1024, 256), rtol=0, atol=2e-3)
    assert make_solver("ddim", OBJECTIVES["flow"], 10, 1024, 256).times[5] == pytest.approx(2 / 3)


def test_what_no_sampler_does_is_refused_by_name():
    with pytest.raises(ValueError, match="name is 'dpm'; one of 'ddim', 'dpm"):
        make_solver("dpm", OBJECTIVES["flow"], 10, 16)
    with pytest.raises(ValueError, match="time_shift_tokens is set on the cosine path"):
        make_solver("unipc", OBJECTIVES["v"], 10, 16, 256)


@pytest.mark.parametrize(
    "name,value",
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", float("nan")),
        ("tokens", 0),
        ("tokens", 2.0),
        ("shift_tokens", 0),
        ("shift_tokens", float("nan")),
    ],
)
def test_numbers_that_are_not_whole_and_positive_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"sampler: {name} is .*; a whole number of at least 1 fits"):
        make_solver("ddim", OBJECTIVES["flow"], **{"steps": 2, "tokens": 16, "shift_tokens": 4, name: value})


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [10**6 + 1, 2**62, 2**70])
def test_more_steps_than_anyone_waits_for_are_refused_before_they_take_memory(name, steps):
    with pytest.raises(ValueError, match=f"sampler: steps is {steps}; at most 1000000 fit"):
        make_solver(name, OBJECTIVES["flow"], steps, 16)


@MODELS
@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_begins_at_noise_and_leads_to_the_image(name, objective):
    objective, x0 = OBJECTIVES[objective], torch.randn(16, 4, dtype=torch.float64)

    sampler = make_solver(name, objective, 1, 16)
    assert sampler.times[0] > 0.99 and len(sampler.times) == 1
    torch.testing.assert_close(run(sampler, torch.randn_like(x0), knowing(objective, x0)), x0, rtol=0, atol=2e-2)


@MODELS
@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_more_steps_than_a_solver_s_table_has_are_refused(name, objective):
    assert make_solver(name, OBJECTIVES[objective], 999, 16).times.unique().numel() == 999
    with pytest.raises(ValueError, match="steps is 1000 and the sampler .*, which takes at most 999"):
        make_solver(name, OBJECTIVES[objective], 1000, 16)
