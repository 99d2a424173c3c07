"""Out of the backbone: patches predicted from hidden states, and the diffusion loss of what is predicted."""
from torch import Tensor, nn

from tfkernels import diffusion_loss, modulated_layer_norm, modulated_layer_norm_diffusion_loss
from transfusion.model.image_layers.embedding import ZeroLinear
from transfusion.sequence import ImageLayout


class ImageHead(nn.Module):
    """What every head does: `forward` predicts patches, `loss` compares them with the objective's target."""

    def forward(self, x: Tensor, condition: Tensor, layout: ImageLayout, skips: list) -> Tensor:
        """Hidden states (P, C) of the patches -> predictions (P, patch_dim).

        condition is (N, C); skips are what the image layers in front sent past the decoder.
        """
        raise NotImplementedError

    def loss(self, hidden: Tensor, places: Tensor, condition: Tensor, layout: ImageLayout, skips: list, x0: Tensor,
             p: Tensor, q: Tensor, seed: Tensor | int) -> Tensor:
        """Mean squared error of each image (N,) between predictions and target, p * x0 + q * eps.

        The predictions are those of the places (P,) in hidden (T, C); p and q are (N,).
        """
        prediction = self(hidden[places], condition, layout, skips)
        return diffusion_loss(prediction, x0, p, q, None, seed, offsets=layout.offsets)


class LinearHead(ImageHead):
    """One linear layer (the paper)."""

    def __init__(self, config, hidden: int):
        super().__init__()
        self.linear = ZeroLinear(hidden, config.patch_dim)

    def forward(self, x: Tensor, condition: Tensor, layout: ImageLayout, skips: list) -> Tensor:
        """As `ImageHead.forward`."""
        return self.linear(x)


class DiTHead(ImageHead):
    """Linear((1 + scale(t)) * norm(x) + shift(t)): the timestep modulates the norm (DiT, arXiv:2212.09748)."""

    def __init__(self, config, hidden: int):
        super().__init__()
        self.modulation = ZeroLinear(hidden, 2 * hidden)
        self.linear = ZeroLinear(hidden, config.patch_dim)

    def forward(self, x: Tensor, condition: Tensor, layout: ImageLayout, skips: list) -> Tensor:
        """As `ImageHead.forward`."""
        shift, scale = self.tables(condition)
        return self.linear(modulated_layer_norm(x, None, None, scale, shift, layout.image_ids))

    def loss(self, hidden: Tensor, places: Tensor, condition: Tensor, layout: ImageLayout, skips: list, x0: Tensor,
             p: Tensor, q: Tensor, seed: Tensor | int) -> Tensor:
        """As `ImageHead.loss`; the predictions are not stored."""
        shift, scale = self.tables(condition)
        return modulated_layer_norm_diffusion_loss(
            hidden, places, scale=scale, shift=shift, weight=self.linear.weight, bias=self.linear.bias, x0=x0, p=p, q=q,
            loss_weight=None, seed=seed, offsets=layout.offsets)

    def tables(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and scale, (N, C) each."""
        return self.modulation(nn.functional.silu(condition)).chunk(2, -1)
