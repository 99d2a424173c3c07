"""Patchify, noising and the patch embedding written out in plain PyTorch: the specification of `tfkernels.patches`."""
import torch
from torch import Tensor
from torch.nn import functional as F

from tfkernels._library import made_once
from tfkernels.patches.latents import locate_reference, of_rows, packed_index, uniform_offsets
from tfkernels.patches.philox import philox_normal_reference


def patchify_reference(x: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, for the three layouts of `tfkernels.patches.latents`.

    x is (N, C, H, W), (P * D,) or (P, D); the result is (P, D).
    """
    if x.ndim == 4:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
        return x.clone(memory_format=torch.contiguous_format).view(n * (h // patch) * (w // patch), c * patch * patch)
    if x.ndim == 2:
        return torch.where(locate_reference(offsets, len(x))[2][:, None], x, 0).contiguous()
    at = packed_index(offsets, columns, channels, patch, len(x) // (channels * patch**2))
    return torch.where(at >= 0, x[at.clamp(min=0)], 0) if x.numel() else x.new_empty(at.shape)


def unpatchify_reference(tokens: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int,
                         height: int, width: int) -> Tensor:
    """The inverse of `patchify_reference`.

    Without offsets it returns (N, C, height, width), with columns packed (P * D,), else tokens.
    """
    if offsets is None:
        h, w = height // patch, width // patch
        x = tokens.reshape(tokens.shape[0] // (h * w), h, w, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return x.clone(memory_format=torch.contiguous_format).view(x.shape[0], channels, height, width)
    if columns is None:
        return patchify_reference(tokens, offsets, None, channels, patch)
    at, size = packed_index(offsets, columns, channels, patch, len(tokens)).flatten(), tokens.numel()
    return tokens.new_zeros(size + 1).scatter(0, torch.where(at >= 0, at, size), tokens.flatten())[:size].clone()


def noise_patchify_reference(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None,
                             columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, in x's dtype, with eps in memory."""
    tokens = patchify_reference(x, offsets, columns, channels, patch)
    image_ids, eps = noise_reference(seed, offsets, len(signal), *tokens.shape, tokens.dtype)
    signal, noise = (of_rows(v.to(tokens.dtype), image_ids)[:, None] for v in (signal, noise))
    tokens = signal * tokens + noise * eps
    return tokens if offsets is None else torch.where(locate_reference(offsets, len(tokens))[2][:, None], tokens, 0)


def noise_reference(seed: Tensor, offsets: Tensor | None, images: int, rows: int, dim: int,
                    dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return each row's image id (P,) and the eps (P, D) in `dtype` that `noise_patchify` adds and the losses know.

    They are drawn once for a seed tensor while sizes and dtype stay the same, and are not to be written to.
    """
    tensors, sizes = (seed,) if offsets is None else (seed, offsets), (images, rows, dim, dtype)
    last = made_once(_no_noise, *tensors)
    drawn = last[0]
    if drawn is None or drawn[0] != sizes:
        drawn = last[0] = sizes, _noise(*tensors, images=images, rows=rows, dim=dim, dtype=dtype)
    return drawn[1]


def _no_noise(*tensors: Tensor) -> list:
    """A place for the noise that was drawn last: a seed that lives on must not keep that of every size."""
    return [None]


def _noise(
    seed: Tensor, offsets: Tensor | None = None, *, images: int, rows: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    image_ids, row, _ = locate_reference(uniform_offsets(images, rows, seed.device) if offsets is None else offsets,
                                         rows)
    eps = philox_normal_reference(seed, image_ids, row, dim, torch.promote_types(dtype, torch.float32))
    return image_ids, eps.to(dtype)


def embed_patches_reference(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor,
                            offsets: Tensor) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype."""
    row, place, image_ids = placed(places, offsets)
    embedded = F.linear(patches[row].to(hidden.dtype), weight.to(hidden.dtype)) + condition.to(hidden.dtype)[image_ids]
    return hidden.flatten(0, -2).index_copy(0, place, embedded).view(hidden.shape)


def placed(places: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The patches that have both an image and a place: their rows, places and images."""
    image_ids, _, inside = locate_reference(offsets, len(places))
    row = (inside & (places >= 0)).nonzero()[:, 0]
    return row, places[row], image_ids[row]
