"""Where a token's elements lie: latents of one size, packed latents of different sizes, or tokens as they are.

    D = channels * patch^2         rows of image n: [offsets_n, offsets_n+1)         t = row - offsets_n
    element (t, d) is latent[c, patch * (t // columns_n) + i, patch * (t % columns_n) + j]
    with (c, i, j) = divmod of d by patch^2 and patch

A latent has as many elements as its tokens. The one array `offsets`, in rows of D elements, therefore says both where
an image's tokens start and where its packed latent does. The image of a row is found by binary search on the device;
rows outside [offsets_0, offsets_N) are padding.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._arguments import got, looks, need_integer, need_offsets, need_tensors


class PackedLatents(NamedTuple):
    """N latents of different sizes and C channels, (C, H_n, W_n) contiguous, one behind the other.

    `pack_latents` makes one.

    values: (P * D,) elements; D = C * patch_size^2, P tokens in all. offsets: (N + 1,) int32, image n's tokens are the
    rows [offsets_n, offsets_n+1); elements behind the last image are padding. columns: (N,) int32, W_n / patch_size.
    channels, patch_size: C and the side of a patch.
    """

    values: Tensor
    offsets: Tensor
    columns: Tensor
    channels: int
    patch_size: int


class Source(NamedTuple):
    """A checked operand of the operators: x is (N, C, H, W), packed (P * D,) or tokens (P, D).

    It has `rows` = P tokens of `dim` = D elements, which belong to `images` images.
    """

    x: Tensor
    offsets: Tensor | None
    columns: Tensor | None
    channels: int
    patch: int
    rows: int
    dim: int
    images: int


def pack_latents(latents: list[Tensor], patch_size: int) -> PackedLatents:
    """Pack a list of (C, H_n, W_n) latents of any sizes that `patch_size` divides. One copy of each; gradients flow.

    Raises:
        ValueError: the list is empty, a latent is not (C, H, W), has no elements, differs in channels, dtype or device,
            or the patch size does not divide it.
    """
    if not isinstance(latents, (list, tuple)):
        raise ValueError(f"pack_latents: latents is {got(latents)}; a list of (C, H, W) tensors fits; take list(x) "
                         "of a batch (N, C, H, W)")
    if not latents:
        raise ValueError("pack_latents: latents is empty; at least one (C, H, W) tensor fits")
    need_tensors("pack_latents", {f"latents[{i}]": x for i, x in enumerate(latents)})
    first = latents[0]
    check_floating("pack_latents", "latents[0]", first)
    for i, x in enumerate(latents):
        if x.ndim == 3 and 0 in x.shape:
            raise ValueError(f"pack_latents: latents[{i}] has shape {tuple(x.shape)}; at least one channel and one "
                             "patch fit")
        if x.ndim != 3 or x.shape[0] != first.shape[0] or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(f"pack_latents: latents[{i}] is {x.dtype} of shape {tuple(x.shape)} on {x.device} and "
                             f"latents[0] {first.dtype} of shape {tuple(first.shape)} on {first.device}; (C, H, W) of "
                             "one C, dtype and device fit")
        check_patch_size("pack_latents", f"latents[{i}]", x.shape, patch_size)
    counts, columns = (torch.tensor(numbers, device="cpu") for numbers in (
        [0] + [x.shape[1] * x.shape[2] // patch_size**2 for x in latents], [x.shape[2] // patch_size for x in latents]))
    numbers = torch.cat([counts.cumsum(0), columns]).int()
    numbers = numbers.pin_memory() if first.is_cuda else numbers
    offsets, columns = numbers.to(first.device, non_blocking=True).split([len(latents) + 1, len(latents)])
    return PackedLatents(torch.cat([x.flatten() for x in latents]), offsets, columns, first.shape[0], patch_size)


def check_patch_size(op: str, name: str, shape, patch_size: int) -> None:
    """Refuse a patch size that is not a positive int or does not divide the last two sizes of `shape`."""
    if isinstance(patch_size, bool) or not isinstance(patch_size, (int, torch.SymInt)) or patch_size < 1:
        raise ValueError(f"{op}: patch_size is {patch_size!r}; a positive int fits")
    if shape[-2] % patch_size or shape[-1] % patch_size:
        raise ValueError(f"{op}: {name} is {shape[-2]}x{shape[-1]} and patch_size {patch_size}; multiples of the "
                         "patch size fit; resize or crop")


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Refuse what is not float16, bfloat16 or float32 (float64 on CPU)."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) and not (x.dtype == torch.float64
                                                                              and x.device.type == "cpu"):
        raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}; float16, bfloat16 or float32 fits (float64 on CPU "
                         "only)")


def check_per_image(op: str, name: str, x: Tensor, images: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (N,) numbers in `dtype`.

    Other shapes, devices, integers, and what asks for a gradient that the operator does not give are refused.
    """
    if not isinstance(x, Tensor) or x.shape != (images,) or not x.is_floating_point() or x.device != device:
        raise ValueError(f"{op}: {name} is {got(x)}; a floating-point tensor ({images},) on {device} fits, one "
                         "number per image")
    check_constant(op, name, x)
    return x.to(dtype).contiguous()


