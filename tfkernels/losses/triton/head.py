"""Kernels of the diffusion loss that starts at the hidden states (`tfkernels.losses.head`): one forward, one backward.

Forward takes a tile of patches and walks C once. From each row's first columns it guesses a mean m and an inverse
deviation r. z = (x - m) r is then near to xhat; it goes into the product with the weight while the true sums are taken.
What the guess missed is put right at the end, exactly:

    u = weight @ round(z (1 + scale))      acc = rstd / r * (u - mean(z) * ws)      ws = (1 + scale) @ weight^T, (N, D)

Error sums differ from those of the true xhat by the factor 1 + ((m - mean) / std)^2. A row of D > BLOCK_D is walked
once per tile of D.

Backward is one program per (tile of columns, `span` patches, tile of D). It walks its patches image by image, in tiles
that begin where the image does; k_n error is the gradient of the prediction. dweight adds up in registers, with k as
its ratio to the largest k, so that float16 holds it (`_head_loss_factors` makes both first). At the image's end dscale
goes to row chunk + image + 1 of `parts`, where no two writes meet (see `tfkernels.norm.triton`). There are no atomics.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import ROUNDED_PRODUCTS, Config, architecture, cdiv, next_power_of_2
from tfkernels._library import INTERPRET
from tfkernels.attention.triton.forward import dot_precision
from tfkernels.losses.triton.diffusion import BLOCK, _diffusion_loss_images, rows_of_one_size
from tfkernels.norm.sums import IMAGES, _norm_bwd_images, columns_together
from tfkernels.patches.philox import philox_normal
from tfkernels.patches.triton.layout import SCALAR_ARGUMENTS, addresses, dense, geometry, locate

PROGRAMS = 9 if INTERPRET else 512              # of the backward kernel, about; fixed: the sums' order is, too
FEWEST_ROWS = 9 if INTERPRET else 128           # patches of one of them at least
PARTIAL_BYTES = 2**26                           # of dweight's partial sums at most, as far as one chunk allows
# elements of D in one tile, at least and at most; by bytes per element; 16 of 2 bytes spill
TILES = {2: (32, 64), 4: (16, 32)}
PILOT = 2                                       # blocks of columns that the guess of mean and 1 / std looks at
SMALL = Config(16, 16, 4, 1)                    # in the interpreter: edges in short rows
FORWARD = {2: Config(64, 64, 8, 3), 4: Config(32, 32, 4, 2)}  # patches, columns; by bytes per element
BACKWARD = {2: Config(32, 64, 8, 3), 4: Config(16, 32, 4, 1)}


def config(table: dict, element_size: int) -> Config:
    """Return the patches, columns, warps and stages of a program."""
    return SMALL if INTERPRET else table[element_size]


def tile(dim: int, element_size: int) -> dict:
    """Return the constexprs of a tile of D."""
    least, most = (16, 16) if INTERPRET else TILES[element_size]
    return {"DIM": dim, "BLOCK_D": min(max(least, next_power_of_2(dim)), most)}


def awaited(target: int, element_size: int) -> bool:
    """Return whether forward reads its sums in each round, to wait for the product of the round before.

    On sm_90 that product may else still read y from registers that the next round already writes, in the machine code
    of Triton 3.6 and 3.7 (triton-lang/triton#9433).
    """
    return target == 90 and element_size == 2


def chunks(rows: int, dim: int, width: int, element_size: int) -> tuple[int, int]:
    """Return into how many chunks backward cuts the patches and the patches of each."""
    tiles = cdiv(width, config(BACKWARD, element_size).block_n) * cdiv(dim,
                                                                                     tile(dim, element_size)["BLOCK_D"])
    span = cdiv(rows, max(1, min(PROGRAMS // tiles, PARTIAL_BYTES // (4 * dim * width), rows // FEWEST_ROWS)))
    return cdiv(rows, span), span


@triton.jit
def _target(x0_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, columns_ptr, row, first, image, start, count, inside, rows,
            grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
            LAYOUT: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """p x0 + q eps (R, BLOCK_D) float32."""
    at, valid = addresses(row, image, start, count, inside, first + tl.arange(0, BLOCK_D), columns_ptr, rows,
                          grid_columns, stride_xn, stride_xc, stride_xh, stride_xw, LAYOUT, PATCH, DIM)
    x = tl.load(x0_ptr + at, mask=valid, other=0).to(tl.float32)
    x0_factor = tl.load(x0_factor_ptr + image, mask=inside, other=0)
    eps_factor = tl.load(eps_factor_ptr + image, mask=inside, other=0)
    return x0_factor[:, None] * x + eps_factor[:, None] * philox_normal(seed_ptr, image, row - start, first, BLOCK_D)


@triton.jit(do_not_specialize=[*SCALAR_ARGUMENTS, "places_ptr", "tokens"])
def _head_loss_fwd(x_ptr, places_ptr, scale_ptr, weight_ptr, base_ptr, ws_ptr, x0_ptr, x0_factor_ptr, eps_factor_ptr,
                   seed_ptr, offsets_ptr, columns_ptr, error_ptr, statistics_ptr, sums_ptr, images, rows, steps,
                   grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw, tokens, eps, stride_xs,
                   stride_cn,
                   C: tl.constexpr, CENTER: tl.constexpr, BASE: tl.constexpr, GUESS: tl.constexpr, LAYOUT: tl.constexpr,
                   SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, AWAITED: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    place = tl.load(places_ptr + row, mask=inside, other=-1)
    found = inside & (place >= 0) & (place < tokens)
    place = tl.where(found, place, 0)
    own_x = x_ptr + place[:, None] * stride_xs
    own_scale = scale_ptr + tl.where(inside, image, 0)[:, None].to(tl.int64) * stride_cn
    middle, guess = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for column in range(0, GUESS, BLOCK_C):
        cols = column + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(own_x + cols, mask=found[:, None] & (cols < GUESS), other=0.0).to(tl.float32)
        middle += tl.sum(x, 1)
        guess += tl.sum(x * x, 1)
    middle = middle / GUESS if CENTER else middle * 0.0
    guess = tl.rsqrt(tl.maximum(guess / GUESS - middle * middle, 0.0) + eps)
    guess = tl.where(guess < 1e9, guess, 1.0)  # eps = 0 and a constant beginning
    total, along, level = (tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32),
                           tl.zeros([BLOCK_R], tl.float32))
    mean, rstd = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        sums, squares = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
        for column in range(0, C, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            valid = found[:, None] & (cols < C)[None, :]
            x = tl.load(own_x + cols[None, :], mask=valid, other=0.0)
            z = tl.where(valid, (x.to(tl.float32) - middle[:, None]) * guess[:, None], 0.0)
            y = (z * (1 + tl.load(own_scale + cols[None, :], mask=valid, other=0.0).to(tl.float32))).to(x.dtype)
            if AWAITED:
                acc = tl.where(found[:, None], acc, 0.0)  # it is 0 there
            weight = tl.load(weight_ptr + d[None, :].to(tl.int64) * C + cols[:, None],
                             mask=(d < DIM)[None, :] & (cols < C)[:, None], other=0.0)
            acc = tl.dot(y, weight.to(x.dtype), acc, input_precision=PRECISION)
            squares += tl.sum(z * z, 1)
            if CENTER:
                sums += tl.sum(z, 1)
        away = sums / C
        variance = tl.maximum(squares / C - away * away, 0.0) / (guess * guess)
        mean, rstd = middle + away / guess, tl.where(found, tl.rsqrt(variance + eps), float("nan"))
        valid = inside[:, None] & (d < DIM)[None, :]
        of_image = image[:, None].to(tl.int64) * DIM + d[None, :]
        if CENTER:
            ws = tl.load(ws_ptr + of_image, mask=valid, other=0.0)
            acc -= away[:, None] * ws
        acc *= (rstd / guess)[:, None]
        error = acc - _target(x0_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, columns_ptr, row, first, image, start,
                              count, inside, rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw, LAYOUT,
                              PATCH, DIM, BLOCK_D)
        if BASE:
            error += tl.load(base_ptr + of_image, mask=valid, other=0.0)
        error = tl.where(valid, error, 0.0)
        total += tl.sum(error * error, 1)
        along += tl.sum(tl.where(valid, error * acc, 0.0), 1)
        if CENTER:
            level += tl.sum(error * ws, 1)
        tl.store(error_ptr + row[:, None].to(tl.int64) * DIM + d[None, :], error.to(error_ptr.dtype.element_ty),
                 mask=(row < rows)[:, None] & (d < DIM)[None, :])
    tl.store(sums_ptr + row, total, mask=row < rows)
    plane = rows.to(tl.int64)
    tl.store(statistics_ptr + row, rstd, mask=row < rows)
    tl.store(statistics_ptr + plane + row, along / C, mask=row < rows)
    if CENTER:
        tl.store(statistics_ptr + 2 * plane + row, mean, mask=row < rows)
        tl.store(statistics_ptr + 3 * plane + row, level / C, mask=row < rows)


@triton.jit
def _head(weight_ptr, first, cols, C: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (BLOCK_D, BLOCK_C) of the weight."""
    d = first + tl.arange(0, BLOCK_D)
    return tl.load(weight_ptr + d[:, None].to(tl.int64) * C + cols[None, :],
                   mask=(d < DIM)[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def _error_rows(error_ptr, row, first, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (R, BLOCK_D) of prediction - target, 0 outside."""
    d = first + tl.arange(0, BLOCK_D)
    return tl.load(error_ptr + row[:, None].to(tl.int64) * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :],
                   other=0.0)


@triton.jit(do_not_specialize=["k_ptr", "ratio_ptr", "places_ptr", "offsets_ptr", "images", "rows", "steps", "tokens",
                               "span"])
def _head_loss_bwd(k_ptr, ratio_ptr, x_ptr, places_ptr, scale_ptr, weight_ptr, offsets_ptr, error_ptr, statistics_ptr,
                   dx_ptr, parts_ptr, base_parts_ptr, dweight_ptr, images, rows, steps, tokens, span, stride_xs,
                   stride_cn,
                   C: tl.constexpr, CENTER: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr,
                   WEIGHT: tl.constexpr, BASE: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    cols, chunk = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    begin, plane = chunk * span, rows.to(tl.int64)
    end = tl.minimum(begin + span, rows)
    image, _, _, _ = locate(begin, offsets_ptr, images, steps, rows, 1, True)
    last, _, _, _ = locate(end - 1, offsets_ptr, images, steps, rows, 1, True)
    weight = _head(weight_ptr, 0, cols, C, DIM, BLOCK_D).to(x_ptr.dtype.element_ty)
    dweight = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for n in range(tl.maximum(image, 0).to(tl.int64), tl.minimum(last + 1, images)):
        start, stop = tl.maximum(tl.load(offsets_ptr + n), begin), tl.minimum(tl.load(offsets_ptr + n + 1), end)
        k, ratio = tl.load(k_ptr + n), tl.load(ratio_ptr + n)
        scale = 1 + tl.load(scale_ptr + n * stride_cn + cols, mask=cols < C, other=0.0).to(tl.float32)
        dscale = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for at in range(start, stop, BLOCK_R):
            row = at + tl.arange(0, BLOCK_R)
            inside = row < stop
            place = tl.load(places_ptr + row, mask=inside, other=-1)
            found = inside & (place >= 0) & (place < tokens)
            place = tl.where(found, place, 0)
            valid = found[:, None] & (cols < C)[None, :]
            rstd = tl.load(statistics_ptr + row, mask=inside, other=0.0)
            xhat = tl.load(x_ptr + place[:, None] * stride_xs + cols[None, :], mask=valid, other=0.0).to(tl.float32)
            if CENTER:
                xhat -= tl.load(statistics_ptr + 2 * plane + row, mask=inside, other=0.0)[:, None]
            xhat = tl.where(valid, xhat * rstd[:, None], 0.0)
            error = _error_rows(error_ptr, row, first, inside, DIM, BLOCK_D)
            if WEIGHT:
                dweight = tl.dot(tl.trans(error), (xhat * (scale * ratio)[None, :]).to(error.dtype), dweight,
                                 input_precision=PRECISION)
            if HIDDEN or SCALE:  # then there is one tile of D, or the others come here: first is 0
                dy = tl.dot(error, weight, input_precision=PRECISION)
                for other in range(BLOCK_D, DIM, BLOCK_D):
                    dy = tl.dot(_error_rows(error_ptr, row, other, inside, DIM, BLOCK_D),
                                _head(weight_ptr, other, cols, C, DIM, BLOCK_D).to(weight.dtype), dy,
                                input_precision=PRECISION)
                if SCALE:
                    dscale += dy * xhat
                if HIDDEN:
                    dx = dy * scale[None, :] - xhat * tl.load(
                        statistics_ptr + plane + row, mask=inside, other=0.0
                    )[:, None]
                    if CENTER:
                        dx -= tl.load(statistics_ptr + 3 * plane + row, mask=inside, other=0.0)[:, None]
                    dx *= (k * rstd)[:, None]
                    tl.store(dx_ptr + place[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=valid)
        slot = chunk.to(tl.int64) + n + 1
        if SCALE:
            tl.store(parts_ptr + slot * C + cols, k * tl.sum(dscale, 0), mask=cols < C)
        if BASE and tl.program_id(0) == 0:
            dbase = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for at in range(start, stop, BLOCK_R):
                row = at + tl.arange(0, BLOCK_R)
                dbase += _error_rows(error_ptr, row, first, row < stop, DIM, BLOCK_D).to(tl.float32)
            tl.store(base_parts_ptr + slot * DIM + d, k * tl.sum(dbase, 0), mask=d < DIM)
    if WEIGHT:
        tl.store(dweight_ptr + (chunk.to(tl.int64) * DIM + d[:, None]) * C + cols[None, :], dweight,
                 mask=(d < DIM)[:, None] & (cols < C)[None, :])


@triton.jit
def _factor(dloss_ptr, loss_weight_ptr, offsets_ptr, n, images, tokens, DIM: tl.constexpr):
    """k of the images `n`, 0 of one without rows, whose dloss and weight may hold anything."""
    count = n * 0 + tokens
    if offsets_ptr is not None:
        count = (tl.load(offsets_ptr + n + 1, mask=n < images, other=0)
                 - tl.load(offsets_ptr + n, mask=n < images, other=0))
    some = (n < images) & (count > 0)
    k = tl.load(dloss_ptr + n, mask=some, other=0.0) * 2.0 / (tl.maximum(count, 1).to(tl.float32) * DIM)
    if loss_weight_ptr is not None:
        k *= tl.load(loss_weight_ptr + n, mask=some, other=0.0)
    return k


@triton.jit(do_not_specialize=["dloss_ptr", "loss_weight_ptr", "offsets_ptr", "k_ptr", "ratio_ptr", "top_ptr",
                               "starts_ptr", "images", "tokens"])
def _head_loss_factors(dloss_ptr, loss_weight_ptr, offsets_ptr, k_ptr, ratio_ptr, top_ptr, starts_ptr, images, tokens,
                       DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write k and its ratio to the largest |k|, that, and where each image begins, the first twice; one program."""
    top = tl.full([], 1.1754943508222875e-38, tl.float32)  # the least normal number: then the ratios are 0
    for first in range(0, images + 1, BLOCK):
        n = first + tl.arange(0, BLOCK)
        k = _factor(dloss_ptr, loss_weight_ptr, offsets_ptr, n, images, tokens, DIM)
        tl.store(k_ptr + n, k, mask=n < images)
        top = tl.maximum(top, tl.max(tl.abs(k)))
        start = n * tokens if offsets_ptr is None else tl.load(offsets_ptr + n, mask=n <= images, other=0)
        tl.store(starts_ptr + n + 1, start, mask=n <= images)
        tl.store(starts_ptr + n, start, mask=n == 0)
    tl.store(top_ptr, top)
    for first in range(0, images, BLOCK):
        n = first + tl.arange(0, BLOCK)
        k = _factor(dloss_ptr, loss_weight_ptr, offsets_ptr, n, images, tokens, DIM)
        tl.store(ratio_ptr + n, k / top, mask=n < images)


def forward(
    hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, base: Tensor | None, x0: Tensor, x0_factor: Tensor,
    eps_factor: Tensor, loss_weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None,
    channels: int, patch: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each image's loss (N,), the error (P, D) in hidden's dtype, and the patches' statistics (2 or 4, P).

    The statistics are 1 / std and along, and of a layer norm also mean and level.
    """
    rows, (dim, width) = len(places), weight.shape
    loss, error = x0_factor.new_empty(x0_factor.shape), hidden.new_empty(rows, dim)
    statistics = hidden.new_empty(4 if center else 2, rows, dtype=torch.float32)
    if loss.numel() == 0 or rows * dim == 0:
        return loss.zero_(), error.zero_(), statistics.zero_()
    hidden, scale, weight = columns_together(hidden), columns_together(scale), weight.contiguous()
    places, base, x0, x0_factor, eps_factor = dense(places, base, x0, x0_factor, eps_factor)
    loss_weight, seed, offsets, columns = dense(loss_weight, seed, offsets, columns)
    with torch.autocast(hidden.device.type, enabled=False):
        ws = (1 + scale.float()) @ weight.to(hidden.dtype).float().T if center else x0_factor
    sums = x0_factor.new_empty(rows)
    pointers, numbers, constants = geometry(x0, offsets, columns, patch)
    launch = config(FORWARD, hidden.element_size())
    _head_loss_fwd[(cdiv(rows, launch.block_m),)](
        hidden,
        places,
        scale,
        weight,
        x0_factor if base is None else base,
        ws,
        x0,
        x0_factor,
        eps_factor,
        seed,
        *pointers,
        error,
        statistics,
        sums,
        len(x0_factor),
        rows,
        *numbers,
        len(hidden),
        eps,
        hidden.stride(0),
        scale.stride(0),
        C=width,
        CENTER=center,
        BASE=base is not None,
        GUESS=width if hidden.dtype == torch.float16 else min(width, PILOT * launch.block_n),  # half has no room
        **constants,
        **tile(dim, hidden.element_size()),
        BLOCK_R=launch.block_m,
        BLOCK_C=launch.block_n,
        AWAITED=not INTERPRET and awaited(architecture(hidden.device), hidden.element_size()),
        PRECISION=dot_precision(hidden),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **ROUNDED_PRODUCTS,
    )
    _diffusion_loss_images[(len(x0_factor),)](sums, x0_factor if loss_weight is None else loss_weight, pointers[0],
                                              loss, rows_of_one_size(x0, patch), SEARCH=offsets is not None,
                                              WEIGHT=loss_weight is not None, DIM=dim, BLOCK=BLOCK, num_warps=4)
    return loss, error, statistics


def backward(
    dloss: Tensor, hidden: Tensor, places: Tensor, scale: Tensor, weight: Tensor, loss_weight: Tensor | None,
    offsets: Tensor | None, error: Tensor, statistics: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, scale, weight and base, empty where not `wanted`."""
    images, rows, (dim, width) = len(dloss), len(places), weight.shape
    of_hidden, of_scale, of_weight, of_base = wanted
    dhidden = hidden.new_zeros(hidden.shape if of_hidden else 0)
    if images * rows * dim == 0:
        return (dhidden, scale.new_zeros(scale.shape if of_scale else 0),
                weight.new_zeros(weight.shape if of_weight else 0), dloss.new_zeros((images, dim) if of_base else 0))
    hidden, scale, weight = columns_together(hidden), columns_together(scale), weight.contiguous()
    dloss, places, loss_weight = dense(dloss, places, loss_weight)
    offsets, error, statistics = dense(offsets, error, statistics)
    k, ratio, top = dloss.new_empty(images), dloss.new_empty(images), dloss.new_empty(1)
    starts = places.new_empty(images + 2, dtype=torch.int32)
    _head_loss_factors[(1,)](dloss, loss_weight, offsets, k, ratio, top, starts, images, rows // images, DIM=dim,
                             BLOCK=BLOCK, num_warps=4)
    offsets = starts[1:]
    launch, constants = config(BACKWARD, hidden.element_size()), tile(dim, hidden.element_size())
    count, span = chunks(rows, dim, width, hidden.element_size())
    slots = count + images + 2
    parts, base_parts = (dloss.new_empty((slots, width) if of_scale else 0),
                         dloss.new_empty((slots, dim) if of_base else 0))
    dweight = dloss.new_empty((count, dim, width) if of_weight else 0)
    layers, flags = (cdiv(dim, constants["BLOCK_D"]),
                     {"HIDDEN": of_hidden, "SCALE": of_scale, "WEIGHT": of_weight, "BASE": of_base})
    off = dict.fromkeys(flags, False)
    rounds = ([(1, flags)]
              if layers == 1
              else [(1, off | {n: flags[n] for n in ("HIDDEN", "SCALE")}),
                    (layers, off | {n: flags[n] for n in ("WEIGHT", "BASE")})])
    for depth, part in rounds:
        if any(part.values()):
            _head_loss_bwd[(cdiv(width, launch.block_n), count, depth)](
                k, ratio, hidden, places, scale, weight, offsets, error, statistics, dhidden, parts, base_parts,
                dweight, images, rows,
                len(offsets).bit_length(), len(hidden), span, hidden.stride(0), scale.stride(0), C=width,
                CENTER=len(statistics) == 4, **part, **constants,
                BLOCK_R=launch.block_m, BLOCK_C=launch.block_n, PRECISION=dot_precision(hidden),
                num_warps=launch.num_warps, num_stages=launch.num_stages)
    dscale, dbase = (_of_images(x, starts, images, span) if wanted else x
                     for x, wanted in ((parts, of_scale), (base_parts, of_base)))
    dweight = dweight.sum(0) * top if of_weight else dweight
    return dhidden, dscale.to(scale.dtype, copy=True), dweight.to(weight.dtype), dbase.clone()


def _of_images(parts: Tensor, starts: Tensor, images: int, span: int) -> Tensor:
    """Sum `parts` (slots, C) per image, chunk by chunk: (N, C)."""
    width = parts.shape[1]
    sums = parts.new_empty(images + 1, width)
    _norm_bwd_images[(images + 1, cdiv(width, IMAGES.block_n), 1)](
        parts, starts, sums, images, 0, span, len(parts), C=width, BLOCK_M=IMAGES.block_m, BLOCK=IMAGES.block_n,
        num_warps=IMAGES.num_warps)
    return sums[1:]
