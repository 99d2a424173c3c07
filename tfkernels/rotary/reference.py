"""What `qk_norm_rotary` computes, in plain PyTorch: the specification that tests compare the kernels with."""
from typing import NamedTuple

import torch
from torch import Tensor


class RotatedQK(NamedTuple):
    """`q` and `k`, normalised and turned, like those that came in."""

    q: Tensor
    k: Tensor


def qk_norm_rotary_reference(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
                             sin: Tensor, *, eps: float = 1e-6) -> RotatedQK:
    """The specification in plain PyTorch: statistics in float32 (float64 stays), the rest in q's dtype."""

    def turned(x, weight):
        n = x if weight is None else (wide(x) * inverse_rms(x, eps)).to(x.dtype) * weight
        return rotate(n, cos, sin).to(x.dtype)

    return RotatedQK(turned(q, q_weight), turned(k, k_weight))


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dimension."""
    return (wide(x).square().mean(-1, keepdim=True) + eps).rsqrt()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 * cos.shape[-1] elements of each head, half against half; the rest stays."""
    x1, x2, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), -1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (..., 1, S, R/2): one for every head
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)
