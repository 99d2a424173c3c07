"""Attention on packed Transfusion batches of 1k to 32k tokens, beside the other implementations of the same mask.

    python -m benchmarks.attention --out DIR [--quick]      on a CUDA device
    python -m benchmarks.attention --out DIR --cpu          without one: float32, documents of 512 with an image of 256,
                                                            and mask build and tiles (benchmarks/mask.py)

Measured are mask build, forward, backward and memory. TFLOP/s count the mask's visible pairs and nothing else: 4 *
area * H * D forward, 2.5 times that backward. Every contender gets the same inputs, drawn from N(0, 1). Before it is
timed, its output and gradients must pass the tests' accuracy rule against float64 in this very run.
"""
import importlib.util
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import attention_peers as peers
from benchmarks import mask as mask_benchmark
from benchmarks.batches import PackedBatch, even_batch, packed_batch
from benchmarks.command_line import run_command
from benchmarks.environment import peak_tflops
from benchmarks.harness import Contender, LeftOut, Result, measure, present
from benchmarks.report import Report
from benchmarks.timing import remark
from tests.compare import assert_as_accurate
from tfkernels import TransfusionMask, attention, attention_reference
from tfkernels.attention.triton import backward, forward

LENGTHS, HEAD_DIMS, HEADS, IMAGES = (
    (1024, 2048, 4096, 8192, 16384, 32768),
    (64, 128),
    ((16, 16), (32, 4)),
    (256, 64, 1024),
)
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0  # times PyTorch's own error; a peer need only have computed the same function
CEILINGS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
REFERENCE_BYTES = 2**29
UNCUT = "tfkernels, not cut into parts"


CPU_DOCUMENT = 512  # tokens


class Case(NamedTuple):
    """One configuration of the grid, with a batch of one row."""

    seq_len: int
    head_dim: int
    heads: int
    kv_heads: int
    image_tokens: int
    hidden: bool = False  # every other image is seen by itself only, as BAGEL's noised copies are


def cases(quick: bool = False) -> list[Case]:
    """Every configuration, those of `quick` first: a run that is cut has measured the ones that matter most."""
    grid = [Case(s, d, h, k, n) for n in IMAGES for (h, k) in HEADS for d in reversed(HEAD_DIMS) for s in LENGTHS]
    first = [
        c
        for c in grid
        if c.image_tokens == 256 and c.seq_len in (1024, 4096, 16384) and (c.heads == c.kv_heads or c.head_dim == 128)
    ]
    first.append(Case(16384, 128, 16, 16, 256, hidden=True))
    grid += [Case(s, d, 16, 16, 256, hidden=True) for d in reversed(HEAD_DIMS) for s in LENGTHS[1:]]
    return first if quick else first + [c for c in grid if c not in first]


def cpu_cases(quick: bool) -> list[Case | mask_benchmark.Case]:
    """Attention at lengths that a CPU takes below seconds, or the shortest alone, and then the masks."""
    lengths, dim = ((1024,), 32) if quick else (LENGTHS[:3], 64)
    return [*(Case(seq_len, dim, 8, 2, 256) for seq_len in lengths), *mask_benchmark.cases(quick)]


def flops(area: int, heads: int, head_dim: int) -> dict[str, float]:
    """Operations of the two products forward (4 * area * H * D) and of the five backward."""
    forward = 4 * area * heads * head_dim
    return {"forward": forward, "backward": 2.5 * forward}


