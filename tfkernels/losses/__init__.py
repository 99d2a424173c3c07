"""The losses of both heads; logits, predictions and targets are never stored."""
from tfkernels.losses.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_lse
from tfkernels.losses.diffusion import diffusion_loss, min_snr_weight
from tfkernels.losses.head import modulated_layer_norm_diffusion_loss, modulated_rms_norm_diffusion_loss
from tfkernels.losses.reference import (
    LinearCrossEntropy,
    LinearCrossEntropyLSE,
    diffusion_loss_reference,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse_reference,
    modulated_layer_norm_diffusion_loss_reference,
    modulated_rms_norm_diffusion_loss_reference,
)

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyLSE",
    "diffusion_loss",
    "diffusion_loss_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_with_lse",
    "linear_cross_entropy_with_lse_reference",
    "min_snr_weight",
    "modulated_layer_norm_diffusion_loss",
    "modulated_layer_norm_diffusion_loss_reference",
    "modulated_rms_norm_diffusion_loss",
    "modulated_rms_norm_diffusion_loss_reference",
]
