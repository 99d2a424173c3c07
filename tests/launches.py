"""Launches of kernels on CPU tensors: seen and not run, or run without a GPU, compiled, by `ptxrun`."""
import ast
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch._library.custom_ops import OPDEFS
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import ptxrun
import tfkernels
from tfkernels import _launch

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
PATCHIFY = {"_patchify_fwd", "_patchify_bwd"}   # one line launches both, as `kernel`


def kernel_names() -> set[str]:
    """The kernels that some `kernel[grid](...)` of the library launches."""
    names = {node.func.value.id for path in Path(tfkernels.__file__).parent.rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)}
    return names - {"kernel"} | PATCHIFY


class Launch(NamedTuple):
    """A kernel by its name, what the launch named (constants and options), and what was run."""

    kernel: str
    named: dict
    ptx: str


@contextmanager
def cuda_implementations_on_cpu(*, computes: bool = False):
    """Let every operator of the library run its CUDA implementation on CPU tensors, and on meta tensors.

    With `computes`, each then runs its CPU implementation and returns what that gives.
    """
    def both(launch, compute):
        def implementation(*arguments):
            launch(*arguments)
            return compute(*arguments)
        return implementation if computes else launch

    operators = [op for op in OPDEFS.values() if op._namespace == "tfkernels"]
    before = [(op._backend_fns["cpu"], op._abstract_fn) for op in operators]
    caches = _launch.architecture, _launch.multiprocessors  # what the library remembers of a device
    for op, (compute, _) in zip(operators, before):
        op.register_kernel("cpu")(both(op._backend_fns["cuda"], compute))
        op._abstract_fn = op._backend_fns["cuda"]
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
        for op, (compute, fake) in zip(operators, before):
            op.register_kernel("cpu")(compute)
            op._abstract_fn = fake


@contextmanager
def seen(look: Callable, *, computes: bool = False, capability: tuple[int, int] = (9, 0)):
    """Call look(kernel, grid, arguments, named) in place of each launch, while operators launch on any tensors.

    What a kernel would have written stays as it was allocated, unless the operator `computes` behind its launches.
    """
    def run(kernel, *arguments, grid, warmup, **named):
        look(kernel, grid, arguments, named)

    properties = SimpleNamespace(multi_processor_count=132)
    with cuda_implementations_on_cpu(computes=computes), patch.object(JITFunction, "run", run), \
            patch.object(torch.cuda, "get_device_capability", lambda device=None: capability), \
            patch.object(torch.cuda, "get_device_properties", lambda device=None: properties):
        yield


@contextmanager
def recorded():
    """Yield a list of launches, to which each is added when it has run."""
    launches, run = [], JITFunction.run

    def record(kernel, *arguments, grid, warmup, **named):
        compiled = run(kernel, *arguments, grid=grid, warmup=warmup, **named)
        launches.append(Launch(kernel.__name__, named, compiled.asm["ptx"]))
        return compiled

    with patch.object(JITFunction, "run", record):
        yield launches


@contextmanager
def emulated(architecture: str, **options):
    """Run the operators' kernels on CPU tensors, compiled for `architecture`, with races looked for.

    Of those none is the proxy fence that Triton before 3.7 leaves out behind cp.async.
    Yields the emulation and the list of launches, see `recorded`.
    """
    with cuda_implementations_on_cpu(), recorded() as launches, \
            ptxrun.emulate(architecture, races=True, copies_fenced=not ptxrun.fences_copies(triton.__version__),
                           **options) as emulation:
        yield emulation, launches


def specialization(kernel: JITFunction, arguments: tuple, named: dict) -> tuple:
    """What Triton compiles a launch for: each argument's type, and whether it is 1, None or a multiple of 16."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, found, options = bind(*arguments, **named)
    names = [parameter.name for parameter in kernel.params]
    return *zip(names, map(str, found)), *sorted(options.items())
