"""A training step of the paper's models: milliseconds, tokens/s, model FLOP utilisation and memory, beside its peers.

    python -m benchmarks.train_step --out DIR [--quick] [--cpu]

Rows of 4,096 tokens, half of them patches (latents of 8x32x32 in 256 patches), go through forward, backward and
AdamW. Weights, gradients and moments are float32 and computation is in bfloat16 under autocast, as with `transfusion
train --autocast`. Masks are made inside the step. Contenders are ours, eager and compiled; the same weights in plain
PyTorch, with SDPA and a dense mask, and with FlexAttention and its block mask; and transfusion-pytorch of equal width
and depth, which has parameters that ours has not and reads a row as one document.

The learning rate is 0, so that all see the same weights. Before a contender is timed, its loss and all its gradients
together pass the tests' accuracy rule against a float32 step (float64 on a CPU). The loss of transfusion-pytorch is
another, so only that its loss and gradients are finite is asked. Utilisation counts three times the forward's matrix
products (visible pairs, logits of text targets alone) against the device's dense bf16 peak. Memory is weights,
moments and what the step needs at most. A step is timed as a user waits for it: its phases one behind the other, with
the host's time. Steps of several processes are in benchmarks/train_processes.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import LlamaConfig

import tfkernels.integrations.transformers as integration
from benchmarks.command_line import run_command
from benchmarks.environment import peak_tflops
from benchmarks.harness import Contender, Result, measure, present
from benchmarks.model_peers import (
    block_mask,
    dense_mask,
    peer_samples,
    plain_loss,
    randomize,
    training_sequence,
    transfusion_pytorch,
)
from benchmarks.report import Report
from tfkernels.patches import noise_reference
from transfusion.model.config import TransfusionConfig
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.paper import PAPER, paper
from transfusion.recipes.studies.measure import flops
from transfusion.sequence import Sequence

OURS, COMPILED, DENSE, FLEX, PEER = (
    "tfkernels",
    "tfkernels, torch.compile",
    "SDPA, dense mask",
    "FlexAttention, block mask",
    "transfusion-pytorch",
)
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0
ROUNDING = 1e-6  # of a float32 loss
SEED = (5, 7)  # of our noise
SMALL = {"tiny": (64, 2, 16), "small": (256, 6, 32)}
"""width, layers and a latent's side of models that a CPU can time"""


class Case(NamedTuple):
    """A size of the paper's and the rows in a step."""

    size: str
    rows: int
    seq_len: int = 4096


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    first = [Case("0.16B", 8), Case("0.76B", 4), Case("1.4B", 2)]
    return first if quick else [*first, Case("1.4B", 4), Case("0.76B", 8), Case("0.16B", 16)]


def configuration(case: Case) -> TransfusionConfig:
    """The paper's model, or one of `SMALL`."""
    if case.size in PAPER:
        return paper(case.size)
    width, layers, side = SMALL[case.size]
    text_config = LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=4096,
    )
    return TransfusionConfig(
        text_config=text_config,
        image_channels=8,
        image_size=(side, side),
        image_layers="linear",
        objective="eps",
        boi_token_id=256,
        eoi_token_id=257,
    )


class Step:
    """A loss as phases of a training step: forward, backward, optimizer."""

    def __init__(self, loss, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: str):
        self.loss, self.model, self.optimizer, self.device = loss, model, optimizer, device

    def forward(self, state: dict) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            state["loss"] = self.loss()

    def backward(self, state: dict) -> None:
        state["loss"].backward()

    def update(self, state: dict) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def contender(self, name: str, check) -> Contender:
        """The step by name."""
        return Contender(
            name, {"forward": self.forward, "backward": self.backward, "optimizer": self.update}, check, wall=True
        )


def distance(model: torch.nn.Module, loss, exact: tuple[float, list], device: str) -> tuple[float, float]:
    """Relative errors against `exact` of a loss, as a step computes it, and of all its gradients together.

    No gradient is left on the model.
    """
    state, step = {}, Step(loss, model, None, device)
    step.forward(state)
    step.backward(state)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    wrong = sum((x.to(y.dtype) - y).square().sum() for x, y in zip(found, exact[1]))
    right = sum(y.square().sum() for y in exact[1])
    return abs(state["loss"].item() - exact[0]) / abs(exact[0]), (wrong / right).sqrt().item()


def exact_step(model: Transfusion, loss, wide: torch.dtype) -> tuple[float, list]:
    """Loss and gradients of one step in `wide`; the model is as before."""
    own = next(model.parameters()).dtype
    model.to(wide)
    value = loss()
    gradients = torch.autograd.grad(value, list(model.parameters()))
    model.to(own)
    return value.item(), list(gradients)


