"""What callers give `TransfusionMask`, checked and brought into one form: spans, documents, windows and integers."""
import torch
from torch import Tensor

from tfkernels._arguments import (
    INT32,
    integers,
    looks,
    need_integers,
    need_offsets,
    need_range,
    shown,
    whole_number,
)

_SPANS_FIT = "a list of (start, end) per batch row, or an integer tensor (B, M, 2), fits"


def checked_window(op: str, window) -> int:
    """Return a window of at least 1 key."""
    number = whole_number(window)
    if isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool) and number >= 1:
        return number
    raise ValueError(f"{op}: window is {shown(window)}; a window of at least 1 key (the query itself) fits; pass None "
                     "for no window")


def checked_dense(op: str, visible) -> Tensor:
    """Return a bool tensor (B, 1, Sq, Sk), (B, Sq, Sk) or (Sq, Sk)."""
    fits = "a bool tensor (B, 1, Sq, Sk), (B, Sq, Sk) or (Sq, Sk), one mask for all heads, fits"
    try:
        visible = torch.as_tensor(visible)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: visible is {shown(visible)}; {fits}") from error
    if visible.ndim not in (2, 3, 4) or visible.ndim == 4 and visible.shape[1] != 1 or visible.dtype != torch.bool:
        raise ValueError(f"{op}: visible is {described(visible)}; {fits}")
    return visible


def documents_of_lengths(op: str, cu_seqlens, seq_len: int, device) -> Tensor:
    """Return the document ids (1, seq_len) of sequences that end where `cu_seqlens` (N + 1,) says, -1 outside them."""
    cu_seqlens = need_integers(op, "cu_seqlens", cu_seqlens, "(N + 1,)", device)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens is {described(cu_seqlens)}; an integer tensor (N + 1,) fits, from 0 to the "
                         "number of tokens")
    need_offsets(op, "cu_seqlens", cu_seqlens, seq_len, what="sequence")
    tokens = torch.arange(seq_len, device=cu_seqlens.device)
    begun = torch.searchsorted(cu_seqlens.long(), tokens, right=True)  # sequences, 0 before the first
    return torch.where(begun == len(cu_seqlens), 0, begun)[None] - 1


def int32(op: str, name: str, x: Tensor | None) -> Tensor | None:
    """Return integers in int32, clipped where they are not looked at."""
    if x is None or x.dtype == torch.int32:
        return x
    need_range(op, name, x, *INT32, "which int32 holds")
    return x.long().clamp(*INT32).int()


def checked_spans(name: str, spans, seq_len: int, device, documents: Tensor | None) -> Tensor:
    """Return spans as an integer tensor (B, M, 2) on `device`, checked where that costs no synchronisation."""
    if not isinstance(spans, Tensor):
        device = torch.empty(0).device if device is None else device  # the default device
        spans = _span_tensor(name, spans)
    if spans.ndim != 3 or spans.shape[-1] != 2 or not integers(spans):
        raise ValueError(f"TransfusionMask.from_spans: {name} is {described(spans)}; {_SPANS_FIT}")
    if looks(spans):
        _check_spans(name, spans, seq_len)
    if looks(spans, documents) and documents is not None:
        _check_within_documents(name, spans, documents)
    return moved(spans, device if device is not None else spans.device)


def moved(x: Tensor, device) -> Tensor:
    """Return x on a device; a copy to the host is waited for, for it is read there at once."""
    return x.to(device, non_blocking=torch.device(device).type != "cpu")


def _span_tensor(name: str, spans) -> Tensor:
    """Stack the lists of spans to (B, M, 2), short rows padded with (0, 0)."""
    try:
        width = max([0, *map(len, spans)])  # default=0 is what torch.compile does not know
        rows = [[*map(list, row), *[[0, 0]] * (width - len(row))] for row in spans]
        tensor = (torch.tensor(rows, device="cpu") if width
                  else torch.zeros(len(rows), 0, 2, dtype=torch.int64, device="cpu"))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"TransfusionMask.from_spans: {name} is {str(spans)[:80]}; {_SPANS_FIT}") from error
    if not rows:
        raise ValueError(f"TransfusionMask.from_spans: {name} is an empty list; one list per batch row fits; [[]] is "
                         "one row without images")
    return tensor


def _check_within_documents(name: str, spans: Tensor, documents: Tensor) -> None:
    """Refuse a span that a document's end or padding cuts; one that lies in padding altogether is padding."""
    if 0 in spans.shape or 0 in documents.shape or len({1, len(spans), len(documents)}) > 2:
        return  # batch sizes that do not fit are refused by the caller
    changes = torch.nn.functional.pad((documents[:, 1:] != documents[:, :-1]).cumsum(1), (1, 0))
    batch = max(len(spans), len(documents))
    start, end = spans.long().expand(batch, -1, -1).unbind(-1)
    changes = changes.expand(batch, -1)
    held = start < end
    first, last = (changes.gather(1, torch.where(held, at, 0)) for at in (start, end - 1))
    if any((cut := held & (first != last)).any(1).tolist()):
        row, m = cut.nonzero()[0].tolist()
        of_spans, of_documents = (row if len(x) > 1 else 0 for x in (spans, documents))
        raise ValueError(f"TransfusionMask.from_spans: {name}[{of_spans}] holds ({start[row, m]}, {end[row, m]}), "
                         f"which an end of a document in documents[{of_documents}] cuts; spans within one document "
                         "fit; split the span, or give its tokens one id")


def _check_spans(name: str, spans: Tensor, seq_len: int) -> None:
    for row, pairs in enumerate(spans.tolist()):
        end = 0
        for a, b in sorted(pair for pair in pairs if pair[0] != pair[1]):
            if a < 0 or b > seq_len or a > b:
                raise ValueError(f"TransfusionMask.from_spans: {name}[{row}] holds ({a}, {b}); 0 <= start <= end <= "
                                 f"{seq_len} (seq_len) fits; clip or drop the span")
            if a < end:
                raise ValueError(f"TransfusionMask.from_spans: {name}[{row}] holds ({a}, {b}), which overlaps the "
                                 f"span before it, ending at {end}; disjoint spans fit; merge them")
            end = b


def checked_documents(op: str, documents, seq_len: int, device) -> Tensor | None:
    """Return document ids as an integer tensor (B, seq_len), checked where that costs no synchronisation."""
    if documents is None:
        return None
    fits = f"(B, {seq_len}), one id per token, -1 for padding,"
    documents = need_integers(op, "documents", documents, fits, device)
    if documents.ndim != 2 or documents.shape[1] != seq_len:
        raise ValueError(f"{op}: documents is {described(documents)}; an integer tensor {fits} fits")
    if looks(documents):
        known = torch.where(documents < 0, -1, documents).cummax(1).values
        if bool(((documents >= 0) & (documents < known)).any()):
            raise ValueError(f"{op}: documents decreases along a row; non-decreasing ids fit (-1, padding, may stand "
                             "anywhere); number documents in order")
    return documents


def described(x: Tensor) -> str:
    """Return what an error says of a tensor."""
    return f"{x.dtype} of shape {tuple(x.shape)}"
