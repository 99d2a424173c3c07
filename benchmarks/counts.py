"""What the compiled kernels do, counted without a GPU: bytes, shared memory, instructions. Time is not among it.

    python -m benchmarks.counts                 prints docs/counts.md
    python -m benchmarks.counts --only norm     of the operators whose names hold a word

`ptxrun` runs each operator's bfloat16 kernels for sm_80 and sm_90 on a small input. What they compute passes the
accuracy rule of the tests against float64 in the same run. Two processes run, one for each architecture.
"""
import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import triton

import ptxrun
from benchmarks import cross_entropy, diffusion_loss, norm, patchify, rotary
from benchmarks.bandwidth import EAGER, OURS, Problem, contenders
from ptxrun.traffic import Traffic
from tfkernels import TransfusionMask, attention, attention_reference

ARCHITECTURES = ("sm_80", "sm_90")
KINDS = ("tensor core", "special", "float", "integer", "move", "global", "shared", "shuffle", "wait", "branch")
PHASES = ("forward", "backward")


class Work(NamedTuple):
    """An operator on one input: how often its unit occurs in it, and what its kernels must multiply."""

    problem: Callable[[], Problem]
    unit: str
    units: int
    products: dict[str, int] = {}  # multiplications and additions of the tensor cores, by kernel
    phases: tuple[str, ...] = PHASES


class Row(NamedTuple):
    """The counts of one kernel in one phase of an operator."""

    operator: str
    phase: str
    kernel: str
    launches: int
    unit: str
    units: int
    must: int                      # bytes that the operator must move in this phase, 0 where no table says it
    least: dict[str, int]          # bytes of the sectors that are touched, by load, store, atomic
    moved: dict[str, int]          # bytes of the sectors of each instruction of a warp
    requested: dict[str, int]      # of these, bytes that some thread asked for
    shared: tuple[int, int]        # passes of shared memory, and without conflicts
    products: tuple[int, int]      # of the tensor cores, and as many as the equations have
    instructions: dict[str, int]   # of warps, by kind

    def ratio(self, kind: str) -> float:
        """Bytes moved for each byte that has to move once; 1 where there is none."""
        return _ratio(self.moved.get(kind, 0), self.least.get(kind, 0))

    def bytes(self) -> list[str]:
        """The cells of the first table, whose columns are BYTES."""
        sides = [x for side in ("load", "store")
                 for x in (f"{self.least.get(side, 0) / 1024:.0f}", f"{self.ratio(side):.2f}")]
        products = f"{_ratio(*self.products):.2f}" if self.products[0] else "-"
        return [str(self.launches), *sides, f"{self.sectors():.2f}", f"{_ratio(*self.shared):.2f}", products,
                f"{self.per_byte():.1f}"]

    def per_byte(self) -> float:
        """Instructions of threads for each byte that has to move."""
        return 32 * sum(self.instructions.values()) / sum(self.least.values())

    def sectors(self) -> float:
        """Bytes of sectors moved for each byte that was asked for."""
        return _ratio(sum(self.moved.values()), sum(self.requested.values()))

    def each(self) -> list[str]:
        """The cells of the second table: instructions of warps and passes of shared memory for each 32 units."""
        counted = [*(self.instructions.get(kind, 0) for kind in KINDS), self.shared[0]]
        return [self.unit, *(f"{32 * count / self.units:.2f}" for count in counted)]


def _ratio(done: int, least: int) -> float:
    return done / least if least else 1.0


