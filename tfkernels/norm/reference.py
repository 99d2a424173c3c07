"""The modulated norms and gated residuals written out in plain PyTorch: the specification of `tfkernels.norm`."""
from typing import NamedTuple

import torch
from torch import Tensor


class ResidualNorm(NamedTuple):
    """`residual`, the stream after the gated addition, and `normed`, its modulated norm; both like the residual."""

    residual: Tensor
    normed: Tensor


def modulated_rms_norm_reference(x: Tensor, weight: Tensor | None, scale: Tensor, shift: Tensor | None,
                                 index: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """The specification in plain PyTorch: statistics in float32 (float64 stays), the rest in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _modulate_reference(y if weight is None else y * weight, scale, shift, index).to(x.dtype)


def modulated_layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor,
                                   shift: Tensor | None, index: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """The specification in plain PyTorch: statistics in float32 (float64 stays), the rest in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    y = (centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return _modulate_reference(y if bias is None else y + bias, scale, shift, index).to(x.dtype)


def gated_residual_reference(residual: Tensor, branch: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """The specification in plain PyTorch."""
    return (residual + of_token(gate, index, 1) * branch).to(residual.dtype)


def gated_residual_rms_norm_reference(
    residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None, scale: Tensor, shift: Tensor | None,
    index: Tensor | None, *, eps: float = 1e-6
) -> ResidualNorm:
    """The specification: one after the other."""
    residual = gated_residual_reference(residual, branch, gate, index)
    return ResidualNorm(residual, modulated_rms_norm_reference(residual, weight, scale, shift, index, eps=eps))


def _modulate_reference(y: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None) -> Tensor:
    y = y * (1 + of_token(scale, index, 0))
    return y if shift is None else y + of_token(shift, index, 0)


def of_token(table: Tensor, image_ids: Tensor | None, text: float) -> Tensor:
    """Each token's row of (N, C): (..., C), `text` where it has none; a row behind the last, which -1 picks.

    Without image ids, batch row n is image n: (N, 1, C).
    """
    if image_ids is None:
        return table[:, None]
    return torch.nn.functional.pad(table, (0, 0, 0, 1), value=text)[image_ids.clamp(min=-1)]
