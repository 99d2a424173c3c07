"""Plan a training before it is paid for: `transfusion plan PRESET [--gpus 256] [--gpu H100] [flags of train]`.

It prints parameters, memory on a GPU by kind, operations, bytes and messages of a step, tokens a second and days, and
what does not fit. No data set and no weights are read, and no GPU is needed. Everything is computed from the settings;
that a GPU reaches `mfu` of its peak, the share of operations that a model's mathematics needs, is an assumption.
"""
import textwrap
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch

from transfusion.model.lora import TuneSettings, base_of, trained_table
from transfusion.sequence import Sequence
from transfusion.settings import Count, OneOf, Positive, Range, Share, WholeNumber, check
from transfusion.train.activations import Trace, outline, trace
from transfusion.train.estimates import (
    LAYOUTS,
    Memory,
    Messages,
    Sizes,
    Work,
    memory,
    messages,
    moved,
    rows_on_a_gpu,
    shards,
    sizes,
    split_keys,
    work,
)
from transfusion.train.frozen import narrow_frozen
from transfusion.train.gpus import GPUS
from transfusion.train.plan_model import planned_config, planned_rows
from transfusion.train.transfusion import TrainConfig, check_settings, holds_narrow

GIB, FREE = 2**30, 0.92  # the rest of a card is the driver's, the communication's and lost between blocks
BUDGETS = {"0.5 T": 0.5e12, "2 T": 2e12}
"""Tokens of the paper's runs: its comparisons (section 4.2) and its largest model (section 4.4)."""


@dataclass(frozen=True)
class PlanSettings:
    """What a plan is made for, beside the settings of the training."""

    gpus: Count = 256
    """GPUs in all"""
    gpu: Annotated[str, OneOf(GPUS)] = "H100"
    """kind of GPU"""
    layout: Annotated[str, OneOf(("all", *LAYOUTS))] = "all"
    """replicate: each GPU holds all weights, or each group that splits the tokens of rows (--parallel.context); shard:
    all GPUs share one copy; hybrid: those of a node share one"""
    mfu: Annotated[float, Range(above=0, high=1)] = 0.4
    """share of the dense bfloat16 peak that training is assumed to reach"""
    gpus_per_node: Count = 8
    """GPUs that share fast links"""
    network: Positive = 50.0
    """GB/s between nodes for each GPU, one direction: 50 is a card of 400 Gb/s"""
    image: tuple[Count, Count, Count] = (8, 32, 32)
    """channels, height and width of a picture or its latent"""
    caption: WholeNumber = 64
    """tokens of a picture's caption"""
    text_share: Share = 0.5
    """share of a row's tokens in documents without pictures"""
    text_tokens: Count = 1024
    """tokens of such a document"""


class Layout(NamedTuple):
    """What one layout costs."""

    name: str
    memory: Memory
    messages: Messages
    trace: Trace
    shared_by: int


