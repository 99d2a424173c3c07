"""The key/value cache of generation: keys and values of a batch of prompts, and images that are drawn against them.

All rows of a batch share the columns of one cache; each knows which of them it sees and its next position. A `Canvas`
holds the columns of one more image for each row and writes them anew, in place, at every denoising step. The prefix
is not moved, only attention reads it, and what does not change from step to step is made once. So `predict` launches
the same kernels on the same addresses each time and can be a CUDA graph.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tfkernels import TransfusionMask
from transfusion.sequence import ImageLayout, Modality

_EVER = torch.iinfo(torch.int32).max


class PrefixCache:
    """A DynamicCache whose rows each know which of its columns they see, and their next position."""

    def __init__(self, cache: Cache, seen: Tensor, positions: Tensor):
        self.cache, self.seen, self.positions = cache, seen, positions  # seen (B, columns) bool, positions (B,)

    def feed(self, model, x: Tensor, valid: Tensor, condition: Tensor, grid: tuple[int, int] = (0, 0)) -> Tensor:
        """Append n columns (B, n, C) and return their hidden states.

        The first of them are an image of `grid` at the time of `condition` (1, C). Columns that are not `valid` (B, n)
        are seen by nobody.
        """
        mask, positions, modality = self.after(model, valid, grid)
        hidden = model.backbone(x, positions, mask, condition.expand(len(x), -1), modality, self.cache)
        self.seen, self.positions = torch.cat([self.seen, valid], 1), self.positions + valid.sum(1)
        return hidden

    def after(self, model, valid: Tensor, grid: tuple[int, int]) -> tuple[TransfusionMask, Tensor, Modality]:
        """Mask, positions and modality of n columns behind these, `valid` (B, n); the first are an image of `grid`."""
        (batch, count), device, block = valid.shape, valid.device, grid[0] * grid[1]
        order = torch.arange(count, device=device)
        seen = self.seen.shape[1] + model.image_attention.seen(order, block)                # (n,)
        hi = torch.where(valid, seen, 0)                                                    # (B, n); 0: an empty row
        until = torch.where(torch.cat([self.seen, valid], 1), _EVER, 0)
        mask = TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=torch.zeros_like(until), until=until,
                                              offset=self.seen.shape[1])
        images = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        image_ids = torch.where(order < block, images, -1)  # (B, n)
        columns = torch.full((batch,), max(1, grid[1]), dtype=torch.int32, device=device)
        places = torch.arange(batch * count, device=device).view(batch, count)
        modality = Modality(image_ids, places[:, block:].flatten(), places[:, :block].flatten())
        positions = torch.where(valid, self.positions[:, None] + order, 0)  # a table may have none behind a row's end
        return mask, model.positions(positions, image_ids, columns), modality

    def select(self, rows: list[int]) -> "PrefixCache":
        """Copy some rows."""
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], number)
        return PrefixCache(cache, self.seen[rows], self.positions[rows])

    @staticmethod
    def stack(parts: list["PrefixCache"]) -> "PrefixCache":
        """All rows of several caches, each in the last columns."""
        columns, cache = max(part.seen.shape[1] for part in parts), DynamicCache()
        for number in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[number] for part in parts]
            cache.update(*(torch.cat([_pad_left(getattr(layer, name), columns, 2) for layer in layers])
                           for name in ("keys", "values")), number)
        seen = torch.cat([_pad_left(part.seen, columns, 1) for part in parts])
        return PrefixCache(cache, seen, torch.cat([part.positions for part in parts]))


def _pad_left(x: Tensor, columns: int, axis: int) -> Tensor:
    """Put zeros in front until `x` has as many columns along `axis`."""
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - axis) + (columns - x.shape[axis], 0))


class _LastColumns(DynamicLayer):
    """A layer's keys and values (B, K, columns + count, D), whose last `count` columns each update writes anew."""

    def __init__(self, layer: DynamicLayer, count: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.prefix = layer.keys.shape[2]
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, count)) for x in (layer.keys, layer.values))

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write the last columns; return all."""
        self.keys[:, :, self.prefix:] = keys
        self.values[:, :, self.prefix:] = values
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns before those that are written."""
        return self.prefix


class Canvas:
    """One image of `grid` for each row of a prefix, predicted as often as it is asked for at another time.

    With `graph`, a CUDA graph is captured at the first call and replayed after.
    """

    def __init__(self, model, prefix: PrefixCache, grid: tuple[int, int], *, graph: bool = False):
        rows, count, device = len(prefix.positions), grid[0] * grid[1], prefix.positions.device
        valid = torch.ones(rows, count, dtype=torch.bool, device=device)
        self.model, self.layout = model, ImageLayout.of([grid] * rows, device)
        self.mask, self.positions, self.modality = prefix.after(model, valid, grid)
        self.cache = Cache(layers=[_LastColumns(layer, count) for layer in prefix.cache.layers])
        self.graph = Graph() if graph else None

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The image head's prediction (R, count, patch_dim) of x at time t, a scalar."""
        return self._predict(x, t) if self.graph is None else self.graph(self._predict, x, t)

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.model.timestep(t[None])
        embedded, skips = embed_images(self.model, x, condition, self.layout)
        condition = condition.expand(len(x), -1)
        hidden = self.model.backbone(embedded, self.positions, self.mask, condition, self.modality, self.cache)
        return self.model.image_head(hidden.flatten(0, 1), condition, self.layout, skips).view_as(x).float()


def embed_images(model, x: Tensor, condition: Tensor, layout: ImageLayout) -> tuple[Tensor, list[Tensor]]:
    """Embeddings (R, count, C) of R images' patches at the time of `condition` (1, C), and what skips the decoder."""
    rows, count, _ = x.shape
    hidden = condition.new_zeros(rows * count, condition.shape[1])
    places = torch.arange(rows * count, device=x.device)
    patches = x.flatten(0, 1).to(hidden.dtype)
    embedded, skips = model.patch_embedding(hidden, patches, condition.expand(rows, -1), layout, places)
    return embedded.view(rows, count, -1), skips


class Graph:
    """A function of CUDA tensors whose shapes stay, captured at its first call and replayed after.

    The function is not kept: as a method of who keeps the graph it would hold both, and their memory, until Python
    looks for cycles, which no lack of a device's memory makes it do.
    """

    def __init__(self):
        self.graph = None

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return function(*inputs), the same function each time."""
        with torch.cuda.device(inputs[0].device):  # a capture is of the current device's streams
            if self.graph is None:
                self._capture(function, inputs)
            for kept, x in zip(self.inputs, inputs):
                kept.copy_(x)
            self.graph.replay()
            return self.output.clone()

    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.inputs, stream = [x.clone() for x in inputs], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*self.inputs)  # kernels compile and libraries make their handles, which a capture forbids
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # its own default is of the device that captured first
            self.output = function(*self.inputs)
        self.graph = graph
