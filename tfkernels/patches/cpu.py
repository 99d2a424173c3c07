"""The patch operators on the CPU: the references, and the gradients written out."""
import torch
from torch import Tensor

from tfkernels._arguments import need_distinct
from tfkernels.norm.blocks import token_blocks
from tfkernels.patches.latents import images_of_rows, of_rows
from tfkernels.patches.reference import noise_patchify_reference, placed, unpatchify_reference
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
    row, place, image_ids = placed(places, offsets)
    need_distinct("embed_patches", "places", place)
    out, wide = hidden.clone(memory_format=torch.contiguous_format), _wide(hidden)
    flat, condition, weight = out.view(-1, out.shape[-1]), condition.to(wide), weight.to(hidden.dtype).to(wide).mT
    with torch.autocast("cpu", enabled=False):
        for rows in token_blocks(image_ids, hidden.shape[-1]):
            taken = patches[row[rows.at]].to(hidden.dtype).to(wide)
            flat[place[rows.at]] = torch.addmm(rows.of(condition), taken, weight).to(hidden.dtype)
    return out


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
        sums, products = (torch.zeros_like(x, dtype=torch.float64) for x in (condition, weight))
        with torch.autocast("cpu", enabled=False):
            for block in token_blocks(image_ids, dout.shape[-1]):
                taken = rows[place[block.at]].to(_wide(dout))
                products += taken.mT @ patches[row[block.at]].to(dout.dtype).to(taken.dtype)
                block.add(taken, sums)
        dweight.copy_(products)
        dcondition.copy_(sums)
    return dhidden, dpatches, dweight, dcondition


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
