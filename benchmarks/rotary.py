"""Norm of queries and keys and rotary embedding: GB/s of the bytes that must move, and as a share of a device copy's.

    python -m benchmarks.rotary --out DIR [--quick] [--cpu]

One packed row has documents of 1024 tokens; q and k are as projections give them, (1, T, H, D), transposed. The bytes
that must move are those of the table in `tfkernels.rotary.op`: q and k, and their gradients, once and nothing in
between. Contenders are ours, the reference in eager PyTorch and under `torch.compile`, and, where there is no norm,
liger-kernel's rotary embedding. That one works in place, and in backward on the gradients that arrive, which the next
round needs. So it gets copies of both, and its numbers include the time of the copies, that of a device copy of as
many bytes again.
"""
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.bandwidth import Problem, functions, run_benchmark
from benchmarks.harness import present
from tfkernels import qk_norm_rotary, qk_norm_rotary_reference, rotary_table

DOCUMENT = 1024
MOVED = {"rotary": (2, 2), "qk_norm_rotary": (2, 3)}  # of T (H + K) D elements


class Case(NamedTuple):
    """One operator on `tokens` tokens of `heads` query and `kv_heads` key heads of `dim` elements."""

    op: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    grid = [Case(op, tokens, *heads, dim)
            for op, tokens, heads, dim in itertools.product(MOVED, (4096, 32768), ((32, 8), (32, 32)), (128, 64))]
    first = [c for c in grid if c.tokens == 32768 and c.kv_heads == 8]
    return first if quick else first + [c for c in grid if c not in first]


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Return what the contenders compute."""
    generator = torch.Generator(device).manual_seed(0)
    table = rotary_table(torch.arange(case.tokens, device=device)[None] % DOCUMENT,
                         10000.0 ** (-torch.arange(0, case.dim, 2, device=device, dtype=torch.float32) / case.dim))

    def random(*size):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q, k, dq, dk = (random(1, case.tokens, n, case.dim).transpose(1, 2) for n in (case.heads, case.kv_heads) * 2)
    weights = ("q_weight", "k_weight") if case.op == "qk_norm_rotary" else ()
    tensors = {"q": q, "k": k} | {name: random(case.dim) for name in weights}
    peers, others = present({"liger-kernel": lambda: _liger(table)} if case.op == "rotary" and device == "cuda" else {})
    size = case.tokens * (case.heads + case.kv_heads) * case.dim * q.element_size()
    return Problem(
        {n: x.requires_grad_() for n, x in tensors.items()},
        {"q": dq, "k": dk},
        dict(zip(("forward", "backward"), (n * size for n in MOVED[case.op]))),
        functions(
            _of(qk_norm_rotary, table), _of(qk_norm_rotary_reference, table), compiled=device == "cuda", peers=peers
        ),
        others=others,
    )


def _of(function, table):
    """`function` of q, k and the weights, if there are any, with `table`."""
    return lambda q, k, q_weight=None, k_weight=None: tuple(function(q, k, q_weight, k_weight, *table))


class _Copied(torch.autograd.Function):
    """A copy in the direction asked for, nothing in the other."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: bool) -> Tensor:
        ctx.backward = not forward
        return x.clone() if forward else x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout.clone() if ctx.backward else dout, None


def _liger(table: tuple):
    """liger-kernel's rotary embedding, which has no norm."""
    from liger_kernel.ops.rope import LigerRopeFunction

    twice = [torch.cat([x, x], -1) for x in table]

    def function(q, k):
        q, k = (_Copied.apply(x, True) for x in (q, k))
        return tuple(_Copied.apply(x, False) for x in LigerRopeFunction.apply(q, k, *twice))

    return function


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def cpu_cases(quick: bool) -> list[Case]:
        return [Case(op, *((256, 4, 2, 64) if quick else (4096, 8, 2, 64))) for op in MOVED]

    return run_benchmark("rotary", __doc__, arguments, settings={"document_tokens": DOCUMENT}, cases=cases,
                         cpu_cases=cpu_cases, problem=problem)


if __name__ == "__main__":
    raise SystemExit(main())
