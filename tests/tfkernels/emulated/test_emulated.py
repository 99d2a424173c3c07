"""Every kernel's compiled code, run without a GPU: bfloat16, for sm_80 and sm_90, with races looked for.

What is run stands in `families.py`. Each family is held to what it says that it launches, and all of them together to
the library: no kernel and no row of a launch table is left out, but for what LEFT_OUT names.
"""
import ast
import pkgutil
from importlib import import_module
from typing import NamedTuple

import pytest
from triton import knobs

import tfkernels
from tests.conftest import KERNEL_RUNS
from tests.launches import emulated
from tests.resources import uneven_sums
from tests.tfkernels.emulated.families import FAMILIES
from tests.tfkernels.test_launches import ROOT
from tfkernels import TransfusionMask
from tfkernels._launch import Config
from tfkernels.attention.triton import backward, decode, forward
from tfkernels.losses.triton import cross_entropy, head
from tfkernels.mask import triton as mask_build
from tfkernels.norm import triton as norm
from tfkernels.patches.triton import embed

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="the kernels themselves run here, in all tests")

ARCHITECTURES = (80, 90)
LEFT_OUT = {"sm_100": "its tensor cores' instructions (tcgen05) are not emulated",
            "4 bytes an element": "float32 is computed in another form; `make emulate` runs every dtype"}
TABLES = {
    "_attention_fwd": [forward.CONFIGS], "_attention_bwd_dq": [backward.DQ_CONFIGS],
    "_attention_bwd_dkv": [backward.DKV_CONFIGS], "_attention_decode": [decode.CONFIGS, decode.WIDE_CONFIGS],
    "_norm_fwd": [norm.FORWARD_WARPS], "_norm_bwd": [norm.BACKWARD_WARPS],
    "_embed_fwd": [embed.FORWARD], "_embed_bwd": [embed.BACKWARD],
    "_head_loss_fwd": [head.FORWARD], "_head_loss_bwd": [head.BACKWARD],
}
ENTROPY_BLOCKS = [2**n for n in range(5, 14)]  # from 32 words to the widest block; the warps follow


class Row(NamedTuple):
    """An entry of a launch table, and what a launch by it names."""

    kernel: str
    key: object
    named: dict

    def is_of(self, launch) -> bool:
        """Whether a launch was made by this row."""
        return launch.kernel == self.kernel and self.named.items() <= launch.named.items()


def named(kernel: str, key, value) -> dict:
    """The constants and options that a launch takes from an entry of a table."""
    if isinstance(value, int):
        return {"BLOCK": key, "num_warps": value}
    config = value if isinstance(value, Config) else value[0]
    rows, columns = ("BLOCK_M", "BLOCK_N") if isinstance(key, tuple) else ("BLOCK_R", "BLOCK_C")
    tile = {rows: config.block_m, columns: config.block_n, "num_warps": config.num_warps,
            "num_stages": config.num_stages}
    return tile | ({"D": key[2], "maxnreg": config.max_registers} if isinstance(key, tuple) else {})


def rows(architecture: int) -> list[Row]:
    """Every row that bfloat16 takes on an architecture."""
    found = [Row(kernel, key, named(kernel, key, value)) for kernel, tables in TABLES.items() for table in tables
             for key, value in table.items()
             if (key[:2] == (architecture, 2) if isinstance(key, tuple) else "norm" in kernel or key == 2)]
    return found + [
        Row("_cross_entropy_rows", block,
            {"BLOCK": block, "num_warps": cross_entropy.launch_config(block).num_warps}) for block in ENTROPY_BLOCKS]


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
    with emulated(f"sm_{architecture}") as (_, launches):
        family.calls()
    assert {launch.kernel for launch in launches} == family.kernels
    missing = [row for row in rows(architecture)
               if family.holds(row.kernel, row.key) and not any(map(row.is_of, launches))]
    assert not missing
    assert not {launch.kernel for launch in launches if uneven_sums(launch.ptx)}


def test_every_kernel_of_the_library_is_run():
    assert set().union(*(family.kernels for family in FAMILIES.values())) == kernels()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_the_launch_tables_is_run(architecture):
    missing = [row for row in rows(architecture)
               if not any(family.holds(row.kernel, row.key) for family in FAMILIES.values())]
    assert not missing


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
