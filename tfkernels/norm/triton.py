"""Kernels of the modulated norms and gated residuals (`tfkernels.norm`): a forward and a backward.

Forward is one program per token: gate, add, statistics, normalise, modulate. A row wider than WIDEST_FORWARD is read in
blocks, once per statistic.

Backward walks the tokens sorted by image, `rows` of them per program, and adds up three rows in registers:

    a = sum dy * xhat,   b = sum dy,   g = sum dresidual * branch

It writes them when the image changes, into row program + image + 1 of `parts`. Along the sorted tokens both terms only
grow, and one of them grows at each write. So no two writes meet, and programs + N + 2 rows suffice. `_norm_bwd_images`
then sums each image's rows in order. What is left (dscale = weight a + bias b, dweight = sum over images (1 + scale) a,
...) is arithmetic on (N + 1, C) (both in `sums.py`). A row wider than WIDEST_BACKWARD has its two means taken first
(`_norm_bwd_means`) and is then split between programs. There are no atomics.

Without image ids (None, which Triton compiles as a constant) the tokens of batch row n are image n's: `row_len` of
them, in order, so that nothing is sorted and no id is read.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv, multiprocessors, next_power_of_2
from tfkernels._library import INTERPRET, made_once
from tfkernels.norm.sums import IMAGES, _norm_bwd_images, columns_together, contiguous

# read one number at a time, or a size: no reason to compile again (see `tfkernels.attention.triton.tiles`)
SCALAR_ARGUMENTS = ["image_ids_ptr", "order_ptr", "starts_ptr", "mean_ptr", "rstd_ptr", "means_ptr", "images",
                    "row_len", "tokens", "rows", "slots"]
# columns that one block holds; small in the interpreter, so that tests reach the loops
WIDEST_FORWARD = 64 if INTERPRET else 8192
WIDEST_BACKWARD = 64 if INTERPRET else 4096
# Programs of the backward kernel for a block of columns, at most. Each writes a row of partial sums of text and of each
# of its images, and one program adds all of text's. Few where rows are wide, which a multiprocessor holds few of.
PROGRAMS = 1024
FEWEST_ROWS = 3 if INTERPRET else 8          # tokens of one of them at least
FORWARD_WARPS = {64: 1, 128: 1, 256: 1, 512: 2, 1024: 4, 2048: 4, 4096: 8, 8192: 16}  # by the block of columns
# twice as many of 512, 1024, half as many of 4096 spill
BACKWARD_WARPS = {64: 1, 128: 1, 256: 1, 512: 1, 1024: 2, 2048: 4, 4096: 16}
# Of a thread of the backward, at most: all that 16 warps leave it. ptxas of Triton 3.7.1 would take 64 for sm_90, and
# spill, though one program of them is all that a multiprocessor is given.
BACKWARD_REGISTERS = {4096: 128}
# programs of the backward kernel that a multiprocessor's registers hold at once, by the block of columns
RESIDENT = {64: 16, 128: 16, 256: 16, 512: 14, 1024: 6, 2048: 3, 4096: 1}


def forward_config(width: int) -> Config:
    """Return the rows (1), columns, warps and stages of a forward program for rows of `width`."""
    block = min(max(next_power_of_2(width), 64), WIDEST_FORWARD)
    return Config(1, block, FORWARD_WARPS[block], 2)


def backward_config(width: int) -> Config:
    """Return the same for both kernels of the backward pass."""
    block = min(max(next_power_of_2(width), 64), WIDEST_BACKWARD)
    return Config(1, block, BACKWARD_WARPS[block], 2, BACKWARD_REGISTERS.get(block))


def backward_rows(tokens: int, width: int, multiprocessors: int) -> tuple[int, int]:
    """Return the rows of a program of the backward kernel, and how many programs share the tokens.

    They all run at once, where FEWEST_ROWS and PROGRAMS allow: more would write more partial sums and leave the last
    wave unfilled.
    """
    block = backward_config(width).block_n
    programs = min(PROGRAMS, max(1, multiprocessors * RESIDENT[block] // cdiv(width, block)))
    rows = max(FEWEST_ROWS, cdiv(tokens, programs))
    return rows, cdiv(tokens, rows)


@triton.jit
def _image(image_ids_ptr, row, row_len):
    """The image of a token."""
    return row // row_len if image_ids_ptr is None else tl.load(image_ids_ptr + row).to(tl.int64)


@triton.jit
def _of_image(ptr, n, images, stride, cols, text, C: tl.constexpr):
    """Row n of a table (images, C) in float32; `text` for a token of no image."""
    return tl.load(
        ptr + n * stride + cols, mask=cols < tl.where((n >= 0) & (n < images), C, 0), other=text
    ).to(tl.float32)


@triton.jit
def _stream(x_ptr, branch_ptr, gate_ptr, n, images, stride_gn, cols, inside, C: tl.constexpr, GATED: tl.constexpr):
    """x, or x + gate * branch rounded as it is stored: what the norm sees."""
    x = tl.load(x_ptr + cols, mask=inside, other=0.0)
    if GATED:
        gate = tl.where(n < images, _of_image(gate_ptr, n, images, stride_gn, cols, 1.0, C), float("nan"))
        branch = tl.load(branch_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + gate * branch).to(x.dtype)
    return x


@triton.jit
def _modulate(y_ptr, xhat, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, images, stride_cn, stride_fn, cols, inside,
              C: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr):
    if WEIGHT:
        xhat *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        xhat += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = xhat * (1 + _of_image(scale_ptr, n, images, stride_cn, cols, 0.0, C))
    if SHIFT:
        y += _of_image(shift_ptr, n, images, stride_fn, cols, 0.0, C)
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _norm_fwd(x_ptr, branch_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, image_ids_ptr, out_ptr, y_ptr,
              mean_ptr, rstd_ptr, images, row_len, eps, stride_xs, stride_bs, stride_gn, stride_cn, stride_fn,
              C: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
              BIAS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = _image(image_ids_ptr, row, row_len)
    x_ptr += row * stride_xs
    branch_ptr += row * stride_bs
    out_ptr += row * C
    y_ptr += row * C
    mean = 0.0
    if C <= BLOCK:
        cols = tl.arange(0, BLOCK)
        inside = cols < C
        x = _stream(x_ptr, branch_ptr, gate_ptr, n, images, stride_gn, cols, inside, C, GATED)
        if GATED:
            tl.store(out_ptr + cols, x, mask=inside)
        if NORM:
            x = x.to(tl.float32)
            if CENTER:
                mean = tl.sum(x) / C
                x = tl.where(inside, x - mean, 0.0)
            rstd = tl.where(n < images, tl.rsqrt(tl.sum(x * x) / C + eps), float("nan"))
            _modulate(y_ptr, x * rstd, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, images, stride_cn, stride_fn,
                      cols, inside, C, WEIGHT, BIAS, SHIFT)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < C
            x = _stream(x_ptr, branch_ptr, gate_ptr, n, images, stride_gn, cols, inside, C, GATED)
            if GATED:
                tl.store(out_ptr + cols, x, mask=inside)
            x = x.to(tl.float32)
            total += x if CENTER else x * x
        if NORM:
            if CENTER:
                mean = tl.sum(total) / C
                total = tl.zeros([BLOCK], tl.float32)
                for start in range(0, C, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    inside = cols < C
                    x = _stream(
                        x_ptr, branch_ptr, gate_ptr, n, images, stride_gn, cols, inside, C, GATED
                    ).to(tl.float32)
                    total += tl.where(inside, (x - mean) * (x - mean), 0.0)
            rstd = tl.where(n < images, tl.rsqrt(tl.sum(total) / C + eps), float("nan"))
            for start in range(0, C, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = cols < C
                x = _stream(x_ptr, branch_ptr, gate_ptr, n, images, stride_gn, cols, inside, C, GATED).to(tl.float32)
                _modulate(y_ptr, (x - mean) * rstd, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, images, stride_cn,
                          stride_fn, cols, inside, C, WEIGHT, BIAS, SHIFT)
    if NORM:
        tl.store(rstd_ptr + row, rstd)
        if CENTER:
            tl.store(mean_ptr + row, mean)


@triton.jit
def _normed(dy_ptr, x_ptr, weight_ptr, scale_ptr, n, images, stride_cn, mean, rstd, cols, inside,
            C: tl.constexpr, WEIGHT: tl.constexpr):
    """dy, xhat and the gradient of xhat, in float32, 0 behind the row's end."""
    dy = tl.load(dy_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32) - mean) * rstd, 0.0)
    dxhat = dy * (1 + _of_image(scale_ptr, n, images, stride_cn, cols, 0.0, C))
    if WEIGHT:
        dxhat *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return dy, xhat, dxhat


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _norm_bwd_means(dy_ptr, x_ptr, weight_ptr, scale_ptr, image_ids_ptr, mean_ptr, rstd_ptr, means_ptr, images, row_len,
                    tokens, stride_ds, stride_xs, stride_cn,
                    C: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = _image(image_ids_ptr, row, row_len)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else 0.0
    along, level = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        _, xhat, dxhat = _normed(dy_ptr + row * stride_ds, x_ptr + row * stride_xs, weight_ptr, scale_ptr, n, images,
                                 stride_cn, mean, rstd, cols, cols < C, C, WEIGHT)
        along += dxhat * xhat
        level += dxhat
    tl.store(means_ptr + row, tl.sum(along) / C)
    if CENTER:
        tl.store(means_ptr + tokens + row, tl.sum(level) / C)


@triton.jit
def _write_parts(parts_ptr, slot, plane, a, b, g, cols, inside,
                 C: tl.constexpr, NORM: tl.constexpr, LEVEL: tl.constexpr, GATED: tl.constexpr):
    parts_ptr += slot * C + cols
    if NORM:
        tl.store(parts_ptr, a, mask=inside)
        if LEVEL:
            tl.store(parts_ptr + plane, b, mask=inside)
    if GATED:
        tl.store(parts_ptr + (NORM + LEVEL) * plane, g, mask=inside)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _norm_bwd(dy_ptr, dout_ptr, x_ptr, branch_ptr, gate_ptr, weight_ptr, scale_ptr, image_ids_ptr, order_ptr, mean_ptr,
              rstd_ptr, means_ptr, dx_ptr, dbranch_ptr, parts_ptr, images, row_len, tokens, rows, slots, stride_ds,
              stride_os, stride_xs, stride_bs, stride_gn, stride_cn,
              C: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
              LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = program * rows
    plane = slots.to(tl.int64) * C
    current = _image(image_ids_ptr, first, row_len)
    a, b, g = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(first, tl.minimum(first + rows, tokens)):
        row = i if order_ptr is None else tl.load(order_ptr + i).to(tl.int64)
        n = _image(image_ids_ptr, i, row_len)
        if n != current:
            _write_parts(parts_ptr, program + current + 1, plane, a, b, g, cols, inside, C, NORM, LEVEL, GATED)
            a, b, g = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            current = n
        dx = tl.zeros([BLOCK], tl.float32)
        if NORM:
            rstd = tl.load(rstd_ptr + row)
            mean = tl.load(mean_ptr + row) if CENTER else 0.0
            dy, xhat, dxhat = _normed(dy_ptr + row * stride_ds, x_ptr + row * stride_xs, weight_ptr, scale_ptr, n,
                                      images, stride_cn, mean, rstd, cols, inside, C, WEIGHT)
            a += dy * xhat
            if LEVEL:
                b += dy
            along = tl.sum(dxhat * xhat) / C if C <= BLOCK else tl.load(means_ptr + row)
            dx = dxhat - xhat * along
            if CENTER:
                dx -= tl.sum(dxhat) / C if C <= BLOCK else tl.load(means_ptr + tokens + row)
            dx *= rstd
        if GATED:
            dx += tl.load(dout_ptr + row * stride_os + cols, mask=inside, other=0.0).to(tl.float32)
            gate = tl.where(n < images, _of_image(gate_ptr, n, images, stride_gn, cols, 1.0, C), float("nan"))
            tl.store(dbranch_ptr + row * C + cols, (dx * gate).to(dbranch_ptr.dtype.element_ty), mask=inside)
            g += dx * tl.load(branch_ptr + row * stride_bs + cols, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            tl.store(dx_ptr + row * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    _write_parts(parts_ptr, program + current + 1, plane, a, b, g, cols, inside, C, NORM, LEVEL, GATED)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, image_ids: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out = x + gate branch, its modulated norm, mean and 1 / std.

    Without `branch` there is no out, and without `scale` no norm: empty tensors instead.
    """
    gated, norm = branch is not None, scale is not None
    width, tokens, table = x.shape[-1], x.shape[:-1].numel(), scale if norm else gate
    row_len = _row_len(x, image_ids)
    out, y = (x.new_empty(x.shape if wanted else 0) for wanted in (gated, norm))
    rstd, mean = (x.new_empty(x.shape[:-1] if wanted else 0, dtype=torch.float32)
                  for wanted in (norm, norm and center))
    if tokens:
        (x, stride_xs), (branch, stride_bs) = _rows(x), _rows(branch)
        gate, scale, shift = columns_together(gate), columns_together(scale), columns_together(shift)
        launch = forward_config(width)
        _norm_fwd[(tokens,)](
            x,
            *_or(x, branch, gate, contiguous(weight), contiguous(bias), scale, shift),
            contiguous(image_ids),
            out,
            y,
            mean,
            rstd,
            table.shape[0],
            row_len,
            eps,
            stride_xs,
            stride_bs,
            _stride(gate),
            _stride(scale),
            _stride(shift),
            C=width,
            GATED=gated,
            NORM=norm,
            CENTER=center,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            SHIFT=shift is not None,
            BLOCK=launch.block_n,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return out, y, mean, rstd


def backward(dy: Tensor | None, dout: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
             weight: Tensor | None, scale: Tensor | None, image_ids: Tensor | None, mean: Tensor, rstd: Tensor,
             center: bool, level: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dbranch and the sums a, b (with `level`) and g in float32, (kinds, N + 1, C), text first.

    x is what the norm saw.
    """
    gated, norm = branch is not None, scale is not None
    width, tokens, images = x.shape[-1], x.shape[:-1].numel(), (scale if norm else gate).shape[0]
    row_len = _row_len(x, image_ids)
    dx, dbranch = (x.new_empty(x.shape if norm else 0),
                   x.new_empty(x.shape, dtype=branch.dtype) if gated else x.new_empty(0))
    kinds = norm + (norm and level) + gated
    sums = x.new_empty(kinds, images + 1, width, dtype=torch.float32)
    if not tokens:
        return dx, dbranch, sums.zero_()
    launch = backward_config(width)
    rows, programs = backward_rows(tokens, width, multiprocessors(x.device))
    slots = programs + images + 2
    ordered, order, starts = (None,) * 3 if image_ids is None else made_once(sorted_tokens, image_ids, images=images)
    parts = x.new_empty(kinds, slots, width, dtype=torch.float32)
    (dy, stride_ds), (dout, stride_os), (x, stride_xs), (branch, stride_bs) = map(_rows, (dy, dout, x, branch))
    gate, scale = columns_together(gate), columns_together(scale)
    weight, mean, rstd = contiguous(weight), contiguous(mean), contiguous(rstd)
    stride_gn, stride_cn = _stride(gate), _stride(scale)
    options = {"BLOCK": launch.block_n, **launch.options}
    means = rstd
    if norm and width > launch.block_n:
        means = x.new_empty(1 + center, tokens, dtype=torch.float32)
        _norm_bwd_means[(tokens,)](dy, x, *_or(x, weight), scale, contiguous(image_ids), mean, rstd, means, images,
                                   row_len, tokens, stride_ds, stride_xs, stride_cn, C=width, CENTER=center,
                                   WEIGHT=weight is not None, **options)
    _norm_bwd[(programs, cdiv(width, launch.block_n))](
        *_or(x, dy, dout, x, branch, gate, weight, scale), ordered, order, mean, rstd, means, dx, dbranch, parts,
        images, row_len, tokens, rows, slots, stride_ds, stride_os, stride_xs, stride_bs, stride_gn, stride_cn,
        C=width, GATED=gated, NORM=norm, CENTER=center, WEIGHT=weight is not None, LEVEL=norm and level, **options)
    _norm_bwd_images[(images + 1, cdiv(width, IMAGES.block_n), kinds)](
        parts, starts, sums, images, row_len, rows, slots, C=width, BLOCK_M=IMAGES.block_m, BLOCK=IMAGES.block_n,
        num_warps=IMAGES.num_warps)
    return dx, dbranch, sums


def _row_len(x: Tensor, image_ids: Tensor | None) -> int | None:
    """Tokens of a batch row, where that is what tells a token's image."""
    return None if image_ids is not None else x.shape[1]


def sorted_tokens(image_ids: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids in ascending order, the tokens in that order, and where text and each image start in it."""
    ordered, order = image_ids.reshape(-1).clamp(-1, images).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(-1, images + 1, device=image_ids.device, dtype=image_ids.dtype),
                                out_int32=True)
    return ordered, order, starts


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Return (..., C) with the columns side by side and its rows evenly apart, and how far; a copy only where they are
    not."""
    if x is None:
        return None, 0
    if not x.is_contiguous():
        x = columns_together(x.reshape(-1, x.shape[-1]))
        return x, x.stride(0)
    return x, x.shape[-1]


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Pointers that no program follows still have to point at something."""
    return [stand_in if t is None else t for t in tensors]
