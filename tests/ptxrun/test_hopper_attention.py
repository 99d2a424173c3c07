"""A warp-specialised Hopper kernel in ptxrun: TMA, mbarriers, wgmma, setmaxnreg, two consumers; and what Triton 3.6.0
makes of such kernels."""
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import ptxrun
from ptxrun.launch import Emulation
from ptxrun.memory import GlobalMemory
from ptxrun.schedule import Schedule
from tests.compare import assert_as_accurate
from tests.conftest import compiles
from tests.ptxrun import hopper_attention

WITHOUT_A_BARRIER = triton.__version__.startswith("3.6.")  # before gl.warp_specialize


def intervals(queries: int):
    """A causal mask with an image, a second document, and padding that sees nothing."""
    lo, hi = torch.zeros(queries, dtype=torch.int32), torch.arange(1, queries + 1, dtype=torch.int32)
    hi[5:40], lo[100:], hi[150:155] = 40, 60, 0
    return lo, hi


def plain_attention(q, k, v, lo, hi):
    """The equation in q's dtype."""
    group, keys = len(q) // len(k), torch.arange(k.shape[1])
    visible = (keys >= lo[:, None]) & (keys < hi[:, None])
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


@compiles
@pytest.mark.parametrize("schedule,seed", [("early", 0), ("late", 0), ("random", 0), ("random", 1)])
def test_the_warp_specialised_kernel_is_as_accurate_as_pytorch_and_has_no_race(schedule, seed):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 200, 64).bfloat16(), torch.randn(2, 1, 200, 64).bfloat16()
    lo, hi = intervals(200)
    emulated = ptxrun.emulate("sm_90", races=True, schedule=schedule, seed=seed)
    if WITHOUT_A_BARRIER:
        with emulated, pytest.raises(ptxrun.Race, match="hopper_attention.py"):
            hopper_attention.attention(q, k, v, lo, hi)
        return
    with emulated:
        out = hopper_attention.attention(q, k, v, lo, hi)
    exact = plain_attention(q.double(), k.double(), v.double(), lo, hi)
    assert_as_accurate("out", out, plain_attention(q, k, v, lo, hi), exact)


MISSING_BARRIER = Path(__file__).with_name("missing_barrier.ptx").read_text()


def largest(ptx: str, schedule: str) -> list[int]:
    """Run the kernel of missing_barrier.ptx: the maximum of 128 numbers, and twice that."""
    x, out = np.arange(128, dtype=np.uint32)[::-1].copy(), np.zeros(2, np.uint32)
    memory = GlobalMemory()
    for name, array in (("x", x), ("out", out)):
        memory.add(array.ctypes.data, array, name)
    pointers = [array.ctypes.data.to_bytes(8, "little") for array in (x, out)]
    Emulation(90, Schedule(schedule), races=True).launch(ptx, (1, 1, 1), pointers, memory, 20)
    return out.tolist()


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_the_barrier_that_triton_3_6_leaves_out_before_warp_specialize_is_a_race(schedule):
    with pytest.raises(ptxrun.Race, match="of byte 0 .* is not ordered after (the|another lane.s) (read|write)"):
        largest(MISSING_BARRIER, schedule)
    store = "st.shared.b32 \t[global_smem+16], 33554689;"
    assert MISSING_BARRIER.count(store) == 1
    assert largest(MISSING_BARRIER.replace(store, f"bar.sync 0, 128; {store}"), schedule) == [127, 254]
