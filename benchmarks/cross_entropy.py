"""The text head's cross-entropy: TFLOP/s, peak memory, and the bytes kept for the backward.

    python -m benchmarks.cross_entropy --out DIR [--quick] [--cpu]

Half of the tokens have a target: R of T = 2 R rows, drawn at random. Operations are those of the equations in
`tfkernels.losses.cross_entropy`: 2 R V C for the loss alone ("evaluation", where no gradient is wanted), and 6 R V C
for "forward" and "backward" together, whichever of the two makes the gradients; ours makes them in the forward.
Contenders are ours, two lines of plain PyTorch, eager and under `torch.compile` ("reference"), and, where they exist,
torch.nn.functional.linear_cross_entropy in chunks, liger-kernel's fused linear cross-entropy, and cut-cross-entropy
with its gradient filter and without. The peers' time includes gathering the rows. "saved" counts what autograd holds.
The gradients that PyTorch's operator makes in its forward are held elsewhere, so they are seen in the peak alone.
"""
import functools
import itertools
from typing import NamedTuple

import torch

from benchmarks.bandwidth import Problem, contenders, functions, saved_bytes
from benchmarks.command_line import run_command
from benchmarks.environment import peak_tflops
from benchmarks.harness import Contender, LeftOut, Result, measure, present
from benchmarks.report import Report
from benchmarks.timing import remark
from tfkernels import linear_cross_entropy, linear_cross_entropy_reference

EXACT_ROWS = 2048


class Case(NamedTuple):
    """`rows` of twice as many tokens of `width` have a target among the words of `vocabulary`."""

    rows: int
    width: int
    vocabulary: int


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    first = [Case(16384, 2048, 32000), Case(4096, 4096, 128256)]
    grid = [Case(*sizes) for sizes in itertools.product((4096, 16384), (2048, 4096), (32000, 128256))]
    return first if quick else first + [c for c in grid if c not in first]


def operations(case: Case) -> dict[str, int]:
    """Multiplications and additions of one product, and of the three."""
    product = 2 * case.rows * case.width * case.vocabulary
    return {"evaluation": product, "training": 3 * product}


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute: the mean over the rows."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randperm(2 * case.rows, generator=generator, device=device)[:case.rows].sort().values
    targets = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=device)
    shapes = {"hidden": (2 * case.rows, case.width), "weight": (case.vocabulary, case.width)}
    tensors = {n: torch.randn(shape, generator=generator, device=device) for n, shape in shapes.items()}
    tensors["weight"] /= case.width**0.5
    tensors = {n: x.to(dtype).requires_grad_() for n, x in tensors.items()}
    arriving = {"loss": torch.full((), 1 / case.rows, device=device)}
    makers = {"torch-chunked": lambda: _torch(targets, rows)}
    if device == "cuda":
        makers |= {"liger-kernel": lambda: _liger(targets, rows)} | {
            f"cut-cross-entropy-{impl.replace('_', '-')}": functools.partial(_cut, targets, rows, impl)
            for impl in ("cce", "cce_exact")
        }
    peers, others = present(makers)
    return Problem(
        tensors,
        arriving,
        {},
        functions(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, rows).loss,
            functools.partial(_plain, targets, rows),
            compiled=device == "cuda",
            peers=peers,
        ),
        others=others,
        exact=functools.partial(_exact, targets, rows),
    )


