"""The two losses of a Transfusion: next tokens on text, denoising on images (arXiv:2408.11039, equation 4)."""
import torch
from torch import Tensor
from torch.nn import functional as F


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of (T, V) logits; 0 where there is no target."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))


def diffusion_loss(prediction: Tensor, target: Tensor, patch_image: Tensor, image_count: int) -> Tensor:
    """Squared error averaged within each image, so that every image counts the same: (N,)."""
    error = (prediction.float() - target.float()).square().mean(-1)                        # (P,)
    sums = error.new_zeros(2, image_count).index_add(1, patch_image, torch.stack([error, torch.ones_like(error)]))
    return sums[0] / sums[1].clamp(min=1)
