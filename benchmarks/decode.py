"""Attention against a cache of 1k to 128k tokens, dense and paged: decoding 1 and 16 tokens, and denoising one image.

    python -m benchmarks.decode --out DIR [--quick] [--cpu]

GB/s are the bytes of the keys and values that the mask leaves visible, each read once, over the median time. Half of
the batch's rows hold half as many tokens as the others. Before it is timed, every contender passes the tests'
accuracy rule against float64.
"""
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention import uncut_contender
from benchmarks.attention_peers import repeated
from benchmarks.command_line import run_command
from benchmarks.harness import Contender, Result, measure
from benchmarks.report import Report
from benchmarks.timing import remark
from tests.compare import assert_as_accurate
from tfkernels import TransfusionMask, attention, attention_reference, paged_attention

PAGE = 64
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0


class Case(NamedTuple):
    """`batch` rows of `query_len` new tokens against `cached` older ones, or half as many in half of the rows."""

    batch: int
    query_len: int
    cached: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def image(self) -> bool:
        """Many new tokens are one image, which sees itself."""
        return self.query_len > 16


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    lengths = 1024, 8192, 32768, 131072
    grid = [Case(batch, query_len, cached, *heads)
            for heads, query_len, batch, cached in itertools.product(((32, 4), (16, 16)), (1, 16, 256), (1, 8), lengths)
            if batch * cached <= 2**18]
    first = [c for c in grid if c.kv_heads == 4 and c.cached in (8192, 32768)]
    return first if quick else first + [c for c in grid if c not in first]


def paged(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter a cache (B, K, S, D), S a multiple of PAGE, over pages in random order.

    Returns the pages (P, PAGE, K, D) and the block table (B, S / PAGE).
    """
    pages = x.transpose(1, 2).unflatten(1, (-1, PAGE)).flatten(0, 1)
    order = torch.randperm(pages.shape[0], generator=torch.Generator().manual_seed(0)).to(x.device)
    store = torch.empty_like(pages)
    store[order] = pages
    return store, order.view(x.shape[0], -1).int()


def contenders(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Contender], int]:
    """Return the contenders and the bytes of keys and values that one call must read."""
    generator = torch.Generator(device).manual_seed(0)
    key_len = -(-(case.cached + case.query_len) // PAGE) * PAGE
    q, k, v = (torch.randn(case.batch, heads, size, case.head_dim, generator=generator, device=device).to(dtype)
               for heads, size in ((case.heads, case.query_len), (case.kv_heads, key_len), (case.kv_heads, key_len)))
    lengths = torch.tensor([case.cached // (1 + row % 2) for row in range(case.batch)], device=device)
    (k_pages, table), (v_pages, _) = paged(k), paged(v)

    def build():
        return TransfusionMask.from_cache(lengths, case.query_len, key_len, image=case.image)

    exact, rounded = (_reference(q, k, v, build(), t) for t in (torch.float64, dtype))

    def check(factor):
        return lambda state: assert_as_accurate("out", state["out"], rounded, exact, factor=factor)

    def ours(name, function):
        def run_build(state):
            state["mask"] = build()

        def run(state):
            state["out"] = function(state["mask"])

        return Contender(name, {"build": run_build, "forward": run}, check(OUR_FACTOR))

    def sdpa(state):
        state["out"] = scaled_dot_product_attention(q, *repeated(q, k, v), attn_mask=state["mask"])

    def build_dense(state):
        causal = torch.arange(1, case.query_len + 1, device=device)[:, None]
        ends = lengths[:, None, None] + (case.query_len if case.image else causal)
        state["mask"] = (torch.arange(key_len, device=device) < ends)[:, None].expand(-1, -1, case.query_len, -1)

    found = [ours("tfkernels", lambda mask: attention(q, k, v, mask)),
             ours("tfkernels, paged", lambda mask: paged_attention(q, k_pages, v_pages, table, mask)),
             Contender("SDPA, dense mask", {"build": build_dense, "forward": sdpa}, check(PEER_FACTOR))]
    if device == "cuda" and case.image:
        found.append(uncut_contender(found[0]))
    visible = int((lengths + case.query_len).sum().item())
    return found, 2 * visible * case.kv_heads * case.head_dim * q.element_size()


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, dtype: torch.dtype) -> Tensor:
    """`attention_reference` in `dtype`, one batch row and key head at a time."""
    group, out = q.shape[1] // k.shape[1], torch.empty_like(q, dtype=dtype)
    for b in range(q.shape[0]):
        row = TransfusionMask.from_intervals(mask.lo[b:b + 1], mask.hi[b:b + 1], key_len=mask.key_len)
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            parts = q[b:b + 1, heads], k[b:b + 1, h:h + 1], v[b:b + 1, h:h + 1]
            out[b, heads] = attention_reference(*(x.to(dtype) for x in parts), row).out[0]
    return out


def run_case(case: Case, report: Report, device: str, seconds: float) -> None:
    """Measure one configuration and record a row per contender."""
    chosen, count = contenders(case, device, torch.bfloat16 if device == "cuda" else torch.float32)

    def record(result: Result) -> dict:
        times = result.milliseconds.get("forward")
        return report.record(
            {**case._asdict(), "kv_bytes": count}, result, gb_per_s=count / times["p50"] / 1e6 if times else None
        )

    for row in map(record, measure(chosen, device=device, seconds=seconds, record=record, **report.limits)):
        times = {phase: found["p50"] for phase, found in row["milliseconds"].items()}
        numbers = (
            f"{times['forward']:8.4f} ms {row['gb_per_s']:7.0f} GB/s, mask {times['build']:.4f} ms" if times else ""
        )
        said = row["error"] or row["left_out"] or numbers + remark(row["timing"])
        print(
            f"batch {case.batch} queries {case.query_len:3} cached {case.cached:6} "
            f"heads {case.heads}:{case.kv_heads:<2} {row['contender']:20} {said}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    return run_command(
        "decode", __doc__, arguments, settings={"page_size": PAGE, "timing": "interleaved, L2 flushed on CUDA"},
        cases=cases, cpu_cases=lambda quick: [Case(2, n, 1024, 8, 2, 64) for n in ((1,) if quick else (1, 16, 64))],
        measure_case=functools.partial(run_case, seconds=0.5))


if __name__ == "__main__":
    raise SystemExit(main())
