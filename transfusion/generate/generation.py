"""Generation: text token by token until BOI, then one image denoised against the cached prefix, EOI, and text again.

All rows of a batch share the columns of one key/value cache. Prompts of different lengths stand left-padded; a row
that waits for the others gets columns that nobody sees (the mask's `until` is 0 there). An image is denoised with
only its own patches as queries: the prefix stays in the cache over all steps, and guided and unguided rows run as one
batch. The finished image is fed once more, clean, so that later text reads it (arXiv:2408.11039, section 3.3).
"""
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from tfkernels import unpatchify
from transfusion.diffusion.guidance import Guidance
from transfusion.diffusion.objective import solve
from transfusion.diffusion.solvers import make_solver
from transfusion.generate.kv_cache import Canvas, PrefixCache, embed_images
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, Image, ImageLayout, Part, Sequence, Text, encode, lay_out

WRITING, DRAWING, DONE = range(3)


class Written(NamedTuple):
    """Row `row` wrote some text."""

    row: int
    text: str


class Preview(NamedTuple):
    """After `step` of `steps` the image of row `row` would come out as `image`."""

    row: int
    image: Image
    step: int
    steps: int


class Drawn(NamedTuple):
    """Row `row` finished an image."""

    row: int
    image: Image


Event = Written | Preview | Drawn


def generate_batch(model, prompts: list[str | list[Part]], *, on_event=None, **options) -> list[list[Part]]:
    """Go on from each prompt; the model decides when to draw by writing BOI and when to stop by writing EOS.

    Args:
        model: a `Transfusion` with its tokenizer.
        prompts: texts, or lists of Text and Image, of any lengths; none give none back.
        on_event: called with each `Written`, `Preview` and `Drawn` as it happens.
        options: the fields of `Sampling`.

    Returns:
        For each prompt the new parts, Text and Image in order.

    Raises:
        ValueError: a prompt or an option that does not fit, named.
    """
    return _consume(_Generation(model, _as_prompts("generate_batch", prompts), Sampling.of(options)), on_event)


def stream(model, prompts: list[list[Part]], **options) -> Iterator[Event]:
    """`generate_batch` as an iterator of what happens."""
    return _Generation(model, _as_prompts("stream", prompts), Sampling.of(options)).events()


def draw(model, prompts: str | list[str | list[Part]], *, on_event=None, **options) -> list[Image]:
    """Draw one image for each prompt, whatever the model would have done.

    A prompt is a text, or parts such as [image, instruction], which edit an image. One text alone is one prompt.
    """
    prompts = _as_prompts("draw", prompts)
    if options.get("max_images", 1) != 1:
        raise ValueError(f"draw: max_images is {options['max_images']!r}; 1 fits, one image for each prompt; "
                         "generate_batch draws more")
    if any(all(isinstance(part, Text) and not part.text.strip() for part in prompt) for prompt in prompts):
        raise ValueError("draw: a prompt is empty; some text or an image fits, e.g. 'a handwritten seven'")
    sampling = Sampling.of({"max_new_tokens": 0, **options, "max_images": 1})
    results = _consume(_Generation(model, prompts, sampling, force_image=True), on_event)
    return [next(part for part in parts if isinstance(part, Image)) for parts in results]


def caption(model, images: Image | list[Image], question: str = "", **options) -> list[str]:
    """Write the text that follows each image and, where one is given, a question; no image is drawn."""
    images = [images] if isinstance(images, Image) else images
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"caption: images is a {type(images).__name__}; a list of Image fits, e.g. [Image(latent)]")
    for i, image in enumerate(images):
        if not isinstance(image, Image):
            raise ValueError(f"caption: images[{i}] is a {type(image).__name__}; an Image fits, e.g. Image(latent)")
    if not isinstance(question, str):
        raise ValueError(f"caption: question is a {type(question).__name__}; a str fits")
    if options.get("max_images", 0) != 0:
        raise ValueError(f"caption: max_images is {options['max_images']!r}; 0 fits, for no image is drawn; "
                         "generate_batch draws")
    prompts = [[image, Text(question)] if question else [image] for image in images]
    results = generate_batch(model, prompts, **{**options, "max_images": 0})
    return ["".join(part.text for part in parts if isinstance(part, Text)).strip() for parts in results]


