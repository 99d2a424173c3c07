"""The mask's integers from image spans, documents and hidden spans in plain PyTorch: the kernel's specification."""
import torch
from torch import Tensor


def intervals_reference(spans: Tensor | None, types: Tensor | None, documents: Tensor | None, hidden: Tensor | None,
                        batch: int, seq_len: int, window: int) -> Tensor:
    """The specification in plain PyTorch, and what runs on a CPU."""
    device = (spans if types is None else types).device
    rows = torch.arange(seq_len, device=device).repeat(batch, 1)
    document_start, document_end = ((torch.zeros_like(rows), torch.full_like(rows, seq_len))
                                    if documents is None else _runs(documents))
    start, end = _runs(types) if spans is None else _spans_of_tokens(spans, seq_len)
    in_image = end > 0 if types is None else types > 0
    start = torch.where(in_image, torch.maximum(start, document_start), rows)
    end = torch.where(in_image, torch.minimum(end, document_end), rows + 1)
    lo, hi, since, until = document_start, end, start, document_end
    if window:
        lo = torch.maximum(lo, rows + 1 - window)
        until = torch.minimum(until, rows + window)
    if hidden is not None:
        hidden_start, hidden_end = _spans_of_tokens(hidden, seq_len)
        since = torch.where(hidden_end > 0, torch.maximum(since, hidden_start), since)
        until = torch.where(hidden_end > 0, torch.minimum(until, hidden_end), until)
    out = torch.stack([x.expand(batch, -1) for x in (lo, hi, since, until)])
    return (out if documents is None else torch.where(documents < 0, rows, out)).int()


def _runs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (start, end) of each token's maximal run of equal labels, both (B, S) int64."""
    seq_len = labels.shape[1]
    rows = torch.arange(seq_len, device=labels.device).expand_as(labels)
    edge = labels[:, 1:] != labels[:, :-1]
    starts, ends = (torch.nn.functional.pad(edge, pad, value=True) if seq_len else edge for pad in ((1, 0), (0, 1)))
    start = torch.where(starts, rows, 0).cummax(1).values
    end = torch.where(ends, rows + 1, seq_len).flip(1).cummin(1).values.flip(1)
    return start, end


def _spans_of_tokens(spans: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return (start, end) of the span that holds each token, both (B, S), 0 where none does.

    Both are written at a span's start, erased at its end, and summed along the tokens.
    """
    spans = spans.long().clamp(0, seq_len)
    a, b = spans[..., 0], torch.maximum(spans[..., 0], spans[..., 1])
    sums = spans.new_zeros(2, spans.shape[0], seq_len + 1)
    for bound, total in zip((a, b), sums):
        bound = bound * (a < b)
        total.scatter_add_(1, a, bound).scatter_add_(1, b, -bound)
    start, end = sums.cumsum(2)[..., :seq_len]
    return start, end
