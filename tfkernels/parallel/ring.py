"""Attention of a row cut over ranks whose keys and values go around in a ring (Liu et al., arXiv:2310.01889).

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

A rank meets the other ranks' keys and values one rank at a time and merges the parts, which is exact: `attention` of
all keys, up to the order of sums. While it computes one part the next one arrives. The backward lets keys and values go
around once more, together with their gradients, and computes each part again, with the gradients of its `out` and `lse`

    dout_a = w_a dout        dlse_a = w_a dout . (out_a - out)        where w_a = exp(lse_a - lse)

so no rank ever holds more than two ranks' keys and values.
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfkernels.attention import attention_with_lse
from tfkernels.mask import TransfusionMask
from tfkernels.parallel.arguments import autocast, checked_rank
from tfkernels.parallel.cut import Cut
from tfkernels.parallel.pairs import packed, sums_of, unpacked


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, cut: Cut, group=None, *,
                   scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Return what `gathered_attention` returns, up to rounding, without a whole row's keys and values on any rank.

    The arguments are those of `gathered_attention`. The backward computes the forward's parts again.
    """
    rank = checked_rank("ring_attention", q, k, v, mask, cut, group)
    return _Ring.apply(*autocast(q, k, v), mask.select_queries(cut.tokens[rank]), cut, group,
                       {"scale": scale, "softcap": softcap})


def merged(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return `out` and `lse` of attention over two sets of keys from those over each; -inf where both see nothing."""
    total = torch.logaddexp(lse, other_lse)
    return _weight(lse, total) * out + _weight(other_lse, total) * other_out, total


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """Return exp(part - total) as (B, H, T, 1), 0 for a part that sees nothing."""
    return (part - total).exp().masked_fill(part == -math.inf, 0)[..., None]


class _Ring(torch.autograd.Function):
    """(B, H, T, D), (B, K, T, D) -> (B, H, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, cut, group, options):
        out = q.new_zeros(q.shape, dtype=sums_of(q))
        lse = out.new_full(q.shape[:3], -math.inf)
        for owner, pairs in _around(packed(k, v, cut.longest), cut, group):
            part = attention_with_lse(q, *unpacked(pairs, len(cut.tokens[owner])),
                                      mask.select_keys(cut.tokens[owner]), **options)
            out, lse = merged(out, lse, *part)
        ctx.mask, ctx.cut, ctx.group, ctx.options = mask, cut, group, options
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        cut, dout = ctx.cut, dout.to(out.dtype)
        dq, dpairs = torch.zeros_like(out), None
        for owner, pairs in _around(packed(k, v, cut.longest), cut, ctx.group):
            tokens = cut.tokens[owner]
            inputs = [x.detach().requires_grad_() for x in (q, *unpacked(pairs, len(tokens)))]
            with torch.enable_grad():
                part = attention_with_lse(*inputs, ctx.mask.select_keys(tokens), **ctx.options)
            weight = _weight(part.lse.detach(), lse)
            dlse = (weight * dout * (part.out.detach() - out)).sum(-1)
            dq_part, dk, dv = torch.autograd.grad(part, inputs, ((weight * dout).to(q.dtype), dlse))
            dq += dq_part
            added = packed(dk.to(out.dtype), dv.to(out.dtype), cut.longest)
            dpairs = added if dpairs is None else _passed_on(dpairs, ctx.group)() + added
        dk, dv = unpacked(_passed_on(dpairs, ctx.group)(), k.shape[2])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _around(pairs: Tensor, cut: Cut, group):
    """Yield (owner, keys and values) of this rank, then of the ranks before it; the next ones arrive meanwhile."""
    rank = dist.get_rank(group)
    for step in range(cut.ranks):
        arrival = _passed_on(pairs, group) if step + 1 < cut.ranks else None
        yield (rank - step) % cut.ranks, pairs
        pairs = arrival() if arrival else None


def _passed_on(x: Tensor, group):
    """Send x to the next rank and return a function that waits for what the one before sends."""
    group = group if group is not None else dist.group.WORLD
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return lambda: x
    received = torch.empty_like(x)
    before, after = (dist.get_global_rank(group, (rank + step) % ranks) for step in (-1, 1))
    messages = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, after, group),
                                       dist.P2POp(dist.irecv, received, before, group)])

    def wait() -> Tensor:
        for message in messages:
            message.wait()
        return received

    return wait
