"""The diffusion loss of each image against a target that is never in memory: its noise is drawn again from the seed.

    target = p_n * x0 + q_n * eps           eps: Philox's, the one that `noise_patchify` added (see there)
    loss_n = weight_n / (T_n D) * sum over n's T_n rows and D elements of (prediction - target)^2
    dprediction = dloss_n * weight_n * 2 / (T_n D) * (prediction - target)

The loss is Transfusion's (arXiv:2408.11039, equation 3). The coefficients p and q of clean image and noise say what the
model predicts: the noise eps is (p, q) = (0, 1), the image x0 is (1, 0), the velocity v is (-noise, signal) and the
flow is (-1, 1). The backward draws eps once more. The specification is in `reference.py`, the kernels are in
`triton/diffusion.py`.

Bytes that must move for E elements of e bytes:

    diffusion_loss   forward       backward
    ours             2 E e         3 E e
    plain PyTorch    9 E e + 8 E   3 E e + 8 E     forward: target 8 e; float32 difference and its square, kept, 8
"""
import math

import torch
from torch import Tensor

from tfkernels._arguments import need_tensors, shown
from tfkernels._library import register
from tfkernels.losses import cpu
from tfkernels.losses.triton import diffusion as kernels
from tfkernels.patches.latents import PackedLatents, check_constant, check_floating, check_per_image, source
from tfkernels.patches.philox import seed_tensor


def diffusion_loss(prediction: Tensor, x0: Tensor | PackedLatents, p: Tensor, q: Tensor, weight: Tensor | None,
                   seed: Tensor | int, *, patch_size: int | None = None, offsets: Tensor | None = None) -> Tensor:
    """Return each image's weight_n * mean of (prediction - (p_n * x0 + q_n * eps))^2; the caller averages or sums.

    Args:
        prediction: (P, D) tokens in float16, bfloat16 or float32 (float64 on CPU).
        x0: what `noise_patchify` was given: latents (N, C, H, W) with `patch_size`; `PackedLatents`; or clean tokens
            (P, D) with `offsets`. Its dtype need not be prediction's.
        p, q: (N,) the coefficients of the clean latent and of the noise in what the model predicts, the target
            p x0 + q eps: (0, 1) for the noise, (1, 0) for the clean latent, (-noise, signal) for the velocity v and
            (-1, 1) for the flow. Inside they are called x0_factor and eps_factor.
        weight: (N,), or None for 1; see `min_snr_weight`.
        seed: the int64 tensor or the int that `noise_patchify` was given.
        offsets: (N + 1,) int32, image n in the rows [offsets_n, offsets_n+1); rows outside count nowhere, whatever they
            hold. Offsets that do not fit are treated as `noise_patchify` treats them.

    Returns:
        (N,) float32 (float64 for float64), 0 for an image without rows, whatever its p, q and weight. Differentiable in
        prediction, in its dtype; deterministic.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also another argument that requires a
            gradient.
    """
    need_tensors("diffusion_loss", {"prediction": prediction})
    s = source("diffusion_loss", "x0", x0, patch_size, offsets)
    if prediction.shape != (s.rows, s.dim) or prediction.device != s.x.device:
        raise ValueError(f"diffusion_loss: prediction has shape {tuple(prediction.shape)} on {prediction.device} and "
                         f"x0 {s.rows} tokens of {s.dim} elements on {s.x.device}; ({s.rows}, {s.dim}) fits")
    check_floating("diffusion_loss", "prediction", prediction)
    check_constant("diffusion_loss", "x0", s.x)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, s.x.dtype), torch.float32)
    named = (("p", p), ("q", q)) + (() if weight is None else (("weight", weight),))
    p, q, *weights = (check_per_image("diffusion_loss", name, x, s.images, s.x.device, dtype) for name, x in named)
    seed = seed_tensor("diffusion_loss", seed, s.x.device)
    return _loss(prediction.contiguous(), s.x, p, q, weights[0] if weights else None, seed, s.offsets, s.columns,
                 s.channels, s.patch)


def min_snr_weight(signal: Tensor, noise: Tensor, p: Tensor, q: Tensor, gamma: float = 5.0) -> Tensor:
    """Return Min-SNR-gamma weights, SNR being (signal / noise)^2.

    With them the loss of any target is min(SNR, gamma) times the loss of x0:

        weight = min(signal^2, gamma * noise^2) / (p * noise - q * signal)^2

    x_t = signal * x0 + noise * eps is known to the model and target = p * x0 + q * eps, so that the target is
    (p - q * signal / noise) * x0 plus what x_t says. The weight is min(SNR, gamma) where x0 is predicted,
    min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v (arXiv:2303.09556, section 3.4); at the ends of
    the path it is their limit. All arguments are (N,) or of any shapes that broadcast.

    Raises:
        ValueError: gamma is not positive.
    """
    need_tensors("min_snr_weight", {"signal": signal, "noise": noise, "p": p, "q": q})
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
        raise ValueError(f"min_snr_weight: gamma is {shown(gamma)}; a positive number fits; the paper takes 5")
    determinant = (p * noise - q * signal).square()
    end = determinant == 0  # eps at signal 0, x0 at noise 0
    weight = torch.minimum(signal.square(), gamma * noise.square()) / torch.where(end, 1, determinant)
    limit = torch.where(p == 0, 1 / q.square(), gamma / p.square())
    return torch.where(end, limit, weight)


def _loss_fake(prediction, x0, x0_factor, eps_factor, weight, seed, offsets, columns, channels, patch):
    return x0_factor.new_empty(x0_factor.shape)


def _backward_fake(dloss, prediction, x0, x0_factor, eps_factor, weight, seed, offsets, columns, channels, patch):
    return prediction.new_empty(prediction.shape)


_loss = register("diffusion_loss", kernel=kernels.forward, cpu=cpu.diffusion_loss, fake=_loss_fake)
_backward = register("diffusion_loss_backward", kernel=kernels.backward, cpu=cpu.diffusion_loss_backward,
                     fake=_backward_fake)


def _save(ctx, inputs, output):
    *tensors, ctx.channels, ctx.patch = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dloss):
    return _backward(dloss.contiguous(), *ctx.saved_tensors, ctx.channels, ctx.patch), *(None,) * 9


_loss.register_autograd(_gradient, setup_context=_save)
