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


OBJECTIVES = {"eps": EpsPrediction(), "v": VPrediction(), "flow": Flow()}


def step(objective, x: Tensor, prediction: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Move x from time t to s < t, given the model's prediction at t."""
    (signal, noise), (p, q) = objective.path(t), objective.target(t)
    det = signal * q - noise * p
    x0, eps = (q * x - noise * prediction) / det, (signal * prediction - p * x) / det
    signal, noise = objective.path(s)
    return signal * x0 + noise * eps


def sample_times(count: int, limit: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one time per image, uniform in [0, limit_n]: limit is 1, or the noise limit where an image stands before its caption."""
    return torch.rand(count, generator=generator) * limit
