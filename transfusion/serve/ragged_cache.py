"""One pool of cached keys and values for contexts of any lengths, and passes of the model over some of them.

    pool      (T, K, D) keys and values of T tokens for each layer, allocated once; a context has pages of it
    context   a run of tokens of which the model has read `length`: a prompt and what was written and drawn behind it;
              prompts that begin alike share the pages of their beginning (`transfusion.serve.pages`)
    feed      new tokens behind a context's: text, finished images at time 0, or one image that is denoised at time t

In a pass every row is another context. Cached tokens stand right-aligned and new ones left-aligned around one column,
so that rows of different lengths have one mask; columns that a row does not use are seen by nobody. What a row gets is
what it would get alone, but for the rounding of matrix products of another shape.
"""
import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from tfkernels import TransfusionMask
from transfusion.sequence import Document, Sequence, lay_out
from transfusion.serve.pages import PAGE, Pages

_EVER = torch.iinfo(torch.int32).max
_serial = itertools.count()


class Context:
    """Pages of a pool, of which the first `length` tokens are read. `places` (tokens,) says where they stand."""

    def __init__(self, pages: list[int], length: int):
        self.pages, self.length, self.serial = pages, length, next(_serial)
        self.places = (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


@dataclass
class Feed:
    """New tokens of one context. Afterwards they count as read, and the answer is the next token's logits (V,)."""

    context: Context
    document: Document

    def patches(self) -> list[Tensor]:
        """The clean patches (P, patch_dim) of its images."""
        return [patches for _, patches, *_ in self.document.images]


@dataclass
class Denoise:
    """An image's patches x (P, patch_dim) at time t behind a context, which stays as it is.

    The answer is the prediction (P, patch_dim).
    """

    context: Context
    x: Tensor
    grid: tuple[int, int]
    time: float

    @property
    def document(self) -> Document:
        """The image as a document; its patches are handed on apart, for they change with each step."""
        count = len(self.x)
        return Document([0] * count, [False] * count, [(0, torch.zeros(1, 1).expand(self.x.shape), self.grid, False)])


class _Plan(NamedTuple):
    """What a pass asks that does not change while its rows stay: who stands where and who sees whom."""

    sequence: Sequence
    positions: Tensor
    mask: TransfusionMask
    reads: Tensor   # (R * columns,) places of the keys of each row
    writes: Tensor  # (W,) places that new tokens are written to
    new: Tensor     # (W,) which of the R * n new tokens of a pass these are
    last: Tensor    # (R,) which of them is the last of each row


class _Layer(DynamicLayer):
    """One layer's part of the pool."""

    def __init__(self, pool: "RaggedCache"):
        super().__init__()
        self.pool, self.is_initialized = pool, True

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write new keys and values (R, K, n, D); return all that the rows of the pass have, (R, K, columns, D)."""
        if self.keys is None:
            self.keys, self.values = (x.new_empty(self.pool.tokens, x.shape[1], x.shape[3]) for x in (keys, values))
        return tuple(self._through(kept, x) for kept, x in ((self.keys, keys), (self.values, values)))

    def _through(self, kept: Tensor, x: Tensor) -> Tensor:
        plan = self.pool.plan
        kept.index_copy_(0, plan.writes, x.transpose(1, 2).flatten(0, 1).index_select(0, plan.new))
        return kept.index_select(0, plan.reads).unflatten(0, (len(x), -1)).transpose(1, 2)

    def get_seq_length(self) -> int:
        """Columns in front of new tokens."""
        return self.pool.plan.mask.offset


class RaggedCache:
    """The pool of one model, `tokens` large, and its passes."""

    def __init__(self, model, tokens: int):
        self.model, count = model, math.ceil(tokens / PAGE)
        self.tokens, self.pages = count * PAGE, Pages(count)
        layers = model.config.text_config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_Layer(self) for _ in range(layers)])
        self.plan, self._kept = None, {}

    @property
    def used(self) -> int:
        """Tokens that contexts hold or have reserved."""
        return self.tokens - self.pages.available * PAGE

    @property
    def bytes(self) -> int:
        """Memory of the pool, once a first pass has made it."""
        made = [layer for layer in self.cache.layers if layer.keys is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in made)

    def fits(self, sizes: list[int]) -> bool:
        """Whether there is room for contexts of these numbers of tokens."""
        return sum(math.ceil(size / PAGE) for size in sizes) <= self.pages.available

    def open(self, size: int, document: Document | None = None) -> Context:
        """A context of up to `size` tokens; `close` gives its pages back.

        Where it will begin with a document whose beginning was read before, `length` tokens of that are there already.
        """
        return Context(*self.pages.take(size, document))

    def close(self, context: Context) -> None:
        """Give a context's pages back."""
        self.pages.give_back(context.pages)
        context.pages = []

    def run(self, asks: list[Feed] | list[Denoise]) -> list[Tensor]:
        """One pass; the answer to each of `asks`, which are all of one kind."""
        return (self._feed if isinstance(asks[0], Feed) else self._denoise)(asks)

    def _feed(self, asks: list[Feed]) -> list[Tensor]:
        plan, patches = self._make_plan(asks), [x for ask in asks for x in ask.patches()]
        patches = torch.cat(patches) if patches else plan.sequence.patches
        hidden, _, _ = self._pass(plan, patches, torch.zeros(plan.sequence.image_count))
        logits = self.model.backbone.logits(hidden.index_select(0, plan.last)).float().cpu()
        for ask in asks:
            ask.context.length += len(ask.document.tokens)
        return list(logits)

    def _denoise(self, asks: list[Denoise]) -> list[Tensor]:
        key = tuple((ask.context.serial, ask.context.length, ask.grid) for ask in asks)
        if key not in self._kept:  # the plan of the last pass, for an image's rows mostly stay from step to step
            with torch.inference_mode(False):  # of plain tensors the embedding remembers its index from step to step
                self._kept = {key: self._make_plan(asks)}
        plan, patches = self._kept[key], torch.cat([ask.x for ask in asks])
        hidden, condition, skips = self._pass(plan, patches, torch.tensor([ask.time for ask in asks]))
        sequence = plan.sequence
        predictions = self.model.image_head(hidden[sequence.patch_places], condition, sequence.layout, skips).float()
        return list(predictions.split([len(ask.x) for ask in asks]))

    def _pass(self, plan: _Plan, patches: Tensor, times: Tensor) -> tuple[Tensor, Tensor, list]:
        """Hidden states (R * n, C) of the new tokens, each image's condition (N, C) and what skips the decoder."""
        model, device = self.model, self.model.device
        condition = model.timestep(times.to(device))
        x, skips = model.embed(plan.sequence, patches.to(device), condition)
        self.plan = plan
        hidden = model.backbone(x, plan.positions, plan.mask, condition, plan.sequence.modality, self.cache)
        return hidden.flatten(0, 1), condition, skips

    def _make_plan(self, asks: list[Feed] | list[Denoise]) -> _Plan:
        model, device = self.model, self.model.device
        documents, contexts = [ask.document for ask in asks], [ask.context for ask in asks]
        counts, cached = [len(document.tokens) for document in documents], [context.length for context in contexts]
        longest, offset = max(counts), max(cached)
        sequence = lay_out([[document] for document in documents], longest, model.config.patch_dim)
        reads = torch.zeros(len(asks), offset + longest, dtype=torch.int64)
        until = torch.zeros(len(asks), offset + longest, dtype=torch.int32)                # 0: seen by nobody
        for row, (context, count) in enumerate(zip(contexts, counts)):
            columns = slice(offset - context.length, offset + count)
            reads[row, columns], until[row, columns] = context.places[:context.length + count], _EVER
        own = model.image_attention.mask(sequence)                                         # of the new tokens alone
        hi = torch.where(own.hi > own.lo, own.hi + offset, 0)                              # (R, n); 0: an empty row
        mask = TransfusionMask.from_intervals(*(x.to(device) for x in (torch.zeros_like(hi), hi)),
                                              since=torch.zeros_like(until).to(device), until=until.to(device),
                                              offset=offset)
        lengths = torch.tensor(counts)[:, None]                                            # (R, 1)
        is_new = torch.arange(longest) < lengths
        positions = (sequence.positions + torch.tensor(cached)[:, None]).to(device)
        sequence = replace(sequence.to(device), patches=sequence.patches[:0].to(device))
        last = torch.arange(len(asks)) * longest + lengths[:, 0] - 1
        return _Plan(sequence, model.positions(positions, sequence.image_ids, sequence.layout.columns), mask,
                     *(x.to(device) for x in (reads.flatten(), reads[:, offset:][is_new],
                                              is_new.flatten().nonzero()[:, 0], last)))
