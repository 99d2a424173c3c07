"""The modulated norms and gated residuals on the CPU, in plain PyTorch.

Statistics are float32 (float64 stays) and sums per image are float64.
"""
import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor) -> Tensor:
    """(..., C) as (T, C), contiguous: what the strides are must not change the order of a sum."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _of_token(table: Tensor, image_ids: Tensor, text: float) -> Tensor:
    """Row n of (N, C) for each token (T, C); `text` for a token of no image."""
    rows = torch.cat([_wide(table), table.new_full((1, table.shape[1]), text, dtype=_wide(table[:0]).dtype)])
    return rows[image_ids]


def _table_rows(image_ids: Tensor | None, x: Tensor, images: int) -> Tensor:
    """The row of each token in a table with a row for text behind its last."""
    if image_ids is None:
        return torch.arange(images).repeat_interleave(x.shape[1])
    image_ids = image_ids.reshape(-1).long()
    if image_ids.numel() and image_ids.max() >= images:
        raise ValueError(f"modulation: index names image {image_ids.max().item()} and there are {images}; -1 (text) "
                         f"to {images - 1} fits")
    return torch.where(image_ids < 0, images, image_ids)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, image_ids: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `kernels.forward` computes."""
    shape, dtype, tokens = x.shape, x.dtype, x.shape[:-1]
    image_ids = _table_rows(image_ids, x, (gate if scale is None else scale).shape[0])
    x = _rows(x)
    out = y = mean = rstd = _wide(x).new_empty(0)
    if branch is not None:
        x = out = (_wide(x) + _of_token(gate, image_ids, 1) * branch.reshape(x.shape)).to(dtype)
        out = out.view(shape)
    if scale is not None:
        y = _wide(x)
        if center:
            mean = y.mean(-1, keepdim=True)
            y = y - mean
        rstd = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = y * rstd
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        y = y * (1 + _of_token(scale, image_ids, 0))
        y = (y if shift is None else y + _of_token(shift, image_ids, 0)).to(dtype).view(shape)
        rstd, mean = rstd.view(tokens), mean.view(tokens if center else 0)
    return out.to(dtype), y.to(dtype), mean if center else rstd.new_empty(0), rstd


def backward(dy: Tensor | None, dout: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
             weight: Tensor | None, scale: Tensor | None, image_ids: Tensor | None, mean: Tensor, rstd: Tensor,
             center: bool, level: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `kernels.backward` computes."""
    shape, dtype, images = x.shape, x.dtype, (gate if scale is None else scale).shape[0]
    image_ids = _table_rows(image_ids, x, images)
    x = _wide(_rows(x))
    sums, dx, dbranch = [], torch.zeros_like(x), x.new_empty(0)

    def per_image(values):  # index_add_ adds row by row: in float32 its error would grow with the tokens
        total = values.new_zeros(images + 1, values.shape[1], dtype=torch.float64)
        return total.index_add_(0, torch.where(image_ids == images, 0, image_ids + 1), values.double()).to(values.dtype)

    if scale is not None:
        dy = _wide(_rows(dy))
        xhat = (x - mean.view(-1, 1) if center else x) * rstd.view(-1, 1)
        sums += [per_image(dy * xhat)] + [per_image(dy)] * level
        dxhat = dy * (1 + _of_token(scale, image_ids, 0))
        dxhat = dxhat if weight is None else dxhat * weight
        dx = dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)
        dx = (dx - dxhat.mean(-1, keepdim=True) if center else dx) * rstd.view(-1, 1)
    if branch is not None:
        dx = dx + dout.reshape(x.shape)
        sums.append(per_image(dx * branch.reshape(x.shape)))
        dbranch = (dx * _of_token(gate, image_ids, 1)).view(shape).to(branch.dtype)
    return dx.to(dtype).view(shape) if scale is not None else x.new_empty(0, dtype=dtype), dbranch, sums


def tables(sums: list[Tensor], weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None,
           gate: Tensor | None) -> tuple[Tensor, ...]:
    """Return dweight, dbias, dscale, dshift and dgate from the sums of `backward`; of None, empty."""
    a, *others = sums

    def over_images(sums):  # an image without tokens has sums of 0, and its scale may hold anything
        return sums[0] + torch.where(sums[1:] == 0, 0, (1 + scale.to(sums.dtype)) * sums[1:]).sum(0)

    dscale = a[1:] if weight is None else a[1:] * weight
    dweight, dbias, dshift, dgate = (a.new_empty(0) for _ in range(4))
    if weight is not None:
        dweight = over_images(a).to(weight.dtype)
    if bias is not None:
        dscale = dscale + others[0][1:] * bias
        dbias = over_images(others[0]).to(bias.dtype)
    if shift is not None:
        dshift = others[0][1:].to(shift.dtype, copy=True)
    if gate is not None:
        dgate = others[-1][1:].to(gate.dtype, copy=True)
    return dweight, dbias, dscale.to(scale.dtype, copy=True), dshift, dgate
