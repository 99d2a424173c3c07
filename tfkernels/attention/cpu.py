"""Attention on the CPU, quick enough to train with: blocks of queries against the keys that each block can see.

A block runs PyTorch's own fused CPU kernel. That kernel has no soft cap and no gradient of the LSE; these take the form
that is written out here. So do inputs that are not finite, for which a hidden pair must be left out whatever it holds.
Nothing larger than (block, its keys) is built, and a mask that hides little is one call for the whole row. The blocks
of one mask serve all layers, forward and backward.
"""
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._library import made_once, result_like
from tfkernels.attention.reference import gather_pages, visible_sums
from tfkernels.attention.sinks import add_sinks, sink_gradients

BLOCK = 32  # queries, or twice as many
FEW = 8  # queries of a key head, at most, for which two plain products are quicker than the fused kernel
KEPT = 2**22  # pairs in all blocks of a mask, at most, for them to be kept while the mask lives
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
    few = q.shape[1] * q.shape[2] <= FEW * k.shape[1] and q.dtype == _statistics(q)
    if few and not softcap and q.numel() and k.numel():
        found = _few_forward(q, k, v, lo, hi, since, until, rows_exact, offset, scale, sinks)
        if found is not None:
            return found
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
    dq, *results = result_like(q), *(result_like(x).zero_() for x in (k, v))
    dk, dv = (x if x.dtype == _statistics(x) else torch.zeros(x.shape, dtype=_statistics(x)) for x in results)
    q, k, v, out, dout = _of_one_width(q, k, v, out, dout)
    empty, known = lse == -math.inf, lse
    some_empty = bool(empty.any())
    if some_empty:
        at = empty.nonzero(as_tuple=True)
        empty[at] = (out[at] == 0).all(-1)  # where every visible score is -inf a row is not empty, and `out` is NaN
        known, dlse = (x if x is None else x.masked_fill(empty, 0) for x in (lse, dlse))
    written_out = bool(softcap) or dlse is not None and bool(dlse.any()) or not _finite(q, k, v, out, dout)
    dlse = torch.zeros_like(lse) if dlse is None and (written_out or sinks is not None) else dlse
    for block in _blocks(q, lo, hi, since, until, rows_exact, offset):
        rows, keys = (slice(None), slice(None), block.rows), (slice(None), slice(None), block.keys)
        if written_out:
            grads = _block_backward(dout[rows], dlse[rows], q[rows], k[keys], v[keys], block, scale, softcap, sinks)
        else:
            grads = _fused_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], known[rows], 0.0,
                                    block.bias is None, attn_mask=block.bias, scale=scale)
        dq[rows] = grads[0][..., :dq.shape[-1]]
        dk[keys].add_(grads[1][..., :dk.shape[-1]])
        dv[keys].add_(grads[2][..., :dv.shape[-1]])
    for result, total in zip(results, (dk, dv)):
        if total is not result:
            result.copy_(total)
    results = [dq.masked_fill_(empty[..., None], 0) if some_empty else dq, *results]
    if sinks is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - dlse
        results.append(sink_gradients(sinks, lse, delta))
    return results


