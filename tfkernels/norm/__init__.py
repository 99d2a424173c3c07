"""Norms whose scale and shift, and residuals whose gate, are each image's own."""
from tfkernels.norm.op import gated_residual, gated_residual_rms_norm, modulated_layer_norm, modulated_rms_norm
from tfkernels.norm.reference import (
    ResidualNorm,
    gated_residual_reference,
    gated_residual_rms_norm_reference,
    modulated_layer_norm_reference,
    modulated_rms_norm_reference,
)

__all__ = [
    "ResidualNorm",
    "gated_residual",
    "gated_residual_reference",
    "gated_residual_rms_norm",
    "gated_residual_rms_norm_reference",
    "modulated_layer_norm",
    "modulated_layer_norm_reference",
    "modulated_rms_norm",
    "modulated_rms_norm_reference",
]
