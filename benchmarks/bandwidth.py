"""Operators that memory bounds: GB/s of the bytes that must move, and that rate as a share of a measured device copy's.

A benchmark names its cases and, for each, a `Problem`: tensors that get gradients, the gradients that arrive, the
bytes that must move, and the functions that compete. Before it is timed, every contender passes the tests' accuracy
rule against float64, in its outputs and in every gradient; of PyTorch with noise of its own, whose numbers are others,
that all is finite is asked alone. Beside milliseconds at three quantiles a row holds the peak memory and the bytes that
autograd keeps from forward to backward, without the inputs.
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.command_line import run_command
from benchmarks.harness import Contender, Result, measure
from benchmarks.report import Report
from benchmarks.timing import remark
from tests.compare import assert_as_accurate

OURS, EAGER, COMPILED, COPY = "tfkernels", "reference, eager", "reference, torch.compile", "device copy"
OWN_NOISE = "eager, PyTorch's noise", "torch.compile, PyTorch's noise"
"""the two of PyTorch, where they draw noise as well"""
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0


class Problem(NamedTuple):
    """One operator on one set of inputs.

    Each function takes the tensors in order and returns a tensor or a tuple of them.
    """

    tensors: dict[str, Tensor]           # require gradients
    arriving: dict[str, Tensor]          # by output
    moved: dict[str, int]                # bytes that must move, by phase
    functions: dict[str, Callable]       # OURS, EAGER, ... in the order of the report
    terms: dict[str, Tensor] | None = None  # `terms` of tests/compare.py, by output and gradient ("d" + name)
    others: list[Result] | None = None      # of peers that cannot take part
    exact: Callable | None = None           # `results` in float64, where the reference does not fit memory


def functions(
    ours: Callable, reference: Callable, *, compiled: bool, drawing: Callable | None = None,
    peers: dict[str, Callable] | None = None
) -> dict[str, Callable]:
    """Return ours, the reference in eager PyTorch and under torch.compile, and the peers, by name.

    `drawing` is the reference with noise that PyTorch draws, where the reference's is ready made.
    """
    found = {OURS: ours, EAGER: reference}
    if compiled:
        found[COMPILED] = torch.compile(reference, dynamic=False)
    if drawing:
        found[OWN_NOISE[0]] = drawing
    if drawing and compiled:
        found[OWN_NOISE[1]] = torch.compile(drawing, dynamic=False)
    return found | (peers or {})


def results(function: Callable, inputs: list[Tensor], arriving: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of `function`."""
    outputs = _tuple(function(*inputs))
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, arriving))]


def contenders(problem: Problem) -> list[Contender]:
    """Return the contenders of a problem, each checked against its reference in float64."""
    tensors, arriving = list(problem.tensors.values()), list(problem.arriving.values())
    reference = problem.functions[EAGER]
    rounded = results(reference, tensors, arriving)
    wide = [x.detach().double().requires_grad_() for x in tensors], [g.double() for g in arriving]
    exact = [x.cpu() for x in (problem.exact(*wide) if problem.exact else results(reference, *wide))]
    del wide
    names = *problem.arriving, *(f"d{name}" for name in problem.tensors)

    def contender(name, function):
        def forward(state):
            state["outputs"] = _tuple(function(*tensors))

        def backward(state):
            state["grads"] = torch.autograd.grad(state["outputs"], tensors, arriving)

        def check(state):
            found = *state["outputs"], *state["grads"]
            if name in OWN_NOISE:  # whose noise, and so whose numbers, are others
                assert all(x.isfinite().all() and x.shape == y.shape for x, y in zip(found, rounded, strict=True))
                return
            for label, actual, theirs, truth in zip(names, found, rounded, exact, strict=True):
                assert_as_accurate(
                    label,
                    actual.detach(),
                    theirs,
                    truth.to(actual.device),
                    (problem.terms or {}).get(label),
                    factor=OUR_FACTOR if name == OURS else PEER_FACTOR,
                )

        return Contender(name, {"forward": forward, "backward": backward}, check)

    return [contender(name, function) for name, function in problem.functions.items()]


def copy_contender(size: int, device: str) -> Contender:
    """A device copy that moves `size` bytes, half in and half out: the bandwidth that there is."""
    source = torch.randint(256, (size // 2,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def check(state):
        assert torch.equal(source, target)

    return Contender(COPY, {"forward": lambda state: target.copy_(source)}, check)


def saved_bytes(function: Callable, tensors: list[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, each storage once, those of `tensors` aside."""
    found, given = {}, {x.untyped_storage().data_ptr() for x in tensors}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kept = function(*tensors)  # alive, so that no address is used twice
    del kept
    return sum(size for address, size in found.items() if address not in given)


def run_problem(problem: Problem, configuration: dict, report: Report, device: str, seconds: float = 0.5) -> None:
    """Measure one problem, and record and print a row per contender."""
    torch._dynamo.reset()  # every case compiles anew: no limit on recompilation sends the compiled one to its slow path
    label, saved, roof = " ".join(f"{key} {value}" for key, value in configuration.items()), {}, None

    def record(result: Result) -> dict:
        nonlocal roof
        medians = {phase: times["p50"] for phase, times in result.milliseconds.items()}
        rates = {phase: problem.moved[phase] / median / 1e6 for phase, median in medians.items()}
        if result.name == COPY and rates:
            roof = rates["forward"]
        has_run = result.checked and result.milliseconds and result.error is None  # outside of measure nothing may fail
        if has_run and result.name in problem.functions and result.name not in saved:
            saved[result.name] = saved_bytes(problem.functions[result.name], list(problem.tensors.values()))
        return report.record(
            {**configuration, "bytes": problem.moved},
            result,
            gb_per_s=rates or None,
            saved_bytes=saved.get(result.name) if result.checked else None,
            percent_of_copy={phase: 100 * rate / roof for phase, rate in rates.items()} if rates and roof else None,
        )

    found = measure(
        [copy_contender(problem.moved["forward"], device), *contenders(problem)],
        device=device,
        seconds=seconds,
        record=record,
        **report.limits,
    )
    for row in map(record, found + (problem.others or [])):
        numbers = [
            f"{phase} {times['p50']:8.4f} ms {row['gb_per_s'][phase]:6.0f} GB/s"
            for phase, times in row["milliseconds"].items()
        ]
        numbers += [
            f"{name} {row[key] / 2**20:.1f} MiB"
            for name, key in (("peak", "peak_bytes"), ("saved", "saved_bytes"))
            if row[key] is not None
        ]
        said = row["error"] or row["left_out"] or ", ".join(numbers) + remark(row["timing"])
        print(f"{label:56} {row['contender']:24} {said}", flush=True)


def run_benchmark(
    name: str,
    documentation: str,
    arguments: list[str] | None,
    *,
    settings: dict,
    cases: Callable[[bool], Iterable],
    cpu_cases: Callable[[bool], Iterable],
    problem: Callable[[NamedTuple, str, torch.dtype], Problem],
) -> int:
    """Command line of a benchmark whose cases are problems of this module: bfloat16 on CUDA, float32 on the CPU."""

    def measure_case(case: NamedTuple, report: Report, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        run_problem(problem(case, device, dtype), case._asdict(), report, device)

    return run_command(
        name, documentation, arguments, settings={**settings, "timing": "interleaved, L2 flushed on CUDA"}, cases=cases,
        cpu_cases=cpu_cases, measure_case=measure_case)


def _tuple(outputs) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)
