"""Out of the backbone: patches predicted from hidden states."""
import torch
from torch import Tensor, nn

from transfusion.embed import ZeroLinear


class ImageHead(nn.Module):
    """Linear((1 + scale(t)) * norm(x) + shift(t)): a final layer whose norm the timestep modulates (as in DiT, arXiv:2212.09748)."""

    def __init__(self, hidden: int, patch_dim: int):
        super().__init__()
        self.modulation = ZeroLinear(hidden, 2 * hidden)
        self.linear = ZeroLinear(hidden, patch_dim)

    def forward(self, x: Tensor, condition: Tensor, patch_image: Tensor) -> Tensor:
        shift, scale = self.modulation(nn.functional.silu(condition)).chunk(2, -1)         # (N, C) each
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        return self.linear(torch.addcmul(shift[patch_image], normed, 1 + scale[patch_image]))  # (P, patch_dim)
