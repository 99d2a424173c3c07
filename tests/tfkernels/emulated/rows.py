"""The rows of the launch tables, and which of them a launch was made by."""
from typing import NamedTuple

import torch

from tests.launches import Launch
from tests.tfkernels.emulated.families import Family
from tfkernels._launch import Config
from tfkernels.attention.triton import backward, decode, forward
from tfkernels.losses.triton import cross_entropy, head
from tfkernels.norm import triton as norm
from tfkernels.patches.triton import embed

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

    def is_of(self, launch: Launch) -> bool:
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


def rows(architecture: int, dtype: torch.dtype) -> list[Row]:
    """Every row that a dtype takes on an architecture."""
    size = dtype.itemsize
    found = [Row(kernel, key, named(kernel, key, value)) for kernel, tables in TABLES.items() for table in tables
             for key, value in table.items()
             if (key[:2] == (architecture, size) if isinstance(key, tuple) else "norm" in kernel or key == size)]
    return found + [
        Row("_cross_entropy_rows", block,
            {"BLOCK": block, "num_warps": cross_entropy.launch_config(block).num_warps}) for block in ENTROPY_BLOCKS]


def made(architecture: int, dtype: torch.dtype, launches: list[Launch]) -> list[Row]:
    """The rows by which launches were made."""
    return [row for row in rows(architecture, dtype) if any(map(row.is_of, launches))]


def missing(family: Family, architecture: int, dtype: torch.dtype, launches: list[Launch]) -> list[Row]:
    """The rows that a family says it holds and none of its launches was made by."""
    found = made(architecture, dtype, launches)
    return [row for row in rows(architecture, dtype) if family.holds(row.kernel, row.key) and row not in found]