def losses(
    model: Transfusion, sequence: Sequence, device: str, eps: torch.Tensor | None = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """The loss of a batch by everything that runs on one set of weights.

    Plain PyTorch draws its noise where `eps` is not given.
    """
    times, seed = torch.linspace(0.05, 0.95, sequence.image_count, device=device), torch.tensor(SEED, device=device)

    def ours(run=model):
        model.backbone.decoder.config._attn_implementation = integration.NAME
        return run(sequence, times, seed).loss

    found = {OURS: ours, DENSE: lambda: plain_loss(model, sequence, times, dense_mask(sequence), "sdpa", eps)}
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        create, compiled = torch.compile(create_block_mask), torch.compile(model)
        found[FLEX] = lambda: plain_loss(model, sequence, times, block_mask(sequence, create), "flex_attention", eps)
        found[COMPILED] = lambda: ours(compiled)
    return found


def contenders(case: Case, device: str) -> tuple[list[Contender], Transfusion]:
    """Everything that runs on one set of weights, and the model."""
    config = configuration(case)
    torch.manual_seed(0)
    model = Transfusion(config).to(device).train()
    randomize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    timed = losses(model, training_sequence(config, case.rows, case.seq_len).to(device), device)

    sequence = training_sequence(config, 1, min(case.seq_len, 1024), seed=1).to(device)
    eps = noise_reference(
        torch.tensor(SEED, device=device), sequence.layout.offsets, sequence.image_count, *sequence.patches.shape
    )[1]
    checked, wide = losses(model, sequence, device, eps), torch.float32 if device == "cuda" else torch.float64
    exact = exact_step(model, checked[DENSE], wide)
    allowed = distance(model, checked[DENSE], exact, device)

    def check(name):
        def assert_right(state):
            for what, error, bound in zip(
                ("loss", "gradients"), distance(model, checked[name], exact, device), allowed
            ):
                factor = OUR_FACTOR if name in (OURS, COMPILED) else PEER_FACTOR
                assert error <= factor * bound + ROUNDING, (
                    f"{what}: relative error {error:.2e}, plain PyTorch's {bound:.2e}"
                )

        return assert_right

    return [Step(timed[name], model, optimizer, device).contender(name, check(name)) for name in timed], model


def peer_contenders(case: Case, device: str) -> tuple[list[Contender], torch.nn.Module]:
    """transfusion-pytorch on the same rows; with its FlexAttention on CUDA, whose dense scores would not fit."""
    config = configuration(case)
    model = transfusion_pytorch(config, device, flex=device == "cuda").train()
    samples = peer_samples(training_sequence(config, case.rows, case.seq_len).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def check(state):
        loss = model(samples)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        assert torch.isfinite(loss) and gradients and all(torch.isfinite(g).all() for g in gradients)

    return [Step(lambda: model(samples), model, optimizer, device).contender(PEER, check)], model


def model_size(model: torch.nn.Module) -> dict[str, int]:
    """Parameters, and bytes of them and of AdamW's two moments."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(3 * p.numel() * p.element_size() for p in model.parameters()),
    }


def run_case(case: Case, report: Report, device: str, seconds: float) -> None:
    """Measure one case and record a row per contender."""
    torch._dynamo.reset()
    chosen, model = contenders(case, device)
    sequence = training_sequence(configuration(case), case.rows, case.seq_len).to(device)
    operations = 3 * sum(flops(model, sequence).values())
    counts = {
        "tokens": sequence.tokens.numel(),
        "patches": len(sequence.patches),
        "text_targets": len(sequence.text_targets),
        "operations": operations,
    }
    peak = peak_tflops(report.environment["device"])

    def record(result: Result, size: dict | None) -> dict:
        step = sum(times["p50"] for times in result.milliseconds.values()) or None
        rate = operations / step / 1e9 if step and result.name != PEER else None
        return report.record(
            {**case._asdict(), **counts, "parameters": size and size["parameters"]},
            result,
            step_ms=step,
            tokens_per_s=step and 1e3 * counts["tokens"] / step,
            tflops=rate,
            mfu=100 * rate / peak if rate and peak else None,
            memory_bytes=result.peak_bytes + size["bytes"] if step and result.peak_bytes else None,
        )

    def compete(chosen: list[Contender], size: dict, seconds: float) -> None:
        for result in measure(
            chosen,
            device=device,
            seconds=seconds,
            warmup=1,
            record=lambda result: record(result, size),
            **report.limits,
        ):
            print(line(case, record(result, size)), flush=True)

    compete(chosen, model_size(model), seconds)
    chosen.clear()
    del model
    peer, others = present({PEER: lambda: peer_contenders(case, device)})
    for result in others:
        print(line(case, record(result, None)), flush=True)
    for chosen, model in peer.values():
        compete(chosen, model_size(model), seconds / 2)


def line(case: Case, row: dict) -> str:
    """A row in words."""
    head = f"{case.size:6} {case.rows:2} x {case.seq_len} {row['contender']:26}"
    if not row["milliseconds"]:
        return f"{head} {(row['error'] or row['left_out'] or 'no numbers').splitlines()[0][:200]}"
    parts = ", ".join(f"{phase} {times['p50']:8.1f}" for phase, times in row["milliseconds"].items())
    numbers = [
        ("tokens_per_s", "{:9,.0f} tokens/s", 1),
        ("mfu", "MFU {:4.1f} %", 1),
        ("memory_bytes", "{:5.1f} GiB", 2**30),
    ]
    return ", ".join(
        [f"{head} {parts} ms", *(form.format(row[name] / unit) for name, form, unit in numbers if row[name])]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    timing = "interleaved, wall time; transfusion-pytorch apart, for memory"
    return run_command(
        "train_step", __doc__, arguments, settings={"timing": timing}, cases=cases,
        cpu_cases=lambda quick: [Case("tiny", 2, 256) if quick else Case("small", 1, 2048)],
        measure_case=functools.partial(run_case, seconds=4.0))


if __name__ == "__main__":
    raise SystemExit(main())
