"""Launches on CPU tensors: operators run their CUDA implementation there, and which kernels they launch is written
down."""
import contextlib
from typing import NamedTuple

import pytest
from torch._library.custom_ops import OPDEFS
from triton.runtime.jit import JITFunction

import ptxrun
from tfkernels import _launch
from tfkernels.attention.triton import decode


class Launch(NamedTuple):
    """A kernel by its name, what the launch named (constants and options), and what was run."""

    kernel: str
    named: dict
    ptx: str


@contextlib.contextmanager
def cuda_implementations_on_cpu():
    """Let every operator of the library run its CUDA implementation on CPU tensors."""
    operators = [op for op in OPDEFS.values() if op._namespace == "tfkernels"]
    before = [op._backend_fns["cpu"] for op in operators]
    caches = _launch.architecture, decode.multiprocessors  # what the library remembers of a device
    for op in operators:
        op.register_kernel("cpu")(op._backend_fns["cuda"])
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
        for op, implementation in zip(operators, before):
            op.register_kernel("cpu")(implementation)


@contextlib.contextmanager
def emulated(architecture: str, **options):
    """Run the operators' kernels on CPU tensors, compiled for `architecture`, with races looked for.

    Yields the emulation and the list of launches, to which each is added when it has run.
    """
    launches, run = [], JITFunction.run

    def recorded(kernel, *arguments, grid, warmup, **named):
        compiled = run(kernel, *arguments, grid=grid, warmup=warmup, **named)
        launches.append(Launch(kernel.__name__, named, compiled.asm["ptx"]))
        return compiled

    with pytest.MonkeyPatch.context() as patch, cuda_implementations_on_cpu():
        patch.setattr(JITFunction, "run", recorded)
        with ptxrun.emulate(architecture, races=True, **options) as emulation:
            yield emulation, launches
