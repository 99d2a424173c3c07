"""The diffusion loss of each image against a target that is never in memory: its noise is made again from the seed.

    target = p_n * x0 + q_n * eps                                       eps: Philox's, the one that `noise_patchify` added (see there)
    loss_n = weight_n / (T_n D) * sum over n's T_n rows and D elements of (prediction - target)^2      (arXiv:2408.11039, equation 3)
    dprediction = dloss_n * weight_n * 2 / (T_n D) * (prediction - target)

One pass sums each row, a second each image's rows in a fixed order (no atomics: equal bits each time, whatever else is in the batch);
the backward makes eps once more. Four numbers per image say what is predicted: eps (p, q) = (0, 1), x0 (1, 0), v (-noise, signal),
flow (-1, 1). Bytes that must move, E elements of e bytes:

    op               forward           plain PyTorch                                         backward           plain PyTorch
    diffusion_loss   2 E e             E e + 12 E: products and sum of the target 8 e,       3 E e              3 E e, and 8 E
                                       float32 difference and its square 8, kept
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._arguments import need_tensors, shown
from tfkernels._library import INTERPRET, register
from tfkernels.patches.latents import (
    SCALAR_ARGUMENTS,
    PackedLatents,
    addresses,
    check_constant,
    check_floating,
    check_per_image,
    dense,
    geometry,
    locate,
    locate_reference,
    source,
    tile,
    uniform_offsets,
)
from tfkernels.patches.patchify import noise_reference, patchify_reference
from tfkernels.patches.philox import philox_normal, seed_tensor

BLOCK = 16 if INTERPRET else 1024  # rows' sums that a program adds at a time


def diffusion_loss(prediction: Tensor, x0: Tensor | PackedLatents, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor | int, *,
                   patch_size: int | None = None, offsets: Tensor | None = None) -> Tensor:
    """Return each image's weight_n * mean of (prediction - (p_n * x0 + q_n * eps))^2; the caller averages or sums.

    Args:
        prediction: (P, D) tokens in float16, bfloat16 or float32 (float64 on CPU).
        x0: what `noise_patchify` was given: latents (N, C, H, W) with `patch_size`; `PackedLatents`; or clean tokens (P, D) with
            `offsets`. Its dtype need not be prediction's.
        p, q: (N,) the target's share of x0 and of eps: `objective.target(t)`.
        weight: (N,), or None for 1; see `min_snr_weight`.
        seed: the int64 tensor (2,), [seed, offset], or the int that `noise_patchify` was given.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1); rows outside count nowhere, whatever they
            hold. Offsets that do not fit are treated as `noise_patchify` treats them.

    Returns:
        (N,) float32 (float64 for float64), 0 for an image without rows, whatever its p, q and weight. Differentiable in
        prediction, in its dtype; deterministic.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also another argument that requires a gradient.
    """
    need_tensors("diffusion_loss", {"prediction": prediction})
    s = source("diffusion_loss", "x0", x0, patch_size, offsets)
    if prediction.shape != (s.rows, s.dim) or prediction.device != s.x.device:
        raise ValueError(f"diffusion_loss: prediction has shape {tuple(prediction.shape)} on {prediction.device} and x0 {s.rows} tokens of {s.dim} elements "
                         f"on {s.x.device}; ({s.rows}, {s.dim}) fits")
    check_floating("diffusion_loss", "prediction", prediction)
    check_constant("diffusion_loss", "x0", s.x)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, s.x.dtype), torch.float32)
    named = (("p", p), ("q", q)) + (() if weight is None else (("weight", weight),))
    p, q, *weights = (check_per_image("diffusion_loss", name, x, s.images, s.x.device, dtype) for name, x in named)
    seed = seed_tensor("diffusion_loss", seed, s.x.device)
    return _loss(prediction.contiguous(), s.x, p, q, weights[0] if weights else None, seed, s.offsets, s.columns, s.channels, s.patch)


def diffusion_loss_reference(prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor, offsets: Tensor | None,
                             columns: Tensor | None, channels: int, patch: int) -> Tensor:
    """The specification in plain PyTorch, in prediction's dtype, with eps and the target in memory."""
    error, image, inside = _error(prediction, x0, p, q, seed, offsets, columns, channels, patch)
    rows = torch.where(inside, error.square().sum(-1), 0)
    counts = _counts(offsets, len(p), len(prediction), p.device).to(rows.dtype) * max(1, prediction.shape[1])
    sums = rows.new_zeros(len(p)).index_add(0, image, rows)
    loss = sums / counts.clamp(min=1)
    return loss if weight is None else torch.where(counts > 0, loss * weight.to(rows.dtype), 0)


