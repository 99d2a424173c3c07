"""The host's time in a call of each operator: Python alone, with launches that do nothing, on CPU tensors.

    python -m benchmarks.host

Operators run their CUDA implementations on CPU tensors of a few numbers, and a launch of theirs does nothing. What is
left is what a call costs the host beside its launches: checks, the way to the implementation, results that are
allocated, and PyTorch's own operators, which compute a few numbers here and would be launched on a GPU. `forward` is a
call without a gradient, `recorded` one that keeps what its gradient will need, and `both` the latter with its gradient:
directly, or through the custom op, as where something watches operators. All outputs are differentiated, of the
cross-entropy its loss. The unit is one bare launch of a kernel of three pointers through Triton's own Python, with a
driver that does nothing; a whole call takes its launches as well. Calls of all kinds take turns and each figure is the
least of many rounds, for whatever else runs on the machine only adds; the ratios are what to read.
"""
import contextlib
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch._library.custom_ops import CustomOpDef
from triton.runtime.jit import JITFunction

import ptxrun
import tfkernels
from ptxrun.driver import EmulatedDriver
from tests.launches import seen
from tfkernels._library import Operator

ROUNDS, CALLS = 150, 4
ORIGINAL_RUN, DIRECTLY = JITFunction.run, Operator.__call__


@triton.jit
def _copied(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at, mask=at < n, other=0.0), tl.load(y_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x + y, mask=at < n)


def operators() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Each operator's call and the tensors that it is differentiated by."""
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    tokens, width, images = 64, 64, 2
    q, k, v = (leaf(1, heads, tokens, 32) for heads in (4, 2, 2))
    x, branch = leaf(1, tokens, width), leaf(1, tokens, width)
    mask = tfkernels.TransfusionMask.from_spans([[(4, 36)]], tokens)
    weight, scale, shift, gate = leaf(width), leaf(images, width), leaf(images, width), leaf(images, width)
    index, cos = (torch.arange(tokens) // 32 - 1)[None], torch.randn(tokens, 16)
    head, targets, rows = leaf(96, width), torch.arange(20), torch.arange(20)
    clean, coefficients = torch.randn(32, 16), torch.rand(2)
    offsets, places = torch.tensor([0, 16, 32], dtype=torch.int32), torch.arange(32)
    prediction, seed, project, flat = leaf(32, 16), torch.tensor([3, 1]), leaf(width, 16), leaf(tokens, width)
    out, bias = leaf(16, width), leaf(16)
    return {
        "attention": (lambda: tfkernels.attention(q, k, v, mask), [q, k, v]),
        "qk_norm_rotary": (lambda: tfkernels.qk_norm_rotary(q, k, None, None, cos, cos), [q, k]),
        "modulated_rms_norm": (lambda: tfkernels.modulated_rms_norm(x, weight, scale, shift, index),
                               [x, weight, scale, shift]),
        "gated_residual": (lambda: tfkernels.gated_residual(x, branch, gate, index), [x, branch, gate]),
        "gated_residual_rms_norm": (lambda: tfkernels.gated_residual_rms_norm(
            x, branch, gate, weight=weight, scale=scale, shift=shift, index=index), [x, branch, gate, weight]),
        "noise_patchify": (lambda: tfkernels.noise_patchify(clean, coefficients, coefficients, seed, offsets=offsets),
                           []),
        "embed_patches": (lambda: tfkernels.embed_patches(flat, clean, project, scale, places, offsets),
                          [flat, project, scale]),
        "diffusion_loss": (lambda: tfkernels.diffusion_loss(prediction, clean, coefficients, coefficients, None, seed,
                                                            offsets=offsets), [prediction]),
        "modulated_layer_norm_diffusion_loss": (lambda: tfkernels.modulated_layer_norm_diffusion_loss(
            flat, places, scale, shift, out, bias, clean, coefficients, coefficients, None, seed, offsets=offsets),
            [flat, scale, out]),
        "linear_cross_entropy": (lambda: tfkernels.linear_cross_entropy(flat, head, targets, rows).loss, [flat, head]),
    }


def forward(call: Callable) -> Callable:
    """The call without a gradient."""
    def run():
        with torch.no_grad():
            call()
    return run


def both(call: Callable, leaves: list[torch.Tensor]) -> Callable:
    """The call and its gradients."""
    def run():
        result = call()
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])
    return run


def through_op(run: Callable) -> Callable:
    """The same, through the custom op."""
    def call():
        Operator.__call__ = CustomOpDef.__call__
        run()
        Operator.__call__ = DIRECTLY
    return call


def seconds(run: Callable) -> float:
    """Of one call, as the mean of a few."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - begin) / CALLS


@contextlib.contextmanager
def bare_launch():
    """A launch through Triton's Python that does nothing."""
    x = torch.zeros(64)
    with ptxrun.emulate("sm_90") as emulation:
        driver = EmulatedDriver(emulation)
        driver.launcher_cls = lambda source, metadata: lambda *arguments: None
        triton.runtime.driver.set_active(driver)
        yield lambda: _copied[(1,)](x, x, x, 64, BLOCK=64)


def launches(run: Callable) -> int:
    """Of one call, once what is made for many calls is made."""
    found = []
    with seen(lambda kernel, *_: found.append(kernel)):
        run()
        found.clear()
        run()
    return len(found)


def least() -> dict[str, float]:
    """Microseconds of each kind of call."""
    with bare_launch() as launch, seen(lambda *_: None):
        def launched():
            stubbed, JITFunction.run = JITFunction.run, ORIGINAL_RUN
            launch()
            JITFunction.run = stubbed

        kinds = {"bare launch": launched}
        for name, (call, leaves) in operators().items():
            kinds[f"{name}, forward"] = forward(call)
            if leaves:
                kinds[f"{name}, recorded"] = call
                kinds[f"{name}, both"] = both(call, leaves)
                kinds[f"{name}, both, custom op"] = through_op(both(call, leaves))
        for kind in kinds.values():
            seconds(kind)
        rounds = [{name: seconds(kind) for name, kind in kinds.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) * 1e6 for name in kinds}


def table(times: dict[str, float]) -> str:
    """The table of docs/performance.md."""
    unit = times["bare launch"]
    lines = [f"One bare launch: {unit:.0f} us.", "",
             "| operator | forward | recorded | in us | both, custom op | both | in us | launches |",
             "|" + "---|" * 8]

    def cell(kind, divisor=unit, places=1):
        return f"{times[kind] / divisor:.{places}f}" if kind in times else ""

    for name, (call, leaves) in operators().items():
        recorded, whole = f"{name}, recorded", f"{name}, both"
        cells = [cell(f"{name}, forward"), cell(recorded), cell(recorded if leaves else f"{name}, forward", 1, 0),
                 cell(f"{whole}, custom op"), cell(whole), cell(whole, 1, 0),
                 str(launches(both(call, leaves) if leaves else forward(call)))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(least()))
