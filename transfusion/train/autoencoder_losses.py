"""The losses that an autoencoder is trained with (arXiv:2408.11039, appendix A).

    L = L_1 + L_perceptual + 0.5 L_GAN + 0.2 L_ID + 1e-6 L_KL

    L_1           mean |x - y|
    L_perceptual  sum over stages of mean over places of |f(x) - f(y)|^2, f of length 1 at each place: LPIPS
                  (arXiv:1801.03924, equation 1) in the stages of whatever classifier is named, with every weight 1
                  where the paper uses learned ones
    L_ID          mean |g(x) - g(y)| of a second model's pooled features (the paper: MoCo v2's)
    L_KL          KL(N(mean, std) || N(0, 1)), summed over a picture's latent
    L_GAN         -mean D(y), with the hinge loss of D, a patch discriminator (arXiv:1611.07004, section 3.2.2)

x are the pictures and y their reconstructions, both in [-1, 1].
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def reconstruction_loss(pictures: Tensor, drawn: Tensor) -> Tensor:
    """Mean absolute difference of (N, C, H, W) and (N, C, H, W)."""
    return (pictures - drawn).abs().mean()


def perceptual_loss(features, pictures: Tensor, drawn: Tensor) -> Tensor:
    """Squared distance of `features.stages`, each place's vector of length 1: a mean over places, a sum over stages."""
    with torch.no_grad():
        wanted = features.stages(pictures)
    stages = zip(wanted, features.stages(drawn))
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in stages)


def identity_loss(features, pictures: Tensor, drawn: Tensor) -> Tensor:
    """Mean absolute difference of `features.pooled`, (N, F)."""
    with torch.no_grad():
        wanted = features.pooled(pictures).float()
    return (wanted - features.pooled(drawn).float()).abs().mean()


def kl_loss(posterior) -> Tensor:
    """KL divergence of diffusers' DiagonalGaussianDistribution from N(0, 1): summed over a latent, then the mean."""
    return posterior.kl().mean()


def generator_loss(discriminator: nn.Module, drawn: Tensor) -> Tensor:
    """-mean D(y): what the autoencoder lowers to be taken for real."""
    return -discriminator(drawn).float().mean()


def discriminator_loss(discriminator: nn.Module, pictures: Tensor, drawn: Tensor) -> Tensor:
    """Hinge loss of the discriminator, (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2 (arXiv:1705.02894).

    `drawn` gets no gradient from it.
    """
    real, made = discriminator(pictures).float(), discriminator(drawn.detach()).float()
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


class PatchDiscriminator(nn.Sequential):
    """pix2pix's discriminator: `layers` 4x4 convolutions of stride 2, then two of stride 1.

    It gives a number for each patch of the picture, above 0 for real. With 3 layers each number sees 70x70 pixels,
    with 1 layer 16x16. Group norm stands in for batch norm, so that a picture gets the same number in any batch.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3):
        widths = [min(2 ** i, 8) * width for i in range(layers + 1)]
        blocks = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < layers else 1, padding=1, bias=False),
                       nn.GroupNorm(8, widths[i]), nn.LeakyReLU(0.2)]
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
