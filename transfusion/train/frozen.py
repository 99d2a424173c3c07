"""Weights that a language model keeps, in the numbers that autocast computes with.

Under autocast every linear layer multiplies by a bfloat16 copy of its weights; of weights that do not change it makes
one at each use. Such weights may be that copy from the start, which takes half the memory of float32 and no time for
copies. The losses and gradients stay what they were, to the bit.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.model.transfusion import Transfusion


class FrozenLinear(nn.Linear):
    """A linear layer with weights in bfloat16. Outside of autocast it computes in the numbers of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear.forward`."""
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def narrow_frozen(model: Transfusion) -> None:
    """Round the frozen float32 weights of the linear layers in a model's blocks to bfloat16, where they stay.

    Without autocast, the model then computes with the rounded weights. What is saved of it must not include them.
    Quantised models stay as they are.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    for block in model.backbone.blocks():
        for module in block.modules():
            if type(module) is nn.Linear and not module.weight.requires_grad and module.weight.dtype == torch.float32:
                module.__class__ = FrozenLinear
                module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
