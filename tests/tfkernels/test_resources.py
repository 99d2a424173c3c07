"""Every row of the launch tables, compiled for its architecture without a GPU: no spills, shared memory within the card's limit.

`python -m tests.tfkernels.test_resources` prints the table of docs/log.md. Rows are compiled by two processes ahead of the tests
that ask for them; Triton's own cache makes a second run quick.
"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import triton

from tests.resources import Resources, resources
from tfkernels import _attention_backward as backward
from tfkernels import _attention_forward as forward
from tfkernels._launch import ARCHITECTURES, SHARED_LIMIT, Config, table_row
from tfkernels._library import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels are interpreted functions, which do not compile")

TABLES = {"fwd": forward.CONFIGS, "dq": backward.DQ_CONFIGS, "dkv": backward.DKV_CONFIGS}
KERNELS = {"fwd": forward._attention_fwd, "dq": backward._attention_bwd_dq, "dkv": backward._attention_bwd_dkv, "delta": backward._attention_bwd_delta}
HEAD_DIMS = (32, 64, 128, 256)
DELTA = Config(backward.DELTA_ROWS, 0, 4, 3)
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


class Row(NamedTuple):
    """One compilation: a kernel, a key of its table, and what differs from the plain case."""

    kernel: str
    architecture: int
    element_size: int
    head_dim: int  # padded
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(str(x) for x in self if x != "")

    @property
    def config(self) -> Config:
        return DELTA if self.kernel == "delta" else table_row(TABLES[self.kernel], *self[1:4], heavy=self.variant in ("check", "softcap"))


ROWS = [Row(kernel, *key) for kernel, table in TABLES.items() for key in table if key[3:] != ("heavy",)]
DELTA_ROWS = [Row("delta", architecture, size, dim) for architecture in ARCHITECTURES for size in (2, 4) for dim in HEAD_DIMS]
VARIANTS = [Row(kernel, architecture, 2, 128, variant) for kernel in TABLES for architecture in ARCHITECTURES for variant in ("check", "softcap", "narrow")]


def compiled(row: Row) -> Resources:
    """Compile one row."""
    config, variant = row.config, row.variant
    constants = {"HEAD_DIM": 80 if variant == "narrow" else row.head_dim, "D": row.head_dim, "BLOCK_M": config.block_m}
    if row.kernel != "delta":
        constants |= {"BLOCK_N": config.block_n, "SOFTCAP": variant == "softcap", "PRECISION": "ieee"}
        constants["CHECK_ROWS" if row.kernel == "dkv" else "CHECK_COLUMNS"] = variant == "check"
    return resources(KERNELS[row.kernel], constants, config, architecture=row.architecture, element_size=row.element_size)


def pool() -> ProcessPoolExecutor:
    """Return two fresh processes: a fork would copy torch's threads' locks."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def results(request):
    """The future of every row that this run asks for."""
    rows = [item.callspec.params["row"] for item in request.session.items if item.module is request.module and "row" in item.callspec.params]
    with pool() as processes:
        yield {row: processes.submit(compiled, row) for row in rows}
        processes.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("row", ROWS + VARIANTS + DELTA_ROWS, ids=str)
def test_a_row_spills_nothing_and_fits_shared_memory(row, results):
    found = results[row].result()
    assert found.stack_bytes == 0, found
    assert found.shared_bytes <= SHARED_LIMIT[row.architecture], found
    if row.element_size == 2 and row.kernel != "delta":
        assert found.tensor_core.get(MULTIPLY[row.architecture], 0) > 0, found
        assert found.loops > 0, found
        if row.head_dim in (64, 128):
            assert found.pipelined == found.loops, found


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_a_row_for_every_key(table):
    assert {key[:3] for key in TABLES[table]} == {(a, size, dim) for a in ARCHITECTURES for size in (2, 4) for dim in HEAD_DIMS}


if __name__ == "__main__":
    rows = ROWS + VARIANTS + DELTA_ROWS
    print(f"Triton {triton.__version__}\n\n| arch | bytes | D | kernel | tile | warps | stages | registers | spilled | shared KiB | multiplies |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with pool() as processes:
        for row, found in zip(rows, processes.map(compiled, rows)):
            c, kernel = row.config, " ".join(x for x in (row.kernel, row.variant) if x)
            tile = f"{c.block_m}x{c.block_n}" if c.block_n else f"{c.block_m}"
            multiplies = ", ".join(f"{count} {name}" for name, count in found.tensor_core.items()) or "-"
            print(f"| {row.architecture} | {row.element_size} | {row.head_dim} | {kernel} | {tile} | {c.num_warps} | {c.num_stages} | "
                  f"{found.registers} | {found.stack_bytes} | {found.shared_bytes / 1024:.1f} | {multiplies} |", flush=True)