def check_constant(op: str, name: str, x: Tensor) -> None:
    """Refuse a tensor that asks for a gradient that the operator does not give."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires a gradient, which {op} does not compute; a tensor without one fits; "
                         f"pass {name}.detach()")


def check_offsets(op: str, name: str, offsets: Tensor, device: torch.device, rows: int) -> None:
    """Refuse what is not (N + 1,) int32 on `device`, and on a CPU what falls or leaves [0, rows]."""
    shaped = isinstance(offsets, Tensor) and offsets.ndim == 1 and offsets.shape[0] > 0
    if not shaped or offsets.dtype != torch.int32 or offsets.device != device:
        raise ValueError(f"{op}: {name} is {got(offsets)}; an int32 tensor (N + 1,) on {device} fits, image n's "
                         "tokens being the rows [offsets[n], offsets[n + 1])")
    need_offsets(op, name, offsets, rows)


def check_columns(op: str, name: str, columns: Tensor, offsets: Tensor) -> None:
    """Refuse, on a CPU, a number of columns that does not divide its image's tokens; elsewhere less than 1 is 1 and no
    element lies outside."""
    if not looks(columns, offsets):
        return
    for n, (width, count) in enumerate(zip(columns.tolist(), offsets.diff().tolist())):
        if width < 1 or count % width:
            raise ValueError(f"{op}: {name} holds {width} for image {n} of {count} tokens; a divisor of them, its "
                             "patches in a row, fits")


def source(op: str, name: str, x: Tensor | PackedLatents, patch_size: int | None, offsets: Tensor | None) -> Source:
    """Check an operand in any of the three layouts and return it with its sizes."""
    if isinstance(x, PackedLatents):
        if patch_size not in (None, x.patch_size) or offsets is not None:
            raise ValueError(f"{op}: patch_size is {patch_size} and offsets "
                             f"{'given' if offsets is not None else None} beside packed latents; None and None fit; "
                             f"{name} has both")
        check_patch_size(op, name, (0, 0), x.patch_size)
        need_tensors(op, {f"{name}.values": x.values, f"{name}.offsets": x.offsets, f"{name}.columns": x.columns})
        dim = need_integer(op, f"{name}.channels", x.channels, 1) * x.patch_size**2
        if x.values.ndim != 1 or x.values.shape[0] % dim:
            raise ValueError(f"{op}: {name}.values has shape {tuple(x.values.shape)}; one dimension, a multiple of "
                             f"channels * patch_size^2 = {dim}, fits")
        check_offsets(op, f"{name}.offsets", x.offsets, x.values.device, x.values.shape[0] // dim)
        shaped = x.columns.shape == (x.offsets.shape[0] - 1,)
        if not shaped or x.columns.dtype != torch.int32 or x.columns.device != x.values.device:
            raise ValueError(f"{op}: {name}.columns is {got(x.columns)}; int32 ({x.offsets.shape[0] - 1},) on "
                             f"{x.values.device} fits")
        check_columns(op, f"{name}.columns", x.columns, x.offsets)
        check_floating(op, f"{name}.values", x.values)
        return Source(x.values.contiguous(), x.offsets.contiguous(), x.columns.contiguous(), x.channels, x.patch_size,
                      len(x.values) // dim, dim, len(x.offsets) - 1)
    if not isinstance(x, Tensor) or x.ndim not in (2, 4):
        kind = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else got(x)
        raise ValueError(f"{op}: {name} is {kind}; latents (N, C, H, W), PackedLatents or tokens (P, D) fit")
    check_floating(op, name, x)
    if x.ndim == 2:
        if patch_size is not None:
            raise ValueError(f"{op}: patch_size is {patch_size} and {name} are tokens {tuple(x.shape)}; None fits "
                             "tokens, which are in patches already")
        check_offsets(op, "offsets", offsets, x.device, x.shape[0])
        return Source(x.contiguous(), offsets.contiguous(), None, x.shape[1], 1, x.shape[0], x.shape[1],
                      len(offsets) - 1)
    if offsets is not None:
        raise ValueError(f"{op}: offsets is given and {name} are latents of one size {tuple(x.shape)}; None fits, for "
                         "their offsets are known")
    check_patch_size(op, name, x.shape, patch_size)
    images, channels, height, width = x.shape
    if not (channels and height and width):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; at least one channel and one patch fit")
    return Source(x, None, None, channels, patch_size, images * (height // patch_size) * (width // patch_size),
                  channels * patch_size**2, images)


def locate_reference(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (image, row within it, whether it has one) of every row, each (P,); image 0 and row 0 for padding."""
    row = torch.arange(rows, device=offsets.device)
    image = torch.searchsorted(offsets.long(), row, right=True) - 1
    inside = (image >= 0) & (image < len(offsets) - 1)
    image = torch.where(inside, image, 0)
    return image, torch.where(inside, row - offsets[image], 0), inside


