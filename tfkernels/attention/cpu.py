"""Attention on the CPU, quick enough to train with: blocks of queries against the keys that each block can see.

A block runs PyTorch's own fused CPU kernel. That kernel has no soft cap and no gradient of the LSE; these take the form
that is written out here. So do inputs that are not finite, for which a hidden pair must be left out whatever it holds.
Nothing larger than (block, its keys) is built, and a mask that hides little is one call for the whole row.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._library import result_like
from tfkernels.attention.reference import gather_pages, visible_sums
from tfkernels.attention.sinks import add_sinks, sink_gradients

BLOCK = 32
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Block(NamedTuple):
    rows: slice
    keys: slice
    bias: Tensor | None   # (B or 1, 1, rows, keys) additive mask, 0 or -inf; None for plain causal attention
    empty: Tensor | None  # (B or 1, 1, rows) rows that see nothing; None where there are none

    def visible(self) -> Tensor:
        """(B or 1, 1, 1, rows, keys) bool."""
        if self.bias is not None:
            return self.bias[:, :, None] == 0
        return torch.ones(
            1, 1, 1, self.rows.stop - self.rows.start, self.keys.stop - self.keys.start, dtype=torch.bool
        ).tril()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool,
    columns_exact: bool, offset: int, scale: float, softcap: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, H, Sq, D) x (B, K, Sk, D), (B, K, Sk, Dv) -> out (B, H, Sq, Dv), LSE float32 (float64 for float64)."""
    out = result_like(q, v.shape[-1]).zero_()
    q, k, v = _of_one_width(q, k, v)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=_statistics(q))
    written_out = bool(softcap) or not _finite(q, k, v)
    for block in _blocks(q, lo, hi, since, until, rows_exact, offset):
        part = q[:, :, block.rows], k[:, :, block.keys], v[:, :, block.keys]
        o, peak = _block_forward(*part, block, written_out, scale, softcap, sinks)
        o = o[..., :out.shape[-1]]
        out[:, :, block.rows] = o if block.empty is None else o.masked_fill(block.empty[..., None], 0)
        lse[:, :, block.rows] = peak if block.empty is None else peak.masked_fill(block.empty, -math.inf)
    return out, lse


def attention_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool, columns_exact: bool,
                       offset: int, scale: float, softcap: float, sinks: Tensor | None = None) -> list[Tensor]:
    """Return dq, dk, dv in the inputs' dtype, laid out as `result_like` says, and dsinks where there are sinks.

    dk and dv are summed over the blocks in the statistics' dtype.
    """
    dq, *results = (result_like(x).zero_() for x in (q, k, v))
    dk, dv = (x if x.dtype == _statistics(x) else torch.zeros(x.shape, dtype=_statistics(x)) for x in results)
    q, k, v, out, dout = _of_one_width(q, k, v, out, dout)
    empty = lse == -math.inf
    if bool(empty.any()):
        empty &= (out == 0).all(-1)  # where every visible score is -inf a row is not empty, and `out` is NaN
    dlse = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(empty, 0)
    known = lse.masked_fill(empty, 0)
    written_out = bool(softcap) or bool((dlse != 0).any()) or not _finite(q, k, v, out, dout)
    for block in _blocks(q, lo, hi, since, until, rows_exact, offset):
        rows, keys = (slice(None), slice(None), block.rows), (slice(None), slice(None), block.keys)
        if written_out:
            grads = _block_backward(dout[rows], dlse[rows], q[rows], k[keys], v[keys], block, scale, softcap, sinks)
        else:
            grads = _fused_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], known[rows], 0.0,
                                    block.bias is None, attn_mask=block.bias, scale=scale)
        dq[rows] = grads[0][..., :dq.shape[-1]]
        dk[keys] += grads[1][..., :dk.shape[-1]]
        dv[keys] += grads[2][..., :dv.shape[-1]]
    for result, total in zip(results, (dk, dv)):
        if total is not result:
            result.copy_(total)
    results = [dq.masked_fill_(empty[..., None], 0), *results]
    if sinks is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - dlse
        results.append(sink_gradients(sinks, lse, delta))
    return results


