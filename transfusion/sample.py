"""Sampling: text token by token until BOI, then one image denoised against the cached prefix, EOI, and text again.

All rows of a batch share the columns of one key/value cache. Prompts of different lengths stand left-padded; a row that waits
for the others gets columns that nobody sees (the mask's `until` is 0 there). An image is denoised with only its own patches as
queries: the prefix stays in the cache over all steps, conditional and unconditional rows run as one batch, and the finished
image is fed once more, clean, so that later text reads it (arXiv:2408.11039, section 3.3).
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from tfkernels import TransfusionMask, unpatchify
from transfusion.objective import step
from transfusion.sequence import Document, Image, Part, Text, encode, lay_out

_EVER = torch.iinfo(torch.int32).max
WRITING, DRAWING, DONE = range(3)


@dataclass
class _Row:
    """One prompt on its way: what it has written since its last image, its finished parts and its own random numbers."""

    generator: torch.Generator
    state: int = WRITING
    tokens: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    images: int = 0
    written: int = 0


class _Cache:
    """A DynamicCache whose rows each know which of its columns they see, and their next position."""

    def __init__(self, cache: DynamicCache, seen: Tensor, positions: Tensor):
        self.cache, self.seen, self.positions = cache, seen, positions                     # seen (B, columns) bool, positions (B,)

    def feed(self, model, x: Tensor, valid: Tensor, condition: Tensor, block: int = 0) -> Tensor:
        """Append n columns (B, n, C), the first `block` of them an image at the time of `condition` (1, C), and return their hidden states."""
        batch, count, _ = x.shape
        columns = self.seen.shape[1]
        self.seen = torch.cat([self.seen, valid], 1)
        order = torch.arange(count, device=x.device)
        hi = columns + torch.where(order < block, block, order + 1)
        hi = torch.where(valid, hi, 0)                                                     # (B, n); 0: an empty row
        until = torch.where(self.seen, _EVER, 0)
        mask = TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=torch.zeros_like(until), until=until, offset=columns)
        image = torch.where(order < block, 0, -1).expand(batch, -1)
        hidden = model.backbone(x, self.positions[:, None] + order, mask, condition, image, self.cache)
        self.positions = self.positions + valid.sum(1)
        return hidden

    def select(self, rows: list[int], prefix: "_Cache | None") -> "_Cache":
        """Copy some rows; with `prefix` (one row), append as many rows that hold only the prefix, in the last columns."""
        cache, columns = DynamicCache(), self.seen.shape[1]
        seen, positions = self.seen[rows], self.positions[rows]
        for number, layer in enumerate(self.cache.layers):
            keys, values = layer.keys[rows], layer.values[rows]
            if prefix is not None:
                keys, values = (torch.cat([x, _right(y, columns, len(rows))]) for x, y in (
                    (keys, prefix.cache.layers[number].keys), (values, prefix.cache.layers[number].values)))
            cache.update(keys, values, number)
        if prefix is not None:
            pad = seen.new_zeros(len(rows), columns - prefix.seen.shape[1])
            seen = torch.cat([seen, torch.cat([pad, prefix.seen.expand(len(rows), -1)], 1)])
            positions = torch.cat([positions, prefix.positions.expand(len(rows))])
        return _Cache(cache, seen, positions)


def _right(x: Tensor, columns: int, rows: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, columns - x.shape[2], 0)).expand(rows, -1, -1, -1)


@torch.inference_mode()
def generate_batch(model, prompts: list[list[Part]], *, max_new_tokens: int = 64, max_images: int = 1, image_size: tuple[int, int] | None = None,
                   steps: int = 50, guidance: float = 3.0, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, on_step=None) -> list[list[Part]]:
    """Go on from each prompt; the model decides when to draw by writing BOI and when to stop by writing EOS.

    Args:
        model: a `Transfusion` with its tokenizer.
        prompts: lists of Text and Image.
        max_new_tokens: text tokens written for each prompt at most.
        max_images: images drawn for each prompt at most; then BOI is not sampled any more.
        image_size: (height, width) of drawn images; the config's by default.
        steps: denoising steps of each image.
        guidance: classifier-free guidance scale (arXiv:2207.12598); 1 is none, and then no unconditional rows are run.
        temperature: 0 takes the likeliest token, larger values sample.
        top_p: sample from the smallest set of tokens that holds this much probability.
        seed: prompt i draws its random numbers from seed + i, whatever the rest of the batch is.
        on_step: called as on_step(rows, images, step, steps) with the images so far after each denoising step.

    Returns:
        For each prompt the new parts, Text and Image in order.
    """
    documents = [encode(prompt, model.tokenizer, model.config, end=False) for prompt in prompts]
    return _Sampler(model, documents, max_new_tokens, max_images, image_size, steps, guidance, temperature, top_p, seed, on_step).run()


@torch.inference_mode()
def draw(model, prompts: list[str], **options) -> list[Image]:
    """Draw one image for each prompt, whatever the model would have done; options as in `generate_batch`."""
    documents = []
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("draw: a prompt is empty; some text fits, e.g. 'a handwritten seven'")
        document = encode([Text(prompt)], model.tokenizer, model.config, end=False)
        documents.append(document._replace(tokens=document.tokens + [model.config.boi_token_id], targets=document.targets + [True]))
    results = _Sampler(model, documents, **{"max_new_tokens": 0, **_DEFAULTS, **options, "max_images": 1}).run()
    return [next(part for part in parts if isinstance(part, Image)) for parts in results]


def caption(model, images: list[Image], **options) -> list[str]:
    """Write the text that follows each image; no image is drawn. Options as in `generate_batch`."""
    results = generate_batch(model, [[image] for image in images], **{**options, "max_images": 0})
    return ["".join(part.text for part in parts if isinstance(part, Text)).strip() for parts in results]


_DEFAULTS = dict(image_size=None, steps=50, guidance=3.0, temperature=0.0, top_p=1.0, seed=0, on_step=None)


class _Sampler:
    def __init__(self, model, documents: list[Document], max_new_tokens, max_images, image_size, steps, guidance, temperature, top_p, seed, on_step):
        size, patch = tuple(image_size or model.config.image_size), model.config.patch_size
        if any(side < patch or side % patch for side in size):
            raise ValueError(f"generate: image_size is {size} and the patch size {patch}; multiples of the patch size fit")
        if steps < 1:
            raise ValueError(f"generate: steps is {steps}; at least 1 fits")
        self.model, self.config, self.documents = model, model.config, documents
        self.grid = size[0] // patch, size[1] // patch
        self.max_new_tokens, self.max_images, self.steps, self.guidance = max_new_tokens, max_images, steps, guidance
        self.temperature, self.top_p, self.on_step = temperature, top_p, on_step
        self.rows = [_Row(torch.Generator().manual_seed(seed + i)) for i in range(len(documents))]
        self.eos = model.tokenizer.eos_token_id
        self.clean = model.timestep(torch.zeros(1, device=model.device))                   # (1, C), what finished images are fed with

    def run(self) -> list[list[Part]]:
        self.cache, hidden = self.prefill(self.documents)
        for row, document in zip(self.rows, self.documents):
            if document.tokens[-1] == self.config.boi_token_id:
                row.state = DRAWING
        while True:
            self.write(hidden)
            drawing = [i for i, row in enumerate(self.rows) if row.state == DRAWING]
            if not drawing:
                break
            hidden = self.draw_images(drawing)
        return [row.parts + self.flush(row) for row in self.rows]

    def prefill(self, documents: list[Document]) -> tuple[_Cache, Tensor]:
        """Run the prompts, left-padded; return the cache and the last column's hidden states (B, C)."""
        device = self.model.device
        sequence = lay_out([[d] for d in documents], max(len(d.tokens) for d in documents), self.config.patch_dim, left=True).to(device)
        condition = self.model.timestep(torch.zeros(sequence.image_count, device=device))
        x = self.model.embed(sequence, sequence.patches, condition)
        cache, seen = DynamicCache(), sequence.documents >= 0
        hidden = self.model.backbone(x, sequence.positions, sequence.mask(), condition, sequence.image, cache)
        return _Cache(cache, seen, seen.sum(1)), hidden[:, -1]

    def write(self, hidden: Tensor) -> None:
        """Write text in every row that is writing, until each is done or wants to draw."""
        while any(row.state == WRITING for row in self.rows):
            logits = self.model.backbone.logits(hidden).float()                            # (B, V)
            tokens, valid = [], []
            for row, scores in zip(self.rows, logits):
                tokens.append(self.choose(row, scores) if row.state == WRITING else self.eos)
                valid.append(row.state == WRITING and tokens[-1] != self.eos)
                if row.state == WRITING:
                    self.take(row, tokens[-1])
            if any(valid):
                at = torch.tensor(tokens, device=logits.device)[:, None]
                fed = self.cache.feed(self.model, self.model.backbone.embed(at), torch.tensor(valid, device=logits.device)[:, None], self.clean)
                hidden = fed[:, -1]

    def take(self, row: _Row, token: int) -> None:
        if token == self.eos:
            row.state = DONE
        elif token == self.config.boi_token_id:
            row.state = DRAWING
        else:
            row.tokens.append(token)
            row.written += 1

    def choose(self, row: _Row, scores: Tensor) -> int:
        """Pick the next token of one row; EOS once it has written enough."""
        if row.written >= self.max_new_tokens:
            return self.eos
        scores = scores.cpu().clone()
        scores[self.config.eoi_token_id] = -torch.inf
        if row.images >= self.max_images:
            scores[self.config.boi_token_id] = -torch.inf
        if self.temperature == 0:
            return int(scores.argmax())
        ranked, order = (scores / self.temperature).softmax(-1).sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0
        return int(order[torch.multinomial(ranked, 1, generator=row.generator)])

    def draw_images(self, rows: list[int]) -> Tensor:
        """Denoise one image in each of `rows`, put them clean into the cache with EOI; return the last column's hidden states."""
        device, count = self.model.device, self.grid[0] * self.grid[1]
        shape = count, self.config.patch_dim
        x = torch.stack([torch.randn(shape, generator=self.rows[i].generator) for i in rows]).to(device)
        guided = self.guidance != 1
        prefix = None
        if guided:
            nothing = Document([self.model.tokenizer.bos_token_id, self.config.boi_token_id], [False, True], [])
            prefix, _ = self.prefill([nothing])
        context = self.cache.select(rows, prefix)
        for number in range(self.steps):
            t, s = (torch.full((), self.model.objective.start * (1 - n / self.steps), device=device) for n in (number, number + 1))
            prediction = self.predict(context, torch.cat([x, x]) if guided else x, t)
            if guided:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + self.guidance * (conditional - unconditional)
            x = step(self.model.objective, x, prediction.float(), t, s)
            if self.on_step is not None:
                self.on_step(rows, [self.image(patches) for patches in x], number + 1, self.steps)
        for i, patches in zip(rows, x):
            self.rows[i].parts += [*self.flush(self.rows[i]), self.image(patches)]
            self.rows[i].images += 1
            self.rows[i].state = WRITING
        return self.append_images(rows, x)

    def predict(self, context: _Cache, x: Tensor, t: Tensor) -> Tensor:
        """The image head's prediction (R, count, patch_dim) at time t; the cache is as before afterwards."""
        rows, count, _ = x.shape
        seen, positions = context.seen, context.positions
        condition = self.model.timestep(t[None])                                           # (1, C)
        valid = torch.ones(rows, count, dtype=torch.bool, device=x.device)
        hidden = context.feed(self.model, self.embed_patches(x, condition), valid, condition, block=count)
        context.cache.crop(-count)
        context.seen, context.positions = seen, positions
        owner = torch.zeros(rows * count, dtype=torch.int64, device=x.device)
        return self.model.image_head(hidden.flatten(0, 1), condition, owner).view_as(x)

    def embed_patches(self, x: Tensor, condition: Tensor) -> Tensor:
        rows, count, _ = x.shape
        owner = torch.zeros(rows * count, dtype=torch.int64, device=x.device)
        return self.model.patch_embedding(x.flatten(0, 1), condition, owner).view(rows, count, -1)

    def append_images(self, rows: list[int], x: Tensor) -> Tensor:
        batch, count = len(self.rows), x.shape[1]
        valid = torch.zeros(batch, count + 1, dtype=torch.bool, device=x.device)
        valid[rows] = True
        embedded = self.embed_patches(x, self.clean)
        full = embedded.new_zeros(batch, count + 1, embedded.shape[-1])
        full[rows, :count] = embedded
        full[:, count] = self.model.backbone.embed(torch.tensor(self.config.eoi_token_id, device=x.device))
        return self.cache.feed(self.model, full, valid, self.clean, block=count)[:, -1]

    def image(self, patches: Tensor) -> Image:
        height, width = (side * self.config.patch_size for side in self.grid)
        return Image(unpatchify(patches.float().cpu(), self.config.patch_size, height, width)[0])

    def flush(self, row: _Row) -> list[Part]:
        """Return the text written since the last image as a part, if any."""
        text = self.model.tokenizer.decode(row.tokens) if row.tokens else ""
        row.tokens = []
        return [Text(text)] if text else []
