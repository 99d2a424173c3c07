"""Out of the backbone: patches predicted from hidden states."""
from torch import Tensor, nn

from tfkernels import modulated_layer_norm
from transfusion.embed import ZeroLinear


class ImageHead(nn.Module):
    """Linear((1 + scale(t)) * norm(x) + shift(t)): a final layer whose norm the timestep modulates (as in DiT, arXiv:2212.09748)."""

    def __init__(self, hidden: int, patch_dim: int):
        super().__init__()
        self.modulation = ZeroLinear(hidden, 2 * hidden)
        self.linear = ZeroLinear(hidden, patch_dim)

    def forward(self, x: Tensor, condition: Tensor, patch_image: Tensor) -> Tensor:
        shift, scale = self.modulation(nn.functional.silu(condition)).chunk(2, -1)         # (N, C) each
        return self.linear(modulated_layer_norm(x, None, None, scale, shift, patch_image))  # (P, patch_dim)
