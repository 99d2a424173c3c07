"""Every row of the launch tables, compiled for its architecture without a GPU: no spills, shared memory within the
card's limit.

`python -m tests.tfkernels.test_resources` prints the table of docs/resources.md, with rare variants that the tests
leave out for time; with a number behind it (86, 89 or 120), which of the 80 rows do not fit that card. Rows are
compiled by two processes ahead of the tests that ask for them, or under pytest-xdist by the worker that asks; Triton's
own cache makes a second run quick.
"""
import functools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton

from ptxrun.instructions import TABLE
from tests.conftest import compiles
from tests.resources import Resources, resources
from tfkernels import _launch
from tfkernels._launch import ARCHITECTURES, BASE, SHARED_LIMIT, Config, table_row
from tfkernels.attention.triton import backward, decode, delta, forward, parts, tiles
from tfkernels.mask import triton as build

pytestmark = compiles

TABLES = {"fwd": forward.CONFIGS, "dq": backward.DQ_CONFIGS, "dkv": backward.DKV_CONFIGS, "decode": decode.CONFIGS,
          "wide": decode.WIDE_CONFIGS}
KERNELS = {"fwd": forward._attention_fwd, "dq": backward._attention_bwd_dq, "dkv": backward._attention_bwd_dkv,
           "delta": delta._attention_bwd_delta, "decode": decode._attention_decode, "wide": decode._attention_decode}
TRAINING = ("fwd", "dq", "dkv")
HEAD_DIMS = {2: (32, 64, 128, 256, 512), 4: (32, 64, 128, 256)}  # by bytes per element
DELTA = Config(delta.DELTA_ROWS, 0, 4, 3)
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


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
    def tile_by_tile(self) -> bool:
        """Whether tiles are looked at one by one, with no pipelined loop: `walks_runs` in tiles.py says where."""
        return (self.variant == "check" and self.kernel in TRAINING
                and self.head_dim > (64 if self.kernel == "dkv" else 128))

    @property
    def config(self) -> Config:
        heavy = self.variant == "check" or (self.kernel, self.variant) == ("dkv", "softcap")
        return DELTA if self.kernel == "delta" else table_row(TABLES[self.kernel], *self[1:4], heavy=heavy)


ROWS = [Row(kernel, *key) for kernel, table in TABLES.items() for key in table if key[3:] != ("heavy",)]
DELTA_ROWS = [Row("delta", architecture, size, dim) for architecture in ARCHITECTURES for size in HEAD_DIMS
              for dim in HEAD_DIMS[size]]
VARIANTS = [Row(kernel, architecture, 2, 128, variant) for kernel in TRAINING for architecture in ARCHITECTURES
            for variant in ("check", "softcap", "narrow")]
VARIANTS += [Row(kernel, architecture, 2, dim, "check") for kernel in TRAINING for architecture in ARCHITECTURES
             for dim in (64, 256, 512)]
VARIANTS += [Row(kernel, architecture, 2, 512, variant) for architecture in ARCHITECTURES
             for kernel, variant in (("dkv", "softcap"), ("decode", "check"), ("wide", "check"))]
VARIANTS += [Row(kernel, architecture, 2, 256, "values") for kernel in (*TRAINING, "decode", "wide")
             for architecture in ARCHITECTURES]
VARIANTS += [Row(kernel, architecture, 2, 128, variant) for kernel in ("decode", "wide")
             for architecture in ARCHITECTURES for variant in ("check", "paged")]
VARIANTS += [Row(kernel, architecture, 2, 64, "sinks") for kernel in ("fwd", "decode", "wide")
             for architecture in ARCHITECTURES]
VARIANTS += [Row("fwd", architecture, 2, dim, "parts") for architecture in ARCHITECTURES for dim in (64, 128, 256)]
RARE = [Row(kernel, architecture, size, dim, "check") for kernel in TRAINING for architecture in ARCHITECTURES
        for size, dim in ((2, 32), (4, 32), (4, 64), (4, 128), (4, 256))]
RARE += [Row("fwd", architecture, size, dim, "parts") for architecture in ARCHITECTURES
         for size, dim in ((2, 32), (4, 32), (4, 64), (4, 128), (4, 256))]
RARE += [Row(kernel, architecture, 4, dim, "tf32") for kernel in TRAINING for architecture in ARCHITECTURES
         for dim in HEAD_DIMS[4]]


