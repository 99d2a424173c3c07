"""Learned sinks: one more logit per head in the softmax's denominator, which takes weight and gives no value.

    LSE_i = log(exp(sink) + sum_j exp(S_ij)),  out_i = sum_j exp(S_ij - LSE_i) v_j       (gpt-oss, arXiv:2508.10925)
    dsink = -sum_i exp(sink - LSE_i) * (sum_d dO_id O_id - dLSE_i)

Since the LSE counts the sink, the formulas of dQ, dK and dV are those without one. A row that sees nothing keeps output
0 and LSE -inf, and gives its sink no gradient.
"""
import math

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, H, S, D) and (B, H, S) with sinks (H,), from a softmax without them whose rows all see something."""
    sinks = sinks.to(lse.dtype)[:, None]
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


def sink_gradients(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return dsinks (H,) like sinks, from the LSE that counts them and delta = sum_d dO O - dLSE, both (B, H, S)."""
    empty = lse == -math.inf
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(empty, 0)
    return -(weights * delta.masked_fill(empty, 0)).sum((0, 2)).to(sinks.dtype)
