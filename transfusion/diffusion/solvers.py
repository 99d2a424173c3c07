"""Solvers, from noise to an image: the objective's own deterministic step, or one of diffusers' on the same path.

A solver is made for one run of `steps` steps: the model is asked at each of `times`, and `advance` takes its answer.

    ddim     DDIM (arXiv:2010.02502); on the straight path that is Euler's method
    dpm++    DPM-Solver++(2M) (arXiv:2211.01095)
    unipc    UniPC (arXiv:2302.04867)
    heun     Heun's method (arXiv:2206.00364, algorithm 1), which asks the model twice a step

In calls and on the command line the option that names one is `sampler`.
"""
import math
from typing import Annotated

import torch
from torch import Tensor

from transfusion.diffusion.objective import Flow, shift_times, step
from transfusion.settings import Count, OneOf, check_value

SOLVERS = ("ddim", "dpm++", "unipc", "heun")
TRAIN_STEPS = 1000  # entries in the tables that diffusers' schedulers make of a path
_PREDICTION = {"EpsPrediction": "epsilon", "VPrediction": "v_prediction", "X0Prediction": "sample"}


class DDIMSolver:
    """The deterministic step of an objective (`step`) at evenly spaced times, shifted for the image's size."""

    def __init__(self, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.objective = objective
        even = objective.start * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
        ends = shift_times(even, tokens, shift_tokens).float()
        self.times, self.ends = ends[:-1], ends

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


class SchedulerSolver:
    """A scheduler of diffusers whose tables are made from the objective's own path. It keeps the state of one run."""

    def __init__(self, scheduler, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.scheduler = scheduler
        flow = isinstance(objective, Flow)
        if not flow and shift_tokens is not None:
            raise ValueError("sampler: time_shift_tokens is set on the cosine path, which diffusers' solvers cannot "
                             "shift; 'ddim' or objective 'flow' fits")
        scheduler.set_timesteps(steps)
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
                shift_tokens: int | None = None) -> DDIMSolver | SchedulerSolver:
    """Return the solver `name` for images of `tokens` patches.

    Raises:
        ValueError: an unknown name, numbers that are not whole and positive, or a path that the solver does not know.
    """
    check_value("sampler", "name", name, Annotated[str, OneOf(SOLVERS)])
    check_value("sampler", "steps", steps, Count)
    check_value("sampler", "tokens", tokens, Count)
    if shift_tokens is not None:
        check_value("sampler", "shift_tokens", shift_tokens, Count)
    if name in ("dpm++", "unipc") and steps >= TRAIN_STEPS:  # whose tables have no more: times would repeat
        raise ValueError(f"sampler: steps is {steps} and the sampler {name!r}, which takes at most {TRAIN_STEPS - 1}; "
                         "fewer steps, or 'ddim' or 'heun', fit")
    if name == "ddim":
        return DDIMSolver(objective, steps, tokens, shift_tokens)
    if isinstance(objective, Flow):
        return SchedulerSolver(_flow_scheduler(name, tokens, shift_tokens), objective, steps, tokens, shift_tokens)
    return SchedulerSolver(_scheduler(name, objective, steps), objective, steps, tokens, shift_tokens)


def _flow_scheduler(name: str, tokens: int, shift_tokens: int | None):
    """A scheduler of the straight path, its times shifted as `shift_times` does."""
    import diffusers

    shift = math.sqrt(tokens / shift_tokens) if shift_tokens else 1.0
    if name == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(TRAIN_STEPS, shift=shift)
    kind = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    return kind(num_train_timesteps=TRAIN_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True,
                flow_shift=shift)


def _scheduler(name: str, objective, steps: int):
    """A scheduler of the cosine path, as betas from 0 to the objective's own start of sampling."""
    import diffusers

    t = min(objective.start, 0.999) * torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    remaining = objective.path(t)[0].square()
    kind = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler,
            "heun": diffusers.HeunDiscreteScheduler}[name]
    spacing = {"timestep_spacing": "trailing"} if name == "heun" and steps == 1 else {}  # else t = 0
    return kind(num_train_timesteps=TRAIN_STEPS, **spacing, trained_betas=(1 - remaining[1:] / remaining[:-1]).tolist(),
                prediction_type=_PREDICTION[type(objective).__name__])
