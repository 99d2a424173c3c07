"""The one way an operator meets PyTorch: a custom op with a CUDA kernel, a CPU implementation and a fake.

PyTorch's dispatcher picks by the tensors' device. Under `TRITON_INTERPRET=1` the CPU runs the Triton kernel through
Triton's interpreter, so that the same tests check the same kernel on a machine without a GPU.
"""
import functools
import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, if that is so."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return (f"on {device}, an AMD {torch.cuda.get_device_properties(device).gcnArchName}; an NVIDIA GPU or the CPU "
            "fits; the kernels' tiles are those of NVIDIA's cards; move the tensors to the CPU")


def register(name, *, kernel, cpu, fake):
    """Register `tfkernels::name` and return it: `kernel` on CUDA, `cpu` on CPU, `fake` for tracing."""

    @functools.wraps(kernel)
    def launch(*args):
        tensors = [a for a in args if isinstance(a, Tensor)]
        if INTERPRET and any(t.dtype == torch.bfloat16 for t in tensors):
            raise ValueError(f"{name}: dtype is torch.bfloat16; Triton's interpreter computes bfloat16 wrongly and "
                             "silently; use float32 or float16, or unset TRITON_INTERPRET")
        if refused := refusal(tensors[0].device):
            raise ValueError(f"{name}: its tensors are {refused}")
        with torch.cuda.device_of(tensors[0]):
            return kernel(*args)

    op = torch.library.custom_op(f"tfkernels::{name}", launch, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(launch if INTERPRET else cpu)
    op.register_fake(fake)
    return op


def result_like(x: Tensor, width: int | None = None) -> Tensor:
    """Return an empty tensor like x: the last dimension contiguous, the others dense in the order of x's strides.

    `width` is the size of the last dimension, where it is another than x's.

    A kernel and its fake both take their results from here, so that they agree on the layout whatever x's is: expanded,
    sliced, transposed.
    """
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    return torch.empty_permuted(shape, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)
