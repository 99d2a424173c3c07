"""Attention under a `TransfusionMask`: block-sparse, causal text with bidirectional images, forward and backward.

    S_ij = softcap(q_i . k_j * scale)  where visible(i, j), else -inf     softcap(x) = c * tanh(x / c), arXiv:2408.00118
    LSE_i = log sum_j exp(S_ij)        out_i = sum_j exp(S_ij - LSE_i) v_j

The tiles that a mask hides are never visited: their bounds come from the mask's integers (see `tfkernels.mask`). One
custom operator serves every device. On CUDA it runs Triton kernels: `triton/forward.py`, `triton/backward.py` and, for
a few queries against a long cache, `triton/decode.py`. On the CPU it runs blocks of PyTorch's own fused attention
(`cpu.py`). The specification is `attention_reference` in `reference.py`.
"""
import math
import numbers

import torch
from torch import Tensor

from tfkernels._arguments import got, looks, need_range, need_tensors
from tfkernels._library import register, result_like
from tfkernels.attention import cpu
from tfkernels.attention.reference import AttentionOutput
from tfkernels.attention.triton import backward, decode, forward
from tfkernels.mask import TransfusionMask

MAX_HEAD_DIM = 512
MAX_CUDA_FLOAT32_HEAD_DIM = 256  # wider float32 tiles of the backward do not fit shared memory
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, *, scale: float | None = None,
              softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """Return softmax(softcap(q k^T * scale) + mask) v, visiting only the tiles that the mask leaves visible.

    Args:
        q: (B, H, Sq, D) in float16, bfloat16 or float32, any strides (a transposed (B, S, H, D) costs no copy). D is
            at most 512; on a GPU in float32 256.
        k, v: (B, K, Sk, D) and (B, K, Sk, Dv) like q; H a multiple of K (grouped-query attention). Dv may differ from
            D, as in multi-head latent attention (arXiv:2405.04434); on a GPU both take the tiles of the wider one.
        mask: Sq queries by Sk keys, on the same device; a mask of batch 1 serves every batch row.
        scale: factor of the scores before the softmax; 1 / sqrt(D) by default.
        softcap: bound c of the scores, c * tanh(scores / c); None for no bound.
        sinks: (H,) in any floating-point dtype, a learned logit per head that joins the softmax's denominator alone
            (gpt-oss, arXiv:2508.10925). It is neither scaled nor capped, and has a gradient.

    Returns:
        (B, H, Sq, Dv) like q. Rows that see nothing are 0, with zero gradients. Gradients are deterministic. Under
        torch.autocast q, k and v are cast to its dtype (float64 stays), as F.scaled_dot_product_attention does.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named.
    """
    return attention_with_lse(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks).out


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, *, scale: float | None = None,
                       softcap: float | None = None, sinks: Tensor | None = None) -> AttentionOutput:
    """Return `attention`'s output and the scores' log-sum-exp, both differentiable: what merging parts needs.

    The log-sum-exp counts the sink of its head, except in a row that sees nothing, where it is -inf. So of parts that
    are merged one may have sinks.
    """
    _check_kinds("attention", mask, scale, softcap, q=q, k=k, v=v)
    if _autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return attention_with_lse(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    _check("attention", q, k, v, mask)
    _check_sinks("attention", sinks, q)
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    out, lse = _forward(q, k, v, mask.lo, mask.hi, mask.key_since, mask.key_until, mask.rows_exact, mask.columns_exact,
                        mask.offset, float(scale), float(softcap or 0), sinks)
    return AttentionOutput(out, lse)


def attention_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TransfusionMask,
                        *, scale: float | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of `attention` from its arguments, in one dtype, and the results of `attention_with_lse`.

    It is for who does not keep k and v between forward and backward. With sinks, `lse` counts them.
    """
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    with torch.autocast(dout.device.type, enabled=False):
        dq, dk, dv = _backward(dout, None, q, k, v, out, lse, mask.lo, mask.hi, mask.key_since,
                               mask.key_until, mask.rows_exact, mask.columns_exact, mask.offset, float(scale),
                               float(softcap or 0), None)
    return dq, dk, dv


def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, mask: TransfusionMask, *,
                    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """Return `attention` against a paged cache, for inference.

    Key j of row b is k_pages[block_table[b, j // page_size], j % page_size].

    Args:
        q: (B, H, Sq, D) in float16, bfloat16 or float32, any strides.
        k_pages, v_pages: (P, page_size, K, D) and (P, page_size, K, Dv) like q, any strides, any page size; H a
            multiple of K.
        block_table: (B, T) int32, the pages of each row in order; entries behind a row's last key are never read. An
            entry that names none of the P pages raises on a CPU; on a GPU, where looking would wait, the first or the
            last page stands for it.
        mask: Sq queries by T * page_size keys: `TransfusionMask.from_cache(cached_lens, Sq, T * page_size, image=...)`.
        scale, softcap, sinks: as in `attention`; autocast changes nothing here, for it would copy the whole cache.

    Returns:
        (B, H, Sq, Dv) like q; there is no backward.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named.
    """
    _check_kinds(
        "paged_attention", mask, scale, softcap, q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table
    )
    if q.ndim != 4:
        raise ValueError(f"paged_attention: q has shape {tuple(q.shape)}; 4 dimensions (batch, heads, tokens, head "
                         "dim) fit")
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0] or block_table.dtype != torch.int32:
        raise ValueError(f"paged_attention: block_table is {block_table.dtype} of shape {tuple(block_table.shape)} "
                         f"and q has {q.shape[0]} rows; an int32 tensor (B, T) fits, the numbers of each row's pages")
    if k_pages.ndim != 4 or v_pages.ndim != 4 or 0 in (len(k_pages), len(v_pages)) or block_table.device != q.device:
        raise ValueError(f"paged_attention: k_pages has shape {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)} "
                         f"and block_table is on {block_table.device}; (P, page_size, K, D), P at least 1, and "
                         f"{q.device} fit")
    keys = [x[:1, :1].transpose(1, 2).expand(q.shape[0], -1, block_table.shape[1] * x.shape[1], -1)
            for x in (k_pages, v_pages)]
    _check("paged_attention", q, *keys, mask, keys=("k_pages", "v_pages"))
    _check_sinks("paged_attention", sinks, q)
    _check_pages(block_table, mask.hi, len(k_pages), k_pages.shape[1])
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    return _paged(q, k_pages, v_pages, block_table, mask.lo, mask.hi, mask.key_since, mask.key_until, mask.rows_exact,
                  mask.offset, float(scale), float(softcap or 0), sinks)[0]


def _check_pages(block_table: Tensor, hi: Tensor, pages: int, page_size: int) -> None:
    """Refuse a page that is not there, among those that a row reads, where looking is free."""
    if looks(block_table, hi) and hi.numel():
        first = torch.arange(block_table.shape[1], device=hi.device) * page_size
        read = first < hi.amax(1, keepdim=True)                                            # (B or 1, T)
        found = block_table[read.expand_as(block_table)]
        need_range("paged_attention", "block_table", found, 0, pages - 1, "the pages there are")


def _autocast(x: Tensor) -> bool:
    """Return whether autocast is on for x's device.

    Then the inputs are cast and autocast is switched off inside, for it would round the CPU's float32 sums.
    """
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _check_kinds(op: str, mask: TransfusionMask, scale: float | None, softcap: float | None, **tensors: Tensor) -> None:
    """Check what each argument is, and the numbers, before anything is asked of them."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{op}: {name} is a {type(x).__name__}; a tensor fits")
    if not isinstance(mask, TransfusionMask):
        raise ValueError(f"{op}: mask is a {type(mask).__name__}; a tfkernels.TransfusionMask fits; build one with "
                         "TransfusionMask.from_spans")
    if scale is not None and not (_is_number(scale) and abs(scale) < math.inf):
        raise ValueError(f"{op}: scale is {scale!r}; a finite number fits; pass None for 1 / sqrt(head dim)")
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < math.inf):
        raise ValueError(f"{op}: softcap is {softcap!r}; a positive, finite bound fits; pass None for no bound")


def _is_number(x) -> bool:
    return isinstance(x, (int, float, numbers.Real))  # NumPy's float32 is only the last


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, keys: tuple[str, str] = ("k", "v")) -> None:
    """Check that shapes, dtypes and devices fit each other; `keys` are the caller's names for k and v."""
    dtype, device, shapes = q.dtype, q.device, (q.shape, k.shape, v.shape)
    of_q, of_k, of_v = shapes
    most = MAX_CUDA_FLOAT32_HEAD_DIM if dtype == torch.float32 and device.type == "cuda" else MAX_HEAD_DIM
    for name, x, shape in zip(("q", *keys), (q, k, v), shapes):
        if len(shape) != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}; 4 dimensions (batch, heads, tokens, head dim) "
                             "fit")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}; one dtype "
                             f"and device fit; convert {name}")
        if shape[0] != of_q[0] or x is not v and shape[3] != of_q[3]:
            raise ValueError(f"{op}: {name} has shape {tuple(shape)} and q {tuple(of_q)}; the same batch size "
                             "and head dim fit (the head dim of values may differ)")
        if not 1 <= shape[3] <= most:
            raise ValueError(f"{op}: {name} has head dim {shape[3]}; 1 to {most} fits {dtype} on {device.type}")
    if of_k[:3] != of_v[:3]:
        raise ValueError(f"{op}: {keys[1]} has shape {tuple(of_v)} and {keys[0]} {tuple(of_k)}; as many heads "
                         "and tokens fit")
    if of_k[1] == 0 or of_q[1] % of_k[1]:
        raise ValueError(f"{op}: q has {of_q[1]} heads and k has {of_k[1]}; a multiple of k's heads fits")
    if dtype not in _DTYPES and not (dtype == torch.float64 and device.type == "cpu"):
        raise ValueError(f"{op}: q is {q.dtype} on {q.device}; float16, bfloat16 or float32 fits (float64 on CPU only)")
    if mask.query_len != of_q[2] or mask.key_len != of_k[2]:
        raise ValueError(f"{op}: mask is {mask.query_len} queries by {mask.key_len} keys, q has {of_q[2]} tokens "
                         f"and k {of_k[2]}; equal lengths fit; for cached decoding take mask.queries(start, stop) "
                         "of a mask as long as the cache")
    check_rows(op, q, mask)


