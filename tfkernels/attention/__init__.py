"""Attention over mixed text and images: the public functions, their specification and the backends, one file each.

`op.py` is what is called and `reference.py` says what it computes; `cpu.py` and `triton/` are the backends, which
PyTorch's dispatcher picks by the tensors' device.
"""
from tfkernels.attention.op import (
    MAX_HEAD_DIM,
    attention,
    attention_gradients,
    attention_with_lse,
    paged_attention,
)
from tfkernels.attention.reference import AttentionOutput, attention_reference, paged_attention_reference

__all__ = [
    "MAX_HEAD_DIM",
    "AttentionOutput",
    "attention",
    "attention_reference",
    "attention_gradients",
    "attention_with_lse",
    "paged_attention",
    "paged_attention_reference",
]