def attention_problem(head_dim: int, queries: int, keys: int, hidden: bool) -> Problem:
    """4 query heads on 2 key heads. Every query sees every key, or with `hidden` two images see themselves alone."""
    generator = torch.Generator().manual_seed(0)
    images = [(0, keys // 2), (keys // 2, keys)] if hidden else [(0, keys)]
    mask = TransfusionMask.from_spans([images], keys, hidden=[images] if hidden else None).queries(keys - queries, keys)
    sizes = {"q": (1, 4, queries, head_dim)} | dict.fromkeys(("k", "v"), (1, 2, keys, head_dim))

    def random(size: tuple) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    tensors = {name: random(size).requires_grad_() for name, size in sizes.items()}
    moved = 2 * sum(x.numel() for x in tensors.values()) + 2 * tensors["q"].numel() + 4 * 4 * queries
    return Problem(
        tensors, {"out": random(sizes["q"])}, {"forward": moved, "backward": 2 * moved},
        {OURS: lambda q, k, v: attention(q, k, v, mask), EAGER: lambda q, k, v: attention_reference(q, k, v, mask).out})


def attention_work(head_dim: int, queries: int = 512, keys: int = 512, *, hidden: bool = False) -> Work:
    """Attention, whose unit is a visible pair of query and key in one head."""
    pairs = 4 * queries * keys // (2 if hidden else 1)
    step = 2 * pairs * head_dim
    products = {"_attention_fwd": 2 * step, "_attention_decode": 2 * step, "_attention_bwd_dq": 3 * step,
                "_attention_bwd_dkv": 4 * step}
    return Work(lambda: attention_problem(head_dim, queries, keys, hidden), "visible pair", pairs, products,
                PHASES if queries > 1 else PHASES[:1])


def works() -> dict[str, Work]:
    """The operators by name."""
    def of(module, *case) -> Callable[[], Problem]:
        return lambda: module.problem(module.Case(*case), "cpu", torch.bfloat16)

    found = {f"attention, D {dim}": attention_work(dim) for dim in (64, 128)}
    found |= {f"attention, hidden images, D {dim}": attention_work(dim, hidden=True) for dim in (64, 128)}
    found |= {f"decoding, D {dim}": attention_work(dim, 1, 2048) for dim in (64, 128)}
    found |= {op: Work(of(norm, op, 512, 1024), "element", 512 * 1024) for op in norm.ARGUMENTS}
    found |= {op: Work(of(rotary, op, 128, 32, 8, 128), "element", 128 * 40 * 128) for op in rotary.MOVED}
    found |= {op: Work(of(patchify, op, 512, 64), "element", 512 * 64) for op in ("patchify", "noise_patchify")}
    one = 2 * 512 * 64 * 1024
    found["embed_patches"] = Work(of(patchify, "embed_patches", 512, 64, 1024), "element", 512 * 1024,
                                  {"_embed_fwd": one, "_embed_bwd": one})
    found["diffusion_loss"] = Work(of(diffusion_loss, "diffusion_loss", 512, 64), "element", 512 * 64)
    found |= {op: Work(of(diffusion_loss, op, 512, 64, 1024), "element", 512 * 1024,
                       {"_head_loss_fwd": one, "_head_loss_bwd": 2 * one}) for op in diffusion_loss.HEADS}
    found["linear_cross_entropy"] = Work(of(cross_entropy, 128, 128, 4096), "logit", 128 * 4096)
    return found


def counts(architecture: str, only: tuple[str, ...] = ("",)) -> list[Row]:
    """Run the operators whose names hold one of `only`, check what they compute, and count: a row for each kernel.

    This changes the operators of this process for good (`ptxrun.operators_on_cpu`); see `apart`.
    """
    rows = []
    with ptxrun.emulate(architecture, count=True) as emulation:
        ptxrun.operators_on_cpu()
        for name, work in works().items():
            if any(word in name for word in only):
                problem, state = work.problem(), {}
                ours = contenders(problem)[0]
                for phase, run in ours.phases.items():
                    emulation.kernels.clear()
                    run(state)
                    if phase in work.phases:
                        rows += [_row(name, phase, kernel, work, problem.moved, found)
                                 for kernel, found in emulation.kernels.items()]
                ours.check(state)
    return rows


def _row(operator: str, phase: str, kernel: str, work: Work, must: dict[str, int], found: Traffic) -> Row:
    return Row(
        operator, phase, kernel, found.launches, work.unit, work.units, must.get(phase, 0),
        {kind: found.least(kind) for kind in found.moved}, dict(found.moved), dict(found.requested),
        (found.shared_passes, found.shared_least), (found.products, work.products.get(kernel, found.products)),
        dict(found.instructions))


def apart(only: tuple[str, ...] = ("",)) -> dict[str, list[Row]]:
    """`counts` of both architectures, in a process for each."""
    with ProcessPoolExecutor(len(ARCHITECTURES), mp_context=multiprocessing.get_context("spawn")) as processes:
        return dict(zip(ARCHITECTURES, processes.map(counts, ARCHITECTURES, [only] * len(ARCHITECTURES))))


PAGE = """# What the kernels do, counted

`python -m benchmarks.counts` prints this page, here on Triton {version}: each operator's bfloat16 kernels, compiled for
sm_80 and sm_90 and run instruction by instruction without a GPU ([testing.md](testing.md)). Counts are exact for the
code before ptxas and for these inputs; what was computed passed the accuracy rule against float64 in the same run.
Time is not among them. [performance.md](performance.md#what-the-counts-say) names what is wasted, and why.

The inputs: attention has 4 query heads on 2 key heads and 512 tokens that all see each other (hidden images: two of 256
tokens that see themselves alone); decoding has one query on 2,048 keys, split as for a device of 4 multiprocessors;
norms, patches' embedding and the losses from hidden states have 512 rows of 1,024 columns and patches of 64 elements,
rotary 128 tokens of 32 + 8 heads of 128, the cross-entropy 128 rows of 4,096 words.

- **KiB read, written**: the sectors of 32 bytes that a kernel touches at all, which memory has to move once. They grow
  with the input's size. `times` says how often its warps' instructions ask for them: what is above 1 is for the caches.
  Attention's keys and values are read once for each tile of queries of a head; tables of a norm once for each row.
- **sectors**: bytes of the sectors asked for, for each byte that threads asked for in them. Above 1, lanes lie apart.
- **shared**: passes of shared memory for each that would do without conflicts between banks, of ordinary accesses,
  cp.async, ldmatrix and stmatrix. What wgmma reads by itself is not in it.
- **products**: multiplications that the tensor cores do for each that the equations have. Decoding fills tiles of 16
  rows with the 2 queries of a key head.
- **per byte**: instructions of threads for each byte read or written. At 3.0 TB/s and 1.83 GHz an H100 has room for 10.
- The second table has instructions of warps, and passes of shared memory, for each 32 units. They hardly depend on the
  size. `special` are exponentials, roots and their like; `move` are moves and conversions, of which ptxas drops many;
  `global` counts copies from global to shared memory. A multiprocessor begins 4 instructions a cycle and does one pass,
  or on sm_80 half of an m16n8k16.
"""
BYTES = ("launches", "KiB read", "times", "KiB written", "times", "sectors", "shared", "products", "per byte")
SUMS = """## An operator as a whole, on sm_90

What an operator must move, by its table, and what all its kernels touch. Above 1 they hand something to each other
through memory, or read it each for itself: attention's backward q, k, v and dO once for dQ and once for dK and dV, the
norms' backward 4 bytes for each column and program (as many as a device of 4 multiprocessors holds here; of an H100
see performance.md), embed_patches its weight's gradient by chunks, the losses from hidden states their weight and each
patch's error.

| operator | phase | must move, KiB | touched, KiB | times |
|---|---|---|---|---|"""


def page(found: dict[str, list[Row]]) -> str:
    """The page as Markdown."""
    parts = [PAGE.format(version=triton.__version__)]
    for architecture, rows in found.items():
        parts += [f"## {architecture}\n", *_table(BYTES, [(row, row.bytes()) for row in rows]), ""]
        parts += [*_table(("unit", *KINDS, "passes"), [(row, row.each()) for row in rows]), ""]
    return "\n".join([*parts, SUMS, *sums(found[ARCHITECTURES[-1]]), ""])


def _table(columns: tuple[str, ...], lines: list[tuple[Row, list[str]]]) -> list[str]:
    cells = [("operator", "kernel", *columns), ["---"] * (2 + len(columns))]
    cells += [(f"{row.operator}: {row.phase}", f"`{row.kernel}`", *rest) for row, rest in lines]
    return [f"| {' | '.join(line)} |" for line in cells]


def sums(rows: list[Row]) -> list[str]:
    """A line for each operator and phase: what must move and what all its kernels touch."""
    lines, wholes = [], list(dict.fromkeys((row.operator, row.phase, row.must) for row in rows if row.must))
    for operator, phase, must in wholes:
        touched = sum(sum(row.least.values()) for row in rows if (row.operator, row.phase) == (operator, phase))
        lines.append(f"| {operator} | {phase} | {must / 1024:.0f} | {touched / 1024:.0f} | {touched / must:.2f} |")
    return lines


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="operators whose names hold one")
    print(page(apart(tuple(parser.parse_args().only))), end="")


if __name__ == "__main__":
    main()
