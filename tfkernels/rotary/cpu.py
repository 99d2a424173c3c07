"""`qk_norm_rotary` on the CPU: the reference, computed in float32 (float64 stays), and its gradient written out.

A few tokens are taken through all steps before the next ones, so that what one step writes the next one finds in the
cache.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from tfkernels.rotary.reference import inverse_rms, wide
from tfkernels.rotary.results import empty_gradients, empty_like

NUMBERS = 2**16  # of q or k that go through all steps together


def forward(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
            eps: float) -> tuple[Tensor, Tensor]:
    """Return q and k, normalised and turned."""
    def turned(x, weight):
        out = empty_like(x)
        for at, cosine, sine in _blocks(x, cos, sin):
            block = wide(x[:, :, at])
            n = block if weight is None else block * inverse_rms(block, eps) * weight
            _rotate(n, cosine, sine, out[:, :, at])
        return out

    return turned(q, q_weight), turned(k, k_weight)


def backward(dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, q_weight: Tensor | None,
             k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and their weights; what nobody asked for has no elements."""
    dq, dk, *dweights = empty_gradients(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps)
    for dx, dweight, dout, x, weight in zip((dq, dk), dweights, (dq_out, dk_out), (q, k), (q_weight, k_weight)):
        if dout is None:
            continue
        total = 0.0
        for at, cosine, sine in _blocks(dout, cos, sin):
            turned = wide(dout[:, :, at])
            if weight is None:
                _rotate(turned, cosine, -sine, dx[:, :, at])
                continue
            dn, block = _rotate(turned, cosine, -sine, torch.empty_like(turned)), wide(x[:, :, at])
            rstd = inverse_rms(block, eps)
            xhat, dxhat = block * rstd, dn * weight
            total = total + (dn * xhat).sum((0, 1, 2), dtype=torch.float64)
            dx[:, :, at] = dxhat.sub_(xhat * (dxhat * xhat).mean(-1, keepdim=True)).mul_(rstd)
        if weight is not None:
            dweight.copy_(total) if dout.shape[2] else dweight.zero_()
    return dq, dk, *dweights


def _blocks(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens of x (B, H, S, D), and the cosines and sines that turn them."""
    cos, sin = (wide(t).unsqueeze(-3) for t in (cos, sin))  # (..., 1, S, R/2): one for every head
    step = max(1, NUMBERS * x.shape[2] // max(1, x.numel()))
    for first in range(0, x.shape[2], step):
        at = slice(first, first + step)
        yield at, cos[..., at, :], sin[..., at, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write to `out` x with the first 2 * cos.shape[-1] elements of each head turned, half against half; return it."""
    sizes = (cos.shape[-1], 2 * cos.shape[-1])
    (x1, x2, rest), (out1, out2, as_it_was) = x.tensor_split(sizes, -1), out.tensor_split(sizes, -1)
    out1.copy_((x1 * cos).addcmul_(x2, sin, value=-1))
    out2.copy_((x2 * cos).addcmul_(x1, sin))
    as_it_was.copy_(rest)
    return out
