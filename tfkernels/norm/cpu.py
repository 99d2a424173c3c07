"""The modulated norms and gated residuals on the CPU, in plain PyTorch.

Statistics are float32 (float64 stays) and sums per image are float64.
"""
import torch
from torch import Tensor

from tfkernels.norm.blocks import Tokens, token_blocks


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor) -> Tensor:
    """(..., C) as (T, C), contiguous: what the strides are must not change the order of a sum."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _table(table: Tensor, text: float) -> Tensor:
    """(N, C) with a row of `text` behind the last, for tokens of no image."""
    table = _wide(table)
    return torch.cat([table, table.new_full((1, table.shape[1]), text)])


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
    shape, images = x.shape, (gate if scale is None else scale).shape[0]
    rows, width = _table_rows(image_ids, x, images), shape[-1:]
    x, wide = _rows(x), torch.promote_types(x.dtype, torch.float32)
    out = y = x.new_empty(0)
    rstd, mean = x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    if branch is not None:
        branch, gate, out = branch.reshape(x.shape), _table(gate, 1), torch.empty_like(x)
    if scale is not None:
        factor, level = _modulation(weight, bias, scale, shift)
        y, rstd = torch.empty_like(x), x.new_empty((len(x), 1), dtype=wide)
        mean = torch.empty_like(rstd) if center else mean
    for tokens in token_blocks(rows, x.shape[1]):
        at, block = tokens.at, _wide(x[tokens.at])
        if branch is not None:
            out[at] = torch.addcmul(block, _wide(branch[at]), tokens.of(gate))
            block = _wide(out[at])
        if scale is not None:
            if center:
                normed, mean[at], rstd[at] = torch.native_layer_norm(block, width, None, None, eps)
            else:
                rstd[at] = (block.square().mean(-1, keepdim=True) + eps).rsqrt()
                normed = block * rstd[at]
            normed *= tokens.of(factor)
            y[at] = normed if level is None else normed.add_(tokens.of(level))
    return (out.view(shape if branch is not None else 0), y.view(shape if scale is not None else 0),
            mean.view(shape[:-1] if center else 0), rstd.view(shape[:-1] if scale is not None else 0))


def _modulation(weight: Tensor | None, bias: Tensor | None, scale: Tensor,
                shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tables (N + 1, C) of what a normed token is multiplied by and, if anything, what is added to it."""
    factor = 1 + _table(scale, 0)
    level = None if shift is None else _table(shift, 0)
    if bias is not None:
        level = factor * bias if level is None else torch.addcmul(level, factor, _wide(bias))
    return factor if weight is None else factor * weight, level


def backward(dy: Tensor | None, dout: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
             weight: Tensor | None, scale: Tensor | None, image_ids: Tensor | None, mean: Tensor, rstd: Tensor,
             center: bool, level: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `kernels.backward` computes."""
    shape, images = x.shape, (gate if scale is None else scale).shape[0]
    rows, x = _table_rows(image_ids, x, images), _rows(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = dbranch = x.new_empty(0)
    kinds = (scale is not None) + level + (branch is not None)
    sums = x.new_zeros(kinds, images + 1, x.shape[1], dtype=torch.float64)
    if scale is not None:
        (factor, _), dy, dx = _modulation(weight, None, scale, None), _rows(dy), torch.empty_like(x)
        rstd, mean = (t.reshape(-1, 1).contiguous() for t in (rstd, mean))  # PyTorch's kernel knows no strides
    if branch is not None:
        branch, dout, gate = branch.reshape(x.shape), _rows(dout), _table(gate, 1)
        dbranch = branch.new_empty(x.shape)
    for tokens in token_blocks(rows, x.shape[1]):
        at = tokens.at
        if scale is not None:
            block = _norm_backward(tokens, _wide(dy[at]), _wide(x[at]), factor, mean[at] if center else None, rstd[at],
                                   sums, level)
            dx[at] = block = block if branch is None else block.add_(dout[at])
        else:
            block = _wide(dout[at])
        if branch is not None:
            tokens.add(block * branch[at], sums[-1])
            dbranch[at] = block * tokens.of(gate)
    sums = sums.roll(1, 1).to(wide)  # text first
    return (dx.view(shape if scale is not None else 0), dbranch.view(shape if branch is not None else 0),
            list(sums))


def _norm_backward(tokens: Tokens, dy: Tensor, x: Tensor, factor: Tensor, mean: Tensor | None, rstd: Tensor,
                   sums: Tensor, level: bool) -> Tensor:
    """Return the gradient of a norm's input (tokens, C), and add dy xhat and, with a `level`, dy to the sums."""
    xhat = (x if mean is None else x - mean) * rstd
    along, dxhat = dy * xhat, dy * tokens.of(factor)
    tokens.add(along, sums[0])
    if level:
        tokens.add(dy, sums[1])
    if mean is not None:
        return torch.ops.aten.native_layer_norm_backward(dxhat, x, x.shape[1:], mean, rstd, None, None,
                                                         [True, False, False])[0]
    along *= tokens.of(factor)
    return dxhat.addcmul_(xhat, along.mean(-1, keepdim=True), value=-1).mul_(rstd)


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
