"""Latents to tokens and back, and noising on the way: the noise is made from a seed in registers and never stored.

    tokens[(n, h, w), (c, i, j)] = x[n, c, h * patch + i, w * patch + j]                    patchify; unpatchify is its inverse and its gradient
    tokens = patchify(signal_n * x0 + noise_n * eps)                                        noise_patchify (DDPM, arXiv:2006.11239, eq. 4)
    dx0    = signal_n * unpatchify(dtokens)                                                 its gradient

Rows are patches in raster order, elements channel by channel, as in `torch.nn.functional.pixel_unshuffle`. A program takes a tile of rows, finds
each row's image (by division, or by binary search where sizes differ: see `tfkernels.patches.latents`) and gathers its elements; reads of one tile
fall into the same cache lines. `eps` is Philox's (`tfkernels.patches.philox`) in token order, so that `diffusion_loss` makes the same one again.
Bytes that must move, E elements of e bytes (plain PyTorch: what eager mode moves for the same):

    op               forward           plain PyTorch                                         backward           plain PyTorch
    patchify         2 E e             2 E e                                                 2 E e              2 E e
    noise_patchify   2 E e             11 E e: randn 1, two products 4, sum 3, copy 2,       2 E e              4 E e
                                       and eps kept for the loss
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._arguments import got, need_integer, need_tensors
from tfkernels._library import register
from tfkernels.patches.latents import (
    SCALAR_ARGUMENTS,
    PackedLatents,
    addresses,
    check_floating,
    check_patch_size,
    check_per_image,
    dense,
    geometry,
    locate,
    locate_reference,
    pack_latents,
    packed_index,
    source,
    tile,
    uniform_offsets,
)
from tfkernels.patches.philox import philox_normal, philox_normal_reference, seed_tensor

__all__ = ["PackedLatents", "noise_patchify", "pack_latents", "patchify", "patchify_packed", "unpatchify", "unpatchify_packed"]


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
        raise ValueError(f"patchify: x has shape {tuple(x.shape)}; 4 dimensions (N, C, H, W) fit; patchify_packed takes latents of different sizes")
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
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; 2 dimensions (N * H/p * W/p, C * p * p) fit; flatten a batch's first two")
    check_floating("unpatchify", "tokens", tokens)
    check_patch_size("unpatchify", "height x width", (height, width), patch_size)
    count = height // patch_size * (width // patch_size)
    if tokens.shape[1] % patch_size**2 or count == 0 or tokens.shape[0] % count:
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; a multiple of {count} rows of a multiple of {patch_size**2} elements fits "
                         f"{height}x{width} in patches of {patch_size}")
    return _unpatchify(tokens.contiguous(), None, None, tokens.shape[1] // patch_size**2, patch_size, height, width)


def patchify_packed(x: PackedLatents) -> Tensor:
    """`patchify` for latents of different sizes: (P, C * p * p), image n in the rows [offsets_n, offsets_n+1); rows of padding are 0.

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
        raise ValueError(f"unpatchify_packed: tokens has shape {tuple(tokens.shape)} on {tokens.device} and like {s.rows} rows of {s.dim} elements on "
                         f"{s.x.device}; ({s.rows}, {s.dim}) fits")
    check_floating("unpatchify_packed", "tokens", tokens)
    return PackedLatents(_unpatchify(tokens.contiguous(), s.offsets, s.columns, s.channels, s.patch, 0, 0), *like[1:])


def _need_packed(op: str, name: str, x) -> None:
    if not isinstance(x, PackedLatents):
        raise ValueError(f"{op}: {name} is {got(x)}; PackedLatents fit; pack_latents makes them of a list of latents")


def noise_patchify(x0: Tensor | PackedLatents, signal: Tensor, noise: Tensor, seed: Tensor | int, *, patch_size: int | None = None,
                   offsets: Tensor | None = None) -> Tensor:
    """Return the tokens of x_t = signal_n * x0 + noise_n * eps; eps is a function of the seed and is never stored.

    Args:
        x0: latents (N, C, H, W) with `patch_size`; or `PackedLatents`; or clean tokens (P, D) with `offsets`. float16, bfloat16 or
            float32 (float64 on CPU), any strides.
        signal, noise: (N,) one number per image.
        seed: int64 tensor (2,) on x0's device, [seed, offset], or an int (offset 0). Give every training step another offset (its low
            32 bits count). `diffusion_loss` with the same seed sees the same eps.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1); rows outside are padding, may hold
            anything and come out 0. Offsets that fall or leave [0, P] raise on a CPU; on a GPU, where looking would
            synchronise, each row goes to the last image whose offset is not above it, and what lies outside is never
            read.

    Returns:
        (P, D) in x0's dtype, computed in float32. Differentiable in x0.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also signal or noise that require a gradient.
    """
    s = source("noise_patchify", "x0", x0, patch_size, offsets)
    dtype = torch.promote_types(s.x.dtype, torch.float32)
    signal, noise = (check_per_image("noise_patchify", name, x, s.images, s.x.device, dtype) for name, x in (("signal", signal), ("noise", noise)))
    seed = seed_tensor("noise_patchify", seed, s.x.device)
    return _noise_patchify(s.x, signal, noise, seed, s.offsets, s.columns, s.channels, s.patch)


