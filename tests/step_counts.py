"""What a training step and a denoising step ask of a device: calls of aten, launches of ours, memory, and waits.

    python -m tests.step_counts          the table of docs/performance.md

Models of two layers run forward and backward, and one denoising step against a cached prompt, with the operators' CUDA
implementations on CPU tensors and their launches counted in place of run. Nothing depends on the numbers. Rows of a
few lengths hold the same two images of 64 patches. What is counted is what eager PyTorch does on a GPU; only
checks of values, which the library makes on a CPU alone, are left out.
"""
import contextlib
import itertools
import sys
from collections import Counter
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig

from tests.launches import seen
from transfusion.generate.kv_cache import Canvas, PrefixCache
from transfusion.model.config import TransfusionConfig
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import lay_out
from transfusion.sequence.packing import Document

BACKBONES, IMAGE_LAYERS = ("decoder", "adaln", "mixture_of_transformers"), ("linear", "dit", "unet")
LENGTHS = {"training": (256, 512, 1024), "denoising": (1024, 2048, 4096)}  # attention is cut into parts in all or none
TABLE_LENGTH = 1024
PATCHES = (8, 8)
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
         "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::nonzero_numpy", "aten::bincount"}
ON_THE_HOST = ("tolist", "cpu", "numpy")  # of a tensor; these read its memory and call no operator on a CPU


class Counts(NamedTuple):
    """Of one step: calls by operator, launches by kernel, bytes of each allocation, and what waits for the device."""

    calls: Counter
    launches: Counter
    allocations: list[int]
    waits: list[str]


class Counting(TorchDispatchMode):
    """Counts what reaches PyTorch's operators, those inside the implementations of ours included."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tfkernels":
            with self:
                return OPDEFS[f"tfkernels::{function._opname}"]._backend_fns["cpu"](*args)
        name = f"{function.namespace}::{function._opname}"
        self.counts.calls[name] += 1
        flags = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITS or flags:
            self.counts.waits.append(name)
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors_of((args, tuple((kwargs or {}).values())))}
        fresh = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors_of(result)}
        self.counts.allocations.extend(size for storage, size in fresh.items() if storage not in given and size)
        return result


def tensors_of(x) -> list[torch.Tensor]:
    """The tensors in arguments or results."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [tensor for part in x for tensor in tensors_of(part)] if isinstance(x, (tuple, list)) else []


@contextlib.contextmanager
def counted():
    """Count what happens inside, as it would on a GPU."""
    counts = Counts(Counter(), Counter(), [], [])

    def waits(name, method):
        def recorded(*args, **options):
            counts.waits.append(name)
            return method(*args, **options)
        return recorded

    with contextlib.ExitStack() as stack:
        stack.enter_context(seen(lambda kernel, *_: counts.launches.update([kernel.__name__])))
        for module in [module for name, module in sys.modules.items() if name.startswith("tfkernels")]:
            if "looks" in vars(module):
                stack.enter_context(patch.object(module, "looks", lambda *tensors: False))
        for name in ON_THE_HOST:
            stack.enter_context(patch.object(torch.Tensor, name, waits(name, getattr(torch.Tensor, name))))
        stack.enter_context(Counting(counts))
        yield counts


def model_of(backbone: str, image_layers: str, layers: int = 2) -> Transfusion:
    """A small model with random weights."""
    text_config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
    return Transfusion(TransfusionConfig(
        text_config=text_config, image_channels=4, image_size=(16, 16), patch_size=2, backbone=backbone,
        image_layers=image_layers, boi_token_id=298, eoi_token_id=299))


def sequence_of(model: Transfusion, seq_len: int, images: int = 2):
    """One row: a document of text behind `images` pictures."""
    text, patches = 10, PATCHES[0] * PATCHES[1]
    tokens, targets, spans = [5] * text, [True] * text, []
    for _ in range(images):
        spans.append((len(tokens) + 1, torch.zeros(patches, model.config.patch_dim), PATCHES, False))
        tokens += [298] + [299] * (patches + 1)
        targets += [True] + [False] * (patches + 1)
    rest = seq_len - len(tokens)
    return lay_out([[Document(tokens + [7] * rest, targets + [True] * rest, spans)]], seq_len, model.config.patch_dim)


def training_step(model: Transfusion, seq_len: int) -> Counts:
    """The counts of loss and gradients."""
    times, seed = torch.tensor([0.3, 0.6]), torch.tensor([5, 7])
    model.train()
    for _ in range(2):  # what a process makes once is made in the first; each step has rows of its own
        sequence = sequence_of(model, seq_len)
        for parameter in model.parameters():
            parameter.grad = None
        with counted() as counts:
            model(sequence, times, seed).loss.backward()
    return counts


@torch.inference_mode()
def denoising_step(model: Transfusion, prompt: int) -> Counts:
    """The counts of one prediction of an image against a prompt, the second of one image."""
    model.eval()
    config = model.config.text_config
    head_dim = config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for number in range(config.num_hidden_layers):
        cache.update(*(torch.zeros(1, config.num_key_value_heads, prompt, head_dim) for _ in range(2)), number)
    with seen(lambda *_: None):
        prefix = PrefixCache(cache, torch.ones(1, prompt, dtype=torch.bool), torch.tensor([prompt]))
        canvas = Canvas(model, prefix, PATCHES)
    x, t = torch.zeros(1, PATCHES[0] * PATCHES[1], model.config.patch_dim), torch.tensor(0.5)
    for _ in range(2):
        with counted() as counts:
            canvas.predict(x, t)
    return counts


STEPS = {"training": training_step, "denoising": denoising_step}


def table() -> str:
    """The table of docs/performance.md, of `TABLE_LENGTH` tokens."""
    lines = ["| step | backbone, image layers | aten calls | launches | allocations | MiB | waits |", "|" + "---|" * 7]
    for (step, count), backbone, image_layers in itertools.product(STEPS.items(), BACKBONES, IMAGE_LAYERS):
        counts = count(model_of(backbone, image_layers), TABLE_LENGTH)
        lines.append(f"| {step} | {backbone}, {image_layers} | {counts.calls.total()} | {counts.launches.total()} | "
                     f"{len(counts.allocations)} | {sum(counts.allocations) / 2**20:.1f} | {len(counts.waits)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
