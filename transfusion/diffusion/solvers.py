"""From noise to an image: the objective's own deterministic step, or a multistep solver of diffusers' on the same path.

A sampler is made for one run of `steps`: the model is asked at `times`, and `advance` takes each answer. `ddim` is DDIM (arXiv:2010.02502), which on
the straight path is Euler's method; `dpm++` is DPM-Solver++(2M) (arXiv:2211.01095), `unipc` UniPC (arXiv:2302.04867), `heun` Heun's method
(arXiv:2206.00364, algorithm 1), which asks twice a step.
"""
import math

import torch
from torch import Tensor

from transfusion.diffusion.objective import Flow, shift_times, step
from transfusion.values import is_whole

TRAIN_STEPS = 1000  # diffusers' schedulers tabulate the path
_PREDICTION = {"EpsPrediction": "epsilon", "VPrediction": "v_prediction", "X0Prediction": "sample"}
SAMPLERS = ("ddim", "dpm++", "unipc", "heun")


class DDIMSampler:
    """The deterministic step of `transfusion.diffusion.objective` at evenly spaced times, shifted for the image's size."""

    def __init__(self, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.objective = objective
        ends = shift_times(objective.start * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps), tokens, shift_tokens).float()
        self.times, self.ends = ends[:-1], ends

    def start(self, noise: Tensor) -> Tensor:
        """Return where sampling begins."""
        return noise

    def input(self, x: Tensor, number: int) -> Tensor:
        """Return x_t as the model knows it."""
        return x

    def advance(self, x: Tensor, prediction: Tensor, number: int) -> Tensor:
        """Take the prediction at `times[number]`; return the next x."""
        t, s = self.ends[number:number + 2]  # scalars on the host go into a kernel's arguments: nothing is carried to the device, which nothing waits for
        return step(self.objective, x, prediction, t, s)


class SchedulerSampler:
    """A diffusers scheduler, its tables made from the objective's own path, its state its own."""

    def __init__(self, scheduler, objective, steps: int, tokens: int, shift_tokens: int | None):
        self.scheduler = scheduler
        flow = isinstance(objective, Flow)
        if not flow and shift_tokens is not None:
            raise ValueError("sampler: time_shift_tokens is set on the cosine path, which diffusers' solvers cannot shift; 'ddim' or objective 'flow' fits")
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[:len(scheduler.timesteps)].double()
        self.times = (sigmas if flow else sigmas.atan() * (2 / math.pi)).float()            # sigma is noise, or noise / signal, at t
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


def make_sampler(name: str, objective, steps: int, tokens: int, shift_tokens: int | None = None) -> DDIMSampler | SchedulerSampler:
    """Return the sampler `name` for images of `tokens` patches.

    Raises:
        ValueError: an unknown name, numbers that are not whole and positive, or a path that the solver does not know.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler: name is {name!r}; one of {', '.join(map(repr, SAMPLERS))} fits")
    for argument, value in (("steps", steps), ("tokens", tokens), ("shift_tokens", 1 if shift_tokens is None else shift_tokens)):
        if not is_whole(value, 1):
            raise ValueError(f"sampler: {argument} is {value!r}; a whole number of at least 1 fits")
    if name == "ddim":
        return DDIMSampler(objective, steps, tokens, shift_tokens)
    import diffusers

    if isinstance(objective, Flow):
        shift = math.sqrt(tokens / shift_tokens) if shift_tokens else 1.0
        options = dict(num_train_timesteps=TRAIN_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler = {"dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**options), "unipc": lambda: diffusers.UniPCMultistepScheduler(**options),
                     "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(TRAIN_STEPS, shift=shift)}[name]()
    else:
        t = min(objective.start, 0.999) * torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        remaining = objective.path(t)[0].square()
        options = dict(num_train_timesteps=TRAIN_STEPS, trained_betas=(1 - remaining[1:] / remaining[:-1]).tolist(),
                       prediction_type=_PREDICTION[type(objective).__name__])
        scheduler = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler,
                     "heun": diffusers.HeunDiscreteScheduler}[name](**options)
    return SchedulerSampler(scheduler, objective, steps, tokens, shift_tokens)
