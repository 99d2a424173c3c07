"""Attention over mixed text and images: the public functions, their references and the backends, one file each.

`op.py` is what is called; `cpu.py` and `triton/` are what PyTorch's dispatcher picks by the tensors' device.
"""
from tfkernels.attention.op import (
    MAX_HEAD_DIM,
    AttentionOutput,
    attention,
    attention_reference,
    attention_with_lse,
    paged_attention,
    paged_attention_reference,
)

__all__ = ["MAX_HEAD_DIM", "AttentionOutput", "attention", "attention_reference", "attention_with_lse", "paged_attention", "paged_attention_reference"]
