"""A training step on several processes: milliseconds, tokens/s and memory of each layout that `--parallel` names.

    torchrun --nproc-per-node N -m benchmarks.train_processes --out DIR [--quick] [--cpu]        N = 1: without torchrun

The paper's models, with rows as in benchmarks/train_step.py, take steps of forward, backward and AdamW (learning rate
0) by all N processes together, in every layout that has them do one thing: weights in shards, copies of the weights, or
the tokens of the same rows, gathered and in a ring. A step has the same rows in all layouts, and for any N. On CUDA
layers compute in bfloat16, on the CPU in float32.

Before a layout is timed, its losses and the norm of its gradients on shorter rows, in float32, are those of one process
with the whole model. A step takes as long as it takes the slowest process. Memory is that of the process that needs
most: on CUDA the peak of a step; everywhere what is kept between forward and backward and what a process holds of
weights, gradients and moments. The file gets a row for each layout; those of other N stay in it.
"""
import gc
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.command_line import common_parser, lacks_device, short_commit
from benchmarks.environment import environment
from benchmarks.harness import Result, quantiles
from benchmarks.model_peers import randomize, training_sequence
from benchmarks.report import Report
from benchmarks.train_step import configuration
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import CONTEXT_ATTENTION, Context, Sequence, split_rows
from transfusion.train.parallel import shard, whole
from transfusion.train.processes import ParallelSettings, Processes, start_processes, started

NAME, SEED, TOLERANCE = "train_processes", (5, 7, 0), 1e-4


class Case(NamedTuple):
    """A size of the paper's and the rows of a step."""

    size: str
    rows: int
    seq_len: int


def cases(quick: bool, device: str) -> list[Case]:
    """The grid, those of `quick` first; on the CPU a model that it can time."""
    if device == "cpu":
        return [Case("tiny", 2, 1024)] if quick else [Case("tiny", 2, 1024), Case("tiny", 2, 4096)]
    first = [Case("0.76B", 8, 4096)]
    return first if quick else [*first, Case("1.4B", 8, 4096), Case("0.76B", 8, 32768)]


def layouts(size: int) -> dict[str, ParallelSettings]:
    """What so many processes do together, by name."""
    if size == 1:
        return {"one process": ParallelSettings()}
    contexts = {f"context, {way}": ParallelSettings(context=size, context_by=way) for way in CONTEXT_ATTENTION}
    return {"shard": ParallelSettings(), "replicate": ParallelSettings(replicate=size), **contexts}


class Step:
    """A model in a layout, and this process's part of the step's rows."""

    def __init__(self, case: Case, settings: ParallelSettings, processes: Processes, device: torch.device):
        torch.manual_seed(0)
        self.config, self.processes, self.device = configuration(case), processes, device
        self.context = None
        if processes.context_ranks > 1:
            self.context = Context(processes.context_group, CONTEXT_ATTENTION[settings.context_by])
        self.model = Transfusion(self.config).to(device).train()
        randomize(self.model)

    def split(self, dtype: torch.dtype | None) -> None:
        """Split the weights as the layout says; what layers compute in is `dtype`."""
        if self.processes.mesh is not None:
            shard(self.model, self.processes.mesh, dtype)

    def loss(self, rows: Sequence, alone: bool = False) -> torch.Tensor:
        """This process's part of the mean over all rows, or, with the whole model, that mean."""
        counts, part, times = self._counts(rows), rows, torch.linspace(0.05, 0.95, rows.image_count)
        seed = torch.tensor(SEED)
        if not alone:
            parts = split_rows(rows, self.processes.data_ranks)
            before = sum(x.image_count for x in parts[:self.processes.data_rank])
            part = parts[self.processes.data_rank]
            times, seed[2] = times[before:before + part.image_count], before
            part = part if self.context is None else self.model.share(part, self.context)
        output = self.model(*(x.to(self.device) for x in (part, times, seed)))
        shares = [mine / max(1, count) for mine, count in zip(self._counts(part), counts)]
        return output.text_loss * shares[0] + self.config.diffusion_weight * output.diffusion_loss * shares[1]

    def _counts(self, rows: Sequence) -> tuple[int, int]:
        return len(rows.text_targets), int(rows.drawn.sum())

    def backward(self, rows: Sequence, alone: bool = False) -> tuple[float, float]:
        """The loss of all rows and the norm of its gradients, which are taken away again."""
        loss = self.loss(rows, alone)
        loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), torch.inf))
        self.model.zero_grad()
        total = loss.detach().double()
        if not alone and self.processes.size > 1:
            dist.all_reduce(total)
        return total.item(), norm.item()


