"""How much memory the forward pass of a training step keeps for its backward pass, counted without doing either.

The model runs on tensors that have shapes and no storage (torch's FakeTensorMode), while hooks add up what autograd
saves. Layers are alike, and so are rows, so that one or two of each tell it for all:

    bytes(L, R) = a + b R + L (c + d R)            L layers, R packed rows in a micro-batch

A tensor counts once, however many operations keep it or a view of it. Parameters do not count; their copies in bfloat16
that autocast makes do, apart. What operators keep inside while they run is not part of it.
"""
import copy
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfkernels import TransfusionMask
from transfusion.model.config import TransfusionConfig
from transfusion.model.lora import TuneSettings, base_of, prepare
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import IMAGE_ATTENTION, Sequence
from transfusion.train.frozen import narrow_frozen
from transfusion.train.recompute import PRODUCTS

STREAMS = {"decoder": 1, "adaln": 2, "mixture_of_transformers": 2}
"""Tensors (B, S, C) that go from layer to layer: the residual stream and, in some backbones, its norm."""


class Kept(NamedTuple):
    """Bytes that a micro-batch keeps, of these in copies of weights; of results of `PRODUCTS`; and more in backward."""

    saved: float
    copies: float
    products: float
    working: float


class Activations(NamedTuple):
    """Bytes between forward and backward of a micro-batch, by how much is computed again, without copies of weights.

    `working` are those that backward needs besides at its beginning, where most is in memory.
    """

    everything: float
    selective: float
    full: float
    copies: float
    working: float


