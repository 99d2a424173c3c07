"""A diffusion objective is four scalar functions of t in [0, 1]; noising, loss target and reverse step follow from them.

    x_t    = signal(t) * x0 + noise(t) * eps
    target = p(t) * x0 + q(t) * eps                 what the model is asked to predict
    step   = solve those two lines for (x0, eps), then write x_s with them: DDIM (arXiv:2010.02502, eq. 12, sigma = 0),
             and, on the straight path, exactly one Euler step.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.values import is_whole


@dataclass(frozen=True)
class Flow:
    """Predict eps - x0 on the straight path (rectified flow, arXiv:2209.03003)."""

    start: float = 1.0  # sampling starts from here

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (signal, noise) at t."""
        return 1 - t, t

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) at t."""
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class VPrediction:
    """Predict signal * eps - noise * x0 on the cosine path (arXiv:2202.00512)."""

    start: float = 1.0

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (signal, noise) at t."""
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) at t."""
        signal, noise = self.path(t)
        return -noise, signal


@dataclass(frozen=True)
class EpsPrediction(VPrediction):
    """Predict eps on the cosine path: DDPM (arXiv:2006.11239), the paper's loss. At t = 1 eps says nothing of x0: sampling starts below."""

    start: float = 0.996  # the first of 250 steps out of 1000

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) at t."""
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class X0Prediction(VPrediction):
    """Predict x0 on the cosine path (arXiv:2202.00512, section 4)."""

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) at t."""
        return torch.ones_like(t), torch.zeros_like(t)


OBJECTIVES = {"eps": EpsPrediction(), "v": VPrediction(), "flow": Flow(), "x0": X0Prediction()}


def solve(objective, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (x0, eps) that x at time t and the model's prediction there stand for."""
    (signal, noise), (p, q) = objective.path(t), objective.target(t)
    det = signal * q - noise * p
    return (q * x - noise * prediction) / det, (signal * prediction - p * x) / det


def step(objective, x: Tensor, prediction: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Move x from time t to s < t, given the model's prediction at t."""
    x0, eps = solve(objective, x, prediction, t)
    signal, noise = objective.path(s)
    return signal * x0 + noise * eps


def shift_times(t: Tensor, tokens: Tensor | int, base: int | None) -> Tensor:
    """Return s t / (1 + (s - 1) t) with s = sqrt(tokens / base): as much is left of a larger image after as much noise (arXiv:2403.03206, eq. 23).

    t (N,) and tokens (N,) or an int; without `base`, t.

    Raises:
        ValueError: `base`, or `tokens` where it is a number, is not whole and positive.
    """
    if base is None:
        return t
    for name, value in (("base", base), ("tokens", 1 if isinstance(tokens, Tensor) else tokens)):
        if not is_whole(value, 1):
            raise ValueError(f"shift_times: {name} is {value!r}; a whole number of at least 1 fits")
    s = torch.as_tensor(tokens, device=t.device, dtype=t.dtype).div(base).sqrt()
    return s * t / (1 + (s - 1) * t)


def uniform_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw times (N,), uniform in [0, 1] (the paper)."""
    return torch.rand(count, generator=generator)


def logit_normal_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw times (N,) whose logits are standard normal: more in the middle (arXiv:2403.03206, eq. 19, its best setting)."""
    return torch.randn(count, generator=generator).sigmoid()


TIMES = {"uniform": uniform_times, "logit-normal": logit_normal_times}


def sample_times(kind: str, limit: Tensor, tokens: Tensor, base: int | None, generator: torch.Generator) -> Tensor:
    """Draw one time per image (N,): by TIMES[kind], shifted for its `tokens` (N,), scaled into [0, limit_n], the noise limit where it stands first."""
    if kind not in TIMES:
        raise ValueError(f"sample_times: kind is {kind!r}; one of {', '.join(map(repr, TIMES))} fits")
    return limit * shift_times(TIMES[kind](len(limit), generator), tokens, base)
