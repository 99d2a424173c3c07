"""Kernels of `embed_patches`.

Forward: a small kernel inverts `places`. Then a program takes a tile of consecutive rows of the sequence and a slice of
the columns, gathers the rows' patches once and multiplies them by the weight, tile by tile. Where a row has no patch it
copies `hidden`, so that nothing is cloned first.

Backward: one pass over the gradient's image rows sums dweight by chunks of patches, and dcondition by chunk and image
(in slot chunk + image: both only grow along the rows, so that no two writes meet). A second pass adds those in a fixed
order. There are no atomics, so that gradients are equal to the bit each time.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv, next_power_of_2
from tfkernels._library import INTERPRET, made_once
from tfkernels.attention.triton.forward import dot_precision
from tfkernels.patches.results import empty_embed_gradients, patch_gradients
from tfkernels.patches.triton.layout import locate

# Rows and columns of a tile, and how many elements of a patch it multiplies at a time, by bytes per element.
# float32 unrolls what it sums over.
FORWARD = {2: (Config(128, 64, 8, 2), 64), 4: (Config(32, 64, 4, 2), 16)}
BACKWARD = {2: (Config(64, 128, 8, 2), 64), 4: (Config(16, 32, 4, 2), 64)}
INTERPRETER = Config(16, 32, 4, 1), 16      # small, so that short sequences cross many tile edges
# of the forward kernel, where enough columns are there to be shared between so many
PROGRAMS = 4 if INTERPRET else 1024
PARTS = 4 if INTERPRET else 512  # tiles of sums of chunks that the backward kernel writes at most, one per program
IMAGES = Config(32, 64, 4, 3)               # chunks and columns of an image's sums read together
COPY = 256 if INTERPRET else 4096           # elements of a program that only copies
FAR = tl.constexpr(2**31 - 1)
SCALAR_ARGUMENTS = ["places_ptr", "offsets_ptr", "images", "steps", "rows", "tokens", "length", "blocks", "chunk"]


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _embed_index(places_ptr, offsets_ptr, table_ptr, patch_image_ids_ptr, images, steps, rows, tokens,
                 BLOCK: tl.constexpr):
    """Write each patch's image id (-1 before the first, N behind the last), and the patch of each row that has one."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, _, _, inside = locate(row, offsets_ptr, images, steps, rows, 0, True)
    place = tl.load(places_ptr + row, mask=inside, other=-1)
    tl.store(patch_image_ids_ptr + row, image, mask=row < rows)
    tl.store(table_ptr + place, row, mask=inside & (place >= 0) & (place < tokens))


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _embed_fwd(x_ptr, patches_ptr, weight_ptr, condition_ptr, table_ptr, patch_image_ids_ptr, out_ptr, tokens, length,
               blocks, stride_xb, stride_xs,
               C: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
               PRECISION: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r = tl.load(table_ptr + row, mask=row < tokens, other=-1)
    taken, text = r >= 0, (row < tokens) & (r < 0)
    image = tl.load(patch_image_ids_ptr + r, mask=taken, other=0)
    some_taken, some_text = tl.max(r) >= 0, tl.max(text.to(tl.int32)) > 0
    lowest, highest = tl.min(tl.where(taken, image, FAR)), tl.max(tl.where(taken, image, -1))
    x_ptr += ((row // length).to(tl.int64) * stride_xb + (row % length).to(tl.int64) * stride_xs)[:, None]
    out_ptr += row[:, None].to(tl.int64) * C
    patches_ptr += r[:, None].to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    patch = tl.load(
        patches_ptr + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0
    ).to(x_ptr.dtype.element_ty)
    first = tl.program_id(1) * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(C, BLOCK_C))):
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = cols < C
        if some_taken:
            wanted = taken[:, None] & inside[None, :]
            acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            if lowest == highest:
                acc += tl.load(
                    condition_ptr + lowest.to(tl.int64) * C + cols, mask=inside, other=0
                ).to(tl.float32)[None, :]
            else:
                acc += tl.load(
                    condition_ptr + image[:, None].to(tl.int64) * C + cols[None, :], mask=wanted, other=0
                ).to(tl.float32)
            for k in range(0, D, BLOCK_D):
                d = k + tl.arange(0, BLOCK_D)
                if D > BLOCK_D:
                    patch = tl.load(
                        patches_ptr + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0
                    ).to(patch.dtype)
                weight = weight_ptr + cols[:, None].to(tl.int64) * D + d[None, :]
                weight = tl.load(weight, mask=inside[:, None] & (d < D)[None, :], other=0).to(patch.dtype)
                acc = tl.dot(patch, tl.trans(weight), acc, input_precision=PRECISION)
            tl.store(out_ptr + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=wanted)
        if some_text:
            wanted = text[:, None] & inside[None, :]
            tl.store(out_ptr + cols[None, :], tl.load(x_ptr + cols[None, :], mask=wanted, other=0), mask=wanted)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _embed_bwd_hidden(dout_ptr, table_ptr, dx_ptr, tokens, length, stride_ob, stride_os,
                      C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < tokens)[:, None] & (cols < C)[None, :]
    text = tl.load(table_ptr + row, mask=row < tokens, other=0) < 0
    dout_ptr += ((row // length).to(tl.int64) * stride_ob + (row % length).to(tl.int64) * stride_os)[:, None]
    dout = tl.load(dout_ptr + cols[None, :], mask=inside & text[:, None], other=0)
    tl.store(dx_ptr + row[:, None].to(tl.int64) * C + cols[None, :], dout, mask=inside)


@triton.jit
def _gradient_rows(dout_ptr, places_ptr, patch_image_ids_ptr, row, cols, end, images, tokens, length, stride_ob,
                   stride_os, C: tl.constexpr):
    """The gradient that arrives at the patches `row`, 0 where they have no place; which have one, and their images."""
    image = tl.load(patch_image_ids_ptr + tl.minimum(row, end - 1))
    place = tl.load(places_ptr + row, mask=row < end, other=-1)
    taken = (image >= 0) & (image < images) & (place >= 0) & (place < tokens)
    at = place // length * stride_ob + place % length * stride_os
    dout = tl.load(dout_ptr + at[:, None] + cols[None, :], mask=taken[:, None] & (cols < C)[None, :], other=0)
    return dout, taken, image


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _embed_bwd(dout_ptr, patches_ptr, places_ptr, patch_image_ids_ptr, products_ptr, parts_ptr, images, rows, tokens,
               length, chunk, stride_ob, stride_os,
               C: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
               PRECISION: tl.constexpr):
    """dout^T @ patches of a chunk, for a tile of columns and elements.

    The programs of the first elements also write each image's sum of dout. They read dout again for it, in a loop of
    its own: Triton takes for granted that what a pipelined loop copies to shared memory for its product has no other
    use, and would let the next rows take its place too early.
    """
    program = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    first = tl.program_id(2) * chunk
    end = tl.minimum(first + chunk, rows)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        dout, taken, _ = _gradient_rows(dout_ptr, places_ptr, patch_image_ids_ptr, row, cols, end, images, tokens,
                                        length, stride_ob, stride_os, C)
        patch = tl.load(patches_ptr + row[:, None].to(tl.int64) * D + d[None, :],
                        mask=taken[:, None] & (d < D)[None, :], other=0).to(dout.dtype)
        acc = tl.dot(tl.trans(dout), patch, acc, input_precision=PRECISION)
    products_ptr += (program * C + cols[:, None]) * D
    tl.store(products_ptr + d[None, :], acc, mask=inside[:, None] & (d < D)[None, :])
    if tl.program_id(0) == 0:
        total, current = tl.zeros([BLOCK_C], tl.float32), tl.load(patch_image_ids_ptr + first)
        for start in range(first, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            dout, _, image = _gradient_rows(dout_ptr, places_ptr, patch_image_ids_ptr, row, cols, end, images, tokens,
                                            length, stride_ob, stride_os, C)
            for n in range(tl.min(image), tl.max(image) + 1):
                if n != current:
                    tl.store(parts_ptr + (program + current + 1) * C + cols, total, mask=inside)
                    total, current = tl.zeros([BLOCK_C], tl.float32), n
                total += tl.sum(tl.where((image == n)[:, None], dout, 0.0).to(tl.float32), 0)
        tl.store(parts_ptr + (program + current + 1) * C + cols, total, mask=inside)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _embed_bwd_images(parts_ptr, offsets_ptr, dcondition_ptr, rows, chunk,
                      C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the slots of image n in the order of the chunks that wrote them."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    start, stop = tl.maximum(tl.load(offsets_ptr + n), 0), tl.minimum(tl.load(offsets_ptr + n + 1), rows)
    last = tl.where(stop > start, (stop + chunk - 1) // chunk, 0)
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for first in range(start // chunk, last, BLOCK_M):
        program = first + tl.arange(0, BLOCK_M)
        total += tl.load(parts_ptr + (program + n + 1)[:, None] * C + cols[None, :],
                         mask=(program < last)[:, None] & inside[None, :], other=0)
    tl.store(dcondition_ptr + n * C + cols, tl.sum(total, 0).to(dcondition_ptr.dtype.element_ty), mask=inside)


def tiles(table: dict, element_size: int, width: int, dim: int) -> dict:
    """Return a row of `table` as constexprs and launch options, for `width` columns and patches of `dim` elements."""
    config, widest = INTERPRETER if INTERPRET else table[element_size]
    return {"C": width, "D": dim, "BLOCK_R": config.block_m, "BLOCK_C": config.block_n,
            "BLOCK_D": min(max(16, next_power_of_2(dim)), widest), "num_warps": config.num_warps,
            "num_stages": config.num_stages}


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x with unit columns, the rows of one batch entry, and the strides of batch and row.

    It is a copy only where the columns lie apart.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x, x.shape[0], 0, x.stride(0)) if x.ndim == 2 else (x, x.shape[1], x.stride(0), x.stride(1))


def _index(places: Tensor, offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the patch of each row of the sequence (T,), -1 for none, and the image of each patch (P,), both int32.

    They are made once for both passes.
    """
    return made_once(_made_index, places, offsets, tokens=tokens)


def _made_index(places: Tensor, offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    table = torch.full((tokens,), -1, dtype=torch.int32, device=places.device)
    image = table.new_empty(len(places))
    rows, block = len(places), COPY // 16
    if rows:
        _embed_index[(cdiv(rows, block),)](places, offsets, table, image, len(offsets) - 1,
                                                  len(offsets).bit_length(), rows, tokens, BLOCK=block, num_warps=4)
    return table, image


def forward(
    hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor
) -> Tensor:
    """Launch the kernels of `embed_patches_reference`."""
    out, width = hidden.new_empty(hidden.shape), hidden.shape[-1]
    tokens = out.numel() // width
    if tokens:
        places, offsets, patches, weight, condition = (x.contiguous()
                                                       for x in (places, offsets, patches, weight, condition))
        hidden, length, *strides = _strided(hidden)
        options = tiles(FORWARD, hidden.element_size(), *weight.shape)
        programs, columns = cdiv(tokens, options["BLOCK_R"]), cdiv(width, options["BLOCK_C"])
        blocks = cdiv(columns, min(columns, max(1, PROGRAMS // programs)))
        _embed_fwd[(programs, cdiv(columns, blocks))](hidden, patches, weight, condition,
                                                             *_index(places, offsets, tokens), out, tokens, length,
                                                             blocks, *strides, PRECISION=dot_precision(hidden),
                                                             **options)
    return out


def backward(dout: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor,
                     of_hidden: bool, of_patches: bool, of_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels: the gradients of hidden, patches, weight and condition, empty where not wanted."""
    dhidden, _, dweight, dcondition = empty_embed_gradients(dout, patches, weight, condition, places, offsets,
                                                            of_hidden, False, of_sums)
    dpatches = patch_gradients(dout, patches, weight, places, offsets) if of_patches else patches.new_empty(0)
    (width, dim), tokens, count, images = weight.shape, dout.numel() // dout.shape[-1], len(places), len(condition)
    if not tokens or not (of_hidden or of_sums):
        return dhidden, dpatches, dweight.zero_(), dcondition.zero_()
    places, offsets, patches = places.contiguous(), offsets.contiguous(), patches.contiguous()
    dout, length, *strides = _strided(dout)
    table, image = _index(places, offsets, tokens)
    if of_hidden:
        block = min(max(next_power_of_2(width), 16), COPY // 4)
        _embed_bwd_hidden[(cdiv(tokens, COPY // block), cdiv(width, block))](
            dout, table, dhidden, tokens, length, *strides, C=width, BLOCK_R=COPY // block, BLOCK_C=block, num_warps=4)
    if of_sums:
        options = tiles(BACKWARD, dout.element_size(), width, dim)
        grid = cdiv(dim, options["BLOCK_D"]), cdiv(width, options["BLOCK_C"])
        most = max(1, PARTS // (grid[0] * grid[1]))
        chunk = max(1, cdiv(cdiv(count, most), options["BLOCK_R"])) * options["BLOCK_R"]
        chunks = cdiv(count, chunk)
        products = dout.new_empty(chunks, width, dim, dtype=torch.float32)
        parts = dout.new_empty(chunks + images + 2, width, dtype=torch.float32)
        if chunks:
            _embed_bwd[(*grid, chunks)](dout, patches, places, image, products, parts, images, count, tokens, length,
                                        chunk, *strides, PRECISION=dot_precision(dout), **options)
        dweight = products.sum(0).to(weight.dtype)
        if images:
            _embed_bwd_images[(images, cdiv(width, IMAGES.block_n))](
                parts, offsets, dcondition, count, chunk, C=width, BLOCK_M=IMAGES.block_m, BLOCK=IMAGES.block_n,
                num_warps=IMAGES.num_warps)
    return dhidden, dpatches, dweight, dcondition