def paged_forward(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lo: Tensor, hi: Tensor, since: Tensor,
                  until: Tensor, rows_exact: bool, offset: int, scale: float, softcap: float,
                  sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `attention_forward` against a paged cache, whose pages are laid out in order first."""
    k, v = (gather_pages(x, block_table, hi) for x in (k, v))
    return attention_forward(q, k, v, lo, hi, since, until, rows_exact, False, offset, scale, softcap, sinks)


def _block_forward(q, k, v, block, written_out, scale, softcap, sinks):
    if not written_out:
        out, lse = _fused(q, k, v, 0.0, block.bias is None, attn_mask=block.bias, scale=scale)
        if _finite(lse if block.empty is None else lse.masked_fill(block.empty, 0)):
            return (out, lse) if sinks is None else add_sinks(out, lse, sinks)  # else finite inputs' scores overflow
    scores, _ = _scores(q, k, block, scale, softcap, sinks)
    out = visible_sums(_weights(scores, block), _grouped(v), block.visible())
    return out.flatten(1, 2).to(q.dtype), scores.logsumexp(-1).flatten(1, 2)


def _block_backward(dout, dlse, q, k, v, block, scale, softcap, sinks):
    group, visible = (k.shape[1], q.shape[1] // k.shape[1]), block.visible()
    scores, slope = _scores(q, k, block, scale, softcap, sinks)                              # (B, K, G, m, n)
    p = _weights(scores, block)
    d = dout.to(p.dtype).unflatten(1, group)
    dp = (d @ _grouped(v).mT).masked_fill(~visible, 0)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) + dlse.to(p.dtype).unflatten(1, group)[..., None]) * slope * scale
    dq = visible_sums(ds, _grouped(k), visible).flatten(1, 2)
    dk = visible_sums(ds.mT, q.to(p.dtype).unflatten(1, group), visible.mT).sum(2)
    return dq, dk, visible_sums(p.mT, d, visible.mT).sum(2)


def _scores(q, k, block, scale, softcap, sinks):
    """Return masked scores (B, K, G, m, n), one column more with sinks, and the slope of the soft cap (1 without one).
    """
    hidden = ~block.visible()
    scores = (q.to(_statistics(q)).unflatten(1, (k.shape[1], -1)) @ _grouped(k).mT * scale).masked_fill(hidden, 0)
    slope = 1.0
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    return scores, slope


def _weights(scores, block):
    visible = block.visible()
    return scores.softmax(-1)[..., :visible.shape[-1]].masked_fill(~visible, 0)  # softmax of an empty row is NaN


def _finite(*tensors: Tensor) -> bool:
    """Whether every value is finite, in one pass that writes nothing: the extremes of what holds a NaN are NaN."""
    return all(math.isfinite(end) for x in tensors if x.numel() for end in x.aminmax())


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as the fused kernel takes them: all as wide as the widest, by zeros, their rows contiguous.

    It reads wrong values where rows are not contiguous.
    """
    width = max(x.shape[-1] for x in tensors)
    padded = [x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _grouped(x: Tensor) -> Tensor:
    return x[:, :, None].to(_statistics(x))  # (B, K, 1, n, D)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(
    q: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool, offset: int
) -> Iterator[_Block]:
    sq, sk = lo.shape[1], since.shape[1]
    if sq == 0 or sk == 0:
        return
    rows = torch.arange(sq)
    if rows_exact and sq == sk and sq > 1 and bool((lo == 0).all()) and bool((hi == rows + 1).all()):
        yield _Block(slice(0, sq), slice(0, sk), None, None)
        return
    empty = lo >= hi
    lo, hi = lo.clamp(min=0), hi.clamp(max=sk)
    starts, stops = torch.where(empty, sk, lo).amin(0).tolist(), torch.where(empty, 0, hi).amax(0).tolist()
    size = BLOCK
    hulls = [(min(starts[i:i + size]), max(stops[i:i + size])) for i in range(0, sq, size)]
    if 2 * size * sum(max(0, b - a) for a, b in hulls) > sq * sk:
        size, hulls = sq, [(min(starts), max(stops))]
    keys = torch.arange(sk, dtype=torch.int32)
    for i, (a, b) in zip(range(0, sq, size), hulls):
        if a >= b:
            continue
        seen = (lo[:, i:i + size, None] <= keys[a:b]) & (keys[a:b] < hi[:, i:i + size, None])
        if not rows_exact:
            at = rows[i:i + size, None] + offset
            seen &= (since[:, None, a:b] <= at) & (at < until[:, None, a:b])
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[:, None]
        empty = ~seen.any(-1)[:, None]
        yield _Block(slice(i, min(i + size, sq)), slice(a, b), bias, empty if bool(empty.any()) else None)
