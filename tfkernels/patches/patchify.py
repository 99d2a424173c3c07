"""Latents to tokens and back, and noising on the way: the noise is drawn from a seed in registers and never stored.

    tokens[(n, h, w), (c, i, j)] = x[n, c, h * patch + i, w * patch + j]   patchify; unpatchify is its inverse, gradient
    tokens = patchify(signal_n * x0 + noise_n * eps)                       noise_patchify (DDPM, arXiv:2006.11239, eq 4)
    dx0    = signal_n * unpatchify(dtokens)                                its gradient

Rows are patches in raster order, elements channel by channel, as in `torch.nn.functional.pixel_unshuffle`. `eps` is
Philox's (`tfkernels.patches.philox`) in token order, so that `diffusion_loss` draws the same one again. The
specification is in `reference.py`, the kernels are in `triton/patchify.py`.

Bytes that must move for E elements of e bytes (plain PyTorch: what eager mode moves for the same):

    op               forward   plain PyTorch   backward   plain PyTorch
    patchify         2 E e     2 E e           2 E e      2 E e
    noise_patchify   2 E e     10 E e          2 E e      4 E e

The 10 are randn 1, two products 4, their sum 3 and a copy 2; eps also stays in memory, E e, for the loss.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_integer, need_tensors
from tfkernels._library import register
from tfkernels.patches import cpu
from tfkernels.patches.latents import PackedLatents, check_floating, check_patch_size, check_per_image, source
from tfkernels.patches.philox import seed_tensor
from tfkernels.patches.reference import patchify_reference, unpatchify_reference
from tfkernels.patches.results import empty_latents, empty_tokens
from tfkernels.patches.triton import patchify as kernels


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut latents of one size into patches: rearrange(x, "n c (h p) (w q) -> (n h w) (c p q)").

    Args:
        x: (N, C, H, W) in float16, bfloat16 or float32 (float64 on CPU), any strides; `patch_size` divides H and W.

    Returns:
        (N * H/p * W/p, C * p * p) like x, contiguous; `.view(N, -1, C * p * p)` for a batch of equal lengths.

    Raises:
        ValueError: a shape, dtype or patch size that does not fit, named.
    """
    need_tensors("patchify", {"x": x})
    if x.ndim != 4:
        raise ValueError(f"patchify: x has shape {tuple(x.shape)}; 4 dimensions (N, C, H, W) fit; patchify_packed "
                         "takes latents of different sizes")
    s = source("patchify", "x", x, patch_size, None)
    return _patchify(s.x, None, None, s.channels, s.patch)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Undo `patchify`: (N * H/p * W/p, C * p * p) -> (N, C, H, W), contiguous, for latents of `height` x `width`.

    Raises:
        ValueError: a shape, dtype or size that does not fit, named.
    """
    need_tensors("unpatchify", {"tokens": tokens})
    height, width = need_integer("unpatchify", "height", height, 1), need_integer("unpatchify", "width", width, 1)
    if tokens.ndim != 2:
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; 2 dimensions (N * H/p * W/p, C * p * "
                         "p) fit; flatten a batch's first two")
    check_floating("unpatchify", "tokens", tokens)
    check_patch_size("unpatchify", "height x width", (height, width), patch_size)
    count = height // patch_size * (width // patch_size)
    if tokens.shape[1] % patch_size**2 or count == 0 or tokens.shape[0] % count:
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; a multiple of {count} rows of a "
                         f"multiple of {patch_size**2} elements fits {height}x{width} in patches of {patch_size}")
    return _unpatchify(tokens.contiguous(), None, None, tokens.shape[1] // patch_size**2, patch_size, height, width)


def patchify_packed(x: PackedLatents) -> Tensor:
    """Return `patchify` of latents of different sizes: (P, C * p * p), image n in the rows [offsets_n, offsets_n+1).

    Rows of padding are 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    _need_packed("patchify_packed", "x", x)
    s = source("patchify_packed", "x", x, None, None)
    return _patchify(s.x, s.offsets, s.columns, s.channels, s.patch)


