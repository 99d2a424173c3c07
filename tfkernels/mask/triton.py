"""Kernel of the mask's integers: one pass over the tokens.

Runs of equal labels (documents, token types) are found by a scan within a block of tokens. From the block's first and
last token on, it looks back and ahead until their runs end. Spans are found by comparing each token with each span.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import cdiv
from tfkernels._library import INTERPRET

# tokens of one program; small in the interpreter, so that short test sequences cross many edges
BLOCK = 16 if INTERPRET else 1024
SPANS = 8                          # spans compared at a time
WARPS = 8                          # 4 spill on sm_90
REGISTERS = 128                    # of a thread at most: left alone, ptxas takes 80 and spills on Triton 3.7.1
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _label(ptr, rows, seq_len):
    return tl.load(ptr + rows, mask=(rows >= 0) & (rows < seq_len), other=0)


@triton.jit
def _run(ptr, first_row, seq_len, BLOCK: tl.constexpr):
    """Start and end of each token's run of equal labels, and its label; the tokens [first_row, first_row + BLOCK)."""
    rows = first_row + tl.arange(0, BLOCK)
    labels = _label(ptr, rows, seq_len)
    opens = (rows == 0) | (labels != _label(ptr, rows - 1, seq_len))
    start = tl.associative_scan(tl.where(opens, rows, -1), 0, _larger)
    found, at = tl.min(start), first_row  # -1: the first tokens go on with a run that opened before
    while (found < 0) & (at > 0):
        at -= BLOCK
        earlier = at + tl.arange(0, BLOCK)
        opens = (earlier == 0) | (_label(ptr, earlier, seq_len) != _label(ptr, earlier - 1, seq_len))
        found = tl.max(tl.where(opens, earlier, -1))
    closes = (rows + 1 >= seq_len) | (labels != _label(ptr, rows + 1, seq_len))
    end = tl.associative_scan(tl.where(closes, rows + 1, FAR), 0, _smaller, reverse=True)
    ahead, at = tl.max(end), first_row + BLOCK
    while (ahead == FAR) & (at < seq_len):
        later = at + tl.arange(0, BLOCK)
        closes = (later + 1 >= seq_len) | (_label(ptr, later, seq_len) != _label(ptr, later + 1, seq_len))
        ahead = tl.min(tl.where(closes, later + 1, FAR))
        at += BLOCK
    return tl.maximum(start, found), tl.minimum(end, ahead), labels


@triton.jit
def _clipped(bound, seq_len):
    """Clipped to [0, seq_len] before int32 could wrap it."""
    return tl.minimum(tl.maximum(bound.to(tl.int64), 0), seq_len).to(tl.int32)


@triton.jit
def _span(ptr, count, rows, seq_len, SPANS: tl.constexpr):
    """Start and end of the span that holds each token, 0 and 0 where none does."""
    start, end = rows * 0, rows * 0
    for m in range(0, count, SPANS):
        offs = m + tl.arange(0, SPANS)
        a = _clipped(tl.load(ptr + 2 * offs, mask=offs < count, other=0), seq_len)
        b = _clipped(tl.load(ptr + 2 * offs + 1, mask=offs < count, other=0), seq_len)
        inside = (a[:, None] <= rows[None, :]) & (rows[None, :] < b[:, None])
        start = tl.maximum(start, tl.max(tl.where(inside, a[:, None], 0), 0))
        end = tl.maximum(end, tl.max(tl.where(inside, b[:, None], 0), 0))
    return start, end


@triton.jit(do_not_specialize=["images_ptr", "documents_ptr", "hidden_ptr", "spans", "hidden_spans", "seq_len",
                               "window", "stride_images", "stride_documents", "stride_hidden", "stride_out"])
def _mask_intervals(images_ptr, documents_ptr, hidden_ptr, out_ptr, spans, hidden_spans, seq_len, window, stride_images,
                    stride_documents, stride_hidden, stride_out,
                    TYPES: tl.constexpr, DOCUMENTS: tl.constexpr, HIDDEN: tl.constexpr, WINDOW: tl.constexpr,
                    BLOCK: tl.constexpr, SPANS: tl.constexpr):
    programs = tl.cdiv(seq_len, BLOCK)  # of one batch row
    first_row, b = tl.program_id(0) % programs * BLOCK, (tl.program_id(0) // programs).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK)
    images_ptr += b * stride_images
    document_start, document_end, padding = rows * 0, rows * 0 + seq_len, rows < 0
    if DOCUMENTS:
        document_start, document_end, documents = _run(documents_ptr + b * stride_documents, first_row, seq_len, BLOCK)
        padding = documents < 0
    if TYPES:
        start, end, types = _run(images_ptr, first_row, seq_len, BLOCK)
        in_image = types > 0
    else:
        start, end = _span(images_ptr, spans, rows, seq_len, SPANS)
        in_image = end > 0
    start = tl.where(in_image, tl.maximum(start, document_start), rows)
    end = tl.where(in_image, tl.minimum(end, document_end), rows + 1)
    lo, hi, since, until = document_start, end, start, document_end
    if WINDOW:
        lo = tl.maximum(lo, rows + 1 - window)
        until = tl.minimum(until, rows + window)
    if HIDDEN:
        hidden_start, hidden_end = _span(hidden_ptr + b * stride_hidden, hidden_spans, rows, seq_len, SPANS)
        is_hidden = hidden_end > 0
        since = tl.where(is_hidden, tl.maximum(since, hidden_start), since)
        until = tl.where(is_hidden, tl.minimum(until, hidden_end), until)
    inside = rows < seq_len
    out_ptr += b * seq_len + rows
    tl.store(out_ptr, tl.where(padding, rows, lo), mask=inside)
    tl.store(out_ptr + stride_out, tl.where(padding, rows, hi), mask=inside)
    tl.store(out_ptr + 2 * stride_out, tl.where(padding, rows, since), mask=inside)
    tl.store(out_ptr + 3 * stride_out, tl.where(padding, rows, until), mask=inside)


def intervals(spans: Tensor | None, types: Tensor | None, documents: Tensor | None, hidden: Tensor | None, batch: int,
              seq_len: int, window: int) -> Tensor:
    """Launch the kernel: lo, hi, since and until, stacked to (4, B, S) int32."""
    images = (spans if types is None else types).contiguous()
    documents, hidden = (x if x is None else x.contiguous() for x in (documents, hidden))
    out = torch.empty(4, batch, seq_len, dtype=torch.int32, device=images.device)
    if out.numel() == 0:
        return out
    strides = (0 if x is None or x.shape[0] == 1 else x.stride(0) for x in (images, documents, hidden))
    _mask_intervals[(cdiv(seq_len, BLOCK) * batch,)](
        images, images if documents is None else documents, images if hidden is None else hidden, out,
        0 if spans is None else spans.shape[1],
        0 if hidden is None else hidden.shape[1], seq_len, window, *strides, batch * seq_len,
        TYPES=types is not None, DOCUMENTS=documents is not None, HIDDEN=hidden is not None, WINDOW=window > 0,
        BLOCK=BLOCK, SPANS=SPANS, num_warps=WARPS, maxnreg=REGISTERS)
    return out
