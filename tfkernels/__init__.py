"""Triton kernels for models that read and draw: attention over mixed text and images, and its masks.

Dimensions, everywhere: B batch, S tokens (Sq queries, Sk keys), M image spans, N images, H query heads, K key/value heads,
D head dim, C hidden size.
"""
from tfkernels.attention import AttentionOutput, attention, attention_reference, attention_with_lse, paged_attention, paged_attention_reference
from tfkernels.mask import TransfusionMask

__all__ = ["AttentionOutput", "TransfusionMask", "attention", "attention_reference", "attention_with_lse", "paged_attention",
           "paged_attention_reference"]
__version__ = "0.1.0"
