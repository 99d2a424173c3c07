"""Time launch configurations of the attention kernels on this device and print the fastest: the tables' offline tuner.

    python -m benchmarks.tune --out DIR [--quick] [--kernels fwd dq dkv] [--head-dims 64 128] [--lengths 1024 8192]

Each candidate takes the place of its table's row, and must pass the accuracy rule before it is timed against all
others in interleaved rounds. What is known of it is saved as it comes. Candidates that do not fit shared memory end
as errors in the report. A row that wins goes into its table by hand, and from there through
tests/tfkernels/test_resources.py: a tile that spills may be fast, and is looked at twice.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch

from benchmarks.attention import Case, checker, mask_builder, random_inputs
from benchmarks.batches import packed_batch
from benchmarks.command_line import run_command
from benchmarks.harness import Contender, Result, measure
from benchmarks.report import Report
from tfkernels import attention
from tfkernels._launch import Config, architecture
from tfkernels.attention.triton import backward, forward

TABLES = {"fwd": forward.CONFIGS, "dq": backward.DQ_CONFIGS, "dkv": backward.DKV_CONFIGS}
ROWS, WALKED = (64, 128), (16, 32, 64, 128)  # of the tile's own side, which the program holds; of the side it walks


def candidates(kernel: str, head_dim: int) -> list[Config]:
    """Every tile worth timing; dkv holds keys and walks queries, the others hold queries and walk keys."""
    found = []
    for held, walked, warps, stages in itertools.product(ROWS, WALKED, (4, 8), (2, 3, 4)):
        if (
            held * head_dim <= 64 * 32 * warps * 2 and walked * head_dim <= 128 * 128
        ):  # accumulators of 64 registers and more spill by themselves
            found.append(
                Config(walked, held, warps, stages) if kernel == "dkv" else Config(held, walked, warps, stages)
            )
    return found


def quick_candidates(own: Config) -> list[Config]:
    """The first ones to time: the table's own tile, 128x128, and 64x64, of which a multiprocessor holds two, each with
    2 and 3 stages."""
    tiles = (own.block_m, own.block_n, own.num_warps), (128, 128, 8), (64, 64, 4)
    return [Config(*tile, stages) for tile in tiles for stages in (2, 3)]


def by_tma(kernel: str, architecture: int, configs: list[Config]) -> list[Config]:
    """The same with TMA's loads, where the kernel has them and the architecture too."""
    return [config._replace(by_tma=True) for config in configs if kernel != "dkv" and architecture >= 90]


@contextlib.contextmanager
def replaced(table: dict, key: tuple, config: Config):
    """Put `config` into `table` for as long as the block runs."""
    before = table[key]
    table[key] = config
    try:
        yield
    finally:
        table[key] = before


def contender(table: dict, key: tuple, config: Config, inputs, mask, check) -> Contender:
    """The whole call with one row replaced, forward and backward as phases."""
    q, k, v, dout = inputs

    def run_forward(state):
        with replaced(table, key, config):
            state["out"] = attention(q, k, v, mask)

    def run_backward(state):
        with replaced(table, key, config):
            state["grads"] = torch.autograd.grad(state["out"], (q, k, v), dout)

    return Contender(str(config), {"forward": run_forward, "backward": run_backward}, check)


def tune(
    kernel: str, case: Case, key: tuple, report: Report, device: str, seconds: float, configs: list[Config]
) -> None:
    """Time `configs` for one kernel and shape; record a row each and print the fastest five beside the table's."""
    batch, inputs = (
        packed_batch(case.seq_len, case.image_tokens, device=device),
        random_inputs(case, device, torch.bfloat16),
    )
    mask = mask_builder(batch)()
    own = TABLES[kernel][key]
    check = checker(inputs, mask)(2.0)
    chosen = [contender(TABLES[kernel], key, c, inputs, mask, check) for c in dict.fromkeys([own, *configs])]
    phase = "forward" if kernel == "fwd" else "backward"

    def record(result: Result) -> dict:
        return report.record({"kernel": kernel, **case._asdict(), "row": list(key)}, result)

    rows = [
        record(result) for result in measure(chosen, device=device, seconds=seconds, record=record, **report.limits)
    ]
    timed = sorted((row["milliseconds"][phase]["p50"], row["contender"]) for row in rows if row["milliseconds"])
    print(
        f"{kernel} {key} {case.seq_len} tokens, table {own}: "
        + ", ".join(f"{config} {ms:.4f} ms" for ms, config in timed[:5]),
        flush=True,
    )


class Tuned(NamedTuple):
    """A kernel, and the shape that its row is tuned on."""

    seq_len: int
    head_dim: int
    kernel: str
    quick: bool


def cases(quick: bool, kernels: list[str], head_dims: list[int], lengths: list[int] | None) -> list[Tuned]:
    """Every kernel at every head dim and length."""
    lengths = lengths or ([8192] if quick else [8192, 1024])
    return [Tuned(*case, quick) for case in itertools.product(lengths, head_dims, kernels)]


def measure_case(case: Tuned, report: Report, device: str) -> None:
    """Time the candidates of one kernel and shape."""
    newest = architecture(torch.device("cuda", torch.cuda.current_device()))
    key = newest, 2, case.head_dim
    configs = quick_candidates(TABLES[case.kernel][key]) if case.quick else candidates(case.kernel, case.head_dim)
    configs += by_tma(case.kernel, newest, configs)
    shape = Case(case.seq_len, case.head_dim, 16, 16, 256)
    tune(case.kernel, shape, key, report, device, 1.0 if case.quick else 5.0, configs)


def main(arguments: list[str] | None = None) -> int:
    """Tune the kernels that are asked for."""
    return run_command(
        "tune", __doc__, arguments, cases=cases, measure_case=measure_case,
        settings={"timing": "interleaved, L2 flushed before each phase"},
        options={
            "kernels": {"nargs": "+", "choices": list(TABLES), "default": list(TABLES)},
            "head-dims": {"nargs": "+", "type": int, "choices": (32, 64, 128, 256), "default": [128, 64]},
            "lengths": {"nargs": "+", "type": int, "help": "8192 and 1024 by default; with --quick 8192"},
        },
        quick="8,192 tokens; the table's tile, 128x128 and 64x64, each with 2 and 3 stages, and with TMA")


if __name__ == "__main__":
    raise SystemExit(main())
