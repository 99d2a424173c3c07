"""Modulated norms and gated residuals: GB/s of the bytes that must move, and what share of a measured device copy's that is.

    python -m benchmarks.norm --out DIR [--quick] [--cpu]

A packed row of text and images of 256 tokens, half of the tokens each. The bytes that must move are those of the table in `tfkernels.norm`:
token tensors once, no intermediate. Contenders: ours, the reference in eager PyTorch, `torch.compile` of the reference, and where
liger-kernel has it, its modulated RMS norm, which has neither text nor an index: every token is of an image, all of one length. Every
contender passes the tests' accuracy rule against float64, in its outputs and every gradient, before it is timed.
"""
import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import tfkernels
from benchmarks.harness import Contender, Report, environment, measure
from tests.compare import assert_as_accurate

IMAGE = 256
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0
ARGUMENTS = {
    "modulated_rms_norm": ("x", "weight", "scale", "shift"),
    "modulated_layer_norm": ("x", "weight", "bias", "scale", "shift"),
    "gated_residual": ("x", "branch", "gate"),
    "gated_residual_rms_norm": ("x", "branch", "gate", "weight", "scale", "shift"),
}
MOVED = {"modulated_rms_norm": (2, 3), "modulated_layer_norm": (2, 3), "gated_residual": (3, 3), "gated_residual_rms_norm": (4, 6)}  # of T C elements


class Case(NamedTuple):
    """One operator on `tokens` rows of `width`; `text` of every two stretches of IMAGE tokens is text (or none is)."""

    op: str
    tokens: int
    width: int
    text: bool = True


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    grid = [Case(op, tokens, width) for op in ARGUMENTS for tokens in (4096, 32768) for width in (1024, 2048, 4096, 8192)]
    grid += [Case("modulated_rms_norm", 32768, 4096, text=False)]
    first = [c for c in grid if c.tokens == 32768 and c.width in (2048, 4096)]
    return first if quick else first + [c for c in grid if c not in first]


def inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[dict, Tensor, list[Tensor]]:
    """Return the arguments by name, the index, and the gradients that arrive."""
    generator = torch.Generator(device).manual_seed(0)
    stretch = torch.arange(case.tokens, device=device) // IMAGE
    index = torch.where(stretch % 2 == 0, -1, stretch // 2) if case.text else stretch
    sizes = dict.fromkeys(("x", "branch"), (case.tokens, case.width)) | dict.fromkeys(("weight", "bias"), (case.width,))
    sizes |= dict.fromkeys(("gate", "scale", "shift"), (int(index.max()) + 1, case.width))
    tensors = {n: torch.randn(sizes[n], generator=generator, device=device).to(dtype).requires_grad_() for n in ARGUMENTS[case.op]}
    outputs = 2 if case.op == "gated_residual_rms_norm" else 1
    return tensors, index, [torch.randn(case.tokens, case.width, generator=generator, device=device).to(dtype) for _ in range(outputs)]


def contenders(case: Case, device: str, dtype: torch.dtype, compile_reference: bool = True) -> list[Contender]:
    """Return the contenders of one configuration."""
    tensors, index, arriving = inputs(case, device, dtype)
    reference = getattr(tfkernels, f"{case.op}_reference")

    def results(function, inputs, arriving):
        outputs = function(*inputs, index)
        outputs = tuple(outputs) if isinstance(outputs, tuple) else (outputs,)
        return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, arriving))]

    rounded = results(reference, list(tensors.values()), arriving)
    exact = [x.cpu() for x in results(reference, [x.detach().double().requires_grad_() for x in tensors.values()], [g.double() for g in arriving])]
    names = ("out", "normed")[:len(arriving)] + tuple(f"d{n}" for n in tensors)

    def contender(name, function, factor):
        def forward(state):
            outputs = function(*tensors.values(), index)
            state["outputs"] = tuple(outputs) if isinstance(outputs, tuple) else (outputs,)

        def backward(state):
            state["grads"] = torch.autograd.grad(state["outputs"], list(tensors.values()), arriving)

        def check(state):
            for label, actual, theirs, truth in zip(names, (*state["outputs"], *state["grads"]), rounded, exact, strict=True):
                assert_as_accurate(label, actual.detach(), theirs, truth.to(device), factor=factor)

        return Contender(name, {"forward": forward, "backward": backward}, check)

    found = [contender("tfkernels", getattr(tfkernels, case.op), OUR_FACTOR), contender("reference, eager", reference, PEER_FACTOR)]
    if compile_reference:
        found.append(contender("reference, torch.compile", torch.compile(reference, dynamic=False), PEER_FACTOR))
    peer = _liger(case)
    return found + ([contender("liger-kernel", peer, PEER_FACTOR)] if peer else [])


