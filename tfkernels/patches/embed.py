"""Patches into the sequence: a linear layer and a row per image, written straight to the places that images have among the packed tokens.

    out = hidden, but out[places_r] = weight @ patches_r + condition_n                     for the rows r of image n, offsets_n <= r < offsets_n+1

The patch embedding of Transfusion (arXiv:2408.11039): the timestep is added to every patch before the linear layer (footnote 6), and
Linear(patch + e_n) = W patch + (W e_n + b), so `condition` is that layer's image of the timesteps alone, one row per image.

Forward: a tiny kernel inverts `places`; then a program takes a tile of consecutive rows of the sequence and a slice of the columns, gathers the
rows' patches once, multiplies them by the weight tile by tile, and copies `hidden` where a row has none: nothing is cloned first. Backward: one
pass over the image rows of the gradient sums dweight by chunks of patches and dcondition by chunk and image (in slot chunk + image: both only
grow along the rows, so no two writes meet), a second sums those in a fixed order. No atomics: equal to the bit each time.
The patches are kept for backward, although `noise_patchify` could make them again from its seed: dweight needs them, storing them costs P D
elements, 1 / 64 of the P C that must move anyway at D = 64, C = 4096, and each tile of columns would have to make its noise anew.

Bytes that must move, T rows of the sequence, P of them patches, C columns, D elements a patch, e bytes an element (weight, condition, places and
the sums of chunks, written and read, 16 MiB or one float32 dweight, aside; so is dpatches, plain PyTorch where it is asked for):

    op              forward                 plain PyTorch                              backward          plain PyTorch
    embed_patches   (2 T - P) C e + P D e   (2 T + 7 P) C e + P D e: clone of hidden   2 T C e + P D e   (2 T + 5 P) C e + P D e: index_fill 2 T + P,
                                            2 T, linear 1, condition[n] 1, their                         index_select 2, both sums 2
                                            sum 3, index_copy 2
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from tfkernels._arguments import got, need_distinct, need_tensors
from tfkernels._launch import Config
from tfkernels._library import INTERPRET, register
from tfkernels.attention.triton.forward import dot_precision
from tfkernels.patches.latents import check_floating, check_offsets, locate, locate_reference

# Rows and columns of a tile, and how many elements of a patch it multiplies at a time, by bytes per element; float32 unrolls what it sums over.
FORWARD = {2: (Config(128, 64, 8, 2), 64), 4: (Config(32, 64, 4, 2), 16)}
BACKWARD = {2: (Config(64, 128, 8, 2), 64), 4: (Config(16, 32, 4, 2), 64)}
INTERPRETER = Config(16, 32, 4, 1), 16      # small, so that short sequences cross many tile edges
PROGRAMS = 4 if INTERPRET else 1024         # of the forward kernel, where enough columns are there to be shared between so many
PARTS = 4 if INTERPRET else 512             # tiles of sums of chunks that the backward kernel writes at most, one per program
IMAGES = Config(32, 64, 4, 3)               # chunks and columns of an image's sums read together
COPY = 256 if INTERPRET else 4096           # elements of a program that only copies
FAR = tl.constexpr(2**31 - 1)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def embed_patches(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """Return hidden with weight @ patches[r] + condition[n] in row places[r], for the rows r of every image n.

    Args:
        hidden: (T, C) or (B, S, C), the packed sequence's token embeddings, in float16, bfloat16 or float32 (float64 on CPU); any strides
            (unit columns cost no copy).
        patches: (P, D), what `noise_patchify` returns.
        weight: (C, D), an nn.Linear's.
        condition: (N, C), what is added to all patches of an image: the linear layer's bias and its image of the timestep.
        places: (P,) int64, the flat row of hidden that each patch takes, each at most once; negative for none. T or
            more, and a row named twice, raise on a CPU; on a GPU, where looking would synchronise, T or more is none,
            and one of the patches takes the row.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1) of patches; rows outside go nowhere,
            whatever they hold. Offsets that fall or leave [0, P] raise on a CPU; on a GPU a patch belongs to the last
            image whose offset is not above it, and no memory outside is touched.

    Returns:
        Like hidden, contiguous. Each argument may have its own dtype; products are taken in hidden's and summed in float32. Gradients flow to
        hidden (0 in the rows that images take), patches, weight and condition and are deterministic; an image without patches gets 0.
        Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    need_tensors("embed_patches", {"hidden": hidden, "patches": patches, "weight": weight, "condition": condition})
    _check(hidden, patches, weight, condition, places, offsets)
    return _embed(hidden, patches, weight, condition, places, offsets)