def unpatchify_packed(tokens: Tensor, like: PackedLatents) -> PackedLatents:
    """Undo `patchify_packed`: tokens (P, C * p * p) to latents packed as `like` is; elements of padding are 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    _need_packed("unpatchify_packed", "like", like)
    need_tensors("unpatchify_packed", {"tokens": tokens})
    s = source("unpatchify_packed", "like", like, None, None)
    if tokens.shape != (s.rows, s.dim) or tokens.device != s.x.device:
        raise ValueError(f"unpatchify_packed: tokens has shape {tuple(tokens.shape)} on {tokens.device} and like "
                         f"{s.rows} rows of {s.dim} elements on {s.x.device}; ({s.rows}, {s.dim}) fits")
    check_floating("unpatchify_packed", "tokens", tokens)
    return PackedLatents(_unpatchify(tokens.contiguous(), s.offsets, s.columns, s.channels, s.patch, 0, 0), *like[1:])


def _need_packed(op: str, name: str, x) -> None:
    if not isinstance(x, PackedLatents):
        raise ValueError(f"{op}: {name} is {got(x)}; PackedLatents fit; pack_latents makes them of a list of latents")


def noise_patchify(x0: Tensor | PackedLatents, signal: Tensor, noise: Tensor, seed: Tensor | int, *,
                   patch_size: int | None = None, offsets: Tensor | None = None) -> Tensor:
    """Return the tokens of x_t = signal_n * x0 + noise_n * eps; eps is a function of the seed and is never stored.

    Args:
        x0: latents (N, C, H, W) with `patch_size`; or `PackedLatents`; or clean tokens (P, D) with `offsets`. float16,
            bfloat16 or float32 (float64 on CPU), any strides.
        signal, noise: (N,) one number per image.
        seed: int64 tensor on x0's device, [seed, offset] or [seed, offset, first image], or an int (offset 0). Give
            every training step another offset (its low 32 bits count). Images are numbered from the first one, 0 where
            it is left out: a part of a batch that starts at image n gets the batch's own eps from [seed, offset, n].
            `diffusion_loss` with the same seed sees the same eps.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1); rows outside are padding, may hold
            anything and come out 0. Offsets that fall or leave [0, P] raise on a CPU; on a GPU, where looking would
            synchronise, each row goes to the last image whose offset is not above it, and what lies outside is never
            read.

    Returns:
        (P, D) in x0's dtype, computed in float32. Differentiable in x0.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also signal or noise that require a
            gradient.
    """
    s = source("noise_patchify", "x0", x0, patch_size, offsets)
    dtype = torch.promote_types(s.x.dtype, torch.float32)
    signal, noise = (check_per_image("noise_patchify", name, x, s.images, s.x.device, dtype)
                     for name, x in (("signal", signal), ("noise", noise)))
    seed = seed_tensor("noise_patchify", seed, s.x.device)
    return _noise_patchify(s.x, signal, noise, seed, s.offsets, s.columns, s.channels, s.patch)


def _noise_fake(x, signal, noise, seed, offsets, columns, channels, patch):
    return empty_tokens(x, offsets, columns, channels, patch)


def _noise_backward_fake(dtokens, signal, offsets, columns, channels, patch, height, width):
    return empty_latents(dtokens, offsets, columns, channels, patch, height, width)


_patchify = register("patchify", kernel=kernels.patchify, cpu=patchify_reference, fake=empty_tokens)
_unpatchify = register("unpatchify", kernel=kernels.unpatchify, cpu=unpatchify_reference, fake=empty_latents)
_noise_patchify = register("noise_patchify", kernel=kernels.noise_patchify, cpu=cpu.noise_patchify, fake=_noise_fake)
_noise_patchify_backward = register("noise_patchify_backward", kernel=kernels.noise_patchify_backward,
                                    cpu=cpu.noise_patchify_backward, fake=_noise_backward_fake)


def _save_patchify(ctx, inputs, output):
    x, offsets, columns, *ctx.numbers = inputs
    ctx.save_for_backward(offsets, columns)
    ctx.size = x.shape[2:] if x.ndim == 4 else (0, 0)


def _save_unpatchify(ctx, inputs, output):
    _, offsets, columns, *ctx.numbers, _, _ = inputs
    ctx.save_for_backward(offsets, columns)


def _save_noise(ctx, inputs, output):
    x, signal, _, _, offsets, columns, *ctx.numbers = inputs
    ctx.save_for_backward(signal, offsets, columns)
    ctx.size = x.shape[2:] if x.ndim == 4 else (0, 0)


def _patchify_gradient(ctx, dout):
    return _unpatchify(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers, *ctx.size), None, None, None, None


def _unpatchify_gradient(ctx, dx):
    return _patchify(dx.contiguous(), *ctx.saved_tensors, *ctx.numbers), *(None,) * 6


def _noise_gradient(ctx, dout):
    return _noise_patchify_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers, *ctx.size), *(None,) * 7


_patchify.register_autograd(_patchify_gradient, setup_context=_save_patchify)
_unpatchify.register_autograd(_unpatchify_gradient, setup_context=_save_unpatchify)
_noise_patchify.register_autograd(_noise_gradient, setup_context=_save_noise)