def largest(processes: Processes, *numbers: float) -> list[float]:
    """Each number's largest over all processes."""
    found = torch.tensor(numbers, dtype=torch.float64)
    if processes.size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def kept_bytes(step: Step, rows: Sequence) -> int:
    """Bytes of all that autograd keeps between forward and backward, weights apart; a storage counts once."""
    storages: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
          torch.autocast(step.device.type, torch.bfloat16, enabled=step.device.type == "cuda")):  # as the timed steps
        loss = step.loss(rows)
    total = sum(storages.values())
    loss.backward()
    step.model.zero_grad()
    return total


def measure(case: Case, step: Step, seconds: float) -> tuple[Result, dict]:
    """Check the layout, then time its steps; the numbers beside the times."""
    short = training_sequence(step.config, case.rows, min(case.seq_len, 1024), seed=1)
    expected = step.backward(short, alone=True)
    step.split(None)
    found = step.backward(short)
    for name, x, y in zip(("loss", "gradients' norm"), found, expected):
        assert abs(x - y) <= TOLERANCE * abs(y), f"{name}: {x:.8g}, on one process {y:.8g}"

    rows, on_gpu = training_sequence(step.config, case.rows, case.seq_len), step.device.type == "cuda"
    # weights, gradients and two moments
    held = 4 * sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in step.model.parameters())
    kept = kept_bytes(step, rows)
    optimizer = torch.optim.AdamW(step.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    milliseconds, began = [], time.perf_counter()
    while len(milliseconds) < 6 or largest(step.processes, time.perf_counter() - began)[0] < seconds:
        start = time.perf_counter()
        with torch.autocast(step.device.type, torch.bfloat16, enabled=on_gpu):
            loss = step.loss(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        milliseconds += largest(step.processes, 1e3 * (time.perf_counter() - start))
    peak, held, kept = largest(step.processes, torch.cuda.max_memory_allocated() if on_gpu else 0, held, kept)
    times = quantiles(milliseconds[1:])
    result = Result("tfkernels", checked=True, milliseconds={"step": times}, peak_bytes=int(peak) or None)
    return result, {"tokens_per_s": 1e3 * rows.tokens.numel() / times["p50"], "state_bytes": int(held),
                    "kept_bytes": int(kept)}


def line(case: Case, layout: str, size: int, result: Result, numbers: dict) -> str:
    """A row in words."""
    times, memory = result.milliseconds["step"], (result.peak_bytes, numbers["state_bytes"], numbers["kept_bytes"])
    named = zip(("peak", "state", "kept for backward"), memory)
    return (f"{case.size:6} {case.rows} x {case.seq_len:6,} {size} x {layout:18} {times['p50']:8.1f} ms, "
            f"{numbers['tokens_per_s']:9,.0f} tokens/s, "
            + ", ".join(f"{name} {x / 2**20:,.1f} MiB" for name, x in named if x))


def earlier_rows(path: Path, report: Report) -> list[dict]:
    """The rows of `path`, of another number of processes and the same commit.

    Raises:
        SystemExit: they are of another commit.
    """
    earlier = Report.load(path) if path.exists() else report
    commits = [one.environment["commit"] for one in (earlier, report)]
    if commits[0] != commits[1]:
        raise SystemExit(f"benchmarks.{NAME}: {path} holds rows of commit {commits[0]}, and this is {commits[1]}; "
                         "another --out fits")
    return earlier.rows


def main(arguments: list[str] | None = None) -> int:
    """Run the grid in every layout."""
    parser = common_parser(__doc__.splitlines()[0], "the first cases only", seconds=4.0,
                           timed="of each layout of each case")
    parser.add_argument("--cpu", action="store_true", help="small cases on the CPU, with one thread a process")
    given, size = parser.parse_args(arguments), started()
    device = "cpu" if given.cpu else "cuda"
    if device == "cuda" and lacks_device(NAME, cpu=True):
        return 1
    if device == "cpu":
        torch.set_num_threads(1)
    report = Report(NAME, {"timing": "wall time of the slowest process"}, environment(device, given.commit))
    path = Path(given.out) / (f"{NAME}.json" if device == "cuda" else f"{NAME}-cpu-{short_commit(report)}.json")
    report.rows = earlier_rows(path, report)
    for case in cases(given.quick, device):
        for layout, settings in layouts(size).items():
            with start_processes(NAME, settings, device) as processes:
                own = processes.device or torch.device(device)
                result, numbers = measure(case, Step(case, settings, processes, own), given.seconds)
                report.record({**case._asdict(), "processes": size, "layout": layout}, result, **numbers)
                print(line(case, layout, size, result, numbers), flush=True)
                if processes.is_main:
                    report.save(path)
            gc.collect()  # FSDP's hooks and modules hold each other, and so the layout that was, beside the next one
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
