"""Triton kernels for models that read and draw: attention over mixed text and images, its masks, and
norms modulated per image.

Dimensions, everywhere: B batch, S tokens (Sq queries, Sk keys), M image spans, N images, H query heads, K key/value heads,
D head dim, C hidden size.
"""
from tfkernels.attention import AttentionOutput, attention, attention_reference, attention_with_lse, paged_attention, paged_attention_reference
from tfkernels.mask import TransfusionMask
from tfkernels.norm import (
    ResidualNorm,
    gated_residual,
    gated_residual_reference,
    gated_residual_rms_norm,
    gated_residual_rms_norm_reference,
    modulated_layer_norm,
    modulated_layer_norm_reference,
    modulated_rms_norm,
    modulated_rms_norm_reference,
)

__all__ = ["AttentionOutput", "ResidualNorm", "TransfusionMask", "attention", "attention_reference", "attention_with_lse", "gated_residual",
           "gated_residual_reference", "gated_residual_rms_norm", "gated_residual_rms_norm_reference", "modulated_layer_norm",
           "modulated_layer_norm_reference", "modulated_rms_norm", "modulated_rms_norm_reference", "paged_attention", "paged_attention_reference"]
__version__ = "0.1.0"
