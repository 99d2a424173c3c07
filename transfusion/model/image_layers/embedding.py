"""Into the backbone: the timestep's condition vector and the patch embedding."""
import math

import torch
from torch import Tensor, nn

from tfkernels import embed_patches
from transfusion.sequence import ImageLayout


class TimestepEmbedding(nn.Module):
    """t in [0, 1] -> condition (N, C): cosines and sines of 1000 t at geometric frequencies, then a small MLP."""

    def __init__(self, hidden: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.frequencies, device=t.device) * (-math.log(10_000) / self.frequencies))
        angles = 1000 * t.float()[:, None] * rates                                         # (N, F)
        features = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(features.to(self.mlp[0].bias.dtype))  # of a quantised weight, the dtype is only its storage's


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: what it feeds begins as if it were not there."""


class PatchEmbedding(nn.Module):
    """Linear(patch + timestep): the timestep is added to each patch before the linear layer (the paper, footnote 6)."""

    def __init__(self, config, hidden: int):
        super().__init__()
        self.time = ZeroLinear(hidden, config.patch_dim)
        self.linear = nn.Linear(config.patch_dim, hidden)

    def forward(self, hidden: Tensor, patches: Tensor, condition: Tensor, layout: ImageLayout,
                places: Tensor) -> tuple[Tensor, list]:
        """Write the embeddings of patches (P, patch_dim) to their places (P,) in `hidden` (T, C).

        The list is of what skips the decoder: nothing.
        """
        timestep = self.linear(self.time(condition))  # (N, C): weight @ timestep + bias, the same for all its patches
        return embed_patches(hidden, patches, self.linear.weight, timestep, places, layout.offsets), []
