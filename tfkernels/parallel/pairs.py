"""Keys and values as one message: (L, 2, B, K, D), tokens first, padded to the longest rank's."""
import torch
from torch import Tensor


def packed(k: Tensor, v: Tensor, length: int) -> Tensor:
    """Return k and v, (B, K, T, D), as one contiguous (length, 2, B, K, D); what lies behind the tokens is 0."""
    batch, heads, tokens, head_dim = k.shape
    pairs = k.new_zeros(length, 2, batch, heads, head_dim)
    pairs[:tokens, 0], pairs[:tokens, 1] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    return pairs


def unpacked(pairs: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return k and v, (B, K, tokens, D), as views."""
    k, v = pairs[:tokens].permute(1, 2, 3, 0, 4)
    return k, v


def sums_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which gradients of ranks are summed: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
