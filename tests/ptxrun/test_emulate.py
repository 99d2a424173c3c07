"""ptxrun.emulate: Triton kernels on CPU tensors, by their compiled code."""
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

import ptxrun
from tests.conftest import compiles

pytestmark = compiles


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=inside) + tl.load(y_ptr + i, mask=inside), mask=inside)


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_kernel_runs_on_tensors_of_the_cpu(architecture):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1000,), torch.nan)
    with ptxrun.emulate(architecture, races=True):
        add[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def test_what_is_compiled_is_kept_apart_from_cubins_which_some_tritons_would_take_it_for(tmp_path):
    x, out = torch.randn(16), torch.empty(16)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        with ptxrun.emulate("sm_80"):
            add[(1,)](x, x, out, 16, BLOCK=16, num_warps=2)
        assert knobs.cache.dir == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ptxrun"] and list(tmp_path.rglob("add.ptx"))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_bfloat16_goes_through_the_tensor_cores(architecture):
    x, y, out = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.full((64, 64), torch.nan)
    with ptxrun.emulate(architecture, races=True, count=True) as emulation:
        multiply[(1,)](x, y, out, SIZE=64)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)
    counts = emulation.kernels["multiply"]
    assert counts.instructions["tensor core"] > 0
    assert counts.least("load") == counts.moved["load"] == 2 * 64 * 64 * 2 and counts.least("store") == 64 * 64 * 4
    assert counts.shared_passes >= counts.shared_least > 0


@triton.jit
def everyone_stores(x_ptr):
    tl.store(x_ptr, tl.program_id(0))


def test_each_emulation_looks_for_what_it_was_asked_to_although_triton_keeps_the_kernel():
    x = torch.zeros(1, dtype=torch.int32)
    with ptxrun.emulate("sm_90") as first:
        everyone_stores[(2,)](x)
    with ptxrun.emulate("sm_90", races=True), pytest.raises(ptxrun.Race, match="block 1 writes .* x_ptr"):
        everyone_stores[(2,)](x)
    assert first.kernels["everyone_stores"].launches == 1


def test_an_overrun_names_the_argument_and_the_line_of_the_kernel():
    x = torch.randn(1000)
    with ptxrun.emulate("sm_90"), pytest.raises(ptxrun.OutOfBounds, match=r"(?s)behind x_ptr.*test_emulate.py:\d+"):
        add[(8,)](x, torch.randn(1001), torch.empty(1001), 1001, BLOCK=128)


def test_an_overrun_never_meets_another_tensor():
    storage = torch.randn(3000)
    x, y, out = storage[:1000], storage[1000:2000], storage[2000:]
    with ptxrun.emulate("sm_90"), pytest.raises(ptxrun.OutOfBounds, match="4 bytes behind x_ptr"):
        add[(8,)](x, y, out, 1001, BLOCK=128)


def test_views_of_one_storage_are_bounded_by_what_they_show():
    storage = torch.randn(2000)
    with ptxrun.emulate("sm_90"), pytest.raises(ptxrun.OutOfBounds, match="x_ptr"):
        add[(8,)](storage[:500], torch.randn(1000), torch.empty(1000), 1000, BLOCK=128)


def test_an_unknown_architecture_is_an_error_that_names_those_that_fit():
    with pytest.raises(ValueError, match="sm_100.*sm_90"), ptxrun.emulate("sm_100"):
        pass
    with pytest.raises(ValueError, match="early.*late.*random"), ptxrun.emulate("sm_90", schedule="soon"):
        pass


@pytest.mark.parametrize("version,fences", [("3.6.0", False), ("3.7.1", True), ("3.10.0", True)])
def test_triton_fences_asynchronous_copies_from_3_7_on(version, fences):
    assert ptxrun.fences_copies(version) is fences