def check_rows(op: str, q: Tensor, mask: TransfusionMask) -> None:
    """Check that a mask has q's batch rows, or one for all, and is on its device."""
    if mask.batch_size not in (1, q.shape[0]):
        raise ValueError(f"{op}: mask has {mask.batch_size} batch rows and q has {q.shape[0]}; the same number, or 1 "
                         "for all, fits")
    if mask.lo.device != q.device:
        raise ValueError(f"{op}: mask is on {mask.lo.device} and q on {q.device}; one device fits; call "
                         "mask.to(q.device)")


def _check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> None:
    """Check what is given for sinks beside q, which is checked."""
    if sinks is None:
        return
    need_tensors(op, {"sinks": sinks})
    if sinks.shape != (q.shape[1],) or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(f"{op}: sinks is {got(sinks)} and q has {q.shape[1]} heads on {q.device}; a floating-point "
                         f"tensor of shape ({q.shape[1]},) on {q.device} fits, a logit for each head")


def _forward_fake(q, k, v, lo, hi, since, until, rows_exact, columns_exact, offset, scale, softcap, sinks=None):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return result_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_fake(dout, dlse, q, k, v, out, lse, lo, hi, since, until, rows_exact, columns_exact, offset, scale,
                   softcap, sinks=None):
    return [*(result_like(x) for x in (q, k, v))] + ([] if sinks is None else [torch.empty_like(sinks)])