def min_snr_weight(signal: Tensor, noise: Tensor, p: Tensor, q: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma: the weight that makes the loss of any target min(SNR, gamma) times that of x0, SNR = (signal / noise)^2.

        weight = min(signal^2, gamma * noise^2) / (p * noise - q * signal)^2

    because target = (p - q * signal / noise) * x0 + what x_t says. It is min(SNR, gamma) for x0, min(SNR, gamma) / SNR for eps and
    min(SNR, gamma) / (SNR + 1) for v (arXiv:2303.09556, section 3.4); at the ends of the path it is their limits. All arguments (N,) or any
    shapes that broadcast.

    Raises:
        ValueError: gamma is not positive.
    """
    need_tensors("min_snr_weight", {"signal": signal, "noise": noise, "p": p, "q": q})
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
        raise ValueError(f"min_snr_weight: gamma is {shown(gamma)}; a positive number fits; the paper takes 5")
    determinant = (p * noise - q * signal).square()
    end = determinant == 0                                                                 # eps at signal 0, x0 at noise 0
    weight = torch.minimum(signal.square(), gamma * noise.square()) / torch.where(end, 1, determinant)
    limit = torch.where(p == 0, 1 / q.square(), gamma / p.square())
    return torch.where(end, limit, weight)


def _error(prediction, x0, p, q, seed, offsets, columns, channels, patch):
    """(prediction - target) in prediction's dtype, each row's image, and whether it has one."""
    x0 = patchify_reference(x0, offsets, columns, channels, patch).to(prediction.dtype)
    image, eps = noise_reference(seed, offsets, len(p), *x0.shape, prediction.dtype)
    p, q = (v.to(prediction.dtype)[image][:, None] for v in (p, q))
    inside = torch.ones_like(image, dtype=torch.bool) if offsets is None else locate_reference(offsets, len(prediction))[2]
    return prediction - (p * x0 + q * eps), image, inside


def _counts(offsets, images, rows, device):
    """Rows of each image, (N,), at least 0."""
    return (uniform_offsets(images, rows, device) if offsets is None else offsets).diff().clamp(min=0)


@triton.jit
def _difference(prediction_ptr, x_ptr, p_ptr, q_ptr, seed_ptr, columns_ptr, row, first, image, start, count, inside, rows, grid_columns,
                stride_xn, stride_xc, stride_xh, stride_xw,
                LAYOUT: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """prediction - target (R, BLOCK_D) float32, 0 outside, where its elements lie and which exist."""
    d = first + tl.arange(0, BLOCK_D)
    at, valid = addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                          LAYOUT, PATCH, DIM)
    x = tl.load(x_ptr + at, mask=valid, other=0).to(tl.float32)
    p = tl.load(p_ptr + image, mask=inside, other=0)
    q = tl.load(q_ptr + image, mask=inside, other=0)
    target = p[:, None] * x + q[:, None] * philox_normal(seed_ptr, image, row - start, first, BLOCK_D)
    own = row[:, None].to(tl.int64) * DIM + d[None, :]
    valid = inside[:, None] & (d < DIM)[None, :]
    prediction = tl.load(prediction_ptr + own, mask=valid, other=0).to(tl.float32)
    return tl.where(valid, prediction - target, 0.0), own


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _diffusion_loss_rows(prediction_ptr, x_ptr, p_ptr, q_ptr, seed_ptr, offsets_ptr, columns_ptr, sums_ptr,
                         images, rows, steps, grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                         LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        error, _ = _difference(prediction_ptr, x_ptr, p_ptr, q_ptr, seed_ptr, columns_ptr, row, first, image, start, count, inside, rows, grid_columns,
                               stride_xn, stride_xc, stride_xh, stride_xw, LAYOUT, PATCH, DIM, BLOCK_D)
        total += tl.sum(error * error, 1)
    tl.store(sums_ptr + row, total, mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
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


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _diffusion_loss_bwd(dloss_ptr, weight_ptr, prediction_ptr, x_ptr, p_ptr, q_ptr, seed_ptr, offsets_ptr, columns_ptr, dprediction_ptr,
                        images, rows, steps, grid_rows, grid_columns, stride_xn, stride_xc, stride_xh, stride_xw,
                        WEIGHT: tl.constexpr, LAYOUT: tl.constexpr, SEARCH: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
                        BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row, first = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D
    image, start, count, inside = locate(row, offsets_ptr, images, steps, rows, grid_rows * grid_columns, SEARCH)
    error, own = _difference(prediction_ptr, x_ptr, p_ptr, q_ptr, seed_ptr, columns_ptr, row, first, image, start, count, inside, rows, grid_columns,
                             stride_xn, stride_xc, stride_xh, stride_xw, LAYOUT, PATCH, DIM, BLOCK_D)
    scale = tl.load(dloss_ptr + image, mask=inside, other=0) * 2.0 / (count.to(tl.float32) * DIM)
    if WEIGHT:
        scale *= tl.load(weight_ptr + image, mask=inside, other=0)
    d = first + tl.arange(0, BLOCK_D)
    tl.store(dprediction_ptr + own, (scale[:, None] * error).to(dprediction_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < DIM)[None, :])


def _tokens(x0: Tensor, patch: int) -> int:
    """Rows of each image where all have one size."""
    return x0.shape[2] // patch * (x0.shape[3] // patch) if x0.ndim == 4 else 0


def _loss_kernel(prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor, offsets: Tensor | None,
                 columns: Tensor | None, channels: int, patch: int) -> Tensor:
    loss, (rows, dim) = _loss_fake(prediction, x0, p, q, weight, seed, offsets, columns, channels, patch), prediction.shape
    sums = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    if loss.numel() == 0 or rows * dim == 0:
        return loss.zero_()
    prediction, x0, p, q, weight, seed, offsets, columns = dense(prediction, x0, p, q, weight, seed, offsets, columns)
    pointers, numbers, constants = geometry(x0, offsets, columns, patch)
    constants |= tile(dim)
    _diffusion_loss_rows[(triton.cdiv(rows, constants["BLOCK_R"]),)](prediction, x0, p, q, seed, *pointers, sums, len(p), rows, *numbers, **constants,
                                                                     num_warps=4)
    _diffusion_loss_images[(len(p),)](sums, p if weight is None else weight, pointers[0], loss, _tokens(x0, patch), SEARCH=offsets is not None,
                                      WEIGHT=weight is not None, DIM=dim, BLOCK=BLOCK, num_warps=4)
    return loss


def _backward_kernel(dloss: Tensor, prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor,
                     offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    dprediction, (rows, dim) = prediction.new_empty(prediction.shape), prediction.shape
    if len(p) == 0 or rows * dim == 0:
        return dprediction.zero_()
    dloss, prediction, x0, p, q, weight = dense(dloss, prediction, x0, p, q, weight)
    seed, offsets, columns = dense(seed, offsets, columns)
    pointers, numbers, constants = geometry(x0, offsets, columns, patch)
    constants |= tile(dim)
    grid = triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(dim, constants["BLOCK_D"])
    _diffusion_loss_bwd[grid](dloss, p if weight is None else weight, prediction, x0, p, q, seed, *pointers, dprediction, len(p), rows, *numbers,
                              WEIGHT=weight is not None, **constants, num_warps=4)
    return dprediction


def _loss_cpu(prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor, offsets: Tensor | None,
              columns: Tensor | None, channels: int, patch: int) -> Tensor:
    prediction = prediction.to(p.dtype)
    return diffusion_loss_reference(prediction, x0, p, q, weight, seed, offsets, columns, channels, patch).contiguous()


def _backward_cpu(dloss: Tensor, prediction: Tensor, x0: Tensor, p: Tensor, q: Tensor, weight: Tensor | None, seed: Tensor,
                  offsets: Tensor | None, columns: Tensor | None, channels: int, patch: int) -> Tensor:
    error, image, inside = _error(prediction.to(p.dtype), x0, p, q, seed, offsets, columns, channels, patch)
    scale = dloss * 2 / (_counts(offsets, len(p), len(prediction), p.device).clamp(min=1) * max(1, prediction.shape[1]))
    scale = scale if weight is None else scale * weight
    return torch.where(inside[:, None], scale[image][:, None] * error, 0).to(prediction.dtype).contiguous()


def _loss_fake(prediction, x0, p, q, weight, seed, offsets, columns, channels, patch):
    return p.new_empty(p.shape)


def _backward_fake(dloss, prediction, x0, p, q, weight, seed, offsets, columns, channels, patch):
    return prediction.new_empty(prediction.shape)


_loss = register("diffusion_loss", kernel=_loss_kernel, cpu=_loss_cpu, fake=_loss_fake)
_backward = register("diffusion_loss_backward", kernel=_backward_kernel, cpu=_backward_cpu, fake=_backward_fake)


def _save(ctx, inputs, output):
    *tensors, ctx.channels, ctx.patch = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dloss):
    return _backward(dloss.contiguous(), *ctx.saved_tensors, ctx.channels, ctx.patch), *(None,) * 9


_loss.register_autograd(_gradient, setup_context=_save)