def copy_contender(case: Case, device: str, dtype: torch.dtype) -> Contender:
    """A device copy of as many bytes as the op's forward pass moves: the bandwidth that there is."""
    source = torch.randn(case.tokens * case.width * MOVED[case.op][0] // 2, device=device).to(dtype)
    target = torch.empty_like(source)

    def check(state):
        assert torch.equal(source, target)

    return Contender("device copy", {"forward": lambda state: target.copy_(source)}, check)


def _liger(case: Case):
    """liger-kernel's modulated RMS norm, for rows of images alone; None where it is not installed or has none."""
    if case.text or case.op != "modulated_rms_norm":
        return None
    try:
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
    except ImportError:
        return None

    def function(x, weight, scale, shift, index):
        in_place = False  # in place, backward would overwrite dy, which the next round needs
        return LigerModulatedRMSNormFunction.apply(x.unflatten(0, (-1, IMAGE)), weight, scale, shift, 1e-6, 0.0, "llama", in_place).flatten(0, 1)

    return function


def run_case(case: Case, report: Report, device: str, seconds: float) -> None:
    """Measure one configuration and record a row per contender."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = case.tokens * case.width * torch.empty(0, dtype=dtype).element_size()
    moved = dict(zip(("forward", "backward"), (n * size for n in MOVED[case.op])))
    found = measure([copy_contender(case, device, dtype), *contenders(case, device, dtype, compile_reference=device == "cuda")], device=device, seconds=seconds)
    copy = found[0].milliseconds.get("forward")
    roof = moved["forward"] / copy["p50"] / 1e6 if copy else None
    for result in found:
        rates = {phase: moved[phase] / times["p50"] / 1e6 for phase, times in result.milliseconds.items()}
        row = report.record({**case._asdict(), "bytes": moved}, result, gb_per_s=rates or None,
                            percent_of_copy={phase: 100 * rate / roof for phase, rate in rates.items()} if rates and roof else None)
        numbers = (f"{phase} {result.milliseconds[phase]['p50']:8.4f} ms {rate:6.0f} GB/s" for phase, rate in rates.items())
        peak = "" if result.peak_bytes is None else f", peak {result.peak_bytes / 2**20:.0f} MiB"
        print(f"{case.op:24} tokens {case.tokens:6} C {case.width:5} {result.name:24} " + (row["error"] or ", ".join(numbers) + peak), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the grid until it ends or `--seconds` are over; the file is complete after every configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="32k tokens of 2048 and 4096 columns")
    parser.add_argument("--cpu", action="store_true", help="a few tokens on the CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no configuration after this many seconds")
    parser.add_argument("--commit", help="the commit being measured, where there is no git")
    options = parser.parse_args(arguments)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.norm: no CUDA device; pass --cpu for a few tokens on the CPU")
        return 1
    report = Report("norm", {"quick": options.quick, "image_tokens": IMAGE, "timing": "interleaved, L2 flushed on CUDA"}, environment(device, options.commit))
    chosen = [Case(op, 1024, 256) for op in ARGUMENTS] if options.cpu else cases(options.quick)
    path = options.out / f"norm{'-cpu' * options.cpu}.json"
    status = report.run(chosen, lambda case: run_case(case, report, device, seconds=0.5), path, options.seconds)
    return status or int(any(row["error"] for row in report.rows if row["contender"].startswith("tfkernels")))


if __name__ == "__main__":
    raise SystemExit(main())