class Plan(NamedTuple):
    """Everything that the report says."""

    settings: PlanSettings
    config: TrainConfig
    table: str
    sizes: Sizes
    row: Sequence
    visible: int
    """pairs of query and key in a row"""
    work: dict[str, Work]
    """of a step"""
    layouts: list[Layout]

    @property
    def split_by(self) -> int:
        """GPUs that split the tokens of the same rows."""
        return self.config.parallel.context

    @property
    def groups(self) -> int:
        """GPUs that take rows of their own, or groups of those that split them."""
        return self.settings.gpus // self.split_by

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch on one GPU, or on a group."""
        return rows_on_a_gpu(self.config.optim.rows, self.groups, self.config.optim.accumulate)

    @property
    def seconds(self) -> float:
        """Of a step, at the assumed share of the peak."""
        busy = min(self.groups, self.config.optim.rows) * self.split_by
        return self.operations / (busy * GPUS[self.settings.gpu].teraflops * 1e12 * self.settings.mfu)

    @property
    def operations(self) -> float:
        """Of a step, forward and backward."""
        return sum(part.step for part in self.work.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.optim.rows * self.config.optim.seq_len


def plan(config: TrainConfig, settings: PlanSettings) -> Plan:
    """Compute a plan.

    Raises:
        ValueError: settings that do not fit, or not each other.
    """
    check("plan", settings)
    check_settings("plan", config)
    if settings.gpus > settings.gpus_per_node and settings.gpus % settings.gpus_per_node:
        raise ValueError(f"plan: gpus is {settings.gpus} and gpus_per_node {settings.gpus_per_node}; whole nodes fit")
    optim, gpu, split_by = config.optim, GPUS[settings.gpu], config.parallel.context
    for gpus in (settings.gpus, min(settings.gpus, settings.gpus_per_node)):
        if gpus % split_by and (split_by % gpus or gpus == settings.gpus):
            raise ValueError(f"plan: parallel.context is {split_by}, gpus {settings.gpus} and gpus_per_node "
                             f"{settings.gpus_per_node}; a divisor of gpus fits that divides gpus_per_node or is a "
                             "multiple of it")
    model_config, clean = planned_config(config, settings.image), getattr(config.data, "context", "") == "clean"
    one, two = (planned_rows(model_config, rows, optim.seq_len, caption=settings.caption,
                             text_share=settings.text_share, text_tokens=settings.text_tokens, clean=clean)
                for rows in (1, 2))
    model, plain = (outline(model_config, tune) for tune in (config.tune, TuneSettings(frozen=config.tune.frozen)))
    narrow = holds_narrow(config, settings.gpus)
    if narrow:
        narrow_frozen(base_of(model))
    count, rows = sizes(model), rows_on_a_gpu(optim.rows, settings.gpus // split_by, optim.accumulate)
    shared_by = {name: shards(name, settings.gpus, settings.gpus_per_node, split_by) for name in _names(settings)}
    whole = split_keys(model_config.text_config.get_text_config(), config.parallel.context_by, split_by,
                       rows * optim.seq_len, optim.accumulate)
    traces = {}
    for shared in {n > 1 for n in shared_by.values()}:
        dtype, autocast = (torch.bfloat16, False) if shared else (torch.float32, config.autocast)
        traces[shared] = trace(model_config, config.tune, one, two, dtype=dtype, autocast=autocast, narrow=narrow)
    layouts = []
    for name, n in shared_by.items():
        sent = messages(n, count, settings.gpus, settings.gpus_per_node, optim.accumulate, gpu.link * 1e9,
                        settings.network * 1e9, split_by, whole.sent)
        held = memory(count, n, traces[n > 1].activations(rows / split_by), whole.held, averaged=optim.ema > 0)
        layouts.append(Layout(name, held, sent, traces[n > 1], n))
    step = {name: Work(*(optim.rows * x for x in part)) for name, part in work(model, plain, one).items()}
    return Plan(settings, config, trained_table(model), count, one, int(one.mask().area().sum()), step, layouts)


def print_plan(config: TrainConfig, settings: PlanSettings) -> None:
    """Run `transfusion plan`."""
    print(report(plan(config, settings)))


def _names(settings: PlanSettings) -> list[str]:
    if settings.layout != "all":
        return [settings.layout]
    return list(LAYOUTS) if settings.gpus > settings.gpus_per_node else list(LAYOUTS[:min(settings.gpus, 2)])


def report(made: Plan) -> str:
    """Return a plan in words and tables, in lines of at most 120 characters."""
    parts = [_head(made), made.table, _memory(made), _work(made), _messages(made), _time(made),
             "\n".join(["advice", *(_wrapped(f"- {line}", "  ") for line in advice(made))])]
    return "\n\n".join(parts)


def _wrapped(line: str, indent: str = "  ") -> str:
    return textwrap.fill(line, 118, subsequent_indent=indent)


def _table(title: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = [f"{title:<44}" + "".join(f"{name:>14}" for name in columns)]
    lines += [(f"  {name:<42}" + "".join(f"{x:>14}" for x in values)).rstrip() for name, values in rows]
    return "\n".join(lines)


def _head(made: Plan) -> str:
    settings, optim, gpu = made.settings, made.config.optim, GPUS[made.settings.gpu]
    pictures, tokens = made.row.image_count, made.row.tokens.numel()
    micro = f"{optim.accumulate} micro-batches" if optim.accumulate > 1 else "1 micro-batch"
    lines = [
        f"{settings.gpus} x {settings.gpu}: {gpu.teraflops:,.0f} TFLOP/s in dense bfloat16, {gpu.memory} GiB at "
        f"{gpu.bandwidth:,.0f} GB/s, links of {gpu.link:,.0f} GB/s. Source: {gpu.source}",
        f"a step: {optim.rows} rows of {optim.seq_len:,} tokens in {micro}, at most {made.micro_rows} rows on "
        + ("a GPU" if made.split_by == 1 else f"{made.split_by} GPUs, which split their tokens,") + " at once",
        f"a row: {pictures} pictures of {len(made.row.patches) // pictures} patches behind captions of "
        f"{settings.caption} tokens, {len(made.row.text_targets):,} text targets, "
        f"{200 * made.visible / tokens**2:.0f} % of a causal row's pairs visible"]
    return "\n".join(map(_wrapped, lines))


def _memory(made: Plan) -> str:
    kinds = [
        (f"weights, float32{', frozen layers bfloat16' if made.sizes.narrow else ''}", lambda m: m.weights),
        ("gradients, float32", lambda m: m.gradients),
        ("AdamW's moments, float32", lambda m: m.moments),
        *([("averaged weights, float32", lambda m: m.averages)] if made.config.optim.ema else []),
        ("weights in bfloat16 for computing", lambda m: m.gathered),
        ("activations, nothing computed again", lambda m: m.activations.everything),
        ("activations, selective checkpointing", lambda m: m.activations.selective),
        ("activations, full checkpointing", lambda m: m.activations.full),
        ("more at the beginning of backward", lambda m: m.activations.working)]
    if made.split_by > 1:
        kinds.append(("keys and values of split rows", lambda m: m.keys))
    kinds += [(f"peak, {name}", lambda m, kind=kind: m.peak(getattr(m.activations, kind), made.config.optim.accumulate))
              for name, kind in (("nothing computed again", "everything"), ("selective checkpointing", "selective"),
                                 ("full checkpointing", "full"))]
    limit = FREE * GPUS[made.settings.gpu].memory * GIB
    found = [(name, [of(layout.memory) for layout in made.layouts]) for name, of in kinds]
    unit, size = _unit(max(max(values) for _, values in found))
    rows = [(name, [f"{x / size:,.2f}" + ("" if name[:4] != "peak" else " !" if x > limit else "  ") for x in values])
            for name, values in found]
    title = f"{unit} on a GPU (! more than {limit / GIB:.0f} GiB)"
    return _table(title, _columns(made), rows) + "\n" + _wrapped(_logits(made))


def _unit(largest: float) -> tuple[str, int]:
    return ("GiB", GIB) if largest >= GIB / 4 else ("MiB", 2**20)


def _columns(made: Plan) -> list[str]:
    return ["one GPU"] if made.settings.gpus == 1 else [layout.name for layout in made.layouts]


def _logits(made: Plan) -> str:
    if made.config.tune.trained == "all":
        return "  logits are never stored: those of some rows at a time become losses and gradients"
    return ("  logits of text targets are stored and count among the activations: an adapter stands around the rows of "
            "BOI and EOI")


def _work(made: Plan) -> str:
    parts = [*made.work.items(), ("all", Work(*(sum(x) for x in zip(*made.work.values()))))]
    size, unit = (1e12, "10^12") if made.operations > 1e12 else (1e9, "10^9")
    rows = [(name, [f"{x / size:,.2f}" for x in part]) for name, part in parts]
    gpu = GPUS[made.settings.gpu]
    traffic = moved(made.sizes, made.layouts[0].memory.activations.everything, made.config.optim.accumulate)
    name, size = _unit(traffic)
    words = (f"  bytes that a GPU with all weights moves in a step: {traffic / size:,.1f} {name} at least, "
             f"{traffic / gpu.bandwidth / 1e9:,.3g} s; its operations: {made.seconds:,.3g} s at "
             f"{made.settings.mfu:.0%} of the peak")
    return _table(f"operations of a step, {unit}", ["forward", "with backward"], rows) + "\n" + _wrapped(words)


def _messages(made: Plan) -> str:
    if made.settings.gpus == 1:
        return "nothing is sent: one GPU"
    sent = [layout.messages for layout in made.layouts]
    unit, size = _unit(max(max(m.gathered, m.scattered, m.reduced, m.keys) for m in sent))
    kinds = [("all-gather of weights, bfloat16", lambda m: f"{m.gathered / size:,.2f}"),
             ("reduce-scatter of gradients, float32", lambda m: f"{m.scattered / size:,.2f}"),
             ("all-reduce of gradients, float32", lambda m: f"{m.reduced / size:,.2f}"),
             *([("keys and values of split rows", lambda m: f"{m.keys / size:,.2f}")] if made.split_by > 1 else []),
             ("seconds at the rate of links and network", lambda m: f"{m.seconds:,.3g}"),
             ("of the seconds that computing takes", lambda m: f"{m.seconds / made.seconds:,.0%}")]
    rows = [(name, [of(m) for m in sent]) for name, of in kinds]
    return _table(f"{unit} sent by a GPU in a step", _columns(made), rows)


def _time(made: Plan) -> str:
    rate = made.tokens / made.seconds
    days = ", ".join(f"{name} tokens in {budget / rate / 86_400:,.1f} days" for name, budget in BUDGETS.items())
    return _wrapped(
        f"at {made.settings.mfu:.0%} of the peak, an assumption: {made.seconds:,.3g} s a step, {rate:,.0f} tokens/s, "
        f"{days}; the {made.config.optim.steps:,} steps of {made.tokens:,} tokens in "
        f"{made.config.optim.steps * made.seconds / 86_400:,.2f} days")


def advice(made: Plan) -> list[str]:
    """Say what fits of each layout, what would make the others fit, and what would wait."""
    settings, optim, groups, lines = made.settings, made.config.optim, made.groups, []
    if optim.rows < groups:
        each = "each" if made.split_by == 1 else f"each {made.split_by}"
        lines.append(f"{(groups - optim.rows) * made.split_by} GPUs have nothing to do: optim.rows is {optim.rows}; "
                     f"--optim.rows {groups} gives {each} a row")
    elif optim.rows % (groups * optim.accumulate):
        over = "" if made.split_by == 1 else " over parallel.context"
        lines.append(f"rows are shared unevenly: optim.rows is {optim.rows}; a multiple of "
                     f"{groups * optim.accumulate} (GPUs{over} times optim.accumulate) fits")
    for layout, column in zip(made.layouts, _columns(made)):
        lines.append(f"{column}: {_fit(made, layout)}")
        share = layout.messages.seconds / made.seconds
        if share > 1:
            lines.append(f"{column}: sending takes {share:.1f} times as long as computing and cannot be hidden behind "
                         "it; more tokens on a GPU in a step, fewer micro-batches or a faster network help")
    if not made.config.autocast and settings.gpus == 1:
        lines.append("products are in float32 and never reach this share of the peak; --autocast makes them bfloat16")
    return lines


def _fit(made: Plan, layout: Layout) -> str:
    """What of a layout fits on its GPU, or the next thing to do."""
    optim, limit = made.config.optim, FREE * GPUS[made.settings.gpu].memory * GIB
    ways = {"everything": "fits as it is", "selective": "fits with selective checkpointing, --recompute selective",
            "full": "fits with full checkpointing, --recompute full"}
    for kind, words in ways.items():
        if layout.memory.peak(getattr(layout.memory.activations, kind), optim.accumulate) <= limit:
            return words
    rows = made.micro_rows
    while rows > 1:
        rows = (rows + 1) // 2
        smaller = layout.memory._replace(activations=layout.trace.activations(rows / made.split_by),
                                         keys=layout.memory.keys * rows / made.micro_rows)
        for kind, words in (("everything", ""), ("full", " --recompute full")):
            if smaller.peak(getattr(smaller.activations, kind), 2) <= limit:
                parts = -(-optim.rows // (rows * min(made.groups, optim.rows)))
                return f"does not fit; --optim.accumulate {parts}{words} makes it fit, {rows} rows at a time"
    held = layout.memory.weights + layout.memory.gradients + layout.memory.moments + layout.memory.averages
    if held > limit and layout.shared_by < made.settings.gpus:
        return f"does not fit: what is kept of the model takes {held / GIB:,.0f} GiB; share it among more GPUs"
    if held > limit:
        return (f"does not fit: what is kept of the model takes {held / GIB:,.0f} GiB on each GPU; more GPUs to share "
                "it among, larger ones, a smaller model or --tune.trained lora help")
    return ("does not fit, not even a row at a time with full checkpointing; shorter rows (--optim.seq-len), rows that "
            "GPUs split (--parallel.context), layouts that share weights, larger GPUs or --tune.trained lora help")
