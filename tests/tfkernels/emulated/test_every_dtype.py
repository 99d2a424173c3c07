"""Every kernel's compiled code in every dtype, where pytest emulates; `python -m benchmarks.emulate` runs it whole.

    python -m pytest -p ptxrun.plugin --emulate sm_90 --races tests/tfkernels/emulated/test_every_dtype.py -k float32
"""
import pytest
import torch

from tests.conftest import EMULATED
from tests.launches import recorded
from tests.resources import uneven_sums
from tests.tfkernels.emulated.families import DTYPES, FAMILIES, MORE_FAMILIES
from tests.tfkernels.emulated.rows import made, missing

pytestmark = pytest.mark.skipif(not EMULATED, reason="`make test` runs these families in bfloat16; `make emulate` all")

EVERY = FAMILIES | MORE_FAMILIES
FITS = [(name, dtype) for dtype in DTYPES for name, family in EVERY.items() if dtype in family.dtypes]


@pytest.mark.parametrize("name,dtype", FITS, ids=str)
def test_compiled_kernels_err_at_most_twice_as_much_as_pytorch(name, dtype, record_property):
    family, (major, minor) = EVERY[name], torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    with recorded() as launches:
        family.calls(dtype)
    record_property("rows", [f"{row.kernel} {row.named}" for row in made(architecture, dtype, launches)])
    assert {launch.kernel for launch in launches} == family.kernels
    assert not missing(family, architecture, dtype, launches)
    assert not {launch.kernel for launch in launches if uneven_sums(launch.ptx)}
