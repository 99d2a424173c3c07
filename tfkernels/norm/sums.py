"""Kernels that end the norms' backward: each image's partial sums are added in order, and make the gradients of weights
and tables. See `triton.py`, which writes the partial sums."""
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv

IMAGES = Config(32, 64, 4, 3)                # rows and columns of sums read together


@triton.jit(do_not_specialize=["starts_ptr", "images", "row_len", "rows", "slots"])
def _norm_bwd_images(parts_ptr, starts_ptr, sums_ptr, images, row_len, rows, slots,
                     C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the rows of `parts` of text (program 0) or image n (program n + 1), in the order of who wrote them."""
    image, kind = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    if starts_ptr is None:
        start, stop = tl.maximum(image - 1, 0) * row_len, image * row_len
    else:
        start, stop = tl.load(starts_ptr + image).to(tl.int64), tl.load(starts_ptr + image + 1).to(tl.int64)
    first, last = start // rows, (stop + rows - 1) // rows
    last = tl.where(stop > start, last, first)
    parts_ptr += kind * slots * C
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for at in range(first, last, BLOCK_M):
        program = at + tl.arange(0, BLOCK_M)
        total += tl.load(parts_ptr + (program + image)[:, None] * C + cols[None, :],
                         mask=(program < last)[:, None] & inside[None, :], other=0.0)
    tl.store(sums_ptr + (kind * (images + 1) + image) * C + cols, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["images"])
def _norm_bwd_tables(sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr,
                     dgate_ptr, images, stride_cn,
                     C: tl.constexpr, LEVEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of vectors (C,) and tables (N, C) from sums (N + 1, C), for a block of columns."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    plane = (images.to(tl.int64) + 1) * C
    a_ptr, b_ptr, g_ptr = sums_ptr, sums_ptr + plane, sums_ptr + (1 + LEVEL) * plane
    dweight, dbias = tl.zeros([BLOCK_M, BLOCK], tl.float32), tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for first in range(0, images, BLOCK_M):
        n = (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        valid = (n < images) & inside[None, :]
        at = n * C + cols[None, :]
        dscale = tl.load(a_ptr + C + at, mask=valid, other=0.0)
        factor = 1 + tl.load(scale_ptr + n * stride_cn + cols[None, :], mask=valid, other=0.0).to(tl.float32)
        if weight_ptr is not None:  # an image without tokens has sums of 0, and its scale may hold anything
            dweight += tl.where(dscale == 0, 0.0, factor * dscale)
            dscale *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        if LEVEL:
            b = tl.load(b_ptr + C + at, mask=valid, other=0.0)
            if bias_ptr is not None:
                dbias += tl.where(b == 0, 0.0, factor * b)
                dscale += b * tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            if dshift_ptr is not None:
                tl.store(dshift_ptr + at, b.to(dshift_ptr.dtype.element_ty), mask=valid)
        tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=valid)
        if dgate_ptr is not None:
            g = tl.load(g_ptr + C + at, mask=valid, other=0.0)
            tl.store(dgate_ptr + at, g.to(dgate_ptr.dtype.element_ty), mask=valid)
    if weight_ptr is not None:
        dweight = tl.load(a_ptr + cols, mask=inside, other=0.0) + tl.sum(dweight, 0)
        tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:
        dbias = tl.load(b_ptr + cols, mask=inside, other=0.0) + tl.sum(dbias, 0)
        tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


def tables(sums: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None,
           gate: Tensor | None) -> tuple[Tensor, ...]:
    """Return dweight, dbias, dscale, dshift and dgate from the sums of `backward`; of None, empty."""
    given = (weight, bias, scale, shift, gate)
    gradients = tuple(sums.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)
    (images, width), scale = scale.shape, columns_together(scale)
    wanted = (None if t is None else gradient for t, gradient in zip(given, gradients))
    _norm_bwd_tables[(cdiv(width, IMAGES.block_n),)](
        sums, contiguous(weight), contiguous(bias), scale, *wanted, images, scale.stride(0), C=width,
        LEVEL=bias is not None or shift is not None, BLOCK_M=IMAGES.block_m, BLOCK=IMAGES.block_n,
        num_warps=IMAGES.num_warps)
    return gradients


def columns_together(x: Tensor | None) -> Tensor | None:
    """Return x with its columns side by side; a copy only where they are not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x with its elements side by side; a copy only where they are not."""
    return x if x is None else x.contiguous()