class _Watch(TorchDispatchMode):
    """Takes note of copies of parameters, of the results of `PRODUCTS` and of how much memory is in use."""

    def __init__(self, parameters: set[int]):
        super().__init__()
        self.parameters, self.copies, self.products = parameters, set(), 0
        self.sizes, self.used, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name, made = str(operation), [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            self.track(x.untyped_storage())
        if name.startswith("aten._to_copy.") and storage(args[0]) in self.parameters:
            self.copies.add(storage(result))
        if name.startswith(PRODUCTS):
            self.products += sum(x.nbytes for x in made)
        return result

    def track(self, memory: torch.UntypedStorage) -> None:
        """Count memory until it is given back."""
        key = memory._cdata
        if key not in self.sizes and key not in self.parameters:
            self.sizes[key] = memory.nbytes()
            self.used += self.sizes[key]
            self.peak = max(self.peak, self.used)
            weakref.finalize(memory, self.forget, key)

    def forget(self, key: int) -> None:
        """Memory was given back; another tensor may get the same number."""
        self.used -= self.sizes.pop(key, 0)
        self.copies.discard(key)


def storage(x: Tensor) -> int:
    """What tells the memory of a tensor and its views from that of others."""
    return x.untyped_storage()._cdata


def kept(model: nn.Module, loss: Callable[[], Tensor]) -> Kept:
    """Run `loss`, which calls `model`, and its backward pass, and count what autograd keeps and needs."""
    parameters = {storage(x) for x in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        found[storage(x)] = x.untyped_storage().nbytes()
        return x

    with _Watch(parameters) as watch:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            value = loss()
        sizes, copies = {key: size for key, size in found.items() if key not in parameters}, set(watch.copies)
        products = watch.products
        value.backward()
    model.zero_grad()
    saved = sum(sizes.values())
    return Kept(saved, sum(size for key, size in sizes.items() if key in copies), products, watch.peak - saved)


def with_layers(config: TransfusionConfig, layers: int) -> TransfusionConfig:
    """Return the same configuration with fewer layers."""
    config = copy.deepcopy(config)
    text = config.text_config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def outline(config: TransfusionConfig, tune: TuneSettings) -> nn.Module:
    """Return the model that would be trained, on the meta device: with shapes, without numbers."""
    with torch.device("meta"):
        tune = dataclasses.replace(tune, start=tune.start or Path("start"))  # nothing is read: the model is here
        return prepare(Transfusion(config), tune).train()


def _onto_cpu(model: nn.Module, dtype: torch.dtype) -> None:
    """Move a model from the meta device to the CPU of the FakeTensorMode that this is called under."""
    moved: dict[int, Tensor] = {}  # a tied weight stays one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
                module._parameters[name] = moved.setdefault(id(p), new)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def count(config: TransfusionConfig, tune: TuneSettings, sequence: Sequence, mask: TransfusionMask, *,
          dtype: torch.dtype, autocast: bool, narrow: bool = False) -> Kept:
    """Return what one forward pass over `sequence` keeps, without doing it.

    Args:
        mask: of the sequence; it is made of the sequence's numbers, which tensors without storage do not have.
        narrow: whether frozen weights are held in bfloat16.
    """
    model = outline(config, tune)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _onto_cpu(model, dtype)
        base = base_of(model)
        if narrow:
            narrow_frozen(base)
        base.image_attention = _Ready(mask)
        times = torch.zeros(sequence.image_count)
        seed = torch.zeros(2, dtype=torch.int64)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(sequence, times, seed).loss

        return kept(model, loss)


class _Ready:
    """An image attention whose mask is there already."""

    def __init__(self, mask: TransfusionMask):
        self.made = mask

    def mask(self, sequence: Sequence) -> TransfusionMask:
        """Return it."""
        return self.made


class Trace(NamedTuple):
    """What one and two layers keep of one and two rows, from which `activations` tells it for all.

    `inputs` are the bytes that go from layer to layer in a row.
    """

    runs: dict[tuple[int, int], Kept]
    layers: int
    inputs: int

    def at(self, field: str, layers: float, rows: float) -> float:
        """Continue a field of `Kept` to other numbers of layers and rows: a + b R + L (c + d R)."""
        def along(n: int) -> float:
            first, second = (getattr(self.runs[n, r], field) for r in (1, 2))
            return first + (rows - 1) * (second - first)

        return along(1) + (layers - 1) * (along(2) - along(1))

    def activations(self, rows: float) -> Activations:
        """Return what a micro-batch of `rows` rows keeps between its forward and its backward pass.

            everything = saved(L, R) - copies
            full       = saved(0, R) + L inputs(R) + saved of one layer
            selective  = full + L products(R)

        Under full checkpointing a layer keeps its input, (R, S, C) for each of its streams, and while backward is in
        it, all that it saves. Selective checkpointing keeps the results of matrix products and of attention as well.
        """
        def own(layers: int) -> float:
            return self.at("saved", layers, rows) - self.at("copies", layers, rows)

        def of_layer(field: str) -> float:
            return self.at(field, 1, rows) - self.at(field, 0, rows)

        everything, layer = own(self.layers), own(1) - own(0)
        full = own(0) + self.layers * self.inputs * rows + layer
        selective = full + self.layers * of_layer("products")
        return Activations(everything, min(selective, everything), min(full, everything),
                           self.at("copies", self.layers, rows), self.at("working", 2, rows))


def trace(config: TransfusionConfig, tune: TuneSettings, one: Sequence, two: Sequence, *, dtype: torch.dtype,
          autocast: bool, narrow: bool = False) -> Trace:
    """Count what one and two layers keep of one and two packed rows like those of training.

    Args:
        one, two: a row, and two.
        dtype: of the parameters.
        autocast: whether products are then in bfloat16.
        narrow: whether frozen weights are held in bfloat16.
    """
    text = config.text_config.get_text_config()
    attention = IMAGE_ATTENTION[config.image_attention]
    runs = {(n, len(rows.tokens)): count(with_layers(config, n), tune, rows, attention.mask(rows), dtype=dtype,
                                         autocast=autocast, narrow=narrow) for n in (1, 2) for rows in (one, two)}
    inputs = STREAMS[config.backbone] * one.tokens.shape[1] * text.hidden_size * dtype.itemsize
    return Trace(runs, text.num_hidden_layers, inputs)
