"""A diffusion objective is four scalar functions of the time t in [0, 1]: how an image is noised and what is predicted.

    x_t    = signal(t) * x0 + noise(t) * eps        the path from the image x0 (t = 0) to the noise eps (t = 1); the
                                                    literature's alpha_t and sigma_t
    target = p(t) * x0 + q(t) * eps                 the prediction target; p is the factor of x0 in it, q that of eps

    name    predicts        signal, noise                   p        q          source
    eps     the noise       cos(pi t / 2), sin(pi t / 2)    0        1          DDPM, arXiv:2006.11239
    x0      the image       the same                        1        0          arXiv:2202.00512, section 4
    v       the velocity    the same                        -noise   signal     arXiv:2202.00512
    flow    the velocity    1 - t, t                        -1       1          rectified flow, arXiv:2209.03003

Path and target are two linear equations in x0 and eps. Solving them turns any prediction into an estimate of both
(`solve`), and writing x_s with these estimates is the reverse step (`step`): DDIM (arXiv:2010.02502, eq. 12, sigma = 0)
and, on the straight path of flow, exactly one step of Euler's method.
"""
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from transfusion.settings import Count, OneOf, check_value


@dataclass(frozen=True)
class Flow:
    """Predict eps - x0 on the straight path (rectified flow, arXiv:2209.03003)."""

    start: float = 1.0  # the time at which sampling starts

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (signal, noise) at t, the factors of x0 and eps in x_t."""
        return 1 - t, t

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) at t, the factors of x0 and eps in the prediction target."""
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
    """Predict eps on the cosine path: DDPM (arXiv:2006.11239), the paper's loss.

    At t = 1 the noise is all of x_t and says nothing of x0: sampling starts below.
    """

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
    """Return s t / (1 + (s - 1) t) with s = sqrt(tokens / base) (arXiv:2403.03206, eq. 23).

    A larger image keeps more of itself under the same noise; at the shifted time it keeps as much as one of `base`
    patches does at t, exactly so on the straight path, where noise over signal grows by s. t is (N,), tokens (N,) or an
    int; without `base` the times stay as they are.

    Raises:
        ValueError: `base`, or `tokens` where it is a number, is not whole and positive.
    """
    if base is None:
        return t
    check_value("shift_times", "base", base, Count)
    if not isinstance(tokens, Tensor):
        check_value("shift_times", "tokens", tokens, Count)
    s = torch.as_tensor(tokens, device=t.device, dtype=t.dtype).div(base).sqrt()
    return s * t / (1 + (s - 1) * t)


def uniform_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw times (N,), uniform in [0, 1] (the paper)."""
    return torch.rand(count, generator=generator)


def logit_normal_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw times (N,) whose logits are standard normal, more of them in the middle (arXiv:2403.03206, eq. 19)."""
    return torch.randn(count, generator=generator).sigmoid()


TIMES = {"uniform": uniform_times, "logit-normal": logit_normal_times}


def sample_times(kind: str, limit: Tensor, tokens: Tensor, base: int | None, generator: torch.Generator, *,
                 before: int = 0, after: int = 0) -> Tensor:
    """Draw one time for each image (N,): by TIMES[kind], shifted for its `tokens` (N,), scaled into [0, limit] (N,).

    The limit is the noise limit of an image that stands before any text, and 1 for others. Where the images are a part
    of a batch, `before` and `after` are how many stand before and behind them: each gets the time that it has when all
    are drawn together.
    """
    check_value("sample_times", "kind", kind, Annotated[str, OneOf(TIMES)])
    times = TIMES[kind](before + len(limit) + after, generator)[before:before + len(limit)]
    return limit * shift_times(times, tokens, base)
