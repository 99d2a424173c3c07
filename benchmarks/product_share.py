"""Attention on one CPU thread as a share of the rate of a matrix product, as a table.

    OMP_NUM_THREADS=1 python -m benchmarks.product_share

Packed documents of 512 tokens with an image of 256, 8 query heads of 64 and 2 of keys, float32. Only visible pairs
count, 4 operations for each number of a head forward and 14 with the gradient. Forward, forward with gradient and a
product of 1,024 x 1,024 take turns, for a machine may be shared; times are medians.
"""
import statistics
import time
from collections.abc import Callable

import torch

import tfkernels

ROUNDS, LENGTHS = 15, (1024, 2048, 4096)
HEADS, KV_HEADS, HEAD_DIM, DOCUMENT, SIDE = 8, 2, 64, 512, 1024


def seconds(run: Callable) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measured(tokens: int) -> tuple[float, float, float, int]:
    """Median seconds of forward, forward with gradient and the product, and the visible pairs of a row."""
    images = [(start + 128, start + 384) for start in range(0, tokens, DOCUMENT)]
    mask = tfkernels.TransfusionMask.from_spans([images], tokens, documents=torch.arange(tokens)[None] // DOCUMENT)
    q, k, v = (torch.randn(1, heads, tokens, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    a, b, gradient = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.randn_like(q)

    @torch.no_grad()
    def forward():
        tfkernels.attention(q, k, v, mask)

    def both():
        torch.autograd.grad(tfkernels.attention(q, k, v, mask), [q, k, v], gradient)

    kinds = forward, both, lambda: a @ b
    for kind in kinds:
        kind()
    rounds = [[seconds(kind) for kind in kinds] for _ in range(ROUNDS)]
    return (*map(statistics.median, zip(*rounds)), int(mask.area().sum()))


def main() -> None:
    """Print the table of docs/performance.md."""
    torch.set_num_threads(1)
    print("| tokens | forward ms | with gradient | share of the product's rate, forward | with gradient |")
    print("|---|---|---|---|---|")
    for tokens in LENGTHS:
        forward, both, product, pairs = measured(tokens)
        rate, numbers = 2 * SIDE**3 / product, HEADS * HEAD_DIM * pairs
        print(f"| {tokens:,} | {1e3 * forward:.1f} | {1e3 * both:.1f} | {4 * numbers / forward / rate:.0%} | "
              f"{14 * numbers / both / rate:.0%} |", flush=True)


if __name__ == "__main__":
    main()