def uniform_offsets(images: int, rows: int, device: torch.device) -> Tensor:
    """Offsets (N + 1,) int32 of `rows` rows shared evenly by `images` images."""
    return torch.arange(images + 1, dtype=torch.int32, device=device) * (rows // max(1, images))


def rows_per_image(offsets: Tensor | None, images: int, rows: int, device: torch.device) -> Tensor:
    """Return how many rows each image has, (N,), at least 0."""
    return (uniform_offsets(images, rows, device) if offsets is None else offsets).diff().clamp(min=0)


def images_of_rows(offsets: Tensor | None, images: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the image id of each row (P,), 0 where it has none, and whether it has one."""
    return locate_reference(uniform_offsets(images, rows, device) if offsets is None else offsets, rows)[::2]


def of_rows(values: Tensor, image_ids: Tensor) -> Tensor:
    """Return the numbers (P, ...) of each row's image from those of all (N, ...), 0 where there is no image at all."""
    return values[image_ids] if len(values) else values.new_zeros(len(image_ids), *values.shape[1:])


def packed_index(offsets: Tensor, columns: Tensor, channels: int, patch: int, rows: int) -> Tensor:
    """Return where element (row, d) lies in packed latents, (P, D) int64; -1 for padding."""
    image, t, inside = locate_reference(offsets, rows)
    c, i, j = torch.unravel_index(torch.arange(channels * patch**2, device=offsets.device), (channels, patch, patch))
    start, count = offsets[image].long()[:, None], of_rows(offsets.diff(), image).long()[:, None]
    width = of_rows(columns, image).long().clamp(min=1)[:, None]
    y, x = t[:, None] // width * patch + i, t[:, None] % width * patch + j
    return torch.where(
        inside[:, None], start * channels * patch**2 + (c * count * patch**2 + y * width * patch + x), -1
    )
