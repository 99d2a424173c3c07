"""Attention of a row's queries, cut over ranks, against keys and values gathered from all of them.

    out_r = attention(q_r, gather(k), gather(v), mask of rank r's queries)            dk_r = sum over ranks s of dk_s[r]

A query meets the keys of the whole row, in order, as on one process. Keys and values are gathered in forward and again
in backward, so that no more than one layer's are there at a time, and their gradients travel once. The backward adds up
what the ranks send in the order of the ranks, so gradients are deterministic on every backend. A whole row's keys and
values are little where heads are grouped; `ring.py` is for rows that are longer still.
"""
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfkernels.attention import attention_gradients, attention_with_lse
from tfkernels.mask import TransfusionMask
from tfkernels.parallel.arguments import autocast, checked_rank
from tfkernels.parallel.cut import Cut
from tfkernels.parallel.pairs import packed, sums_of, unpacked


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, cut: Cut, group=None, *,
                       scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Return `tfkernels.attention` of this rank's queries against the whole row's keys and values.

    Args:
        q: (B, H, T, D), the queries of the T tokens that `cut` gives this rank.
        k, v: (B, K, T, D), their keys and values; H a multiple of K.
        mask: the whole row's mask, S queries by S keys, the same on every rank.
        cut: which tokens each rank holds, the same on every rank: `cut_by_area(mask, ranks)`.
        group: process group of the ranks that share the row; None for all processes.
        scale, softcap: as `tfkernels.attention` takes them.

    Returns:
        (B, H, T, D) like q. Every rank must call it, and its backward, the same number of times in the same order.

    Raises:
        ValueError: a shape that does not fit the cut, or what `tfkernels.attention` refuses.
    """
    rank = checked_rank("gathered_attention", q, k, v, mask, cut, group)
    return _Gathered.apply(*autocast(q, k, v), mask.select_queries(cut.tokens[rank]), cut, group,
                           {"scale": scale, "softcap": softcap})


class _Gathered(torch.autograd.Function):
    """(B, H, T, D), (B, K, T, D) -> (B, H, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, cut, group, options):
        out, lse = attention_with_lse(q, *_gathered(k, v, cut, group), mask, **options)
        ctx.mask, ctx.cut, ctx.group, ctx.options = mask, cut, group, options
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        cut, tokens = ctx.cut, k.shape[2]
        dq, dk, dv = attention_gradients(dout, q, *_gathered(k, v, cut, ctx.group), out, lse, ctx.mask, **ctx.options)
        row = packed(dk, dv, cut.seq_len)
        del dk, dv  # here and below: of what is as large as the row's keys and values, two are there at a time
        sent = row.new_zeros(cut.ranks * cut.longest, *row.shape[1:]).index_copy_(0, cut.places, row)
        del row
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=ctx.group)
        del sent
        total = received.unflatten(0, (cut.ranks, cut.longest)).sum(0, dtype=sums_of(received)).to(received.dtype)
        return dq, *unpacked(total, tokens), None, None, None, None


def _gathered(k: Tensor, v: Tensor, cut: Cut, group) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the whole row, in its order: (B, K, T, D) -> (B, K, S, D)."""
    mine = packed(k, v, cut.longest)
    everyone = mine.new_empty(cut.ranks * cut.longest, *mine.shape[1:])
    dist.all_gather(list(everyone.chunk(cut.ranks)), mine, group=group)
    return unpacked(everyone.index_select(0, cut.places), cut.seq_len)