def patchify_reference(x: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, for the three layouts of `tfkernels.patches.latents`: x (N, C, H, W), (P * D,) or (P, D) to (P, D)."""
    if x.ndim == 4:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
        return x.clone(memory_format=torch.contiguous_format).view(n * (h // patch) * (w // patch), c * patch * patch)
    if x.ndim == 2:
        return torch.where(locate_reference(offsets, len(x))[2][:, None], x, 0).contiguous()
    at = packed_index(offsets, columns, channels, patch, len(x) // (channels * patch**2))
    return torch.where(at >= 0, x[at.clamp(min=0)], 0) if x.numel() else x.new_empty(at.shape)


def unpatchify_reference(tokens: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify_reference`: to (N, C, height, width) without offsets, to packed (P * D,) with columns, else to tokens."""
    if offsets is None:
        h, w = height // patch, width // patch
        x = tokens.reshape(tokens.shape[0] // (h * w), h, w, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return x.clone(memory_format=torch.contiguous_format).view(x.shape[0], channels, height, width)
    if columns is None:
        return patchify_reference(tokens, offsets, None, channels, patch)
    at, size = packed_index(offsets, columns, channels, patch, len(tokens)).flatten(), tokens.numel()
    return tokens.new_zeros(size + 1).scatter(0, torch.where(at >= 0, at, size), tokens.flatten())[:size].clone()


def noise_patchify_reference(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None, columns: Tensor | None,
                             channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, in x's dtype, with eps in memory."""
    tokens = patchify_reference(x, offsets, columns, channels, patch)
    image, eps = noise_reference(seed, offsets, len(signal), *tokens.shape, tokens.dtype)
    signal, noise = (v.to(tokens.dtype)[image][:, None] for v in (signal, noise))
    tokens = signal * tokens + noise * eps
    return tokens if offsets is None else torch.where(locate_reference(offsets, len(tokens))[2][:, None], tokens, 0)


def noise_reference(seed: Tensor, offsets: Tensor | None, images: int, rows: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return each row's image (P,) and the eps (P, D) in `dtype` that `noise_patchify` adds and `diffusion_loss` knows."""
    image, row, _ = locate_reference(uniform_offsets(images, rows, seed.device) if offsets is None else offsets, rows)
    eps = philox_normal_reference(seed, image, row, dim, torch.promote_types(dtype, torch.float32))
    return image, eps.to(dtype)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _patchify_fwd(x_ptr, signal_ptr, noise_ptr, seed_ptr, offsets_ptr, columns_ptr, out_ptr,
                  images, rows, steps, grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                  NOISE: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row, first = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                          LAYOUT, PATCH, DIM)
    x = tl.load(x_ptr + at, mask=valid, other=0)
    if NOISE:
        signal = tl.load(signal_ptr + image, mask=inside, other=0)
        noise = tl.load(noise_ptr + image, mask=inside, other=0)
        x = signal[:, None] * x.to(tl.float32) + noise[:, None] * philox_normal(seed_ptr, image, row - start, first, BLOCK_D)
    out = out_ptr + row[:, None].to(tl.int64) * DIM + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _patchify_bwd(dout_ptr, signal_ptr, offsets_ptr, columns_ptr, dx_ptr,
                  images, rows, steps, grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                  NOISE: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                          LAYOUT, PATCH, DIM)
    own = row[:, None].to(tl.int64) * DIM + d[None, :]
    dout = tl.load(dout_ptr + own, mask=valid, other=0)
    if NOISE:
        dout = tl.load(signal_ptr + image, mask=inside, other=0)[:, None] * dout.to(tl.float32)
    dout = dout.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, dout, mask=valid)
    if SEARCH:  # padding lies where its rows do, in every layout
        tl.store(dx_ptr + own, dout, mask=(row < rows)[:, None] & (inside == 0)[:, None] & (d < DIM)[None, :])


def _launch(kernel, operands: list, x: Tensor, out: Tensor, offsets: Tensor | None, columns: Tensor | None, images: int, rows: int, patch: int,
            noise: bool, dim: int) -> Tensor:
    """Run `kernel` over `rows` rows, x being the operand that has the layout."""
    if rows * dim:
        x, offsets, columns, *operands = dense(x, offsets, columns, *operands)
        pointers, numbers, constants = geometry(x, offsets, columns, patch)
        constants |= tile(dim)
        grid = triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(dim, constants["BLOCK_D"])
        kernel[grid](*operands, *pointers, out, images, rows, *numbers, NOISE=noise, **constants, num_warps=4)
    return out


def _rows(x: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """P and D of an operand in any layout."""
    dim = channels * patch**2
    return (x.shape[0] * (x.shape[2] // patch) * (x.shape[3] // patch) if x.ndim == 4 else x.shape[0] if x.ndim == 2 else x.shape[0] // dim), dim


def _patchify_fake(x, offsets, columns, channels, patch):
    return x.new_empty(_rows(x, channels, patch))


def _unpatchify_fake(tokens, offsets, columns, channels, patch, height, width):
    if offsets is None:
        return tokens.new_empty(tokens.shape[0] // (height // patch * (width // patch)), channels, height, width)
    return tokens.new_empty(tokens.shape) if columns is None else tokens.new_empty(tokens.shape[0] * tokens.shape[1])


def _noise_fake(x, signal, noise, seed, offsets, columns, channels, patch):
    return _patchify_fake(x, offsets, columns, channels, patch)


def _noise_backward_fake(dtokens, signal, offsets, columns, channels, patch, height, width):
    return _unpatchify_fake(dtokens, offsets, columns, channels, patch, height, width)


def _patchify_kernel(x: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    out = _patchify_fake(x, offsets, columns, channels, patch)
    images = x.shape[0] if offsets is None else len(offsets) - 1
    return _launch(_patchify_fwd, [x, x, x, x], x, out, offsets, columns, images, out.shape[0], patch, False, out.shape[1])


def _unpatchify_kernel(tokens: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, height: int, width: int) -> Tensor:
    dx = _unpatchify_fake(tokens, offsets, columns, channels, patch, height, width)
    images = dx.shape[0] if offsets is None else len(offsets) - 1
    return _launch(_patchify_bwd, [tokens, tokens], dx, dx, offsets, columns, images, tokens.shape[0], patch, False, tokens.shape[1])


def _noise_kernel(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int,
                  patch: int) -> Tensor:
    out = _patchify_fake(x, offsets, columns, channels, patch)
    return _launch(_patchify_fwd, [x, signal, noise, seed], x, out, offsets, columns, len(signal), out.shape[0], patch, True, out.shape[1])


def _noise_cpu(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    tokens = noise_patchify_reference(x.to(signal.dtype), signal, noise, seed, offsets, columns, channels, patch)
    return tokens.to(x.dtype).contiguous()


def _noise_backward_kernel(dtokens: Tensor, signal: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int,
                           height: int, width: int) -> Tensor:
    dx = _unpatchify_fake(dtokens, offsets, columns, channels, patch, height, width)
    return _launch(_patchify_bwd, [dtokens, signal], dx, dx, offsets, columns, len(signal), dtokens.shape[0], patch, True, dtokens.shape[1])


def _noise_backward_cpu(dtokens: Tensor, signal: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int,
                        height: int, width: int) -> Tensor:
    rows = len(dtokens)
    image = locate_reference(uniform_offsets(len(signal), rows, signal.device) if offsets is None else offsets, rows)[0]
    dtokens = (signal[image][:, None] * dtokens.to(signal.dtype)).to(dtokens.dtype)
    return unpatchify_reference(dtokens, offsets, columns, channels, patch, height, width)


_patchify = register("patchify", kernel=_patchify_kernel, cpu=patchify_reference, fake=_patchify_fake)
_unpatchify = register("unpatchify", kernel=_unpatchify_kernel, cpu=unpatchify_reference, fake=_unpatchify_fake)
_noise_patchify = register("noise_patchify", kernel=_noise_kernel, cpu=_noise_cpu, fake=_noise_fake)
_noise_patchify_backward = register("noise_patchify_backward", kernel=_noise_backward_kernel, cpu=_noise_backward_cpu, fake=_noise_backward_fake)


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
