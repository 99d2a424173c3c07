"""Every launch of a kernel passes what the kernel takes: nothing is compiled and nothing runs.

The operators' CUDA implementations run on CPU tensors, with Triton's launch replaced by a check of its arguments. So a
launcher that does not follow a change of its kernel's arguments fails here, without a GPU and without the interpreter.
"""
import ast
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import tfkernels
from tests.conftest import KERNEL_RUNS
from tests.launches import OPTIONS, seen
from tests.tfkernels.test_arguments import CALLS
from tests.tfkernels.test_library import MASKS, calls_of
from tfkernels import TransfusionMask, _library
from tfkernels._library import refusal
from tfkernels.norm import triton as norm

ROOT = Path(tfkernels.__file__).parent

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="the launches themselves run here, and are tested")


def launch_lines() -> set[tuple[str, int]]:
    """(file, line) of every `kernel[grid](...)` in the library."""
    return {(str(path), call.lineno) for path in ROOT.rglob("*.py") for call in ast.walk(ast.parse(path.read_text()))
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)}


def check(kernel: JITFunction, arguments: tuple, named: dict):
    """Raise where a launch does not fit the kernel's signature."""
    bound = kernel.signature.bind(*arguments, **{name: x for name, x in named.items() if name not in OPTIONS})
    for name, value in bound.arguments.items():
        if name.endswith("_ptr") and not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"{kernel.__name__}: {name} is {value}; a tensor fits")
        if not name.endswith("_ptr") and isinstance(value, Tensor):
            raise TypeError(f"{kernel.__name__}: {name} is a tensor; a number fits")


@pytest.fixture
def launched():
    """The lines that have launched a kernel, while operators launch on CPU tensors."""
    lines = set()

    def look(kernel, grid, arguments, named):
        frame = sys._getframe(1)
        while not frame.f_code.co_filename.startswith(str(ROOT)):
            frame = frame.f_back
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        check(kernel, arguments, named)

    with seen(look):
        yield lines


def attention():
    """Masks with ends that ascend and with ends that do not, new tokens against a cache, and a cache in pages."""
    q, k, v = (torch.randn(2, heads, 64, 32, requires_grad=True) for heads in (4, 2, 2))
    ascending = TransfusionMask.from_spans([[(4, 20)], [(8, 40)]], 64)
    for mask in (ascending, replace(ascending, rows_exact=False, columns_exact=False)):
        tfkernels.attention(q, k, v, mask).sum().backward()
    few, long = TransfusionMask.from_cache(torch.tensor([40, 7]), 4, 64), torch.randn(1, 1, 8192, 32)
    with torch.no_grad():
        tfkernels.attention(long[:, :, :1], long, long, TransfusionMask.from_cache(torch.tensor([8000]), 1, 8192))
        pages, table = torch.randn(8, 16, 2, 32), torch.arange(8, dtype=torch.int32).view(2, 4)
        tfkernels.paged_attention(q[:, :, :4], pages, pages, table, few)


def wide_rows():
    """A norm of rows too wide for one pass, with image ids and without."""
    x, scale, shift = (torch.randn(2, *shape, 8192, requires_grad=True) for shape in ((16,), (), ()))
    for index in (None, torch.full((2, 16), -1)):
        tfkernels.modulated_layer_norm(x, None, None, scale, shift, index).sum().backward()


def test_every_launch_passes_what_its_kernel_takes(launched):
    for name in (*CALLS, *MASKS):
        calls_of(name)
    attention()
    wide_rows()
    assert launch_lines() == launched


def test_a_launch_without_one_argument_or_with_two_swapped_is_refused(launched):
    kernel, x = norm._norm_bwd_images, torch.zeros(4)
    named = {"C": 4, "BLOCK_M": 1, "BLOCK": 4, "num_warps": 4}
    check(kernel, (x, x, x, 1, 0, 1, 1), named)
    with pytest.raises(TypeError, match="missing a required argument"):
        check(kernel, (x, x, x, 1, 1, 1), named)
    with pytest.raises(TypeError, match="starts_ptr is 1; a tensor fits"):
        check(kernel, (x, 1, x, x, 0, 1, 1), named)


def test_an_amd_card_is_refused_in_one_line_that_names_it(launched, monkeypatch):
    """Its capability reads as that of an NVIDIA card whose tiles do not fit its 64 KiB a block."""
    assert refusal(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942"))
    refusal.cache_clear()
    try:
        assert "\n" not in refusal(torch.device("cuda:0")) and "an AMD gfx942" in refusal(torch.device("cuda:0"))
        assert refusal(torch.device("cpu")) is None
    finally:
        refusal.cache_clear()


def test_every_operator_asks_whether_its_device_is_refused(launched, monkeypatch):
    monkeypatch.setattr(_library, "refusal", lambda device: "on a card that is refused")
    for name in CALLS:
        if name not in ("min_snr_weight", "rotary_table", "grid_positions", "pack_latents"):
            with pytest.raises(ValueError, match="its tensors are on a card that is refused"):
                calls_of(name)
