"""Sampling: seconds and images/s of drawing 256 patches under guidance, and text tokens/s, beside the peers'.

    python -m benchmarks.sample --out DIR [--quick] [--cpu]

Models have the paper's sizes and random weights in bfloat16; prompts have equal length; the guidance scale is 5.

Drawing: ours; ours with the denoising step as a CUDA graph; the same attention without a cache, where the whole
sequence runs at every step; and transfusion-pytorch's `sample_many` at equal width and depth, with half as many
steps, because its midpoint rule calls the model twice a step. Writing: ours, and transformers' `generate` of the same
decoder with SDPA.

A denoising step's time is what one draw takes longer than a draw of one step, per step. Its roofline is the larger of
two times: its matrix products at the dense bf16 peak, and its bytes (the weights and the cache's keys and values,
once) at the bandwidth of a device copy measured in the same run. A contender that draws is timed after a draw of two
steps passes the tests' accuracy rule against float32 (float64 on a CPU), and one that writes after eight tokens equal
those of `generate` there. Of transfusion-pytorch, another model, whose float32 weights run under autocast, only
finite images are asked. All times are those that a user waits for, the host's included.
"""

import contextlib
import functools
import importlib
import io
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import tfkernels.integrations.transformers as integration
from benchmarks.bandwidth import copy_contender
from benchmarks.command_line import run_command
from benchmarks.environment import peak_tflops
from benchmarks.harness import Contender, Result, measure, present
from benchmarks.model_peers import randomize, transfusion_pytorch
from benchmarks.report import Report
from benchmarks.train_step import configuration
from tests.compare import assert_as_accurate
from tfkernels import unpatchify
from transfusion.diffusion.solvers import make_solver
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Image, Text, encode, lay_out
from transfusion.sequence.tokenizer import BOS, EOS, PAD

OURS, GRAPH, UNCACHED, PEER, GENERATE = (
    "tfkernels",
    "tfkernels, CUDA graph",
    "without a prefix cache",
    "transfusion-pytorch",
    "transformers generate, SDPA",
)
GUIDANCE, CHECKED_STEPS, CHECKED_TOKENS = 5.0, 2, 8
OUR_FACTOR, PEER_FACTOR = 2.0, 4.0


class Case(NamedTuple):
    """`batch` prompts of `prompt` tokens, each drawn in `count` steps or continued by `count` tokens."""

    task: str
    size: str
    batch: int
    prompt: int
    count: int


def cases(quick: bool) -> list[Case]:
    """The grid, those of `quick` first."""
    first = [
        Case("draw", "0.76B", 1, 16, 50),
        Case("draw", "0.76B", 16, 256, 50),
        Case("write", "0.76B", 1, 256, 64),
        Case("write", "0.76B", 16, 256, 64),
    ]
    grid = [
        Case("draw", size, batch, prompt, steps)
        for size in ("0.76B", "1.4B")
        for steps in (50, 250)
        for batch in (1, 16)
        for prompt in (16, 256, 2048)
    ]
    grid += [
        Case("write", size, batch, prompt, 256)
        for size in ("0.76B", "1.4B")
        for batch in (1, 16)
        for prompt in (16, 2048)
    ]
    return first if quick else first + [c for c in grid if c not in first]


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One word, "w5", for each id behind PAD, BOS and EOS, so that a prompt has as many tokens as words."""
    words = [PAD, BOS, EOS, *(f"w{i}" for i in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def prompts(case: Case, boi: int) -> list[str]:
    """Random words that are no special tokens."""
    ids = torch.randint(
        5, boi, (case.batch, case.prompt - 2), generator=torch.Generator().manual_seed(0)
    )  # BOS and BOI come to them
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def build(case: Case, device: str, dtype: torch.dtype) -> Transfusion:
    """The model with random weights, the same each time.

    EOS's logit is 0, below the best of all others, so that no text ends early.
    """
    config = configuration(case)
    torch.manual_seed(0)
    model = Transfusion(config, word_tokenizer(config.text_config.vocab_size)).to(device).eval()
    randomize(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[model.tokenizer.eos_token_id] = 0
    return cast(model, dtype)


def cast(model: Transfusion, dtype: torch.dtype) -> Transfusion:
    """Weights in `dtype`; tables such as the rotation's frequencies stay as they are."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