def read(model, documents: list[Document], cache: Cache | None = None) -> tuple[Sequence, Tensor]:
    """Run documents, one a row, left-padded, their images clean; return the rows and their hidden states (B, S, C)."""
    longest = max(len(d.tokens) for d in documents)
    sequence = lay_out([[d] for d in documents], longest, model.config.patch_dim, left=True).to(model.device)
    condition = model.timestep(torch.zeros(1, device=model.device)).expand(sequence.image_count, -1)
    x, _ = model.embed(sequence, sequence.patches, condition)
    positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
    mask = model.image_attention.mask(sequence)
    return sequence, model.backbone(x, positions, mask, condition, sequence.modality, cache)


def as_parts(op: str, name: str, given) -> list[Part]:
    """Return a prompt's parts, checked. A str, a Text or an Image alone is a list of one."""
    given = [Text(given)] if isinstance(given, str) else [given] if isinstance(given, (Text, Image)) else given
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{op}: {name} is a {type(given).__name__}; a list of Text and Image fits, "
                         "e.g. [Text('a handwritten seven')]")
    for i, part in enumerate(given):
        if not isinstance(part, (Text, Image)):
            raise ValueError(f"{op}: {name}[{i}] is a {type(part).__name__}; a Text or an Image fits, "
                             "e.g. Text('a handwritten seven')")
    return given


def _as_prompts(op: str, given) -> list[list[Part]]:
    """Return prompts, checked. One alone is a list of one.

    A Text or an Image among several could be a prompt or a part of one, and is refused.
    """
    if isinstance(given, (str, Text, Image)):
        given = [as_parts(op, "prompts", given)]
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{op}: prompts is a {type(given).__name__}; "
                         "a list of texts, or of lists of Text and Image, fits, e.g. ['a handwritten seven']")
    for i, prompt in enumerate(given):
        if isinstance(prompt, (Text, Image)):
            raise ValueError(f"{op}: prompts[{i}] is a {type(prompt).__name__}; a str or a list of Text and Image "
                             "fits, one for each prompt: write [[first, second]] for one prompt of two parts")
    return [as_parts(op, f"prompts[{i}]", prompt) for i, prompt in enumerate(given)]


def _consume(generation: "_Generation", on_event) -> list[list[Part]]:
    for event in generation.events():
        if on_event is not None:
            on_event(event)
    return [row.parts for row in generation.rows]


@dataclass
class _Row:
    """One prompt on its way: what it wrote since its last image, its finished parts and its own random numbers."""

    generator: torch.Generator
    stop: tuple[str, ...] = ()
    state: int = WRITING
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    parts: list[Part] = field(default_factory=list)
    images: int = 0
    written: int = 0

    def before_stop(self, text: str) -> str:
        """What of a text stands before the first of the texts that end it: all of it where none is there."""
        return text[:min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]


