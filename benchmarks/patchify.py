"""Patches, noise and the patch embedding: GB/s of the bytes that must move, and as a share of a measured device copy's.

    python -m benchmarks.patchify --out DIR [--quick] [--cpu]

Images have 256 tokens: patches of 2 x 2 in 8 or 16 latent channels, so D is 32 or 64. `embed_patches` puts them into
a sequence that holds as many rows of text, in stretches of 256. `noise_patchify_embed` is `noise_patchify` followed
by `embed_patches`, from latents that need no gradient. The bytes that must move are those of the tables in
`tfkernels.patches`. In training x0 needs no gradient, but a problem without one has no backward: in `patchify` and
`noise_patchify` x0 gets one, an unpatchify. Contenders are ours, and the same in eager PyTorch and under
`torch.compile`: once with noise that is ready in memory (Philox's, so that all compute the same), whose making is not
timed, which favours them; once with noise that PyTorch draws on the way, as a program of theirs has to.
"""
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bandwidth import Problem, functions, run_benchmark
from tfkernels import embed_patches, noise_patchify, patchify
from tfkernels.patches import noise_reference, patchify_reference

IMAGE, PATCH = 256, 2
SEED = 1
OPS = ("patchify", "noise_patchify", "embed_patches", "noise_patchify_embed")


class Case(NamedTuple):
    """One operator on `patches` patches of D = `dim` elements, among as many rows of text of `width` columns.

    A width of 0 says that nothing is embedded.
    """

    op: str
    patches: int
    dim: int
    width: int = 0


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    grid = [Case(op, patches, dim, width) for op in OPS for patches in (16_384, 65_536) for dim in (32, 64)
            for width in ((2048, 4096) if "embed" in op else (0,))]
    first = [c for c in grid if c.patches == 16_384 and c.dim == 64]
    return first if quick else first + [c for c in grid if c not in first]


def moved(case: Case, size: int) -> dict[str, int]:
    """Bytes that must move, with `size` bytes per element."""
    patches, embedded = case.patches * case.dim, 0 if not case.width else case.patches * case.width
    tokens = 2 * embedded
    forward, backward = {"patchify": (2 * patches, 2 * patches), "noise_patchify": (2 * patches, 2 * patches),
                         "embed_patches": (2 * tokens - embedded + patches, 2 * tokens + patches),
                         "noise_patchify_embed": (2 * tokens - embedded + 3 * patches, 2 * tokens + patches)}[case.op]
    return {"forward": forward * size, "backward": backward * size}


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute."""
    generator = torch.Generator(device).manual_seed(0)
    images, side = case.patches // IMAGE, round(IMAGE**0.5) * PATCH

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x0 = normal(images, case.dim // PATCH**2, side, side)
    signal, noise = torch.rand(2, images, generator=generator, device=device).unbind()
    seed = torch.tensor([SEED, 0], device=device)
    offsets = torch.arange(images + 1, dtype=torch.int32, device=device) * IMAGE
    places = torch.arange(case.patches, device=device)
    places += (places // IMAGE + 1) * IMAGE  # text, image, text, image, ...
    image = torch.arange(case.patches, device=device) // IMAGE
    dtypes = (dtype, torch.float64) if "noise" in case.op else ()
    eps = {d: noise_reference(seed, None, images, case.patches, case.dim, d)[1] for d in dtypes}

    def patches(x: Tensor) -> Tensor:
        return patchify_reference(x, None, None, x.shape[1], PATCH)

    def noised(x: Tensor, drawn: bool = False) -> Tensor:
        x, scale = patches(x), noise.to(x.dtype)[image][:, None]
        return signal.to(x.dtype)[image][:, None] * x + scale * (torch.randn_like(x) if drawn else eps[x.dtype])

    def embedded(tokens: Tensor, hidden: Tensor, weight: Tensor, condition: Tensor) -> Tensor:
        return hidden.index_copy(0, places, F.linear(tokens.to(hidden.dtype), weight) + condition[image])

    def noise_ours(x: Tensor) -> Tensor:
        return noise_patchify(x, signal, noise, seed, patch_size=PATCH)

    def embed_ours(tokens: Tensor, hidden: Tensor, weight: Tensor, condition: Tensor) -> Tensor:
        return embed_patches(hidden, tokens, weight, condition, places, offsets)

    tensors, size = {"x0": x0}, (case.patches, case.dim)
    if case.width:
        size = 2 * case.patches, case.width
        tensors = {"hidden": normal(*size), "weight": normal(case.width, case.dim) / case.dim**0.5,
                   "condition": normal(images, case.width)}
    tokens = patches(x0)

    def noised_and_embedded(*given: Tensor, drawn: bool = False) -> Tensor:
        return embedded(noised(x0.to(given[0].dtype), drawn), *given)

    ours, plain = {
        "patchify": (lambda x: patchify(x, PATCH), patches),
        "noise_patchify": (noise_ours, noised),
        "embed_patches": (lambda *given: embed_ours(tokens, *given), lambda *given: embedded(tokens, *given)),
        "noise_patchify_embed": (lambda *given: embed_ours(noise_ours(x0), *given), noised_and_embedded),
    }[case.op]
    drawing = partial(plain, drawn=True) if "noise" in case.op else None
    return Problem({name: x.requires_grad_() for name, x in tensors.items()}, {"out": normal(*size)},
                   moved(case, x0.element_size()),
                   functions(ours, plain, compiled=device == "cuda", drawing=drawing))


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def cpu_cases(quick: bool) -> list[Case]:
        patches, width = (512, 128) if quick else (2048, 512)
        return [Case(op, patches, 32, width if "embed" in op else 0) for op in OPS]

    return run_benchmark("patchify", __doc__, arguments, settings={"image_tokens": IMAGE, "patch_size": PATCH},
                         cases=cases, cpu_cases=cpu_cases, problem=problem)


if __name__ == "__main__":
    raise SystemExit(main())
