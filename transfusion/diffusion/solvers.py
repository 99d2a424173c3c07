"""Solvers, from noise to an image: by the objective's own deterministic step, or by diffusers' on the same path.

A solver is made for one run of `steps` steps: the model is asked at each of `times`, and `advance` takes its answer.

    ddim     DDIM (arXiv:2010.02502); on the straight path that is Euler's method
    dpm++    DPM-Solver++(2M) (arXiv:2211.01095)
    unipc    UniPC (arXiv:2302.04867)
    heun     Heun's method (arXiv:2206.00364, algorithm 1), which asks the model twice a step, but for the last

The first and the last are written here. diffusers' Heun steps in noise over signal, which begins at hundreds, and few
steps end far off: with an exact model 5 of them draw pictures of deviation 3.6 where the data's is 0.5.

In calls and on the command line the option that names one is `sampler`.
"""
import math
from typing import Annotated

import torch
from torch import Tensor

from transfusion.diffusion.objective import Flow, shift_times, solve, step
from transfusion.settings import Count, OneOf, check_value

SOLVERS = ("ddim", "dpm++", "unipc", "heun")
TRAIN_STEPS = 1000  # entries in the tables that diffusers' schedulers make of a path
MOST_STEPS = 10**6  # a solver holds numbers of every step, and the times of many more would be equal in float32
_PREDICTION = {"EpsPrediction": "epsilon", "VPrediction": "v_prediction", "X0Prediction": "sample"}


class DDIMSolver:
    """The deterministic step of an objective (`step`) at evenly spaced times, shifted for the image's size."""

    last = 1.0  # how long the last step is beside the others

    def __init__(self, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.objective = objective
        even = objective.start * (1 - torch.arange(steps, dtype=torch.float64) / (steps - 1 + self.last))
        self.ends = torch.cat([shift_times(even, tokens, shift_tokens), even.new_zeros(1)]).float()
        self.times = self.ends[:-1]

    def start(self, noise: Tensor) -> Tensor:
        """Return where sampling begins."""
        return noise

    def input(self, x: Tensor, number: int) -> Tensor:
        """Return x_t as the model knows it."""
        return x

    def advance(self, x: Tensor, prediction: Tensor, number: int) -> Tensor:
        """Take the prediction at `times[number]`; return the next x."""
        t, s = self.ends[number:number + 2]  # scalars on the host become arguments of kernels: no copy, no waiting
        return step(self.objective, x, prediction, t, s)


class HeunSolver(DDIMSolver):
    """Heun's method on the straight path that any path is when it is divided by signal + noise.

        y = x / (signal + noise) = (1 - l) x0 + l eps,    l = noise / (signal + noise),    dy/dl = eps - x0

    DDIM is Euler's method there. Each step but the last is taken again from where it began, with the mean of the slopes
    at its two ends. The last, to the image, is Euler's, and a quarter as long as the others, for it errs most. A solver
    keeps the state of one run.
    """

    last = 0.25

    def __init__(self, objective, steps: int, tokens: int, shift_tokens: int | None):
        super().__init__(objective, steps, tokens, shift_tokens)
        self.times = torch.stack([self.ends[:-1], self.ends[1:]], 1).flatten()[:-1]
        self.began: tuple[Tensor, Tensor] | None = None  # where the step did, and the slope there

    def advance(self, x: Tensor, prediction: Tensor, number: int) -> Tensor:
        """Take the prediction at `times[number]`; return the next x."""
        t, s = self.ends[number // 2:number // 2 + 2]
        x0, eps = solve(self.objective, x, prediction, s if number % 2 else t)
        if number % 2 == 0:
            self.began = x, eps - x0
            signal, noise = self.objective.path(s)
            return signal * x0 + noise * eps
        (before, slope), self.began = self.began, None
        (size, level), (next_size, next_level) = map(self._straight, (t, s))
        return next_size * (before / size + (next_level - level) * 0.5 * (slope + eps - x0))

    def _straight(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal + noise at t, and l."""
        signal, noise = self.objective.path(t)
        return signal + noise, noise / (signal + noise)


class SchedulerSolver:
    """A scheduler of diffusers whose tables are made from the objective's own path. It keeps the state of one run."""

    def __init__(self, scheduler, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.scheduler = scheduler
        flow = isinstance(objective, Flow)
        if not flow and shift_tokens is not None:
            raise ValueError("sampler: time_shift_tokens is set on the cosine path, which diffusers' solvers cannot "
                             "shift; 'ddim' or 'heun', or objective 'flow', fits")
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # of many shifted steps the first ones have equal numbers, which it would look up
        sigmas = scheduler.sigmas[:len(scheduler.timesteps)].double()
        self.times = (sigmas if flow else sigmas.atan() * (2 / math.pi)).float()  # sigma is noise, or noise / signal
        self.scaled = not flow

    def start(self, noise: Tensor) -> Tensor:
        """Return where sampling begins."""
        return noise * self.scheduler.init_noise_sigma if self.scaled else noise

    def input(self, x: Tensor, number: int) -> Tensor:
        """Return x_t as the model knows it."""
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[number]) if self.scaled else x

    def advance(self, x: Tensor, prediction: Tensor, number: int) -> Tensor:
        """Take the prediction at `times[number]`; return the next x."""
        return self.scheduler.step(prediction, self.scheduler.timesteps[number], x).prev_sample


def make_solver(name: str, objective, steps: int, tokens: int,
                shift_tokens: int | None = None) -> DDIMSolver | HeunSolver | SchedulerSolver:
    """Return the solver `name` for images of `tokens` patches.

    Raises:
        ValueError: an unknown name, numbers that are not whole and positive, more steps than fit, or a path that the
            solver does not know.
    """
    check_value("sampler", "name", name, Annotated[str, OneOf(SOLVERS)])
    check_value("sampler", "steps", steps, Count)
    if steps > MOST_STEPS:
        raise ValueError(f"sampler: steps is {steps}; at most {MOST_STEPS} fit")
    check_value("sampler", "tokens", tokens, Count)
    if shift_tokens is not None:
        check_value("sampler", "shift_tokens", shift_tokens, Count)
    if name in ("dpm++", "unipc") and steps >= TRAIN_STEPS:  # whose tables have no more: times would repeat
        raise ValueError(f"sampler: steps is {steps} and the sampler {name!r}, which takes at most {TRAIN_STEPS - 1}; "
                         "fewer steps, or 'ddim' or 'heun', fit")
    if name in ("ddim", "heun"):
        return (DDIMSolver if name == "ddim" else HeunSolver)(objective, steps, tokens, shift_tokens)
    if isinstance(objective, Flow):
        return SchedulerSolver(_flow_scheduler(name, tokens, shift_tokens), objective, steps, tokens, shift_tokens)
    return SchedulerSolver(_scheduler(name, objective), objective, steps, tokens, shift_tokens)


def _flow_scheduler(name: str, tokens: int, shift_tokens: int | None):
    """A scheduler of the straight path, its times shifted as `shift_times` does."""
    import diffusers

    shift = math.sqrt(tokens / shift_tokens) if shift_tokens else 1.0
    kind = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    return kind(num_train_timesteps=TRAIN_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True,
                flow_shift=shift)


def _scheduler(name: str, objective):
    """A scheduler of the cosine path, as betas from 0 to the objective's own start of sampling."""
    import diffusers

    t = min(objective.start, 0.999) * torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    remaining = objective.path(t)[0].square()
    kind = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    return kind(num_train_timesteps=TRAIN_STEPS, trained_betas=(1 - remaining[1:] / remaining[:-1]).tolist(),
                prediction_type=_PREDICTION[type(objective).__name__])