@torch.inference_mode()
def draw_uncached(model: Transfusion, texts: list[str], steps: int, seed: int = 0) -> list[Image]:
    """`model.draw(texts, steps=steps, guidance=GUIDANCE, seed=seed)` without a cache.

    The whole sequence runs at every step, once with the text and once without.
    """
    config = model.config
    height, width = config.image_size
    count, blank = height * width // config.patch_size**2, Image(torch.zeros(config.image_channels, height, width))

    def laid_out(parts):
        documents = [encode([*p, blank], model.tokenizer, config, end=False) for p in parts]
        return lay_out([[d] for d in documents], max(len(d.tokens) for d in documents), config.patch_dim, left=True).to(
            model.device
        )

    contexts = [laid_out([[Text(text)] for text in given]) for given in (texts, [""] * len(texts))]
    sampler = make_solver("ddim", model.objective, steps, count, config.time_shift_tokens)
    x = torch.stack(
        [
            torch.randn(count, config.patch_dim, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(texts))
        ]
    )
    x = sampler.start(x).to(model.device)
    for number, t in enumerate(sampler.times.tolist()):
        found = []
        for sequence in contexts:
            condition = model.timestep(torch.full((len(texts),), t, device=x.device))
            embedded, skips = model.embed(sequence, x.flatten(0, 1).to(condition.dtype), condition)
            positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
            hidden = model.backbone(embedded, positions, sequence.mask(), condition, sequence.modality).flatten(0, 1)
            found.append(
                model.image_head(hidden[sequence.patch_places], condition, sequence.layout, skips).view_as(x).float()
            )
        x = sampler.advance(x, torch.lerp(found[1], found[0], GUIDANCE), number)
    return [Image(image) for image in unpatchify(x.cpu().flatten(0, 1), config.patch_size, height, width)]


def latents(images: list[Image]) -> Tensor:
    """Images as one tensor."""
    return torch.stack([image.latent for image in images])


def draw_contenders(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Contender], Transfusion]:
    """Everything that draws with one set of weights, and the model."""
    model = build(case, device, dtype)
    texts = prompts(case, model.config.boi_token_id)
    ways = {
        OURS: lambda texts, steps: model.draw(texts, steps=steps, guidance=GUIDANCE),
        GRAPH: lambda texts, steps: model.draw(texts, steps=steps, guidance=GUIDANCE, cuda_graph=True),
        UNCACHED: lambda texts, steps: draw_uncached(model, texts, steps),
    }
    if device == "cpu":
        del ways[GRAPH]
    few, wide = texts[:2], torch.float32 if device == "cuda" else torch.float64
    rounded = latents(draw_uncached(model, few, CHECKED_STEPS))
    cast(model, wide)
    exact = latents(draw_uncached(model, few, CHECKED_STEPS)).double()
    cast(model, dtype)

    def contender(name, draw):
        def check(state):
            assert_as_accurate(
                "images",
                latents(draw(few, CHECKED_STEPS)),
                rounded,
                exact,
                exact.abs().amax().expand_as(exact),
                factor=PEER_FACTOR if name == UNCACHED else OUR_FACTOR,
            )

        return Contender(
            name,
            {"one step": lambda state: draw(texts, 1), "draw": lambda state: draw(texts, case.count)},
            check,
            wall=True,
        )

    return [contender(name, draw) for name, draw in ways.items()], model


def peer_contender(case: Case, device: str, dtype: torch.dtype) -> Contender:
    """transfusion-pytorch; ModuleNotFoundError where it is not installed.

    Its sampler makes float32 tensors of its own, so that weights in another dtype do not fit: `dtype` is autocast's.
    """
    config = configuration(case)
    model = transfusion_pytorch(config, device, flex=False).eval()
    importlib.import_module("loguru").logger.disable("transfusion_pytorch")
    count = config.image_size[0] * config.image_size[1] // config.patch_size**2
    ids = torch.randint(
        5, config.boi_token_id, (case.batch, case.prompt - 2), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def draw(state, steps):
        with (
            contextlib.redirect_stderr(io.StringIO()),
            torch.autocast(device, dtype, enabled=dtype != torch.float32),
        ):  # its progress bar goes nowhere
            state["samples"] = model.sample_many(
                list(ids),
                force_modality_at_start=(0, (count,)),
                modality_steps=max(2, steps // 2 + 1),
                cfg_scale=GUIDANCE,
                max_length=case.prompt,
                return_without_prompt=True,
            )

    def check(state):
        images = [part[1] for sample in state["samples"] for part in sample if isinstance(part, tuple)]
        assert len(images) == case.batch and all(
            image.numel() == count * config.patch_dim and torch.isfinite(image).all() for image in images
        )

    return Contender(
        PEER,
        {"one step": lambda state: draw(state, 1), "draw": lambda state: draw(state, case.count)},
        check,
        wall=True,
    )


def write_contenders(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Contender], Transfusion]:
    """Greedy text, ours and transformers' own."""
    model = build(case, device, dtype)
    decoder, tokenizer, config = model.backbone.decoder, model.tokenizer, model.config
    texts = prompts(case, config.boi_token_id)

    def ours(texts, count):
        decoder.config._attn_implementation = integration.NAME
        parts = model.generate_batch([[Text(text)] for text in texts], max_images=0, max_new_tokens=count)
        return ["".join(part.text for part in row) for row in parts]

    def generate(texts, count):
        decoder.config._attn_implementation = "sdpa"
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in texts], device=device)
        with torch.inference_mode():
            out = decoder.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=[config.boi_token_id, config.eoi_token_id],
            )
        return [tokenizer.decode(row)[len(tokenizer.decode(given)) :] for row, given in zip(out, ids)]

    few = texts[:2]
    cast(model, torch.float32)
    expected = generate(few, CHECKED_TOKENS)
    cast(model, dtype)

    def contender(name, write):
        def check(state):
            cast(model, torch.float32)
            written = write(few, CHECKED_TOKENS)
            cast(model, dtype)
            assert written == expected, f"{written} is not {expected}"
            assert all(len(text.split()) == case.count for text in state["texts"]), "a text ended early"

        def run(state):
            state["texts"] = write(texts, case.count)

        return Contender(name, {"write": run}, check, wall=True)

    return [contender(OURS, ours), contender(GENERATE, generate)], model


