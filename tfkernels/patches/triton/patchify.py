"""Kernels of `patchify`, `noise_patchify` and their gradients: one gathers tokens from latents, one scatters them back.

A program takes a tile of rows, finds each row's image (by division, or by binary search where sizes differ) and reads
its elements; the reads of one tile fall into the same cache lines.
"""
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import cdiv
from tfkernels.patches.philox import philox_normal
from tfkernels.patches.results import empty_latents, empty_tokens
from tfkernels.patches.triton.layout import SCALAR_ARGUMENTS, addresses, dense, geometry, locate, tile


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _patchify_fwd(x_ptr, signal_ptr, noise_ptr, seed_ptr, offsets_ptr, columns_ptr, out_ptr, images, rows, steps,
                  grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                  NOISE: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr,
                  DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row, first = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc,
                          stride_xh, stride_xw, LAYOUT, PATCH, DIM)
    x = tl.load(x_ptr + at, mask=valid, other=0)
    if NOISE:
        signal = tl.load(signal_ptr + image, mask=inside, other=0)
        noise = tl.load(noise_ptr + image, mask=inside, other=0)
        x = signal[:, None] * x.to(tl.float32) + noise[:, None] * philox_normal(seed_ptr, image, row - start, first,
                                                                                BLOCK_D)
    out = out_ptr + row[:, None].to(tl.int64) * DIM + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _patchify_bwd(dout_ptr, signal_ptr, offsets_ptr, columns_ptr, dx_ptr, images, rows, steps, grid_rows, grid_columns,
                  stride_xn, stride_xc, stride_xh, stride_xw,
                  NOISE: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr,
                  DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc,
                          stride_xh, stride_xw, LAYOUT, PATCH, DIM)
    own = row[:, None].to(tl.int64) * DIM + d[None, :]
    dout = tl.load(dout_ptr + own, mask=valid, other=0)
    if NOISE:
        dout = tl.load(signal_ptr + image, mask=inside, other=0)[:, None] * dout.to(tl.float32)
    dout = dout.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, dout, mask=valid)
    if SEARCH:  # padding lies where its rows do, in every layout
        tl.store(dx_ptr + own, dout, mask=(row < rows)[:, None] & (inside == 0)[:, None] & (d < DIM)[None, :])


def _launch(kernel, operands: list, x: Tensor, out: Tensor, offsets: Tensor | None, columns: Tensor | None, images: int,
            rows: int, patch: int, noise: bool, dim: int) -> Tensor:
    """Run `kernel` over `rows` rows, x being the operand that has the layout."""
    if rows * dim:
        x, offsets, columns, *operands = dense(x, offsets, columns, *operands)
        pointers, numbers, constants = geometry(x, offsets, columns, patch)
        constants |= tile(dim)
        grid = cdiv(rows, constants["BLOCK_R"]), cdiv(dim, constants["BLOCK_D"])
        kernel[grid](*operands, *pointers, out, images, rows, *numbers, NOISE=noise, **constants, num_warps=4)
    return out


def patchify(x: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """Launch the kernel of `patchify_reference`."""
    out = empty_tokens(x, offsets, columns, channels, patch)
    images = x.shape[0] if offsets is None else len(offsets) - 1
    return _launch(_patchify_fwd, [x, x, x, x], x, out, offsets, columns, images, out.shape[0], patch, False,
                   out.shape[1])


def unpatchify(tokens: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int, height: int,
               width: int) -> Tensor:
    """Launch the kernel of `unpatchify_reference`."""
    dx = empty_latents(tokens, offsets, columns, channels, patch, height, width)
    images = dx.shape[0] if offsets is None else len(offsets) - 1
    return _launch(_patchify_bwd, [tokens, tokens], dx, dx, offsets, columns, images, tokens.shape[0], patch, False,
                   tokens.shape[1])


def noise_patchify(x: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, offsets: Tensor | None,
                   columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """Launch the kernel of `noise_patchify_reference`."""
    out = empty_tokens(x, offsets, columns, channels, patch)
    return _launch(_patchify_fwd, [x, signal, noise, seed], x, out, offsets, columns, len(signal), out.shape[0], patch,
                   True, out.shape[1])


def noise_patchify_backward(dtokens: Tensor, signal: Tensor, offsets: Tensor | None, columns: Tensor | None,
                            channels: int, patch: int, height: int, width: int) -> Tensor:
    """Launch the kernel of the gradient of x0."""
    dx = empty_latents(dtokens, offsets, columns, channels, patch, height, width)
    return _launch(_patchify_bwd, [dtokens, signal], dx, dx, offsets, columns, len(signal), dtokens.shape[0], patch,
                   True, dtokens.shape[1])