def embed_patches_reference(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """The specification in plain PyTorch, in hidden's dtype."""
    row, place, image = _placed(places, offsets)
    embedded = F.linear(patches[row].to(hidden.dtype), weight.to(hidden.dtype)) + condition.to(hidden.dtype)[image]
    return hidden.flatten(0, -2).index_copy(0, place, embedded).view(hidden.shape)


def _placed(places: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The patches that have both an image and a place: their rows, places and images."""
    image, _, inside = locate_reference(offsets, len(places))
    row = (inside & (places >= 0)).nonzero()[:, 0]
    return row, places[row], image[row]


def _check(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> None:
    if hidden.ndim not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"embed_patches: hidden has shape {tuple(hidden.shape)}; (tokens, C) or (batch, tokens, C) fits, C at least 1")
    check_floating("embed_patches", "hidden", hidden)
    if patches.ndim != 2 or patches.shape[1] == 0:
        raise ValueError(f"embed_patches: patches has shape {tuple(patches.shape)}; (P, D) fits, D at least 1; patchify latents first")
    check_offsets("embed_patches", "offsets", offsets, hidden.device, patches.shape[0])
    (count, dim), width, images = patches.shape, hidden.shape[-1], offsets.shape[0] - 1
    if weight.shape != (width, dim):
        raise ValueError(f"embed_patches: weight has shape {tuple(weight.shape)}, hidden {width} columns and patches {dim} elements; "
                         f"({width}, {dim}) fits, as an nn.Linear holds it")
    if condition.shape != (images, width):
        raise ValueError(f"embed_patches: condition has shape {tuple(condition.shape)}, offsets {images} images and hidden {width} columns; "
                         f"({images}, {width}) fits, a row for each image")
    for name, x in (("patches", patches), ("weight", weight), ("condition", condition)):
        if x.dtype not in _DTYPES and not (x.dtype == hidden.dtype == torch.float64) or x.device != hidden.device:
            raise ValueError(f"embed_patches: {name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on {hidden.device}; "
                             "float16, bfloat16 or float32 on the same device fits (float64 for float64)")
    if not isinstance(places, Tensor) or places.shape != (count,) or places.dtype != torch.int64 or places.device != hidden.device:
        raise ValueError(f"embed_patches: places is {got(places)}; an int64 tensor ({count},) on {hidden.device} "
                         "fits, the row of hidden for each patch")


@triton.jit(do_not_specialize=["images", "steps", "rows", "tokens"])
def _embed_index(places_ptr, offsets_ptr, table_ptr, image_ptr, images, steps, rows, tokens, BLOCK: tl.constexpr):
    """The image of each patch, -1 before the first and N behind the last, and the patch of each row of the sequence that has one."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, _, _, inside = locate(row, offsets_ptr, images, steps, rows, 0, True)
    place = tl.load(places_ptr + row, mask=inside, other=-1)
    tl.store(image_ptr + row, image, mask=row < rows)
    tl.store(table_ptr + place, row, mask=inside & (place >= 0) & (place < tokens))


@triton.jit(do_not_specialize=["tokens", "length", "blocks"])
def _embed_fwd(x_ptr, patches_ptr, weight_ptr, condition_ptr, table_ptr, image_ptr, out_ptr, tokens, length, blocks, stride_xb, stride_xs,
               C: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    r = tl.load(table_ptr + row, mask=row < tokens, other=-1)
    taken, text = r >= 0, (row < tokens) & (r < 0)
    image = tl.load(image_ptr + r, mask=taken, other=0)
    some_taken, some_text = tl.max(r) >= 0, tl.max(text.to(tl.int32)) > 0
    lowest, highest = tl.min(tl.where(taken, image, FAR)), tl.max(tl.where(taken, image, -1))
    x_ptr += ((row // length).to(tl.int64) * stride_xb + (row % length).to(tl.int64) * stride_xs)[:, None]
    out_ptr += row[:, None].to(tl.int64) * C
    patches_ptr += r[:, None].to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    patch = tl.load(patches_ptr + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0).to(x_ptr.dtype.element_ty)
    first = tl.program_id(1) * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(C, BLOCK_C))):
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = cols < C
        if some_taken:
            wanted = taken[:, None] & inside[None, :]
            acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            if lowest == highest:
                acc += tl.load(condition_ptr + lowest.to(tl.int64) * C + cols, mask=inside, other=0).to(tl.float32)[None, :]
            else:
                acc += tl.load(condition_ptr + image[:, None].to(tl.int64) * C + cols[None, :], mask=wanted, other=0).to(tl.float32)
            for k in range(0, D, BLOCK_D):
                d = k + tl.arange(0, BLOCK_D)
                if D > BLOCK_D:
                    patch = tl.load(patches_ptr + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0).to(patch.dtype)
                weight = weight_ptr + cols[:, None].to(tl.int64) * D + d[None, :]
                weight = tl.load(weight, mask=inside[:, None] & (d < D)[None, :], other=0).to(patch.dtype)
                acc = tl.dot(patch, tl.trans(weight), acc, input_precision=PRECISION)
            tl.store(out_ptr + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=wanted)
        if some_text:
            wanted = text[:, None] & inside[None, :]
            tl.store(out_ptr + cols[None, :], tl.load(x_ptr + cols[None, :], mask=wanted, other=0), mask=wanted)


@triton.jit(do_not_specialize=["tokens", "length"])
def _embed_bwd_hidden(dout_ptr, table_ptr, dx_ptr, tokens, length, stride_ob, stride_os,
                      C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < tokens)[:, None] & (cols < C)[None, :]
    text = tl.load(table_ptr + row, mask=row < tokens, other=0) < 0
    dout_ptr += ((row // length).to(tl.int64) * stride_ob + (row % length).to(tl.int64) * stride_os)[:, None]
    dout = tl.load(dout_ptr + cols[None, :], mask=inside & text[:, None], other=0)
    tl.store(dx_ptr + row[:, None].to(tl.int64) * C + cols[None, :], dout, mask=inside)


@triton.jit(do_not_specialize=["images", "rows", "tokens", "length", "chunk"])
def _embed_bwd(dout_ptr, patches_ptr, places_ptr, image_ptr, products_ptr, parts_ptr, images, rows, tokens, length, chunk, stride_ob, stride_os,
               C: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """dout^T @ patches of a chunk, for a tile of columns and elements; beside the first elements also each image's sum of dout."""
    program = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    first = tl.program_id(2) * chunk
    end = tl.minimum(first + chunk, rows)
    acc, total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    current = tl.load(image_ptr + first)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        image = tl.load(image_ptr + tl.minimum(row, end - 1))
        place = tl.load(places_ptr + row, mask=row < end, other=-1)
        taken = (image >= 0) & (image < images) & (place >= 0) & (place < tokens)
        at = place // length * stride_ob + place % length * stride_os
        dout = tl.load(dout_ptr + at[:, None] + cols[None, :], mask=taken[:, None] & inside[None, :], other=0)
        patch = tl.load(patches_ptr + row[:, None].to(tl.int64) * D + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0).to(dout.dtype)
        acc = tl.dot(tl.trans(dout), patch, acc, input_precision=PRECISION)
        if tl.program_id(0) == 0:
            for n in range(tl.min(image), tl.max(image) + 1):
                if n != current:
                    tl.store(parts_ptr + (program + current + 1) * C + cols, total, mask=inside)
                    total, current = tl.zeros([BLOCK_C], tl.float32), n
                total += tl.sum(tl.where((image == n)[:, None], dout, 0.0).to(tl.float32), 0)
    if tl.program_id(0) == 0:
        tl.store(parts_ptr + (program + current + 1) * C + cols, total, mask=inside)
    products_ptr += (program * C + cols[:, None]) * D
    tl.store(products_ptr + d[None, :], acc, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "chunk"])
def _embed_bwd_images(parts_ptr, offsets_ptr, dcondition_ptr, rows, chunk, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the slots of image n in the order of the chunks that wrote them."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    start, stop = tl.maximum(tl.load(offsets_ptr + n), 0), tl.minimum(tl.load(offsets_ptr + n + 1), rows)
    last = tl.where(stop > start, (stop + chunk - 1) // chunk, 0)
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for first in range(start // chunk, last, BLOCK_M):
        program = first + tl.arange(0, BLOCK_M)
        total += tl.load(parts_ptr + (program + n + 1)[:, None] * C + cols[None, :], mask=(program < last)[:, None] & inside[None, :], other=0)
    tl.store(dcondition_ptr + n * C + cols, tl.sum(total, 0).to(dcondition_ptr.dtype.element_ty), mask=inside)


def tiles(table: dict, element_size: int, width: int, dim: int) -> dict:
    """Return the constexprs and launch options of a row of `table` for `width` columns and patches of `dim` elements."""
    (block_r, block_c, num_warps, num_stages, _), widest = INTERPRETER if INTERPRET else table[element_size]
    return {"C": width, "D": dim, "BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_D": min(max(16, triton.next_power_of_2(dim)), widest),
            "num_warps": num_warps, "num_stages": num_stages}


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x with unit columns, the rows of one batch entry and the strides of batch and row; a copy only where the columns lie apart."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x, x.shape[0], 0, x.stride(0)) if x.ndim == 2 else (x, x.shape[1], x.stride(0), x.stride(1))


def _index(places: Tensor, offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the patch of each row of the sequence (T,), -1 for none, and the image of each patch (P,), both int32."""
    table = torch.full((tokens,), -1, dtype=torch.int32, device=places.device)
    image = table.new_empty(len(places))
    rows, block = len(places), COPY // 16
    if rows:
        _embed_index[(triton.cdiv(rows, block),)](places, offsets, table, image, len(offsets) - 1, len(offsets).bit_length(), rows, tokens,
                                                  BLOCK=block, num_warps=4)
    return table, image


def _embed_kernel(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    out, width = hidden.new_empty(hidden.shape), hidden.shape[-1]
    tokens = out.numel() // width
    if tokens:
        places, offsets, patches, weight, condition = (x.contiguous() for x in (places, offsets, patches, weight, condition))
        hidden, length, *strides = _strided(hidden)
        options = tiles(FORWARD, hidden.element_size(), *weight.shape)
        programs, columns = triton.cdiv(tokens, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_C"])
        blocks = triton.cdiv(columns, min(columns, max(1, PROGRAMS // programs)))
        _embed_fwd[(programs, triton.cdiv(columns, blocks))](hidden, patches, weight, condition, *_index(places, offsets, tokens), out,
                                                             tokens, length, blocks, *strides, PRECISION=dot_precision(hidden), **options)
    return out


def _backward_kernel(dout: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor,
                     of_hidden: bool, of_patches: bool, of_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dhidden, _, dweight, dcondition = _backward_fake(dout, patches, weight, condition, places, offsets, of_hidden, False, of_sums)
    dpatches = _dpatches(dout, patches, weight, places, offsets) if of_patches else patches.new_empty(0)
    (width, dim), tokens, count, images = weight.shape, dout.numel() // dout.shape[-1], len(places), len(condition)
    if not tokens or not (of_hidden or of_sums):
        return dhidden, dpatches, dweight.zero_(), dcondition.zero_()
    places, offsets, patches = places.contiguous(), offsets.contiguous(), patches.contiguous()
    dout, length, *strides = _strided(dout)
    table, image = _index(places, offsets, tokens)
    if of_hidden:
        block = min(max(triton.next_power_of_2(width), 16), COPY // 4)
        _embed_bwd_hidden[(triton.cdiv(tokens, COPY // block), triton.cdiv(width, block))](
            dout, table, dhidden, tokens, length, *strides, C=width, BLOCK_R=COPY // block, BLOCK_C=block, num_warps=4)
    if of_sums:
        options = tiles(BACKWARD, dout.element_size(), width, dim)
        grid = triton.cdiv(dim, options["BLOCK_D"]), triton.cdiv(width, options["BLOCK_C"])
        most = max(1, PARTS // (grid[0] * grid[1]))
        chunk = max(1, triton.cdiv(triton.cdiv(count, most), options["BLOCK_R"])) * options["BLOCK_R"]
        chunks = triton.cdiv(count, chunk)
        products = dout.new_empty(chunks, width, dim, dtype=torch.float32)
        parts = dout.new_empty(chunks + images + 2, width, dtype=torch.float32)
        if chunks:
            _embed_bwd[(*grid, chunks)](dout, patches, places, image, products, parts, images, count, tokens, length, chunk, *strides,
                                        PRECISION=dot_precision(dout), **options)
        dweight = products.sum(0).to(weight.dtype)
        if images:
            _embed_bwd_images[(images, triton.cdiv(width, IMAGES.block_n))](
                parts, offsets, dcondition, count, chunk, C=width, BLOCK_M=IMAGES.block_m, BLOCK=IMAGES.block_n, num_warps=IMAGES.num_warps)
    return dhidden, dpatches, dweight, dcondition


def _dpatches(dout: Tensor, patches: Tensor, weight: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """dout[places] @ weight, 0 for a patch that went nowhere; no host synchronisation."""
    dout = dout.reshape(-1, dout.shape[-1])
    if not len(dout):
        return patches.new_zeros(patches.shape)
    taken = locate_reference(offsets, len(places))[2] & (places >= 0) & (places < len(dout))
    with torch.autocast(dout.device.type, enabled=False):
        dpatches = dout[torch.where(taken, places, 0)] @ weight.to(dout.dtype)
    return torch.where(taken[:, None], dpatches, 0).to(patches.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _embed_cpu(hidden: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    tokens = hidden.numel() // hidden.shape[-1]
    if len(places) and places.max() >= tokens:
        raise ValueError(f"embed_patches: places names row {places.max().item()} and hidden has {tokens}; negative (none) to {tokens - 1} fits")
    need_distinct("embed_patches", "places", _placed(places, offsets)[1])
    with torch.autocast("cpu", enabled=False):
        patches, weight = patches.to(hidden.dtype), weight.to(hidden.dtype)
        return embed_patches_reference(hidden.to(_wide(hidden)), patches, weight, condition, places, offsets).to(hidden.dtype).contiguous()


def _backward_cpu(dout: Tensor, patches: Tensor, weight: Tensor, condition: Tensor, places: Tensor, offsets: Tensor,
                  of_hidden: bool, of_patches: bool, of_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dhidden, dpatches, dweight, dcondition = _backward_fake(dout, patches, weight, condition, places, offsets, of_hidden, False, of_sums)
    row, place, image = _placed(places, offsets)
    rows = dout.reshape(-1, dout.shape[-1])
    if of_hidden:
        dhidden.copy_(dout).view(rows.shape)[place] = 0
    if of_patches:
        dpatches = _dpatches(dout, patches, weight, places, offsets)
    if of_sums:
        with torch.autocast("cpu", enabled=False):
            taken = rows[place].to(_wide(dout))
            dweight.copy_(taken.mT @ patches[row].to(dout.dtype).to(taken.dtype))
            dcondition.copy_(condition.new_zeros(condition.shape, dtype=torch.float64).index_add_(0, image, taken.double()))
    return dhidden, dpatches, dweight, dcondition


def _embed_fake(hidden, patches, weight, condition, places, offsets):
    return hidden.new_empty(hidden.shape)


def _backward_fake(dout, patches, weight, condition, places, offsets, of_hidden, of_patches, of_sums):
    wanted = (dout, of_hidden), (patches, of_patches), (weight, of_sums), (condition, of_sums)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in wanted)


_embed = register("embed_patches", kernel=_embed_kernel, cpu=_embed_cpu, fake=_embed_fake)
_backward = register("embed_patches_backward", kernel=_backward_kernel, cpu=_backward_cpu, fake=_backward_fake)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx, dout):
    of_hidden, of_patches, of_weight, of_condition, *_ = ctx.needs_input_grad
    found = _backward(dout, *ctx.saved_tensors, of_hidden, of_patches, of_weight or of_condition)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad)), None, None


_embed.register_autograd(_gradients, setup_context=_save)