def compiled(row: Row, target: int | None = None) -> Resources:
    """Compile one row, for its architecture or for the `target` given."""
    config, variant = row.config, row.variant
    head_dim = {"narrow": 80, "values": 192}.get(variant, row.head_dim)
    in_parts = row.kernel in ("decode", "wide") and variant != "sinks" or variant == "parts"
    constants = {"HEAD_DIM": head_dim, "D": row.head_dim, "BLOCK_M": config.block_m}
    if row.kernel != "delta":
        values = (128, 128) if variant == "values" else (head_dim, row.head_dim)
        constants |= dict(zip(("HEAD_DIM_V", "D_V"), values))
        constants |= {"BLOCK_N": config.block_n, "SOFTCAP": variant == "softcap",
                      "PRECISION": "tf32" if variant == "tf32" else "ieee"}
        constants["CHECK_ROWS" if row.kernel == "dkv" else "CHECK_COLUMNS"] = variant == "check"
    if "TMA" in KERNELS[row.kernel].arg_names:
        constants["TMA"] = config.by_tma
    if row.kernel in ("decode", "wide"):
        constants["PAGE_SIZE"] = 16 if variant == "paged" else 0
    if "SPLIT" in KERNELS[row.kernel].arg_names:
        constants["SPLIT"] = in_parts
    if "sinks_ptr" in KERNELS[row.kernel].arg_names and variant != "sinks":
        constants["sinks_ptr"] = None
    return resources(KERNELS[row.kernel], constants, config, architecture=target or row.architecture,
                     element_size=row.element_size, float32=("out_ptr",) if in_parts else ())


def pool() -> ProcessPoolExecutor:
    """Return two fresh processes: a fork would copy torch's threads' locks."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def result_of(request):
    """A function of a row that returns what it compiles to."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # a pool of each worker would compile every row that any worker asks for
        yield compiled
        return
    rows = [item.callspec.params["row"] for item in request.session.items
            if item.module is request.module and "row" in getattr(item, "callspec", SimpleNamespace(params={})).params]
    with pool() as processes:
        futures = {row: processes.submit(compiled, row) for row in rows}
        yield lambda row: futures[row].result()
        processes.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("row", ROWS + VARIANTS + DELTA_ROWS, ids=str)
def test_a_row_spills_nothing_and_fits_shared_memory(row, result_of):
    found = result_of(row)
    assert found.spills == found.overwritten == 0, found
    assert found.shared_bytes <= SHARED_LIMIT[row.architecture], found
    if row.element_size == 2 and row.kernel != "delta":
        held = row.config.block_n if row.kernel == "dkv" else row.config.block_m
        assert found.tensor_core.get(MULTIPLY[row.architecture] if held >= 64 else "mma.sync", 0) > 0, found
        if row.head_dim in (64, 128) and not row.tile_by_tile:
            assert found.loops > 0 and found.pipelined == found.loops, found


LOOPS = [row for row in ROWS + VARIANTS if row.kernel in TRAINING and row[1:3] == (90, 2) and not row.tile_by_tile]
AT_ONCE = [] if _launch.TRITON >= (3, 7) else [("fwd", 256)]  # kernel and head dim, where a third stage would spill


@pytest.mark.parametrize("row", LOOPS, ids=str)
def test_a_row_of_sm_90_that_spills_nothing_asks_for_a_tile_a_tile_of_work_before_it_waits(row, result_of):
    """With two stages it would wait as soon as it has asked (tests/schedule.py)."""
    found = result_of(row)
    assert found.waits and min(found.waits) == (0 if (row.kernel, row.head_dim) in AT_ONCE else 1), found


SMALL = {"bounds": (tiles._tile_bounds, {"SIZE": 128, "TILES": tiles.TILES}),
         "merge": (parts._attention_merge, {"HEAD_DIM": 256, "D": 256}),
         "sum": (parts._attention_bwd_sum, {"HEAD_DIM": 512, "D": 512, "HEAD_DIM_V": 512, "D_V": 512,
                                            "BLOCK_N": parts.SUMMED_ROWS}),
         "mask from spans": (build._mask_intervals,
                             {"TYPES": False, "DOCUMENTS": True, "HIDDEN": True, "WINDOW": True, "BLOCK": 1024,
                              "SPANS": build.SPANS}),
         "mask from types": (build._mask_intervals,
                             {"TYPES": True, "DOCUMENTS": True, "HIDDEN": False, "WINDOW": False, "BLOCK": 1024,
                              "SPANS": build.SPANS})}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SMALL)
def test_the_small_kernels_spill_nothing(name, architecture):
    kernel, constants = SMALL[name]
    warps = build.WARPS if kernel is build._mask_intervals else 4
    most = build.REGISTERS if kernel is build._mask_intervals else None
    found = resources(kernel, constants, Config(0, 0, warps, 3, most), architecture=architecture, element_size=2)
    assert found.fit(architecture), found


def test_spills_of_a_kernel_with_an_instruction_that_is_not_emulated_are_not_asked_for(monkeypatch):
    monkeypatch.setitem(TABLE, "setp", (None, ""))
    kernel, constants = SMALL["bounds"]
    with pytest.raises(AssertionError, match="_tile_bounds for sm_90.*setp"):
        resources(kernel, constants, Config(0, 0, 4, 3), architecture=90, element_size=2)