def step_cost(model: Transfusion, case: Case) -> dict[str, int]:
    """Operations and bytes of a guided denoising step.

    The bytes are every weight of the layers and each context's keys and values, once.
    """
    text, config = model.config.text_config, model.config
    count = config.image_size[0] * config.image_size[1] // config.patch_size**2
    matrices = sum(p.numel() for p in model.backbone.decoder.get_decoder().layers.parameters() if p.ndim == 2)
    seen = case.batch * (case.prompt + 2 + 2 * count)  # keys, with the prompt and with BOS and BOI alone
    queries, size = 2 * case.batch * count, next(model.parameters()).element_size()
    return {
        "operations": 2 * matrices * queries
        + 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * count * seen,
        "bytes": size * (matrices + 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * seen),
    }


def run_case(case: Case, report: Report, device: str, seconds: float) -> None:
    """Measure one case and record a row per contender."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chosen, model = (draw_contenders if case.task == "draw" else write_contenders)(case, device, dtype)
    cost = step_cost(model, case) if case.task == "draw" else {}
    found, others = present({PEER: lambda: peer_contender(case, device, dtype)} if case.task == "draw" else {})
    copied, peak = 2**30 if device == "cuda" else 2**20, peak_tflops(report.environment["device"])
    (copy,) = measure([copy_contender(copied, device)], device=device, seconds=0.1)
    bandwidth = copied / copy.milliseconds["forward"]["p50"] / 1e6 if copy.milliseconds else None  # GB/s
    roof = (
        1e3 * max(cost["operations"] / (1e12 * peak), cost["bytes"] / (1e9 * bandwidth))
        if cost and peak and bandwidth
        else None
    )

    def record(result: Result) -> dict:
        p50 = {phase: times["p50"] for phase, times in result.milliseconds.items()}
        whole, asked = p50.get(case.task), 2 if result.name == PEER else 1  # the model is asked in the shortest draw
        step = (whole - p50["one step"]) / (case.count - asked) if whole and case.task == "draw" else None
        done = case.batch * (case.count if case.task == "write" else 1)
        return report.record(
            {**case._asdict(), **cost},
            result,
            copy_gb_per_s=bandwidth if result.checked else None,
            step_ms=step,
            per_second=1e3 * done / whole if whole else None,
            of_roofline=step / roof if step and roof and result.name != PEER else None,
        )

    results = measure(
        [*chosen, *found.values()], device=device, seconds=seconds, warmup=0, least=2, record=record, **report.limits
    )
    for result in results + others:
        print(line(case, record(result)), flush=True)


def line(case: Case, row: dict) -> str:
    """A row in words."""
    counted, made = ("steps", "images") if case.task == "draw" else ("tokens", "tokens")
    shape = f"{case.task:5} {case.size:6} batch {case.batch:2} prompt {case.prompt:4} {counted} {case.count:3}"
    head = f"{shape} {row['contender']:28}"
    if not row["milliseconds"]:
        return f"{head} {(row['error'] or row['left_out'] or 'no numbers').splitlines()[0][:200]}"
    step = f", step {row['step_ms']:7.3f} ms" if row["step_ms"] else ""
    roof = f", {row['of_roofline']:.2f} x roofline" if row["of_roofline"] else ""
    return f"{head} {row['milliseconds'][case.task]['p50']:9.1f} ms, {row['per_second']:8.2f} {made}/s{step}{roof}"


def main(arguments: list[str] | None = None) -> int:
    """Run the grid."""
    def cpu_cases(quick: bool) -> list[Case]:
        if quick:
            return [Case("draw", "tiny", 2, 24, 4), Case("write", "tiny", 2, 24, 8)]
        return [Case("draw", "small", 1, 256, 10), Case("write", "small", 1, 256, 64)]

    return run_command(
        "sample", __doc__, arguments, settings={"guidance": GUIDANCE, "timing": "interleaved, wall time"}, cases=cases,
        cpu_cases=cpu_cases, measure_case=functools.partial(run_case, seconds=5.0))


if __name__ == "__main__":
    raise SystemExit(main())