class _Generation:
    """A batch of prompts on its way; each row writes, draws or is done, and waits for the others that draw."""

    def __init__(self, model, prompts: list[list[Part]], options: Sampling, force_image: bool = False):
        config = model.config
        if model.tokenizer is None or model.tokenizer.eos_token_id is None:
            raise ValueError("generate: the model has no tokenizer with an EOS; set model.tokenizer to the one that it "
                             "was trained with")
        size, patch = tuple(options.image_size or config.image_size), config.patch_size
        if any(side < patch or side % patch for side in size):
            raise ValueError(f"generate: image_size is {size} and the patch size {patch}; "
                             "multiples of the patch size fit")
        self.model, self.config, self.options = model, config, options
        self.prompts, self.force_image = prompts, force_image
        self.documents = [encode(prompt, model.tokenizer, config, end=False) for prompt in prompts]
        if force_image:
            self.documents = [self.then_image(document) for document in self.documents]
        self.grid = size[0] // patch, size[1] // patch
        self.guidance = options.guidance if isinstance(options.guidance, Guidance) else Guidance(options.guidance)
        self.solver()  # refuses what does not fit before anything runs
        if options.cuda_graph and model.device.type != "cuda":
            raise ValueError(f"generate: cuda_graph is True and the model is on {str(model.device)!r}; "
                             "a model on a CUDA device fits")
        self.rows = [_Row(torch.Generator().manual_seed(options.seed + i), tuple(options.stop or ()))
                     for i in range(len(prompts))]
        self.eos = model.tokenizer.eos_token_id

    def solver(self):
        """A solver for one image, or several of one size."""
        tokens = self.grid[0] * self.grid[1]
        return make_solver(self.options.sampler, self.model.objective, self.options.steps, tokens,
                           self.config.time_shift_tokens)

    def then_image(self, document: Document) -> Document:
        """The document and the BOI of an image behind it."""
        return document._replace(tokens=[*document.tokens, self.config.boi_token_id], targets=[*document.targets, True])

    @torch.inference_mode()
    def events(self) -> Iterator[Event]:
        """Run to the end; `rows` holds the parts then."""
        if not self.rows:
            return
        self.clean = self.model.timestep(torch.zeros(1, device=self.model.device))  # (1, C): time 0, of finished images
        self.cache, hidden = self.prefill(self.documents)
        for row in self.rows:
            row.state = DRAWING if self.force_image else WRITING
        while True:
            yield from self.write(hidden)
            drawing = [i for i, row in enumerate(self.rows) if row.state == DRAWING]
            if not drawing:
                break
            hidden = yield from self.draw_images(drawing)
        for row in self.rows:
            row.parts += self.flush(row)

    def prefill(self, documents: list[Document]) -> tuple[PrefixCache, Tensor]:
        """Run the prompts, left-padded; return the cache and the last column's hidden states (B, C)."""
        cache = DynamicCache()
        sequence, hidden = read(self.model, documents, cache)
        seen = sequence.documents >= 0
        return PrefixCache(cache, seen, seen.sum(1)), hidden[:, -1]

    def write(self, hidden: Tensor) -> Iterator[Event]:
        """Write text in every row that is writing, until each is done or wants to draw."""
        while any(row.state == WRITING for row in self.rows):
            logits = self.model.backbone.logits(hidden).float().cpu()                      # (B, V)
            tokens, valid = [], []
            for number, (row, scores) in enumerate(zip(self.rows, logits)):
                tokens.append(self.choose(row, scores) if row.state == WRITING else self.eos)
                valid.append(row.state == WRITING and tokens[-1] != self.eos)
                if row.state == WRITING:
                    yield from self.take(number, row, tokens[-1])
            if any(valid):
                chosen, valid = (torch.tensor(x, device=hidden.device)[:, None] for x in (tokens, valid))
                hidden = self.cache.feed(self.model, self.model.backbone.embed(chosen), valid, self.clean)[:, -1]

    def take(self, number: int, row: _Row, token: int) -> Iterator[Event]:
        """Add a token to what a row has written, or let it end or begin to draw."""
        if token == self.eos:
            row.state = DONE
        elif token == self.config.boi_token_id:
            row.state = DRAWING
        else:
            row.tokens.append(token)
            row.written += 1
            text = self.model.tokenizer.decode(row.tokens)
            kept = row.before_stop(text)
            row.state = WRITING if kept == text else DONE
            if not kept.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is not whole yet
                yield Written(number, kept[len(row.text):])
                row.text = kept

    def choose(self, row: _Row, scores: Tensor) -> int:
        """Pick the next token of one row; EOS once it has written enough."""
        options = self.options
        if row.written >= options.max_new_tokens:
            return self.eos
        scores = scores.clone()
        scores[self.config.eoi_token_id] = -torch.inf
        if row.images >= options.max_images:
            scores[self.config.boi_token_id] = -torch.inf
        if options.temperature == 0:
            return int(scores.argmax())
        ranked, order = (scores / options.temperature).softmax(-1).sort(descending=True)
        ranked[(ranked.cumsum(-1) - ranked >= options.top_p) | (ranked < options.min_p * ranked[0])] = 0
        ranked[0] = ranked[0].clamp(min=torch.finfo(ranked.dtype).tiny)  # top_p 0 leaves the likeliest
        return int(order[torch.multinomial(ranked, 1, generator=row.generator)])

    def prefix(self, rows: list[int], contexts: tuple[str, ...]) -> PrefixCache:
        """What `rows` are denoised against: one row for each context and prompt."""
        made = {"whole": lambda: self.cache.select(rows),
                "images": lambda: self.prefill([self.images_of(i) for i in rows])[0],
                "nothing": lambda: self.prefill([self.then_image(self.nothing())])[0].select([0] * len(rows))}
        return PrefixCache.stack([made[name]() for name in contexts])

    def nothing(self) -> Document:
        """An empty prompt."""
        return Document([self.model.tokenizer.bos_token_id], [False], [])

    def images_of(self, row: int) -> Document:
        """The images of a row's prompt and of what it has drawn, without any text, and the beginning of another."""
        images = [part for part in (*self.prompts[row], *self.rows[row].parts) if isinstance(part, Image)]
        if not images:
            return self.then_image(self.nothing())
        return self.then_image(encode(images, self.model.tokenizer, self.config, end=False))

    def draw_images(self, rows: list[int]) -> Iterator[Event]:
        """Denoise one image in each of `rows` and feed it; return the last column's hidden states (B, C)."""
        x = yield from self.denoise(rows)
        for i, patches in zip(rows, x):
            self.rows[i].parts += [*self.flush(self.rows[i]), self.image(patches)]
            self.rows[i].images += 1
            self.rows[i].state = WRITING
            yield Drawn(i, self.image(patches))
        return self.append_images(rows, x)

    def denoise(self, rows: list[int]) -> Iterator[Event]:
        """Solve from noise to the patches (R, P, patch_dim) of one image for each of `rows`."""
        shape = self.grid[0] * self.grid[1], self.config.patch_dim
        solver, canvases = self.solver(), {}
        noise = torch.stack([torch.randn(shape, generator=self.rows[i].generator) for i in rows])
        x = solver.start(noise).to(self.model.device)
        for number, t in enumerate(solver.times.tolist()):
            given = solver.input(x, number)
            contexts = self.guidance.contexts if self.guidance.active(t) else ("whole",)
            if contexts not in canvases:
                prefix = self.prefix(rows, contexts)
                canvases[contexts] = Canvas(self.model, prefix, self.grid, graph=self.options.cuda_graph)
            time, copies = torch.full((), t, device=x.device), len(contexts)
            predictions = canvases[contexts].predict(given.repeat(copies, 1, 1), time).unflatten(0, (copies, -1))
            prediction = self.guidance.combine(predictions)
            x = solver.advance(x, prediction, number)
            if self.options.previews:
                estimates = solve(self.model.objective, given, prediction, time)[0]
                yield from (Preview(i, self.image(patches), number + 1, len(solver.times))
                            for i, patches in zip(rows, estimates))
        return x

    def append_images(self, rows: list[int], x: Tensor) -> Tensor:
        """Feed finished patches and EOI to `rows`, columns that nobody sees to others; return as `draw_images`."""
        batch, count = len(self.rows), x.shape[1]
        valid = torch.zeros(batch, count + 1, dtype=torch.bool, device=x.device)
        valid[rows] = True
        embedded, _ = embed_images(self.model, x, self.clean, ImageLayout.of([self.grid] * len(rows), x.device))
        full = embedded.new_zeros(batch, count + 1, embedded.shape[-1])
        full[rows, :count] = embedded
        full[:, count] = self.model.backbone.embed(torch.tensor(self.config.eoi_token_id, device=x.device))
        return self.cache.feed(self.model, full, valid, self.clean, self.grid)[:, -1]

    def image(self, patches: Tensor) -> Image:
        """An image on the host from its patches."""
        height, width = (side * self.config.patch_size for side in self.grid)
        return Image(unpatchify(patches.float().cpu(), self.config.patch_size, height, width)[0])

    def flush(self, row: _Row) -> list[Part]:
        """Return the text written since the last image as a part, if any."""
        text = row.before_stop(self.model.tokenizer.decode(row.tokens)) if row.tokens else ""
        row.tokens, row.text = [], ""
        return [Text(text)] if text else []
