"""Patches into the sequence: a linear layer and a row per image, written straight to the images' places in it.

    out = hidden, but out[places_r] = weight @ patches_r + condition_n
    for the rows r of image n, offsets_n <= r < offsets_n+1

The patch embedding of Transfusion (arXiv:2408.11039) adds the timestep to every patch before the linear layer (footnote
6). Linear(patch + e_n) = W patch + (W e_n + b), so `condition` is that layer's image of the timesteps alone, one row
per image. The specification is in `reference.py`, the kernels are in `triton/embed.py`.

The patches are kept for the backward, although `noise_patchify` could make them again from its seed: dweight needs
them. Storing them costs P D elements, 1 / 64 of the P C that must move anyway at D = 64, C = 4096; made anew, each tile
of columns would have to draw its own noise.

Bytes that must move, with T rows of the sequence, P of them patches, C columns, D elements a patch and e bytes an
element. Left out are weight, condition, places, the sums of chunks (written and read: 16 MiB or one float32 dweight)
and dpatches (plain PyTorch where it is asked for):

    embed_patches   forward                   backward
    ours            (2 T - P) C e + P D e     2 T C e + P D e
    plain PyTorch   (2 T + 7 P) C e + P D e   (2 T + 5 P) C e + P D e

Plain PyTorch's forward moves 2 T for the clone of hidden and, in P, 1 for the linear layer, 1 for condition[n], 3 for
their sum and 2 for index_copy; its backward 2 T + P for index_fill, 2 P for index_select and 2 P for both sums.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_tensors
from tfkernels._library import register
from tfkernels.patches import cpu
from tfkernels.patches.latents import check_floating, check_offsets
from tfkernels.patches.results import empty_embed_gradients
from tfkernels.patches.triton import embed as kernels

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def embed_patches(
    hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor
) -> Tensor:
    """Return hidden with weight @ patches[r] + condition[n] in row places[r], for the rows r of every image n.

    Args:
        hidden: (T, C) or (B, S, C), the packed sequence's token embeddings, in float16, bfloat16 or float32 (float64 on
            CPU); any strides (unit columns cost no copy).
        patches: (P, D), what `noise_patchify` returns.
        weight: (C, D), an nn.Linear's.
        condition: (N, C), what is added to all patches of an image: the linear layer's bias and its image of the
            timestep.
        places: (P,) int64, the flat row of hidden that each patch takes, each at most once; negative for none. T or
            more, and a row named twice, raise on a CPU; on a GPU, where looking would synchronise, T or more is none,
            and one of the patches takes the row.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1) of patches; rows outside go nowhere,
            whatever they hold. Offsets that fall or leave [0, P] raise on a CPU; on a GPU a patch belongs to the last
            image whose offset is not above it, and no memory outside is touched.

    Returns:
        Like hidden, contiguous. Each argument may have its own dtype; products are taken in hidden's and summed in
        float32. Gradients flow to hidden (0 in the rows that images take), patches, weight and condition and are
        deterministic; an image without patches gets 0. Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    need_tensors("embed_patches", {"hidden": hidden, "patches": patches, "weight": weight, "condition": condition})
    _check(hidden, patches, weight, condition, places, offsets)
    return _embed(hidden, patches, weight, condition, places, offsets)


def _check(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> None:
    if hidden.ndim not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"embed_patches: hidden has shape {tuple(hidden.shape)}; (tokens, C) or (batch, tokens, C) "
                         "fits, C at least 1")
    check_floating("embed_patches", "hidden", hidden)
    if patches.ndim != 2 or patches.shape[1] == 0:
        raise ValueError(f"embed_patches: patches has shape {tuple(patches.shape)}; (P, D) fits, D at least 1; "
                         "patchify latents first")
    check_offsets("embed_patches", "offsets", offsets, hidden.device, patches.shape[0])
    (count, dim), width, images = patches.shape, hidden.shape[-1], offsets.shape[0] - 1
    if weight.shape != (width, dim):
        raise ValueError(f"embed_patches: weight has shape {tuple(weight.shape)}, hidden {width} columns and patches "
                         f"{dim} elements; ({width}, {dim}) fits, as an nn.Linear holds it")
    if condition.shape != (images, width):
        raise ValueError(f"embed_patches: condition has shape {tuple(condition.shape)}, offsets {images} images and "
                         f"hidden {width} columns; ({images}, {width}) fits, a row for each image")
    for name, x in (("patches", patches), ("weight", weight), ("condition", condition)):
        if x.dtype not in _DTYPES and not (x.dtype == hidden.dtype == torch.float64) or x.device != hidden.device:
            raise ValueError(f"embed_patches: {name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on "
                             f"{hidden.device}; float16, bfloat16 or float32 on the same device fits (float64 for "
                             "float64)")
    if (not isinstance(places, Tensor) or places.shape != (count,) or places.dtype != torch.int64
        or places.device != hidden.device):
        raise ValueError(f"embed_patches: places is {got(places)}; an int64 tensor ({count},) on {hidden.device} "
                         "fits, the row of hidden for each patch")


def _embed_fake(hidden, patches, weight, condition, places, offsets):
    return hidden.new_empty(hidden.shape)


_embed = register("embed_patches", kernel=kernels.forward, cpu=cpu.embed_patches, fake=_embed_fake)
_backward = register("embed_patches_backward", kernel=kernels.backward, cpu=cpu.embed_patches_backward,
                     fake=empty_embed_gradients)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx, dout):
    of_hidden, of_patches, of_weight, of_condition, *_ = ctx.needs_input_grad
    found = _backward(dout, *ctx.saved_tensors, of_hidden, of_patches, of_weight or of_condition)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad)), None, None


_embed.register_autograd(_gradients, setup_context=_save)