def _plain(targets, rows, hidden, weight):
    """The loss alone, as it is written by hand; the library's reference also makes log-sum-exp."""
    logits = torch.nn.functional.linear(hidden[rows], weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _exact(targets, rows, inputs, arriving):
    """Loss and gradients by EXACT_ROWS rows: all logits in float64 can be more than a device holds."""
    loss, gradients = torch.zeros_like(arriving[0]), [torch.zeros_like(x) for x in inputs]
    for some in zip(targets.split(EXACT_ROWS), rows.split(EXACT_ROWS)):
        part = linear_cross_entropy_reference(*inputs, *some).loss
        loss += part.detach()
        for total, gradient in zip(gradients, torch.autograd.grad(part, inputs, arriving)):
            total += gradient
    return [loss, *gradients]


def _torch(targets, rows):
    """PyTorch's own operator in chunks."""
    operator = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if operator is None:
        raise LeftOut(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight: operator(hidden[rows], weight, targets, reduction="sum", options=options).float()


def _liger(targets, rows):
    """liger-kernel's fused linear cross-entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    options = (
        None,
        None,
        -100,
        0.0,
        0.0,
        "sum",
        None,
        False,
        torch.float32,
    )  # from the bias to the dtype that weight's gradient is summed in
    return lambda hidden, weight: Liger.apply(hidden[rows], weight, targets, *options)[0].float()


def _cut(targets, rows, impl):
    """cut-cross-entropy, with its gradient filter or, exact, without."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight: linear_cross_entropy(
        hidden[rows], weight, targets, reduction="sum", impl=impl
    ).float()


def with_evaluation(contender: Contender, function, tensors: list) -> Contender:
    """The contender with a first phase that wants no gradient."""
    inputs = [x.detach() for x in tensors]

    @torch.no_grad()
    def evaluation(state):
        function(*inputs)

    return Contender(contender.name, {"evaluation": evaluation, **contender.phases}, contender.check)


def run_case(case: Case, report: Report, device: str, dtype: torch.dtype, seconds: float = 0.5) -> None:
    """Measure one case, and record and print a row per contender."""
    torch._dynamo.reset()  # as benchmarks.bandwidth does
    chosen, count = problem(case, device, dtype), operations(case)
    tensors = list(chosen.tensors.values())
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    saved = {}

    def record(result: Result) -> dict:
        times = {phase: found["p50"] for phase, found in result.milliseconds.items()}
        rates = (
            {
                "evaluation": count["evaluation"] / times["evaluation"] / 1e9,
                "training": count["training"] / (times["forward"] + times["backward"]) / 1e9,
            }
            if times
            else None
        )
        if result.checked and result.milliseconds and result.error is None and result.name not in saved:
            saved[result.name] = saved_bytes(chosen.functions[result.name], tensors)
        return report.record(
            {**case._asdict(), "operations": count},
            result,
            tflops=rates,
            saved_bytes=saved.get(result.name) if result.checked else None,
            percent_of_peak={name: 100 * rate / peak for name, rate in rates.items()} if rates and peak else None,
        )

    competing = [with_evaluation(c, chosen.functions[c.name], tensors) for c in contenders(chosen)]
    found = measure(competing, device=device, seconds=seconds, record=record, **report.limits)
    for row in map(record, found + (chosen.others or [])):
        numbers = [f"{phase} {times['p50']:8.3f} ms" for phase, times in row["milliseconds"].items()]
        numbers += [f"{name} {rate:5.2f} TFLOP/s" for name, rate in (row["tflops"] or {}).items()]
        numbers += [
            f"{name} {row[key] / 2**20:.1f} MiB"
            for name, key in (("peak", "peak_bytes"), ("saved", "saved_bytes"))
            if row[key] is not None
        ]
        label = f"rows {case.rows:5} width {case.width:4} words {case.vocabulary:6}"
        said = row["error"] or row["left_out"] or ", ".join(numbers) + remark(row["timing"])
        print(f"{label} {row['contender']:27} {said}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def measure_case(case: Case, report: Report, device: str) -> None:
        run_case(case, report, device, torch.bfloat16 if device == "cuda" else torch.float32)

    return run_command(
        "cross_entropy", __doc__, arguments, settings={"timing": "interleaved, L2 flushed on CUDA"}, cases=cases,
        cpu_cases=lambda quick: [Case(512, 128, 500) if quick else Case(1024, 512, 8192)], measure_case=measure_case)


if __name__ == "__main__":
    raise SystemExit(main())
