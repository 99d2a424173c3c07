"""Modulated norms and gated residuals: GB/s of the bytes that must move, and as a share of a measured device copy's.

    python -m benchmarks.norm --out DIR [--quick] [--cpu]

A packed row of text and images of 256 tokens, half of the tokens each. The bytes that must move are those of the
table in `tfkernels.norm.op`: token tensors once, nothing in between. Contenders are ours, the reference in eager
PyTorch and under `torch.compile`, and, where liger-kernel is installed, its modulated RMS norm. That one knows
neither text nor an index, so it gets rows in which every token is of an image, all images of one length.
"""
import itertools
from typing import NamedTuple

import torch

import tfkernels
from benchmarks.bandwidth import Problem, functions, run_benchmark
from benchmarks.harness import present

IMAGE = 256
ARGUMENTS = {
    "modulated_rms_norm": ("x", "weight", "scale", "shift"),
    "modulated_layer_norm": ("x", "weight", "bias", "scale", "shift"),
    "gated_residual": ("x", "branch", "gate"),
    "gated_residual_rms_norm": ("x", "branch", "gate", "weight", "scale", "shift"),
}
MOVED = {  # forward and backward, in T C elements
    "modulated_rms_norm": (2, 3), "modulated_layer_norm": (2, 3), "gated_residual": (3, 3),
    "gated_residual_rms_norm": (4, 6)}


class Case(NamedTuple):
    """One operator on `tokens` rows of `width`; `text` of every two stretches of IMAGE tokens is text (or none is)."""

    op: str
    tokens: int
    width: int
    text: bool = True


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    grid = [Case(*case) for case in itertools.product(ARGUMENTS, (4096, 32768), (1024, 2048, 4096, 8192))]
    grid += [Case("modulated_rms_norm", 32768, 4096, text=False)]
    first = [c for c in grid if c.tokens == 32768 and c.width in (2048, 4096)]
    return first if quick else first + [c for c in grid if c not in first]


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute."""
    generator = torch.Generator(device).manual_seed(0)
    stretch = torch.arange(case.tokens, device=device) // IMAGE
    index = torch.where(stretch % 2 == 0, -1, stretch // 2) if case.text else stretch
    sizes = dict.fromkeys(("x", "branch"), (case.tokens, case.width)) | dict.fromkeys(("weight", "bias"), (case.width,))
    sizes |= dict.fromkeys(("gate", "scale", "shift"), (int(index.max()) + 1, case.width))

    def random(*size):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    tensors = {name: random(*sizes[name]).requires_grad_() for name in ARGUMENTS[case.op]}
    outputs = ("out", "normed") if case.op == "gated_residual_rms_norm" else ("out",)
    arriving = {name: random(case.tokens, case.width) for name in outputs}
    size = case.tokens * case.width * torch.empty(0, dtype=dtype).element_size()
    ours, reference = (getattr(tfkernels, f"{case.op}{suffix}") for suffix in ("", "_reference"))
    peers, others = present({} if case.text or case.op != "modulated_rms_norm" else {"liger-kernel": _liger})
    return Problem(
        tensors,
        arriving,
        dict(zip(("forward", "backward"), (n * size for n in MOVED[case.op]))),
        functions(
            lambda *tensors: ours(*tensors, index),
            lambda *tensors: reference(*tensors, index),
            compiled=device == "cuda",
            peers=peers,
        ),
        others=others,
    )


def _liger():
    """liger-kernel's modulated RMS norm, for rows of images alone."""
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    def function(x, weight, scale, shift):
        in_place = False  # in place, backward would overwrite dy, which the next round needs
        return LigerModulatedRMSNormFunction.apply(
            x.unflatten(0, (-1, IMAGE)), weight, scale, shift, 1e-6, 0.0, "llama", in_place
        ).flatten(0, 1)

    return function


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def cpu_cases(quick: bool) -> list[Case]:
        return [Case(op, *((1024, 256) if quick else (4096, 512))) for op in ARGUMENTS]

    return run_benchmark("norm", __doc__, arguments, settings={"image_tokens": IMAGE}, cases=cases,
                         cpu_cases=cpu_cases, problem=problem)


if __name__ == "__main__":
    raise SystemExit(main())
