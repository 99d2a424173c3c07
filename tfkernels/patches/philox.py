"""Normal noise from a counter: Philox4x32-10 and Box-Muller, the same numbers in a Triton kernel and in plain PyTorch.

    w0..w3 = Philox4x32-10(counter = (d // 4, row, first image + image, offset), key = seed)
    u      = round(w0 * 2^-32 + 2^-33)          a = 2 pi w1 * 2^-32       u in (0, 1], rounded to float32 in every dtype
    eps    = sqrt(-2 log u) * (cos a, sin a)    and the same of w2, w3

Philox is of Salmon et al., SC'11, doi:10.1145/2063384.2063405. `eps` of the elements 4g .. 4g + 3 of a row depends on
(seed, offset, image, row within its image, g) alone: not on the launch, on the other images or on where the rows lie in
memory, and no two elements share a counter. The integers are equal everywhere; the normals, up to 6.8 standard
deviations, to float32 rounding. The angle is reduced as an integer, so that sine and cosine need no slow path (and no
stack). Nothing moves through memory: three int64 (seed, offset, first image) are read on the device, where a CUDA
graph's replay can find new ones. Images count from the first one, so that a part of a batch, on whatever device it is,
gets the noise that the whole batch would give it.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK = 2**32 - 1


@triton.jit
def _pair(word, other):
    """Box-Muller: two uint32 to two float32 normals."""
    radius = tl.sqrt(-2.0 * tl.log(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    quarter = (other + 0x20000000) >> 30  # nearest multiple of pi / 2; it wraps
    # in [-pi / 4, pi / 4]
    x = (other - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    y = x * x
    sine = ((-1.9515295891e-4 * y + 8.3321608736e-3) * y - 1.6666654611e-1) * y * x + x    # Cephes sinf, cosf
    cosine = ((2.443315711809948e-5 * y - 1.388731625493765e-3) * y + 4.166664568298827e-2) * y * y - 0.5 * y + 1.0
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return radius * first, radius * second


@triton.jit
def philox_normal(seed_ptr, image, row, first, BLOCK_D: tl.constexpr):
    """Normals (R, BLOCK_D) float32 of the elements [first, first + BLOCK_D) of rows `row` of images `image`.

    row and image are (R,) int32; 4 divides first and BLOCK_D.
    """
    group = first // 4 + tl.arange(0, BLOCK_D // 4)[None, :]
    offset = tl.load(seed_ptr + 1).to(tl.int32)
    image += tl.load(seed_ptr + 2).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), group, row[:, None], image[:, None], offset)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 in int64 arithmetic: four words of counter and two of key to four words.

    All are in [0, 2^32), of any shapes that broadcast.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits, whatever the sign
        c0, c1, c2, c3 = _high_word(b, c1, k0), b, _high_word(a, c3, k1), a  # b and a: their low 32 bits count
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _high_word(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The upper 32 bits of a product, xor the lower ones of word and key; in place where nothing broadcasts."""
    high = product >> 32
    high = high.bitwise_xor_(word) if high.shape == word.shape else high ^ word
    return high.bitwise_xor_(key).bitwise_and_(_MASK)


def philox_normal_reference(
    seed: Tensor, image: Tensor, row: Tensor, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The specification: eps (P, dim) in `dtype` of rows `row` (P,) of images `image` (P,).

    seed (3,) int64 holds the seed, the offset and the first image, or (2,) for a first image of 0.
    """
    first = seed[2] if len(seed) == 3 else 0
    group = torch.arange(-(-dim // 4), device=seed.device)
    counter = group, row.long()[:, None] & _MASK, (image + first)[:, None] & _MASK, seed[1] & _MASK
    words = philox_reference(counter, (seed[0] & _MASK, seed[0] >> 32 & _MASK))
    normals = torch.empty(len(row), len(group), 4, dtype=dtype, device=seed.device)
    for first, (word, other) in ((0, words[:2]), (2, words[2:])):
        radius = word.float().mul_(2**-32).add_(2**-33).to(dtype).log_().mul_(-2).sqrt_()
        angle = (other << 32 >> 32).to(dtype).mul_(math.pi * 2**-31)  # of a signed word
        torch.mul(radius, angle.cos(), out=normals[..., first])
        torch.mul(radius, angle.sin(), out=normals[..., first + 1])
    return normals.flatten(1)[:, :dim]


def seed_tensor(op: str, seed: Tensor | int, device: torch.device) -> Tensor:
    """Return [seed, offset, first image], int64 (3,) on `device`, without a host synchronisation.

    An int is a seed with offset 0; what a shorter tensor leaves out is 0.
    """
    if isinstance(seed, Tensor):
        if seed.shape not in ((2,), (3,)) or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; an int64 "
                             f"tensor on {device}, [seed, offset] or [seed, offset, first image], or an int fits; "
                             "torch.tensor([seed, step], device=...) makes one")
        return seed if len(seed) == 3 else torch.nn.functional.pad(seed, (0, 1))
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise ValueError(f"{op}: seed is a {type(seed).__name__}; an int64 tensor, [seed, offset] or [seed, offset, "
                         "first image], or an int fits")
    if not -2**63 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}; an int of 64 bits fits, -2^63 to 2^63 - 1")
    number = torch.full((1,), seed, dtype=torch.int64, device=device)
    return torch.nn.functional.pad(number, (0, 2))
