"""The diffusion loss, and its form that starts at the hidden states: GB/s, and as a share of a device copy's.

    python -m benchmarks.diffusion_loss --out DIR [--quick] [--cpu]

Images have 256 patches. The bytes that must move are those of the tables in `tfkernels.losses.diffusion` and
`tfkernels.losses.head`. The packed row of the loss from the hidden states has as many text tokens as patches, in
stretches of 256. Contenders are ours, and plain PyTorch, eager and compiled: once with its noise, Philox's, ready made
in memory, where neither making nor first writing it is timed, which favours plain PyTorch; once with noise that PyTorch
draws on the way, as a step that has kept none must.
"""
from functools import partial
from typing import NamedTuple

import torch

import tfkernels
from benchmarks.bandwidth import Problem, functions, results, run_benchmark
from tfkernels.patches import noise_reference

IMAGE = 256
HEADS = {"modulated_layer_norm_diffusion_loss": tfkernels.modulated_layer_norm_reference,
         "modulated_rms_norm_diffusion_loss": tfkernels.modulated_rms_norm_reference}
OPS = ("diffusion_loss", *HEADS)
MOVED = {"diffusion_loss": (2, 3), "norm, head, loss": ((1, 0), (1, 1))}  # of E elements; of P C and of T C elements


class Case(NamedTuple):
    """One operator on `patches` rows of `dim` elements, and on twice as many hidden states of `width` (0: none)."""

    op: str
    patches: int
    dim: int
    width: int = 0


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    first = [Case("diffusion_loss", 2**18, 64)] + [Case(op, 2**14, 64, 4096) for op in HEADS]
    grid = [Case("diffusion_loss", patches, dim) for patches in (2**16, 2**18) for dim in (32, 64)]
    grid += [Case(op, 2**14, 64, width) for op in HEADS for width in (2048, 4096, 8192)]
    return first if quick else first + [c for c in grid if c not in first]


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute; the plain ones take prediction - target in float32, as we do."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    images, e = case.patches // IMAGE, torch.empty(0, dtype=dtype).element_size()
    x0, dloss = random(case.patches, case.dim).to(dtype), random(images)
    p, q, weight = random(images), random(images), random(images)
    offsets = torch.arange(images + 1, dtype=torch.int32, device=device) * IMAGE
    seed = torch.tensor([5, 7], device=device)
    index, eps = noise_reference(seed, offsets, images, case.patches, case.dim)

    def plain(prediction, drawn=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        noise = torch.randn(eps.shape, device=device, dtype=dtype) if drawn else eps
        target = p.to(dtype)[index][:, None] * x0 + q.to(dtype)[index][:, None] * noise
        return weight * (prediction - target).square().view(images, -1).mean(-1)

    if not case.width:
        moved = [n * case.patches * case.dim * e for n in MOVED["diffusion_loss"]]
        tensors = {"prediction": random(case.patches, case.dim)}
        reference = plain

        def ours(prediction):
            return tfkernels.diffusion_loss(prediction, x0, p, q, weight, seed, offsets=offsets)
    else:
        tokens = 2 * case.patches
        moved = [(a * case.patches + b * tokens) * case.width * e for a, b in MOVED["norm, head, loss"]]
        places = torch.arange(tokens, device=device).view(-1, 2, IMAGE)[:, 1].flatten()
        tensors = {"hidden": random(tokens, case.width), "scale": random(images, case.width),
                   "shift": random(images, case.width), "weight": random(case.dim, case.width) / case.width**0.5,
                   "bias": random(case.dim)}

        def ours(hidden, scale, shift, head, bias):
            operator = getattr(tfkernels, case.op)
            return operator(hidden, places, scale, shift, head, bias, x0, p, q, weight, seed, offsets=offsets)

        def reference(hidden, scale, shift, head, bias, drawn=False):
            vectors = (None, None) if "layer" in case.op else (None,)
            normed = HEADS[case.op](hidden[places], *vectors, scale, shift, index)
            return plain(torch.nn.functional.linear(normed, head, bias), drawn)

    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    loss, *gradients = results(reference, list(tensors.values()), [dloss])
    terms = {"loss": IMAGE**0.5 * loss.abs()}  # a sum of IMAGE rows
    for name, gradient in zip(tensors, gradients):  # prediction - target cancels
        terms[f"d{name}"] = gradient.abs() + gradient.abs().amax()
    return Problem(tensors, {"loss": dloss}, dict(zip(("forward", "backward"), moved)),
                   functions(ours, reference, compiled=device == "cuda", drawing=partial(reference, drawn=True)), terms)


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def cpu_cases(quick: bool) -> list[Case]:
        patches, width = (1024, 128) if quick else (2048, 512)
        return [Case("diffusion_loss", patches, 32)] + [Case(op, patches, 32, width) for op in HEADS]

    return run_benchmark("diffusion_loss", __doc__, arguments, settings={"image_patches": IMAGE}, cases=cases,
                         cpu_cases=cpu_cases, problem=problem)


if __name__ == "__main__":
    raise SystemExit(main())
