"""Latents in the three layouts, in float64, and what kernels are compiled for in each, for the tests of patchify and of
the diffusion loss."""
from typing import NamedTuple

import torch
from torch import Tensor

from tests.conftest import DEVICE
from tfkernels import PackedLatents, pack_latents
from tfkernels.patches.triton.layout import tile


class Case(NamedTuple):
    """`x` as an operator takes it with the keywords `options`, and what its `_reference` takes behind the per-image
    numbers."""

    x: Tensor | PackedLatents
    options: dict
    images: int
    rows: int
    dim: int
    layout: tuple  # offsets, columns, channels, patch

    @property
    def data(self) -> Tensor:
        return self.x.values if isinstance(self.x, PackedLatents) else self.x

    def like(self, data: Tensor) -> Tensor | PackedLatents:
        """`x` with other data."""
        return PackedLatents(data, *self.x[1:]) if isinstance(self.x, PackedLatents) else data


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(count: int, seed: int) -> Tensor:
    """(count,) float32 around 1, of both signs."""
    return random(count, seed=seed).float().to(DEVICE)


def padded(packed: PackedLatents, before: int, behind: int) -> PackedLatents:
    """The same images between rows of padding, which hold numbers that no image may see."""
    dim = packed.channels * packed.patch_size**2
    values = torch.cat([random(before * dim, seed=8).to(packed.values), packed.values,
                        random(behind * dim, seed=9).to(packed.values)])
    return PackedLatents(values, packed.offsets + before, *packed[2:])


def uniform(*shape: int, patch: int) -> Case:
    x = random(*shape).to(DEVICE)
    rows, dim = shape[0] * (shape[2] // patch) * (shape[3] // patch), shape[1] * patch**2
    return Case(x, {"patch_size": patch}, shape[0], rows, dim, (None, None, shape[1], patch))


def ragged(sizes, channels: int, patch: int, before: int = 0, behind: int = 0) -> Case:
    packed = padded(pack_latents([random(channels, h * patch, w * patch, seed=i).to(DEVICE)
                                  for i, (h, w) in enumerate(sizes)], patch), before, behind)
    dim = channels * patch**2
    return Case(packed, {}, len(sizes), len(packed.values) // dim, dim, packed[1:])


def rows_of_tokens(counts, dim: int, before: int = 0, behind: int = 0) -> Case:
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE) + before
    rows = before + sum(counts) + behind
    return Case(random(rows, dim).to(DEVICE), {"offsets": offsets}, len(counts), rows, dim, (offsets, None, dim, 1))


def layout_constants(layout: str, dim: int, patch: int) -> dict:
    """The constants by which a kernel knows the layout of its latents."""
    return {"LAYOUT": layout, "SEARCH": layout != "latents", "PATCH": patch, **tile(dim)}


def nothing_but_padding(channels: int, patch: int, rows: int) -> Case:
    packed = PackedLatents(random(rows * channels * patch**2).to(DEVICE),
                           *(torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (1, 0)), channels, patch)
    return Case(packed, {}, 0, rows, channels * patch**2, packed[1:])


COMPILED = [("latents", 2, 16, 2), ("packed", 4, 48, 4), ("tokens", 2, 1536, 1)]  # layout, bytes an element, D, patch
CASES = {"one image": uniform(1, 1, 4, 4, patch=2), "latents": uniform(3, 4, 8, 6, patch=2),
         "pixels of 3 channels": uniform(2, 3, 5, 3, patch=1), "wide patches": uniform(2, 3, 8, 16, patch=4),
         "no images": uniform(0, 4, 4, 4, patch=2), "packed": ragged([(3, 2), (1, 5), (4, 4)], 4, 2),
         "packed, patch 3, padding": ragged([(2, 2), (1, 1), (5, 3)], 2, 3, before=2, behind=5),
         "tokens": rows_of_tokens([5, 1, 12], 16),
         "tokens, an empty image, padding": rows_of_tokens([7, 0, 3], 37, before=1, behind=20),
         "packed, padding alone": nothing_but_padding(2, 2, 3),
         "tokens, padding alone": rows_of_tokens([], 16, behind=3)}