def random_inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and dout from N(0, 1)."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [
        (1, heads, case.seq_len, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    q, k, v, dout = (
        torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype) for size in sizes
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def reference(inputs, mask: TransfusionMask, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `attention_reference` in `dtype`, for one key head and one block of rows at a time.

    A block of rows is computed against the keys that it sees.
    """
    q, k, v, dout = (x.detach().to(dtype) for x in inputs)
    group, total = q.shape[1] // k.shape[1], torch.promote_types(dtype, torch.float32)
    out, dq, dk, dv = (
        torch.zeros_like(q),
        torch.zeros_like(q),
        torch.zeros_like(k, dtype=total),
        torch.zeros_like(v, dtype=total),
    )
    block = max(16, REFERENCE_BYTES // (8 * group * mask.key_len))
    for start in range(0, mask.query_len, block):
        part = mask.queries(start, min(start + block, mask.query_len))
        first, last = part.lo.min().item(), part.hi.max().item()
        sides = (None, None) if mask.rows_exact else (mask.since[:, first:last], mask.until[:, first:last])
        near = TransfusionMask.from_intervals(
            part.lo - first, part.hi - first, *sides, key_len=last - first, offset=start
        )
        for head in range(k.shape[1]):
            rows = slice(None), slice(head * group, (head + 1) * group), slice(start, start + part.query_len)
            keys = slice(None), slice(head, head + 1), slice(first, last)
            args = [x.clone().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            result = attention_reference(*args, near).out
            grads = torch.autograd.grad(result, args, dout[rows])
            out[rows], dq[rows] = result.detach(), grads[0]
            dk[keys] += grads[1]
            dv[keys] += grads[2]
    return out, dq, dk.to(dtype), dv.to(dtype)


def checker(inputs, mask: TransfusionMask):
    """Return check(factor): it asserts a state's out and, if it has them, dq, dk and dv against float64."""
    exact, rounded = reference(inputs, mask, torch.float64), reference(inputs, mask, inputs[0].dtype)

    def check(factor):
        def assert_right(state):
            for name, *values in zip(
                ("out", "dq", "dk", "dv"), (state["out"].detach(), *state.get("grads", ())), rounded, exact
            ):
                assert_as_accurate(name, *values, factor=factor)

        return assert_right

    return check


def our_contender(make_mask, inputs, check) -> Contender:
    """`tfkernels.attention`, its mask built from spans and documents on the device."""
    return peers.contender("tfkernels", inputs, check, attention, make_mask)


@contextmanager
def uncut():
    """Leave attention's tiles and groups of heads whole where they would be cut into parts (parts.py in its folder)."""
    with patch.object(backward, "head_splits", lambda *_: 1), patch.object(forward, "key_splits", lambda *_: 1):
        yield


def uncut_contender(ours: Contender) -> Contender:
    """The same contender without parts, so that a GPU says what they win."""
    def whole(run):
        def run_whole(state):
            with uncut():
                run(state)
        return run_whole

    return replace(ours, name=UNCUT, phases={phase: whole(run) for phase, run in ours.phases.items()})


def mask_builder(batch: PackedBatch):
    """Return a function that builds the batch's mask from tensors where the batch lives, as a training step does."""
    spans, hidden = (
        None if x is None else torch.tensor(x, dtype=torch.int64, device=batch.documents.device).view(1, -1, 2)
        for x in (batch.spans, batch.hidden)
    )
    return lambda: TransfusionMask.from_spans(spans, batch.documents.shape[1], documents=batch.documents, hidden=hidden)


def contenders(case: Case, batch: PackedBatch, inputs) -> tuple[list[Contender], list[Result], dict[str, int]]:
    """Return the contenders, the results of those that cannot take part, and areas where the mask is another."""
    make_mask = mask_builder(batch)
    check = checker(inputs, make_mask())
    chosen, areas = [our_contender(make_mask, inputs, check(OUR_FACTOR))], {}
    if batch.documents.device.type == "cuda" and case.heads > case.kv_heads:
        chosen.append(uncut_contender(chosen[0]))
    dense_bytes, free = 8 * case.seq_len**2, free_bytes()  # bool mask, its bf16 bias, and room for a copy of each

    def maker(name, source, make):
        def made():
            if "dense" in name and dense_bytes > free:
                raise LeftOut(f"its mask needs about {dense_bytes} bytes, the device has {free} free")
            return make(source, inputs, check(PEER_FACTOR))

        return made

    found, others = present(
        {
            name: maker(name, source, make)
            for name, source, make in (
                ("FlexAttention, create_block_mask", batch, peers.flex),
                ("FlexAttention, mask.block_mask()", make_mask, peers.flex_with_our_blocks),
                ("SDPA, dense mask", batch, peers.sdpa_dense),
                ("xformers, dense bias", batch, peers.xformers_dense),
                ("flash-attn, per segment", batch, peers.flash_segments),
            )
        }
    )
    chosen += found.values()
    if batch.documents.device.type == "cpu":
        chosen.append(peers.products_alone(case.seq_len, CPU_DOCUMENT, inputs))
        areas[chosen[-1].name] = case.seq_len * CPU_DOCUMENT
    elif case.image_tokens == IMAGES[0] and not case.hidden:
        causal = TransfusionMask.causal(case.seq_len, device=batch.documents.device)
        check = checker(inputs, causal)
        for backend in CEILINGS:
            chosen.append(peers.sdpa_causal(backend, inputs, check(PEER_FACTOR)))
            areas[chosen[-1].name] = causal.area().item()
    return chosen, others, areas


def free_bytes() -> float:
    """Of the CUDA device's memory; a CPU's is not asked for."""
    if not torch.cuda.is_available():
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def run_case(case: Case, report: Report, seconds: float, device: str = "cuda") -> None:
    """Measure one configuration, and record and print a row per contender."""
    torch._dynamo.reset()  # every shape compiles anew, so that no limit on recompilation sends a peer to its slow path
    if device == "cpu":
        batch, dtype = even_batch(case.seq_len, CPU_DOCUMENT, case.image_tokens), torch.float32
    else:
        batch, dtype = packed_batch(case.seq_len, case.image_tokens, device=device, hidden=case.hidden), torch.bfloat16
    inputs = random_inputs(case, device, dtype)
    area, peak = mask_builder(batch)().area().item(), peak_tflops(report.environment["device"])
    chosen, others, areas = contenders(case, batch, inputs)

    def record(result: Result) -> dict:
        own_area = areas.get(result.name, area)
        medians = {phase: times["p50"] for phase, times in result.milliseconds.items()}
        rates = {
            phase: count / medians[phase] / 1e9
            for phase, count in flops(own_area, case.heads, case.head_dim).items()
            if phase in medians
        }
        return report.record(
            {
                **case._asdict(),
                "dtype": str(dtype).removeprefix("torch."),
                "area": own_area,
                "mask": "another" if result.name in areas else "transfusion",
            },
            result,
            sum_ms=sum(medians.values()) if medians else None,
            tflops=rates or None,
            percent_of_peak={phase: 100 * rate / peak for phase, rate in rates.items()} if peak and rates else None,
        )

    found = measure(chosen, device=device, seconds=seconds, record=record, **report.limits)
    print(table([record(result) for result in found + others]), flush=True)


def table(rows: list[dict]) -> str:
    """One line per row: milliseconds (p50), TFLOP/s, MiB, or the error, or why it was left out."""
    lines = []
    for row in rows:
        image = f"{row['image_tokens']:<4}{' hidden' * row['hidden']}"
        shape = f"{row['seq_len']:6} D{row['head_dim']:<3} {row['heads']}:{row['kv_heads']:<2} img {image}"
        head = f"{shape} {row['contender'][:46]:46}"
        if not row["milliseconds"]:
            lines.append(f"{head} {(row['error'] or row['left_out'] or 'no numbers').splitlines()[0][:90]}")
        else:
            p50 = {phase: times["p50"] for phase, times in row["milliseconds"].items()}
            rates = "/".join(f"{rate:4.0f}" if rate >= 1 else f"{rate:.3f}" for rate in row["tflops"].values())
            memory = f" {row['peak_bytes'] / 2**20:7.0f} MiB" if row["peak_bytes"] else ""
            lines.append(
                f"{head} build {p50.get('build', 0):7.3f} fwd {p50['forward']:8.3f} bwd {p50.get('backward', 0):8.3f} "
                f"sum {row['sum_ms']:8.3f} ms  {rates} TFLOP/s{memory}{remark(row['timing'])}"
            )
    return "\n".join(lines)


def plot(report: Report, out: Path) -> None:
    """Draw forward and backward TFLOP/s against length, one picture per head dim, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for dim in HEAD_DIMS:
        figure, axes = pyplot.subplots(2, len(HEADS), figsize=(13, 8), squeeze=False)
        for column, (heads, kv_heads) in enumerate(HEADS):
            rows = [
                r
                for r in report.rows
                if (r["head_dim"], r["heads"], r["image_tokens"]) == (dim, heads, IMAGES[0])
                and not r["hidden"]
                and r["tflops"]
            ]
            for axis, phase in zip(axes[:, column], ("forward", "backward")):
                for name in dict.fromkeys(r["contender"] for r in rows):
                    points = sorted((r["seq_len"], r["tflops"][phase]) for r in rows if r["contender"] == name)
                    axis.plot(*zip(*points), "--" if "another mask" in name else "-", marker="o", label=name)
                axis.set(
                    xscale="log",
                    xlabel="tokens",
                    ylabel="TFLOP/s over visible pairs",
                    title=f"{phase}, D {dim}, heads {heads}:{kv_heads}",
                )
                axis.set_xscale("log", base=2)
        if axes[0, 0].lines:
            axes[0, 0].legend(fontsize=7)
        figure.suptitle(report.environment["device"])
        figure.tight_layout()
        figure.savefig(out / f"attention_d{dim}.png", dpi=110)
        pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the grid, or with `--cpu` `cpu_cases`."""

    def measure_case(case: Case | mask_benchmark.Case, report: Report, device: str) -> None:
        if isinstance(case, mask_benchmark.Case):
            mask_benchmark.run_case(case, report)
        else:
            run_case(case, report, 1.0, device)

    return run_command(
        "attention", __doc__, arguments, cases=cases, cpu_cases=cpu_cases, measure_case=measure_case,
        settings={"timing": "interleaved; on CUDA L2 flushed before each phase, on the CPU wall time, nothing flushed",
                  "cpu_image_tokens": mask_benchmark.IMAGE},
        quick="three lengths, images of 256 tokens", finish=plot)


if __name__ == "__main__":
    raise SystemExit(main())
