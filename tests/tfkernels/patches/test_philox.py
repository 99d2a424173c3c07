"""Philox and its normals: the published known answers, equality of kernel and reference, and the statistics that noise
must have."""
import math
import weakref

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import DEVICE, KERNEL_RUNS
from tfkernels import _library
from tfkernels.patches import noise_reference
from tfkernels.patches.philox import philox_normal, philox_normal_reference, philox_reference, seed_tensor

needs_kernels = pytest.mark.skipif(not KERNEL_RUNS, reason="neither CUDA nor TRITON_INTERPRET=1: no kernel runs here")
# Random123, kat_vectors, philox4x32-10
KNOWN = [((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
         ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
         ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
          (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))]


@triton.jit
def _words(counter_ptr, seed_ptr, out_ptr):
    at = tl.program_id(0) * 4
    c = counter_ptr + at
    words = tl.philox(tl.load(seed_ptr + tl.program_id(0)), tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
    for i in tl.static_range(4):
        tl.store(out_ptr + at + i, words[i].to(tl.int64))


@triton.jit
def _normals(seed_ptr, image_ptr, row_ptr, out_ptr, rows, R: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    r, d = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    eps = philox_normal(seed_ptr, tl.load(image_ptr + r, mask=r < rows, other=0),
                        tl.load(row_ptr + r, mask=r < rows, other=0), tl.program_id(1) * BLOCK_D, BLOCK_D)
    tl.store(out_ptr + r[:, None] * DIM + d[None, :], eps, mask=(r < rows)[:, None] & (d < DIM)[None, :])


def signed(x, bits):
    return x - 2**bits if x >= 2**(bits - 1) else x


def seeds(seed, offset=0, first=0):
    return torch.tensor([seed, offset, first], device=DEVICE)


def eps(seed, images, rows, dim, dtype=torch.float32):
    """(images, rows, dim)."""
    image, row = (x.flatten() for x in torch.meshgrid(torch.arange(images), torch.arange(rows), indexing="ij"))
    return philox_normal_reference(seed.cpu(), image, row, dim, dtype).view(images, rows, dim)


def launched(seed, image, row, dim, block_rows, block_dim):
    out = torch.empty(len(row), dim, device=DEVICE)
    _normals[(triton.cdiv(len(row), block_rows), triton.cdiv(dim, block_dim))](seed, image.int().to(DEVICE),
                                                                               row.int().to(DEVICE), out, len(row),
                                                                               R=block_rows, DIM=dim, BLOCK_D=block_dim)
    return out.cpu()


def test_the_reference_gives_the_known_answers_of_random123():
    for counter, key, answer in KNOWN:
        found = philox_reference(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(x.item() for x in found) == answer


@needs_kernels
def test_the_kernels_words_are_the_known_answers_and_the_references():
    generator = torch.Generator().manual_seed(0)
    counters = torch.tensor([c for c, _, _ in KNOWN]), torch.randint(0, 2**32, (29, 4), generator=generator)
    keys = torch.tensor([k for _, k, _ in KNOWN]), torch.randint(0, 2**32, (29, 2), generator=generator)
    counters, keys = torch.cat(counters), torch.cat(keys)
    seed = torch.tensor([signed(k0 + (k1 << 32), 64) for k0, k1 in keys.tolist()])
    out = torch.empty(32, 4, dtype=torch.int64, device=DEVICE)
    words = torch.where(counters >= 2**31, counters - 2**32, counters).int()
    _words[(32,)](words.to(DEVICE), seed.to(DEVICE), out)
    assert out[:3].tolist() == [list(answer) for _, _, answer in KNOWN]
    assert torch.equal(out.cpu(), torch.stack(philox_reference(counters.T, keys.T), 1))


@needs_kernels
@pytest.mark.parametrize("dim", [1, 3, 16, 37])
def test_the_kernels_normals_equal_the_references_to_float32_rounding_under_any_tiles(dim):
    image, row = torch.tensor([0, 0, 0, 1, 1, 7, 7, 7, 7]), torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 100_000])
    seed = seeds(-2**63 + 12345, 2**32 + 7, 5)
    found = [launched(seed, image, row, dim, *tile) for tile in ((4, 16), (1, 64), (16, 4))]
    exact = philox_normal_reference(seed.cpu(), image, row, dim, torch.float64)
    assert (found[0].double() - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_elements_noise_depends_on_its_own_place_only():
    whole = eps(seeds(5, 9), 4, 8, 13)
    some = philox_normal_reference(seeds(5, 9).cpu(), torch.tensor([3, 1]), torch.tensor([2, 7]), 13)
    assert torch.equal(some, whole[[3, 1], [2, 7]])
    assert torch.equal(eps(seeds(5, 9, 2), 2, 8, 13), whole[2:])
    assert torch.equal(eps(seeds(5, 9), 1, 8, 5), whole[:1, :, :5])


def test_float64_differs_from_float32_by_rounding_only():
    exact, rounded = eps(seeds(3), 2, 64, 64, torch.float64), eps(seeds(3), 2, 64, 64)
    assert (rounded - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_the_noise_is_standard_normal():
    x = eps(seeds(0), 16, 256, 64, torch.float64).flatten()
    n = x.numel()
    # E x^k and Var x^k of a standard normal
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 4.5 * math.sqrt(variance / n), power
    at = torch.linspace(-4, 4, 161, dtype=torch.float64)
    empirical = torch.searchsorted(x.sort().values, at) / n
    assert (empirical - torch.special.ndtr(at)).abs().max() < 1.95 / math.sqrt(n)          # Kolmogorov-Smirnov at 0.1 %
    assert 4.2 < x.abs().max() < 6.8  # 4.2: an expected 7 beyond it, 0.1 % for none


@pytest.mark.parametrize("other",
                         ["neighbour", "next but one", "third", "fourth", "row", "image", "offset", "seed",
                          "high word of the seed"])
def test_the_noise_is_uncorrelated_with(other):
    x = eps(seeds(11, 3), 5, 256, 64, torch.float64)
    a, b = {"neighbour": (x[..., 1:], x[..., :-1]), "next but one": (x[..., 2:], x[..., :-2]),
            "third": (x[..., 3:], x[..., :-3]), "fourth": (x[..., 4:], x[..., :-4]), "row": (x[:, 1:], x[:, :-1]),
            "image": (x[1:], x[:-1]), "offset": (x, eps(seeds(11, 4), 5, 256, 64)),
            "seed": (x, eps(seeds(12, 3), 5, 256, 64)),
            "high word of the seed": (x, eps(seeds(11 + 2**32, 3), 5, 256, 64))}[other]
    bound = 4.5 / math.sqrt(a.numel())
    assert abs((a * b).mean()) < bound  # products of independent normals: variance 1
    assert abs(((a * a - 1) * (b * b - 1)).mean()) < 2 * bound  # and of their squares: variance 4


def test_no_word_repeats_across_seeds_offsets_and_images_more_often_than_chance():
    group, row = torch.arange(64), torch.arange(64)[:, None]
    found = [torch.stack(torch.broadcast_tensors(*philox_reference((group, row, torch.tensor(image),
                                                                    torch.tensor(offset)),
                                                                   (torch.tensor(seed), torch.tensor(0)))), -1)
             for seed in range(3) for offset in range(3) for image in range(3)]
    words = torch.stack(found).flatten(0, -2)                                              # (calls, 4)
    assert len(words.unique(dim=0)) == len(words)
    pairs = words.numel() * (words.numel() - 1) / 2 / 2**32
    repeated = words.numel() - len(words.unique())
    assert abs(repeated - pairs) < 5 * math.sqrt(pairs)


def test_a_seed_is_an_int_or_a_tensor_of_two_or_three():
    assert seed_tensor("op", -5, torch.device(DEVICE)).tolist() == [-5, 0, 0]
    seed = seeds(1, 2, 3)
    assert seed_tensor("op", seed, seed.device) is seed
    assert seed_tensor("op", seed[:2], seed.device).tolist() == [1, 2, 0]
    for bad, message in ((2**63, "op: seed is 9223372036854775808; an int of 64 bits fits"),
                         (1.5, "op: seed is a float; an int64 tensor"), (True, "seed is a bool"),
                         (seed.int(), "seed is torch.int32 of shape \\(3,\\)"), (seed[:1], "of shape \\(1,\\)"),
                         (seed.to("meta"), "on meta; an int64 tensor on")):
        with pytest.raises(ValueError, match=message):
            seed_tensor("op", bad, torch.device(DEVICE))


def test_noise_is_drawn_once_for_a_seed_tensor_and_again_when_that_is_written_to(monkeypatch):
    monkeypatch.setattr(_library._calls, "are_eager", True)  # as inside of an operator
    seed, offsets = torch.tensor([5, 7, 0]), torch.tensor([0, 4, 6], dtype=torch.int32)
    first = noise_reference(seed, offsets, 2, 6, 5)[1]
    assert noise_reference(seed, offsets, 2, 6, 5)[1] is first
    assert noise_reference(seed, offsets, 2, 6, 5, torch.float64)[1].dtype == torch.float64
    assert noise_reference(seed, offsets.clone(), 2, 6, 5)[1].equal(first)
    offsets[1] = 3
    moved = noise_reference(seed, offsets, 2, 6, 5)[1]
    assert moved[:3].equal(first[:3]) and moved[3:5].equal(first[4:])
    assert not moved[5].equal(first[5])
    seed[0] = 6
    assert not (noise_reference(seed, offsets, 2, 6, 5)[1] == moved).any()


def test_a_seed_that_lives_on_keeps_the_noise_that_was_drawn_last_alone(monkeypatch):
    monkeypatch.setattr(_library._calls, "are_eager", True)
    seed, offsets = torch.tensor([5, 7, 0]), torch.tensor([0, 4, 6], dtype=torch.int32)
    asked = [(None, 1, rows, 5) for rows in (4, 6, 8)] + [(offsets, 2, 6, 5)]
    kept = [weakref.ref(noise_reference(seed, *what)[1]) for what in asked]
    assert [noise() is None for noise in kept] == [True, True, True, False]
    assert noise_reference(seed, *asked[-1])[1] is kept[-1]()
