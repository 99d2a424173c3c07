"""`qk_norm_rotary` on the CPU: the reference, computed in float32 (float64 stays), and its gradient written out."""
import torch
from torch import Tensor

from tfkernels.rotary.reference import inverse_rms, rotate, wide
from tfkernels.rotary.results import empty_gradients, empty_like


def forward(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
                 eps: float) -> tuple[Tensor, Tensor]:
    """Return q and k, normalised and turned."""
    def turned(x, weight):
        n = wide(x) if weight is None else wide(x) * inverse_rms(x, eps) * weight
        return empty_like(x).copy_(rotate(n, wide(cos), wide(sin)))

    return turned(q, q_weight), turned(k, k_weight)


def backward(dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, q_weight: Tensor | None,
             k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and their weights; what nobody asked for has no elements."""
    dq, dk, *dweights = empty_gradients(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps)
    for dx, dweight, dout, x, weight in zip((dq, dk), dweights, (dq_out, dk_out), (q, k), (q_weight, k_weight)):
        if dout is None:
            continue
        dn = rotate(wide(dout), wide(cos), -wide(sin))
        if weight is not None:
            rstd = inverse_rms(x, eps)
            xhat, dxhat = wide(x) * rstd, dn * weight
            dweight.copy_((dn * xhat).sum((0, 1, 2), dtype=torch.float64))
            dn = (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)) * rstd
        dx.copy_(dn)
    return dq, dk, *dweights