@pytest.mark.parametrize("capability,rows",
                         [((7, 5), 80), ((8, 0), 80), ((8, 6), 80), ((8, 7), 80), ((8, 9), 80), ((9, 0), 90),
                          ((10, 0), 100), ((10, 3), 100), ((12, 0), 120), ((12, 1), 120)], ids=str)
def test_a_card_takes_rows_that_fit_its_shared_memory(capability, rows, monkeypatch):
    """sm_86, sm_89 and sm_120 have 99 KiB a block, for which the 80 rows are gated; what is unknown takes them as
    well. sm_120 has rows of its own where those of 80 would spill."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    _launch.architecture.cache_clear()
    try:
        assert _launch.architecture(torch.device("cuda:0")) == rows
        for table in TABLES.values():
            row = _launch.table_row(table, _launch.architecture(torch.device("cuda:0")), 2, 128, heavy=False)
            assert row == table.get((rows, 2, 128), table[(BASE.get(rows, rows), 2, 128)])
    finally:
        _launch.architecture.cache_clear()


# What comes nearest to a thread's registers on these cards; the rest of the 80 rows by hand, see the end of the file.
SMALL_CARDS = [(120, Row(kernel, 80, 2, dim)) for kernel in ("fwd", "dq", "dkv", "wide") for dim in (128, 256)
               if (120, 2, dim) not in TABLES[kernel]]
SMALL_CARDS += [(card, Row("dkv", 80, 2, 128)) for card in (86, 89)]


@pytest.mark.parametrize("card,row", SMALL_CARDS, ids=str)
def test_an_80_row_spills_nothing_on_the_other_cards_that_take_it(card, row):
    """Compiled for the card itself, whose multiply instructions, registers and shared memory may differ."""
    assert compiled(row, target=card).fit(80)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_a_row_for_every_key(table):
    assert {key[:3] for key in TABLES[table] if key[0] not in BASE} == {
        (a, size, dim) for a in ARCHITECTURES for size in HEAD_DIMS for dim in HEAD_DIMS[size]}


def check_card(card: int):
    """Print the 80 rows that do not fit `card`, but for those in whose place it has rows of its own."""
    rows = [row for row in ROWS + VARIANTS + DELTA_ROWS + RARE if row.architecture == 80
            and (row.kernel == "delta" or (card, *row[2:4]) not in TABLES[row.kernel])]
    with pool() as processes:
        found = list(zip(rows, processes.map(functools.partial(compiled, target=card), rows)))
    unfit = [(row, result) for row, result in found if not result.fit(80)]
    print(*(f"{row} {result}" for row, result in unfit), sep="\n")
    print(f"{len(unfit)} of {len(rows)} rows do not fit sm_{card} on Triton {triton.__version__}")


if __name__ == "__main__" and len(sys.argv) > 1:
    check_card(int(sys.argv[1]))
elif __name__ == "__main__":
    rows = ROWS + VARIANTS + DELTA_ROWS + RARE
    print(f"""# What the launch tables compile to

`python -m tests.tfkernels.test_resources` prints this page: registers, shared memory, spills and matrix instructions of
every row of attention's launch tables, compiled offline, here on Triton {triton.__version__}. The last {len(RARE)} rows
are left out of the tests for time. The kernels around attention are compiled by the tests of their own operators
(`pytest -k spill`).

A tile is queries x keys; `spilled` counts the instructions that store to or load from a thread's stack; `ahead` is how
many tiles of work lie, at the least, between a loop's request for a tile and its wait for it. Variants: `check`, masks
of two sides; `narrow`, head dim 80 in tiles of 128; `values`, keys of 192 in tiles of 256 and values of 128; `sinks`, a
learned sink per head; `tf32`, float32 where PyTorch allows it.

| arch | bytes | D | kernel | tile | warps | stages | registers | spilled | shared KiB | ahead | multiplies |""")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    failures = 0
    with pool() as processes:
        for row, found in zip(rows, processes.map(compiled, rows)):
            failures += not found.fit(row.architecture)
            c, kernel = row.config, " ".join(x for x in (row.kernel, row.variant) if x)
            tile = f"{c.block_m}x{c.block_n}" if c.block_n else f"{c.block_m}"
            multiplies = ", ".join(f"{count} {name}" for name, count in found.tensor_core.items()) or "-"
            print(f"| {row.architecture} | {row.element_size} | {row.head_dim} | {kernel} | "
                  f"{tile} | {c.num_warps} | {c.num_stages} | "
                  f"{found.registers} | {found.spills} | {found.shared_bytes / 1024:.1f} | "
                  f"{min(found.waits, default='-')} | {multiplies} |", flush=True)
    print(f"\n{failures} of {len(rows)} rows spill or exceed shared memory.")
