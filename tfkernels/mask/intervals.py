"""The mask's integers from image spans, documents and hidden spans: one kernel, one pass, no host synchronisation.

Token i lies in the document [d0, d1) and in the image [s, e), which for text is [i, i + 1); an image ends where its
document does.

    lo = max(d0, i + 1 - window)        since = s                            without a window lo = d0 and until = d1
    hi = e                              until = min(d1, i + window)

A token in the hidden span [h0, h1) is a key for its span only: since = max(s, h0), until = min(until, h1). Padding is
empty on both sides. Bytes that must move: the labels once, and 16 bytes a token written, 0.5 MB for 32k tokens. The
specification is in `reference.py` and runs on the CPU; the kernel is in `triton.py`.
"""
import torch

from tfkernels._library import register
from tfkernels.mask import triton
from tfkernels.mask.reference import intervals_reference


def _fake(spans, types, documents, hidden, batch, seq_len, window):
    return (spans if types is None else types).new_empty(4, batch, seq_len, dtype=torch.int32)


intervals = register("mask_intervals", kernel=triton.intervals, cpu=intervals_reference, fake=_fake)
