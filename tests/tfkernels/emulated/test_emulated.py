"""Every kernel's compiled code, run without a GPU: bfloat16, for sm_80 and sm_90, with races looked for.

What is run stands in `families.py`. Each family is held to what it says that it launches, and all of them together to
the library: no kernel and no row of a launch table is left out, but for sm_100, whose tensor cores' instructions
(tcgen05) are not emulated. `test_every_dtype.py` runs the families in every dtype, where pytest itself emulates.
"""
import ast
import pkgutil
from importlib import import_module

import pytest
import torch
from triton import knobs

import tfkernels
from tests.conftest import KERNEL_RUNS
from tests.launches import emulated
from tests.remembered import unless_known
from tests.resources import uneven_sums
from tests.tfkernels.emulated.families import DTYPES, FAMILIES
from tests.tfkernels.emulated.rows import TABLES, missing, rows
from tests.tfkernels.test_launches import ROOT
from tfkernels import TransfusionMask
from tfkernels._launch import Config
from tfkernels.mask import triton as mask_build

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="the kernels themselves run here, in all tests")

ARCHITECTURES = (80, 90)


def kernels() -> set[str]:
    """The kernels of the library that are launched: those that no other kernel calls or names."""
    functions = [node for path in ROOT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.FunctionDef)
                 and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)]
    used = {name.id for f in functions for name in ast.walk(f) if isinstance(name, ast.Name)}
    return {f.name for f in functions} - used


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_kernels_err_at_most_twice_as_much_as_pytorch_and_race_nowhere(name, architecture):
    family = FAMILIES[name]
    with unless_known(f"emulated, {name}, sm_{architecture}"):
        with emulated(f"sm_{architecture}") as (_, launches):
            family.calls(torch.bfloat16)
        assert {launch.kernel for launch in launches} == family.kernels
        assert not missing(family, architecture, torch.bfloat16, launches)
        assert not {launch.kernel for launch in launches if uneven_sums(launch.ptx)}


def test_every_kernel_of_the_library_is_run():
    assert set().union(*(family.kernels for family in FAMILIES.values())) == kernels()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_of_the_launch_tables_is_run(dtype, architecture):
    assert not [row for row in rows(architecture, dtype)
                if not any(dtype in family.dtypes and family.holds(row.kernel, row.key)
                           for family in FAMILIES.values())]


def test_every_launch_table_of_the_library_is_looked_at():
    modules = [import_module(module.name) for module in pkgutil.walk_packages(tfkernels.__path__, "tfkernels.")
               if ".triton" in module.name]
    found = {id(value) for module in modules for name, value in vars(module).items()
             if isinstance(value, dict) and (name.endswith("_WARPS")
                                             or any(isinstance(x, Config) or isinstance(x, tuple)
                                                    and isinstance(x[0], Config) for x in value.values()))}
    assert found == {id(table) for tables in TABLES.values() for table in tables}


def test_a_second_run_compiles_nothing(tmp_path, monkeypatch):
    """What Triton holds in memory is dropped in between, as by another process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, src, cache_hit, **_: found.append(cache_hit))
    kernel = mask_build._mask_intervals
    monkeypatch.setattr(kernel, "device_caches", kernel.device_caches.copy())
    with emulated("sm_90"):
        for _ in range(2):
            kernel.device_caches.clear()
            TransfusionMask.from_spans([[(1, 3)]], 5)
        kernel.device_caches.clear()
    assert found == [False, True]
