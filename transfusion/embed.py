"""Into the backbone: the timestep's condition vector and the patch embedding."""
import math

import torch
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """t in [0, 1] -> condition (N, C): cosines and sines of 1000 t at geometric frequencies, then a two-layer perceptron."""

    def __init__(self, hidden: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.frequencies, device=t.device) * (-math.log(10_000) / self.frequencies))
        angles = 1000 * t.float()[:, None] * rates                                         # (N, F)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: what it feeds begins as if it were not there."""


class PatchEmbedding(nn.Module):
    """Linear(patch + timestep): the timestep is added to every patch vector before the linear layer (arXiv:2408.11039, footnote 6)."""

    def __init__(self, patch_dim: int, hidden: int):
        super().__init__()
        self.timestep = ZeroLinear(hidden, patch_dim)
        self.linear = nn.Linear(patch_dim, hidden)

    def forward(self, patches: Tensor, condition: Tensor, patch_image: Tensor) -> Tensor:
        return self.linear(patches.to(condition.dtype) + self.timestep(condition)[patch_image])  # (P, C)
