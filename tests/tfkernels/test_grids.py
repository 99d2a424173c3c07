"""Every launch has a grid that a GPU takes, whatever the sizes are: 2^31 - 1 programs in x, 65,535 in y and z at most.

Nothing is allocated: operators launch on meta tensors of millions of batch rows, tokens, images and patches.
"""
import functools
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

import tfkernels
from tests.conftest import KERNEL_RUNS
from tests.launches import kernel_names, seen
from tfkernels import TransfusionMask

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="a grid is seen without running it, once")


def numbers(*shape) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def whole(*shape, dtype=torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plain(*shape) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def mask_of(rows: int, queries: int, keys: int, exact: bool = True) -> TransfusionMask:
    integers = [whole(rows, length, dtype=torch.int32) for length in (queries, queries, keys, keys)]
    return TransfusionMask(*integers, rows_exact=exact, columns_exact=exact)


def attention():
    """Many rows, many heads, one long row, many heads of one key head, and one query for each of many caches, whole and
    in pages."""
    for rows, heads, kv_heads, tokens in ((2**20, 8, 2, 64), (2, 2**17, 2**16, 64), (1, 2, 2, 2**24), (1, 8, 1, 64)):
        q, k = numbers(rows, heads, tokens, 64), numbers(rows, kv_heads, tokens, 64)
        for exact in (True, False):
            tfkernels.attention(q, k, k, mask_of(rows, tokens, tokens, exact)).sum().backward()
    for rows, kv_heads, keys in ((2**20, 8, 64), (1, 2**17, 64), (1, 1, 2**20)):
        tfkernels.attention(numbers(rows, 4 * kv_heads, 1, 64), *[numbers(rows, kv_heads, keys, 64)] * 2,
                            mask_of(rows, 1, keys))
    tfkernels.paged_attention(numbers(2**20, 8, 1, 64), *[numbers(2**22, 16, 2, 64)] * 2,
                              whole(2**20, 4, dtype=torch.int32), mask_of(2**20, 1, 64))


def norms():
    for shape, images in (((2**14, 2**12, 64), 2**20), ((4, 2**10, 2**14), 2**17)):
        x, branch = numbers(*shape), numbers(*shape)
        scale, shift, gate = (numbers(images, shape[-1]) for _ in range(3))
        index = whole(*shape[:2])
        tfkernels.modulated_layer_norm(x, None, None, scale, shift, index).sum().backward()
        tfkernels.gated_residual(x, branch, gate, index).sum().backward()


def rotary():
    q, k, weight, angle = numbers(2**14, 8, 2**12, 64), numbers(2**14, 2, 2**12, 64), numbers(64), plain(2**12, 32)
    rotated = tfkernels.qk_norm_rotary(q, k, weight, weight, angle, angle)
    (rotated.q.sum() + rotated.k.sum()).backward()


def patches():
    images, rows, dim, width = 2**20, 2**26, 16, 1024
    latents = numbers(images, 4, 16, 16)
    signal, noise, seed, places = plain(images), plain(images), whole(2), whole(rows)
    tfkernels.patchify(latents, 2).sum().backward()
    tokens = tfkernels.noise_patchify(latents, signal, noise, seed, patch_size=2)
    hidden = numbers(2**26, width)
    offsets = whole(images + 1, dtype=torch.int32)
    weight, condition = numbers(width, dim), numbers(images, width)
    tfkernels.embed_patches(hidden, tokens, weight, condition, places, offsets).sum().backward()
    x0 = latents.detach()
    tfkernels.diffusion_loss(numbers(rows, dim), x0, signal, noise, None, seed, patch_size=2).sum().backward()
    tfkernels.modulated_layer_norm_diffusion_loss(hidden, places, condition, condition, weight.mT, None, x0, signal,
                                                  noise, None, seed, patch_size=2).sum().backward()


def losses():
    hidden, rows = numbers(2**18, 1024), 2**18
    tfkernels.linear_cross_entropy(hidden, numbers(1000, 1024), whole(rows), whole(rows)).loss.backward()


def masks():
    TransfusionMask.from_spans(whole(2**20, 4, 2), 1024)
    TransfusionMask.from_token_types(whole(1, 2**28))


@functools.cache
def grids_of(run: Callable) -> list[tuple[str, tuple[int, ...]]]:
    grids = []
    with (seen(lambda kernel, grid, arguments, named: grids.append((kernel.__name__, grid))),
          patch.object(torch, "autocast", lambda *_, **__: nullcontext())):   # it knows no meta tensors
        run()
    return grids


RUNS = (attention, norms, rotary, patches, losses, masks)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_grid_fits_a_gpu(run):
    grids = grids_of(run)
    assert max(grid[0] for _, grid in grids) > 65_535
    assert [(name, grid) for name, grid in grids if grid[0] >= 2**31 or max(grid[1:], default=1) > 65_535] == []


def test_every_kernel_of_the_library_is_launched():
    assert {name for run in RUNS for name, _ in grids_of(run)} == kernel_names()
