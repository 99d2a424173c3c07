"""pytest-benchmark entry: `pytest benchmarks --benchmark-enable`; small on a CPU, one real size on CUDA.

Wall time until the device is done, the host's included; `python -m benchmarks.attention` tells the two apart.
"""
import pytest
import torch

from benchmarks.attention import Case, checker, mask_builder, random_inputs
from benchmarks.batches import packed_batch
from tfkernels import attention

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
CASE = Case(8192, 128, 16, 16, 256) if CUDA else Case(512, 32, 2, 1, 64)


@pytest.fixture(scope="module")
def checked_call():
    """A call of the operator whose output and gradients have just passed the accuracy rule."""
    batch, inputs = packed_batch(CASE.seq_len, CASE.image_tokens, device=DEVICE), random_inputs(CASE, DEVICE, DTYPE)
    mask = mask_builder(batch)()
    out = attention(*inputs[:3], mask)
    checker(inputs, mask)(2.0)({"out": out, "grads": torch.autograd.grad(out, inputs[:3], inputs[3])})
    return inputs, mask, mask_builder(batch)


def finished(function, *args, **kwargs):
    result = function(*args, **kwargs)
    if CUDA:
        torch.cuda.synchronize()
    return result


def test_mask_build(benchmark, checked_call):
    benchmark(finished, checked_call[2])


def test_forward(benchmark, checked_call):
    inputs, mask, _ = checked_call
    benchmark(finished, attention, *inputs[:3], mask)


def test_backward(benchmark, checked_call):
    inputs, mask, _ = checked_call
    out = attention(*inputs[:3], mask)
    benchmark(finished, torch.autograd.grad, out, inputs[:3], inputs[3], retain_graph=True)