def _paged_fake(q, k, v, block_table, lo, hi, since, until, rows_exact, offset, scale, softcap, sinks=None):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return result_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool,
    columns_exact: bool, offset: int, scale: float, softcap: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if q.shape[2] <= decode.MAX_QUERIES:
        return decode.attention_decode(q, k, v, None, lo, hi, since, until, rows_exact, offset, scale, softcap, sinks)
    return forward.attention_forward(q, k, v, lo, hi, since, until, rows_exact, columns_exact, offset, scale, softcap,
                                     sinks)


_forward = register("attention_forward", kernel=_forward_kernel, cpu=cpu.attention_forward, fake=_forward_fake)
_backward = register("attention_backward", kernel=backward.attention_backward, cpu=cpu.attention_backward,
                     fake=_backward_fake)
_paged = register("paged_attention", kernel=decode.paged_attention_forward, cpu=cpu.paged_forward, fake=_paged_fake)


def _save(ctx, inputs, output):
    q, k, v, lo, hi, since, until, *ctx.numbers, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, since, until, sinks)
    ctx.set_materialize_grads(False)  # else zeros are made for the log-sum-exp


def _gradients(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 13
    *tensors, sinks = ctx.saved_tensors
    if _autocast(tensors[0]):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return _gradients(ctx, dout, dlse)
    dout = torch.zeros_like(tensors[3]) if dout is None else dout
    dq, dk, dv, *dsinks = _backward(dout, dlse, *tensors, *ctx.numbers, sinks)
    return dq, dk, dv, *(None,) * 9, dsinks[0] if dsinks else None


_forward.register_autograd(_gradients, setup_context=_save)
