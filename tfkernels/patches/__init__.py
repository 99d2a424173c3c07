"""Images to patches and back, noise from a counter, and patches embedded into packed rows."""
from tfkernels.patches.embed import embed_patches
from tfkernels.patches.latents import PackedLatents, pack_latents
from tfkernels.patches.patchify import noise_patchify, patchify, patchify_packed, unpatchify, unpatchify_packed
from tfkernels.patches.reference import (
    embed_patches_reference,
    noise_patchify_reference,
    noise_reference,
    patchify_reference,
    unpatchify_reference,
)

__all__ = [
    "PackedLatents",
    "embed_patches",
    "embed_patches_reference",
    "noise_patchify",
    "noise_patchify_reference",
    "noise_reference",
    "pack_latents",
    "patchify",
    "patchify_packed",
    "patchify_reference",
    "unpatchify",
    "unpatchify_packed",
    "unpatchify_reference",
]
