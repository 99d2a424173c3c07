"""Keys and values by TMA, which no row of the tables asks for yet: compiled and run without a GPU, races looked for."""
import pytest
import torch

from tests.conftest import KERNEL_RUNS
from tests.launches import emulated
from tests.tfkernels.attention.test_attention import check, random_inputs
from tests.tfkernels.attention.test_attention_rows import filled
from tests.tfkernels.emulated.families import mask_of_two_sides, packed_mask
from tfkernels import TransfusionMask, attention
from tfkernels._launch import Config, loads_by_tma
from tfkernels.attention.triton import backward, forward

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="the kernels themselves run here, in all tests")

BY_TMA = Config(64, 32, 4, 3, by_tma=True)


@pytest.fixture
def rows_by_tma(monkeypatch):
    """Let the forward kernel and dQ load keys and values by TMA, whatever the head dim."""
    for table in (forward.CONFIGS, backward.DQ_CONFIGS):
        for key in [key for key in table if key[:2] == (90, 2)]:
            monkeypatch.setitem(table, key, BY_TMA)


def by_tma(launches) -> dict[str, bool]:
    """Whether each kernel that reads keys in a loop has a copy by TMA."""
    return {launch.kernel: "cp.async.bulk.tensor" in launch.ptx for launch in launches
            if launch.kernel in ("_attention_fwd", "_attention_bwd_dq")}


@pytest.mark.parametrize("dims,dtype,softcap,mask", [
    ((64, 64), torch.bfloat16, None, packed_mask), ((80, 80), torch.float16, None, packed_mask),
    ((48, 24), torch.bfloat16, 1.5, mask_of_two_sides)], ids=["64", "80, float16", "48 and 24, two sides, a soft cap"])
def test_keys_and_values_by_tma_give_what_pointers_give(dims, dtype, softcap, mask, rows_by_tma):
    with emulated("sm_90") as (_, launches):
        check(random_inputs(1, 1, 1, 90, 90, *dims), mask(90), dtype, softcap=softcap)
    assert by_tma(launches) == {"_attention_fwd": True, "_attention_bwd_dq": True}


def test_what_is_not_aligned_is_loaded_by_pointers(rows_by_tma):
    q, k, v = (torch.randn(1, 1, 90, 36, dtype=torch.bfloat16) for _ in range(3))
    with emulated("sm_90") as (_, launches), torch.no_grad():
        attention(q, k, v, packed_mask(90))
    assert by_tma(launches) == {"_attention_fwd": False}


def test_keys_behind_the_last_that_is_seen_are_zeros_by_tma(rows_by_tma):
    """The rest of a cache is memory that nobody wrote; a row that met NaN there would be done over."""
    q, k, v = torch.randn(1, 2, 20, 64), torch.randn(1, 1, 100, 64), torch.randn(1, 1, 100, 64)
    mask = TransfusionMask.from_cache(torch.tensor([30]), 20, 100)
    behind = torch.arange(100)[None] >= 50
    with emulated("sm_90") as (_, launches), torch.no_grad():
        zeros, junk = (attention(q.bfloat16(), *(filled(x, behind, with_junk).bfloat16() for x in (k, v)), mask)
                       for with_junk in (False, True))
    assert torch.equal(zeros, junk) and by_tma(launches) == {"_attention_fwd": True}


LAYOUTS = {
    "as it is": (lambda x: x, True), "of another order": (lambda x: x.transpose(0, 1), True),
    "without its first row": (lambda x: x[:, :, 1:], True), "of fewer columns": (lambda x: x[..., :5], True),
    "without its first column": (lambda x: x[..., 1:], False),
    "of rows of 24 bytes": (lambda x: x.flatten()[:384].view(2, 2, 8, 12), False),
    "of one row again and again": (lambda x: x[:, :, :1].expand(2, 2, 8, 16), False)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tma_loads_tensors_whose_address_and_strides_are_multiples_of_16_bytes(layout):
    change, fits = LAYOUTS[layout]
    x = change(torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16))
    assert loads_by_tma(BY_TMA, x) == fits
    assert not loads_by_tma(BY_TMA._replace(by_tma=False), x)
