"""Images to patches and back, noise from a counter, and patches embedded into packed rows."""
from tfkernels.patches.embed import embed_patches, embed_patches_reference
from tfkernels.patches.patchify import (
    PackedLatents,
    noise_patchify,
    pack_latents,
    patchify,
    patchify_packed,
    unpatchify,
    unpatchify_packed,
)

__all__ = ["PackedLatents", "embed_patches", "embed_patches_reference", "noise_patchify", "pack_latents", "patchify", "patchify_packed", "unpatchify",
           "unpatchify_packed"]
