"""The two losses of a Transfusion: next tokens on text, denoising on images (arXiv:2408.11039, equation 4)."""
from torch import Tensor
from torch.nn import functional as F


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of (T, V) logits; 0 where there is no target."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))