@torch.autocast("cpu", enabled=False)
def paged_forward(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lo: Tensor, hi: Tensor, since: Tensor,
                  until: Tensor, rows_exact: bool, offset: int, scale: float, softcap: float,
                  sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `attention_forward` against a paged cache, whose pages are laid out in order first."""
    k, v = (gather_pages(x, block_table, hi) for x in (k, v))
    return attention_forward(q, k, v, lo, hi, since, until, rows_exact, False, offset, scale, softcap, sinks)


def _few_forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor,
                 rows_exact: bool, offset: int, scale: float, sinks: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return `attention_forward` for few queries, such as a text's next token; None where something is not finite.

    Keys and values are read in the products alone, not to look for what is not finite: the results show it. A single
    query of each key head reads them once in the fused kernel, too.
    """
    hidden, empty, bias = made_once(_hidden, lo, hi, since, until, rows_exact=rows_exact, offset=offset, dtype=q.dtype)
    if q.shape[1] * q.shape[2] == k.shape[1] and q.shape[-1] == v.shape[-1] and empty is None:
        out, lse = _fused(*_of_one_width(q, k, v), 0.0, False, attn_mask=bias, scale=scale)
        return _finished(q, out, lse, empty, sinks)
    scores = (q.reshape(len(q), k.shape[1], -1, q.shape[-1]) @ k.mT).mul_(scale)             # (B, K, G Sq, Sk)
    if hidden is not None:
        scores.view(len(q), k.shape[1], -1, *hidden.shape[-2:]).masked_fill_(hidden, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    if empty is not None:
        peak.view(q.shape[:3]).masked_fill_(empty, 0)
    weights = scores.sub_(peak).exp_()
    sums = weights.sum(-1, keepdim=True)
    if empty is not None:
        sums.view(q.shape[:3]).masked_fill_(empty, 1)
    out, lse = (weights @ v).div_(sums).view(*q.shape[:3], v.shape[-1]), sums.log_().add_(peak).view(q.shape[:3])
    return _finished(q, out, lse, empty, sinks)


def _finished(q: Tensor, out: Tensor, lse: Tensor, empty: Tensor | None,
              sinks: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The results of few queries, with sinks and laid out like q; None where something is not finite."""
    if not _finite(out, lse):
        return None
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    lse = lse if empty is None else lse.masked_fill_(empty, -math.inf)
    return out if q.is_contiguous() else result_like(q, out.shape[-1]).copy_(out), lse


def _hidden(lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, *, rows_exact: bool, offset: int,
            dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(B or 1, 1, 1, Sq, Sk) the hidden pairs, (B or 1, 1, Sq) the rows that see nothing, and (B or 1, 1, Sq, Sk) 0
    for what is seen and -inf; each None where it hides nothing."""
    seen = _seen(slice(0, lo.shape[1]), slice(0, since.shape[1]), lo, hi, since, until, rows_exact, offset)
    if seen.all():
        return None, None, None
    hidden = ~seen[:, None]
    return hidden[:, None], _empty(seen), torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


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
    """Whether every value is finite, as far as their sum says: values whose sum overflows are taken for infinite."""
    return all(math.isfinite(x.sum(dtype=_statistics(x))) for x in tensors)


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
) -> Iterable[_Block]:
    """Return the blocks of queries that see something, made once for a mask where that takes little memory."""
    mask, options = (lo, hi, since, until), {"rows_exact": rows_exact, "offset": offset, "dtype": q.dtype}
    kept = made_once(_kept_blocks, *mask, **options)
    return _each_block(_hulls(lo, hi, since.shape[1], rows_exact), *mask, **options) if kept is None else kept


def _kept_blocks(lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, **options) -> list[_Block] | None:
    hulls = _hulls(lo, hi, since.shape[1], options["rows_exact"])
    pairs = len(lo) * sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in hulls)
    return list(_each_block(hulls, lo, hi, since, until, **options)) if pairs <= KEPT else None


def _each_block(hulls: list[tuple[slice, slice]], lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, *,
                rows_exact: bool, offset: int, dtype: torch.dtype) -> Iterator[_Block]:
    if not hulls and rows_exact and _causal(lo, hi, since.shape[1]):
        yield _Block(slice(0, lo.shape[1]), slice(0, since.shape[1]), None, None)
        return
    for rows, hull in hulls:
        seen = _seen(rows, hull, lo, hi, since, until, rows_exact, offset)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)[:, None]
        yield _Block(rows, hull, bias, _empty(seen))


def _seen(rows: slice, hull: slice, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool,
          offset: int) -> Tensor:
    """(B or 1, rows, keys of the hull) bool, the visible pairs."""
    keys = torch.arange(hull.start, hull.stop, dtype=torch.int32)
    seen = (lo[:, rows, None] <= keys) & (keys < hi[:, rows, None])
    if not rows_exact:
        at = torch.arange(offset + rows.start, offset + rows.stop)[:, None]
        seen &= (since[:, None, hull] <= at) & (at < until[:, None, hull])
    return seen


def _empty(seen: Tensor) -> Tensor | None:
    """(B or 1, 1, rows) the rows that see nothing, None where each sees something."""
    empty = ~seen.any(-1)[:, None]
    return empty if bool(empty.any()) else None


def _causal(lo: Tensor, hi: Tensor, keys: int) -> bool:
    """Whether each row sees the keys up to its own, the fused kernel's own rule."""
    count = lo.shape[1]
    return count == keys > 1 and bool((lo == 0).all()) and bool((hi == torch.arange(1, count + 1)).all())


def _hulls(lo: Tensor, hi: Tensor, keys: int, rows_exact: bool) -> list[tuple[slice, slice]]:
    """Return the queries of each block and the run of keys that holds all that they see.

    There are none where the mask is plainly causal. A block is the whole row where blocks would leave out less than
    half, and has 2 * BLOCK queries where that costs no more than an eighth of the pairs.
    """
    count = lo.shape[1]
    if not count or not keys or rows_exact and _causal(lo, hi, keys):
        return []
    empty = lo >= hi
    starts = torch.where(empty, keys, lo.clamp(min=0)).amin(0).tolist()
    stops = torch.where(empty, 0, hi.clamp(max=keys)).amax(0).tolist()

    def cut(size: int) -> tuple[int, list[tuple[slice, slice]]]:
        found = [(slice(i, min(i + size, count)), slice(min(starts[i:i + size]), max(stops[i:i + size])))
                 for i in range(0, count, size)]
        found = [(rows, hull) for rows, hull in found if hull.start < hull.stop]
        return size * sum(hull.stop - hull.start for _, hull in found), found

    (pairs, blocks), (wider, wide_blocks) = cut(BLOCK), cut(2 * BLOCK)
    if 2 * pairs > count * keys:
        return cut(count)[1]
    return wide_blocks if 8 * wider <= 9 * pairs else blocks
