"""The patch operators on the CPU: the references, and the gradients written out."""
import torch
from torch import Tensor

from tfkernels._arguments import need_distinct
from tfkernels.patches.latents import images_of_rows, of_rows
from tfkernels.patches.reference import embed_patches_reference, noise_patchify_reference, placed, unpatchify_reference
from tfkernels.patches.results import empty_embed_gradients, patch_gradients


def noise_patchify(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None,
                   columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """Return noised tokens, computed in the dtype of signal and noise."""
    tokens = noise_patchify_reference(x.to(signal.dtype), signal, noise, seed, offsets, columns, channels, patch)
    return tokens.to(x.dtype).contiguous()


def noise_patchify_backward(dtokens: Tensor, signal: Tensor, offsets: Tensor | None, columns: Tensor | None,
                            channels: int, patch: int, height: int, width: int) -> Tensor:
    """Return the gradient of x0."""
    rows = len(dtokens)
    image_ids = images_of_rows(offsets, len(signal), rows, signal.device)[0]
    dtokens = (of_rows(signal, image_ids)[:, None] * dtokens.to(signal.dtype)).to(dtokens.dtype)
    return unpatchify_reference(dtokens, offsets, columns, channels, patch, height, width)


def embed_patches(
    hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor
) -> Tensor:
    """Return the embedded sequence, summed in float32 (float64 stays)."""
    tokens = hidden.numel() // hidden.shape[-1]
    if len(places) and places.max() >= tokens:
        raise ValueError(f"embed_patches: places names row {places.max().item()} and hidden has {tokens}; negative "
                         f"(none) to {tokens - 1} fits")
    need_distinct("embed_patches", "places", placed(places, offsets)[1])
    with torch.autocast("cpu", enabled=False):
        patches, weight = patches.to(hidden.dtype), weight.to(hidden.dtype)
        return embed_patches_reference(
            hidden.to(_wide(hidden)), patches, weight, condition, places, offsets
        ).to(hidden.dtype).contiguous()


def embed_patches_backward(
    dout: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor, of_hidden: bool,
    of_patches: bool, of_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, patches, weight and condition, empty where not wanted."""
    dhidden, dpatches, dweight, dcondition = empty_embed_gradients(dout, patches, weight, condition, places, offsets,
                                                                   of_hidden, False, of_sums)
    row, place, image_ids = placed(places, offsets)
    rows = dout.reshape(-1, dout.shape[-1])
    if of_hidden:
        dhidden.copy_(dout).view(rows.shape)[place] = 0
    if of_patches:
        dpatches = patch_gradients(dout, patches, weight, places, offsets)
    if of_sums:
        with torch.autocast("cpu", enabled=False):
            taken = rows[place].to(_wide(dout))
            dweight.copy_(taken.mT @ patches[row].to(dout.dtype).to(taken.dtype))
            dcondition.copy_(
                condition.new_zeros(condition.shape, dtype=torch.float64).index_add_(0, image_ids, taken.double())
            )
    return dhidden, dpatches, dweight, dcondition


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
