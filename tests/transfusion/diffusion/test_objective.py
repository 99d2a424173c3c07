"""The objectives' algebra: noising, targets and reverse steps agree with each other and with the literature."""
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from tests.transfusion.plain import add_noise
from transfusion.diffusion.objective import OBJECTIVES, TIMES, sample_times, shift_times, step


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_prediction_leads_back_to_the_clean_image(name):
    objective = OBJECTIVES[name]
    x0, eps = torch.randn(2, 5, 4, dtype=torch.float64)
    times = torch.linspace(0.95, 0, 20, dtype=torch.float64)
    x, _ = add_noise(objective, x0, eps, times[0])
    for t, s in zip(times, times[1:]):
        _, target = add_noise(objective, x0, eps, t)
        x = step(objective, x, target, t, s)
        torch.testing.assert_close(x, add_noise(objective, x0, eps, s)[0])
    torch.testing.assert_close(x, x0)


def test_input_and_target_hold_the_same_noise():
    x0, eps, t = torch.zeros(3, 4), torch.randn(3, 4), torch.tensor(0.3)
    for name in ("eps", "flow"):
        noised, target = add_noise(OBJECTIVES[name], x0, eps, t)
        torch.testing.assert_close(noised / OBJECTIVES[name].path(t)[1], target)


def test_flow_step_is_the_euler_step_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(10)
    x, prediction = torch.randn(2, 1, 4, 4)
    ours = step(OBJECTIVES["flow"], x, prediction, scheduler.sigmas[0], scheduler.sigmas[1])
    torch.testing.assert_close(ours, scheduler.step(prediction, scheduler.timesteps[0], x).prev_sample)


@pytest.mark.parametrize("name,prediction_type", [("eps", "epsilon"), ("v", "v_prediction")])
def test_cosine_step_is_the_ddim_step_of_diffusers(name, prediction_type):
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True
    )
    times = (torch.arange(1000) + 1) / 1000
    scheduler.alphas_cumprod = OBJECTIVES["eps"].path(times)[0] ** 2  # our exact cosine in place of its table
    scheduler.set_timesteps(50)
    x, prediction = torch.randn(2, 1, 4, 4)
    now, then = scheduler.timesteps[3], scheduler.timesteps[3] - 20
    ours = step(OBJECTIVES[name], x, prediction, times[now], times[then])
    torch.testing.assert_close(ours, scheduler.step(prediction, int(now), x).prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TIMES)
def test_times_stay_under_each_images_limit_and_follow_their_law(kind):
    limit, tokens = torch.tensor([1.0, 0.5] * 2000), torch.full((4000,), 64)
    times = sample_times(kind, limit, tokens, None, torch.Generator().manual_seed(0))
    assert (times >= 0).all() and (times <= limit).all()
    torch.testing.assert_close(times[::2].mean(), torch.tensor(0.5), rtol=0, atol=0.02)
    spread = {"uniform": 12**-0.5, "logit-normal": 0.2083}[kind]
    torch.testing.assert_close(2 * times[1::2].std(), torch.tensor(spread), rtol=0, atol=0.01)
    larger = sample_times(kind, limit, 4 * tokens, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(larger / limit, 2 * (times / limit) / (1 + times / limit))


def test_a_law_of_times_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="kind is 'uniforn'; one of 'uniform', 'logit-normal' fits"):
        sample_times("uniforn", torch.ones(1), torch.ones(1), None, torch.Generator())


@pytest.mark.parametrize(
    "name,value",
    [("base", 0), ("base", -4), ("base", float("nan")), ("base", 2.5), ("tokens", 0), ("tokens", float("inf"))],
)
def test_a_shift_by_no_number_of_patches_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"shift_times: {name} is .*; a whole number of at least 1 fits"):
        shift_times(torch.tensor([0.5]), **{"tokens": 16, "base": 4, name: value})
