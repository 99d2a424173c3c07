"""What the kernels, the CPU and tracing share: results to be filled, and the gradient of the embedded patches."""
import torch
from torch import Tensor

from tfkernels.patches.latents import locate_reference


def _size(x: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """P and D of an operand in any layout."""
    dim = channels * patch**2
    return ((x.shape[0] * (x.shape[2] // patch) * (x.shape[3] // patch) if x.ndim == 4 else x.shape[0]
             if x.ndim == 2 else x.shape[0] // dim), dim)


def empty_tokens(x, offsets, columns, channels, patch):
    """Return tokens (P, D) to be filled, of an operand in any layout."""
    return x.new_empty(_size(x, channels, patch))


def empty_latents(tokens, offsets, columns, channels, patch, height, width):
    """Return latents to be filled from tokens: of one size, packed, or tokens again."""
    if offsets is None:
        return tokens.new_empty(tokens.shape[0] // (height // patch * (width // patch)), channels, height, width)
    return tokens.new_empty(tokens.shape) if columns is None else tokens.new_empty(tokens.shape[0] * tokens.shape[1])


def empty_embed_gradients(dout, patches, weight, condition, places, offsets, of_hidden, of_patches, of_sums):
    """Return `embed_patches`' gradients of hidden, patches, weight, condition to be filled; empty where not wanted."""
    wanted = (dout, of_hidden), (patches, of_patches), (weight, of_sums), (condition, of_sums)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in wanted)


def patch_gradients(dout: Tensor, patches: Tensor, weight: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """dout[places] @ weight, 0 for a patch that went nowhere; no host synchronisation."""
    dout = dout.reshape(-1, dout.shape[-1])
    if not len(dout):
        return patches.new_zeros(patches.shape)
    taken = locate_reference(offsets, len(places))[2] & (places >= 0) & (places < len(dout))
    with torch.autocast(dout.device.type, enabled=False):
        dpatches = dout[torch.where(taken, places, 0)] @ weight.to(dout.dtype)
    return torch.where(taken[:, None], dpatches, 0).to(patches.dtype)
