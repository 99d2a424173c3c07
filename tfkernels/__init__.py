"""Triton kernels for models that read and draw: attention over mixed text and images and its masks, norms modulated per image, rotary
embedding, patches, noise, and the losses of both heads.

Dimensions, everywhere: B batch, S tokens (Sq queries, Sk keys), M image spans, N images, H query heads, K key/value heads,
D head dim, C hidden size.
"""
from tfkernels.attention.op import AttentionOutput, attention, attention_reference, attention_with_lse, paged_attention, paged_attention_reference
from tfkernels.losses.cross_entropy import LinearCrossEntropy, linear_cross_entropy, linear_cross_entropy_reference
from tfkernels.losses.diffusion import diffusion_loss, diffusion_loss_reference, min_snr_weight
from tfkernels.losses.head import (
    modulated_layer_norm_diffusion_loss,
    modulated_layer_norm_diffusion_loss_reference,
    modulated_rms_norm_diffusion_loss,
    modulated_rms_norm_diffusion_loss_reference,
)
from tfkernels.mask import TransfusionMask
from tfkernels.norm.op import (
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
from tfkernels.patches.embed import embed_patches, embed_patches_reference
from tfkernels.patches.patchify import PackedLatents, noise_patchify, pack_latents, patchify, patchify_packed, unpatchify, unpatchify_packed
from tfkernels.rotary.op import RotatedQK, grid_positions, qk_norm_rotary, qk_norm_rotary_reference, rotary_table

__all__ = ["AttentionOutput", "LinearCrossEntropy", "PackedLatents", "ResidualNorm", "RotatedQK", "TransfusionMask", "attention",
           "attention_reference", "attention_with_lse", "diffusion_loss", "diffusion_loss_reference", "embed_patches", "embed_patches_reference",
           "gated_residual", "gated_residual_reference", "gated_residual_rms_norm", "gated_residual_rms_norm_reference", "grid_positions",
           "linear_cross_entropy", "linear_cross_entropy_reference", "min_snr_weight", "modulated_layer_norm",
           "modulated_layer_norm_diffusion_loss", "modulated_layer_norm_diffusion_loss_reference", "modulated_layer_norm_reference",
           "modulated_rms_norm", "modulated_rms_norm_diffusion_loss", "modulated_rms_norm_diffusion_loss_reference",
           "modulated_rms_norm_reference", "noise_patchify", "pack_latents", "paged_attention", "paged_attention_reference", "patchify",
           "patchify_packed", "qk_norm_rotary", "qk_norm_rotary_reference", "rotary_table", "unpatchify", "unpatchify_packed"]
__version__ = "0.1.0"
