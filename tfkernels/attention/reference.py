"""Attention under a `TransfusionMask`, and against a paged cache, in plain PyTorch: the kernels' specification."""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels.mask import TransfusionMask


class AttentionOutput(NamedTuple):
    """`out` (B, H, Sq, Dv) in the inputs' dtype, and `lse` (B, H, Sq) in float32, natural, -inf for empty rows."""

    out: Tensor
    lse: Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, *, scale: float | None = None,
                        softcap: float | None = None, sinks: Tensor | None = None) -> AttentionOutput:
    """The specification in plain PyTorch, in the inputs' dtype, with the whole score matrix in memory.

    What the mask hides from a query takes no part in its row, nor in a gradient, whatever stands there.
    """
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = mask.dense()
    scores = _VisibleProducts.apply(q, k, visible) * scale                                 # (B, H, Sq, Sk)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    empty = ~visible.any(-1, keepdim=True)                                                 # (B, 1, Sq, 1)
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(empty, 0)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)                                           # (B, H, Sq, Sk + 1)
    weights = scores.softmax(-1)[..., :visible.shape[-1]].masked_fill(~visible, 0)
    return AttentionOutput(_VisibleSums.apply(weights, v, visible),
                           scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf))


def paged_attention_reference(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, mask: TransfusionMask,
                              *, scale: float | None = None, softcap: float | None = None,
                              sinks: Tensor | None = None) -> Tensor:
    """The specification: gather each row's pages, then `attention_reference`."""
    return attention_reference(q, *(gather_pages(x, block_table, mask.hi) for x in (k_pages, v_pages)), mask,
                               scale=scale, softcap=softcap, sinks=sinks).out


class _VisibleProducts(torch.autograd.Function):
    """x_i . y_j for the visible pairs, 0 for the hidden ones."""

    @staticmethod
    def forward(ctx, x, y, visible):
        ctx.save_for_backward(x, y, visible)
        return (x @ y.mT).masked_fill(~visible, 0)

    @staticmethod
    def backward(ctx, g):
        x, y, visible = ctx.saved_tensors
        return _VisibleSums.apply(g, y, visible), _VisibleSums.apply(g.mT, x, visible.mT), None


class _VisibleSums(torch.autograd.Function):
    """sum_j weights_ij y_j over the visible pairs."""

    @staticmethod
    def forward(ctx, weights, y, visible):
        ctx.save_for_backward(weights, y, visible)
        return visible_sums(weights, y, visible)

    @staticmethod
    def backward(ctx, g):
        weights, y, visible = ctx.saved_tensors
        return _VisibleProducts.apply(g, y, visible), _VisibleSums.apply(weights.mT, g, visible.mT), None


def visible_sums(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """Return sum_j weights_ij x_j over the visible pairs: (..., m, n) x (..., n, D) -> (..., m, D).

    What the hidden pairs hold, NaN and infinities included, has no influence.
    """
    weights, finite = weights.masked_fill(~visible, 0), x.isfinite()
    sums = weights @ x.masked_fill(~finite, 0)
    if bool(finite.all()):
        return sums

    def meets(pairs: Tensor, values: Tensor) -> Tensor:
        return pairs.to(sums.dtype) @ values.to(sums.dtype) > 0

    up = meets(weights > 0, x == math.inf) | meets(weights < 0, x == -math.inf)
    down = meets(weights > 0, x == -math.inf) | meets(weights < 0, x == math.inf)
    unknown = meets(visible, x.isnan()) | meets(visible & (weights == 0), x.isinf()) | (up & down)
    return torch.where(up, math.inf, torch.where(down, -math.inf, sums)).masked_fill(unknown | sums.isnan(), math.nan)


def gather_pages(pages: Tensor, block_table: Tensor, hi: Tensor) -> Tensor:
    """Lay each row's pages out in order: (P, page_size, K, D) -> (B, K, T * page_size, D).

    What lies behind the last key that a query sees is 0.
    """
    rows = pages[block_table.long().clamp(0, pages.shape[0] - 1)].flatten(1, 2).transpose(1, 2)
    last = torch.nn.functional.pad(hi, (0, 1)).amax(1, keepdim=True)                       # 0 without queries
    seen = torch.arange(rows.shape[2], device=hi.device) < last                            # (B or 1, Sk)
    return torch.where(seen[:, None, :, None], rows, 0)
