"""Triton kernels for models that read and draw: attention over mixed text and images and its masks, norms modulated per
image, rotary embedding, patches, noise, and the losses of both heads.

Dimensions, everywhere: B batch, S tokens (Sq queries, Sk keys), M image spans, N images, H query heads, K key/value
heads, D head dim, C hidden size. Words, everywhere: `places` are flat rows of a batch's hidden states, b S + s; `index`
holds image ids, the number of the image that each token belongs to, negative for text; `offsets` (N + 1,) are the ends
of each image's rows among all patches.

The folder of an operator always has the same shape: the public functions and their checks in op.py (or a file for
each), what they compute in plain PyTorch in reference.py, and a backend each in cpu.py and triton (a file or a folder).
`tfkernels.parallel`, attention of rows cut over several processes, is imported by its own name.
"""
from tfkernels.attention import (
    AttentionOutput,
    attention,
    attention_reference,
    attention_with_lse,
    paged_attention,
    paged_attention_reference,
)
from tfkernels.losses import (
    LinearCrossEntropy,
    LinearCrossEntropyLSE,
    diffusion_loss,
    diffusion_loss_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse,
    linear_cross_entropy_with_lse_reference,
    min_snr_weight,
    modulated_layer_norm_diffusion_loss,
    modulated_layer_norm_diffusion_loss_reference,
    modulated_rms_norm_diffusion_loss,
    modulated_rms_norm_diffusion_loss_reference,
)
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
from tfkernels.patches import (
    PackedLatents,
    embed_patches,
    embed_patches_reference,
    noise_patchify,
    pack_latents,
    patchify,
    patchify_packed,
    unpatchify,
    unpatchify_packed,
)
from tfkernels.rotary import RotatedQK, grid_positions, qk_norm_rotary, qk_norm_rotary_reference, rotary_table

# The functions *_reference say in plain PyTorch what an op computes. They are attributes of this module for comparisons
# such as those of our tests, but are no part of `from tfkernels import *`.
_REFERENCES = (
    attention_reference,
    diffusion_loss_reference,
    embed_patches_reference,
    gated_residual_reference,
    gated_residual_rms_norm_reference,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse_reference,
    modulated_layer_norm_diffusion_loss_reference,
    modulated_layer_norm_reference,
    modulated_rms_norm_diffusion_loss_reference,
    modulated_rms_norm_reference,
    paged_attention_reference,
    qk_norm_rotary_reference,
)

__all__ = [
    "AttentionOutput",
    "LinearCrossEntropy",
    "LinearCrossEntropyLSE",
    "PackedLatents",
    "ResidualNorm",
    "RotatedQK",
    "TransfusionMask",
    "attention",
    "attention_with_lse",
    "diffusion_loss",
    "embed_patches",
    "gated_residual",
    "gated_residual_rms_norm",
    "grid_positions",
    "linear_cross_entropy",
    "linear_cross_entropy_with_lse",
    "min_snr_weight",
    "modulated_layer_norm",
    "modulated_layer_norm_diffusion_loss",
    "modulated_rms_norm",
    "modulated_rms_norm_diffusion_loss",
    "noise_patchify",
    "pack_latents",
    "paged_attention",
    "patchify",
    "patchify_packed",
    "qk_norm_rotary",
    "rotary_table",
    "unpatchify",
    "unpatchify_packed",
]
__version__ = "0.1.0"
