"""Kernels of `diffusion_loss`: each row's sum of squares, each image's sum of its rows in a fixed order, the gradient.

There are no atomics: results are equal to the bit each time, whatever else is in the batch.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import ROUNDED_PRODUCTS, cdiv
from tfkernels._library import INTERPRET
from tfkernels.patches.philox import philox_normal
from tfkernels.patches.triton.layout import SCALAR_ARGUMENTS, addresses, dense, geometry, locate, tile

BLOCK = 16 if INTERPRET else 1024  # rows' sums that a program adds at a time
ROW_REGISTERS = {"tokens": 96}     # of a thread at most, by layout: left alone, ptxas spills on Triton 3.7.1, sm_100


@triton.jit
def _difference(prediction_ptr, x_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, columns_ptr, row, first, image, start,
                count, inside, rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                LAYOUT: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """prediction - target (R, BLOCK_D) float32, 0 outside, where its elements lie and which exist."""
    d = first + tl.arange(0, BLOCK_D)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc,
                          stride_xh, stride_xw, LAYOUT, PATCH, DIM)
    x = tl.load(x_ptr + at, mask=valid, other=0).to(tl.float32)
    x0_factor = tl.load(x0_factor_ptr + image, mask=inside, other=0)
    eps_factor = tl.load(eps_factor_ptr + image, mask=inside, other=0)
    target = x0_factor[:, None] * x + eps_factor[:, None] * philox_normal(seed_ptr, image, row - start, first, BLOCK_D)
    own = row[:, None].to(tl.int64) * DIM + d[None, :]
    valid = inside[:, None] & (d < DIM)[None, :]
    prediction = tl.load(prediction_ptr + own, mask=valid, other=0).to(tl.float32)
    return tl.where(valid, prediction - target, 0.0), own


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _diffusion_loss_rows(prediction_ptr, x_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, offsets_ptr, columns_ptr,
                         sums_ptr, images, rows, steps, grid_rows, grid_columns, stride_xn, stride_xc, stride_xh,
                         stride_xw,
                         LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        error, _ = _difference(prediction_ptr, x_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, columns_ptr, row, first,
                               image, start, count, inside, rows, grid_columns, stride_xn, stride_xc, stride_xh,
                               stride_xw, LAYOUT, PATCH, DIM, BLOCK_D)
        total += tl.sum(error * error, 1)
    tl.store(sums_ptr + row, total, mask=row < rows)


@triton.jit(do_not_specialize=["weight_ptr", "offsets_ptr", "tokens"])
def _diffusion_loss_images(sums_ptr, weight_ptr, offsets_ptr, loss_ptr, tokens,
                           SEARCH: tl.constexpr, WEIGHT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    start, end = n * tokens, n * tokens + tokens
    if SEARCH:
        start, end = tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    end = tl.maximum(start, end)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + row, mask=row < end, other=0)
    loss = tl.sum(total) / (tl.maximum(end - start, 1).to(tl.float32) * DIM)
    if WEIGHT:
        loss *= tl.load(weight_ptr + n, mask=end > start, other=0.0)  # of an image without rows it may hold anything
    tl.store(loss_ptr + n, loss)


@triton.jit(do_not_specialize=[*SCALAR_ARGUMENTS, "dloss_ptr", "weight_ptr"])
def _diffusion_loss_bwd(dloss_ptr, weight_ptr, prediction_ptr, x_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr,
                        offsets_ptr, columns_ptr, dprediction_ptr, images, rows, steps, grid_rows, grid_columns,
                        stride_xn, stride_xc, stride_xh, stride_xw,
                        WEIGHT: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr,
                        DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row, first = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    error, own = _difference(prediction_ptr, x_ptr, x0_factor_ptr, eps_factor_ptr, seed_ptr, columns_ptr, row, first,
                             image, start, count, inside, rows, grid_columns, stride_xn, stride_xc, stride_xh,
                             stride_xw, LAYOUT, PATCH, DIM, BLOCK_D)
    scale = tl.load(dloss_ptr + image, mask=inside, other=0) * 2.0 / (count.to(tl.float32) * DIM)
    if WEIGHT:
        scale *= tl.load(weight_ptr + image, mask=inside, other=0)
    d = first + tl.arange(0, BLOCK_D)
    tl.store(dprediction_ptr + own, (scale[:, None] * error).to(dprediction_ptr.dtype.element_ty),
             mask=(row < rows)[:, None] & (d < DIM)[None, :])


def rows_of_one_size(x0: Tensor, patch: int) -> int:
    """Rows of each image where all have one size."""
    return x0.shape[2] // patch * (x0.shape[3] // patch) if x0.ndim == 4 else 0


def forward(prediction: Tensor, x0: Tensor, x0_factor: Tensor, eps_factor: Tensor, weight: Tensor | None, seed: Tensor,
            offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """Launch the kernels of the loss: each row's sum, then each image's; (N,)."""
    loss, (rows, dim) = x0_factor.new_empty(x0_factor.shape), prediction.shape
    sums = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    if loss.numel() == 0 or rows * dim == 0:
        return loss.zero_()
    prediction, x0, x0_factor, eps_factor, weight, seed, offsets, columns = dense(prediction, x0, x0_factor, eps_factor,
                                                                                  weight, seed, offsets, columns)
    pointers, numbers, constants = geometry(x0, offsets, columns, patch)
    constants |= tile(dim)
    _diffusion_loss_rows[(cdiv(rows, constants["BLOCK_R"]),)](prediction, x0, x0_factor, eps_factor, seed,
                                                                     *pointers, sums, len(x0_factor), rows, *numbers,
                                                                     **constants, num_warps=4,
                                                                     maxnreg=ROW_REGISTERS.get(constants["LAYOUT"]),
                                                                     **ROUNDED_PRODUCTS)
    _diffusion_loss_images[(len(x0_factor),)](sums, x0_factor if weight is None else weight, pointers[0], loss,
                                              rows_of_one_size(x0, patch), SEARCH=offsets is not None,
                                              WEIGHT=weight is not None, DIM=dim, BLOCK=BLOCK, num_warps=4)
    return loss


def backward(dloss: Tensor, prediction: Tensor, x0: Tensor, x0_factor: Tensor, eps_factor: Tensor,
             weight: Tensor | None, seed: Tensor, offsets: Tensor | None, columns: Tensor | None, channels: int,
             patch: int) -> Tensor:
    """Launch the kernel of the gradient of the prediction."""
    dprediction, (rows, dim) = prediction.new_empty(prediction.shape), prediction.shape
    if len(x0_factor) == 0 or rows * dim == 0:
        return dprediction.zero_()
    dloss, prediction, x0, x0_factor, eps_factor, weight = dense(dloss, prediction, x0, x0_factor, eps_factor, weight)
    seed, offsets, columns = dense(seed, offsets, columns)
    pointers, numbers, constants = geometry(x0, offsets, columns, patch)
    constants |= tile(dim)
    grid = cdiv(rows, constants["BLOCK_R"]), cdiv(dim, constants["BLOCK_D"])
    _diffusion_loss_bwd[grid](dloss, x0_factor if weight is None else weight, prediction, x0, x0_factor, eps_factor,
                              seed, *pointers, dprediction, len(x0_factor), rows, *numbers, WEIGHT=weight is not None,
                              **constants, num_warps=4)
    return dprediction
