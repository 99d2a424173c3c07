"""Generation: text token by token until BOI, then one image denoised against the cached prefix, EOI, and text again.

All rows of a batch share the columns of one key/value cache. Prompts of different lengths stand left-padded; a row
that waits for the others gets columns that nobody sees (the mask's `until` is 0 there). An image is denoised with
only its own patches as queries: the prefix stays in the cache over all steps, and guided and unguided rows run as one
batch. The finished image is fed once more, clean, so that later text reads it (arXiv:2408.11039, section 3.3).
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from transfusion.diffusion.objective import solve
from transfusion.generate.kv_cache import Canvas, PrefixCache, embed_images
from transfusion.generate.row import DRAWING, WRITING, Row, check_options, guidance_of, solver_of
from transfusion.generate.sampling import RowSeed, Sampling
from transfusion.sequence import Document, Image, ImageLayout, Part, Sequence, Text, lay_out
from transfusion.settings import check_value


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


def draw(model, prompts: str | list[str | list[Part]], *, seeds: list[int] | None = None, on_event=None,
         **options) -> list[Image]:
    """Draw one image for each prompt, whatever the model would have done.

    A prompt is a text, or parts such as [image, instruction], which edit an image. One text alone is one prompt.
    `seeds` has one for each prompt, in place of `seed` plus the prompt's number.
    """
    prompts = _as_prompts("draw", prompts)
    if seeds is not None:
        if not isinstance(seeds, (list, tuple)) or len(seeds) != len(prompts):
            raise ValueError(f"draw: seeds is {seeds!r} and there are {len(prompts)} prompts; a list with one for each "
                             "fits")
        for i, seed in enumerate(seeds):
            check_value("draw", f"seeds[{i}]", seed, RowSeed)
    if options.get("max_images", 1) != 1:
        raise ValueError(f"draw: max_images is {options['max_images']!r}; 1 fits, one image for each prompt; "
                         "generate_batch draws more")
    if any(all(isinstance(part, Text) and not part.text.strip() for part in prompt) for prompt in prompts):
        raise ValueError("draw: a prompt is empty; some text or an image fits, e.g. 'a handwritten seven'")
    sampling = Sampling.of({"max_new_tokens": 0, **options, "max_images": 1})
    results = _consume(_Generation(model, prompts, sampling, force_image=True, seeds=seeds), on_event)
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
        if isinstance(part, Text) and not isinstance(part.text, str):
            raise ValueError(f"{op}: {name}[{i}].text is a {type(part.text).__name__}; a str fits")
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


def check_graph(model) -> None:
    """Refuse `cuda_graph` for a model that no graph can hold.

    Raises:
        ValueError: it is on no CUDA device, or its decoder waits for the device to choose its rotary frequencies.
    """
    for part in model.backbone.decoder.modules():
        kinds = getattr(part, "rope_type", None)
        for kind in map(str, kinds.values() if isinstance(kinds, dict) else [kinds]):
            if "dynamic" in kind or kind == "longrope":
                raise ValueError(f"generate: cuda_graph is True and the decoder's rope_type is {kind!r}, whose "
                                 "frequencies are chosen anew in each call; False fits")
    if model.device.type != "cuda":
        raise ValueError(f"generate: cuda_graph is True and the model is on {str(model.device)!r}; "
                         "a model on a CUDA device fits")


class _Generation:
    """A batch of prompts on its way; each row writes, draws or is done, and waits for the others that draw."""

    def __init__(self, model, prompts: list[list[Part]], options: Sampling, force_image: bool = False,
                 seeds: list[int] | None = None):
        self.model, self.config, self.options, self.force_image = model, model.config, options, force_image
        self.grid, self.guidance = check_options(model, options), guidance_of(options)
        if options.cuda_graph:
            check_graph(model)
        first = int(options.seed)  # NumPy's integers would wrap
        seeds = range(first, first + len(prompts)) if seeds is None else seeds
        self.rows = [Row(model, prompt, options, self.grid, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        self.documents = [row.document(force_image) for row in self.rows]
        self.eos = model.tokenizer.eos_token_id

    def solver(self):
        """A solver for one image, or several of one size."""
        return solver_of(self.model, self.options, self.grid)

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
            row.finish()

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
                tokens.append(row.choose(scores) if row.state == WRITING else self.eos)
                valid.append(row.state == WRITING and tokens[-1] != self.eos)
                if row.state == WRITING and (text := row.take(tokens[-1])) is not None:
                    yield Written(number, text)
            if any(valid):
                chosen, valid = (torch.tensor(x, device=hidden.device)[:, None] for x in (tokens, valid))
                hidden = self.cache.feed(self.model, self.model.backbone.embed(chosen), valid, self.clean)[:, -1]

    def prefix(self, rows: list[int], contexts: tuple[str, ...]) -> PrefixCache:
        """What `rows` are denoised against: one row for each context and prompt."""
        made = {"whole": lambda: self.cache.select(rows),
                "images": lambda: self.prefill([self.rows[i].context("images") for i in rows])[0],
                "nothing": lambda: self.prefill([self.rows[0].context("nothing")])[0].select([0] * len(rows))}
        return PrefixCache.stack([made[name]() for name in contexts])

    def draw_images(self, rows: list[int]) -> Iterator[Event]:
        """Denoise one image in each of `rows` and feed it; return the last column's hidden states (B, C)."""
        x = yield from self.denoise(rows)
        for i, patches in zip(rows, x):
            yield Drawn(i, self.rows[i].drawn(patches))
        return self.append_images(rows, x)

    def denoise(self, rows: list[int]) -> Iterator[Event]:
        """Solve from noise to the patches (R, P, patch_dim) of one image for each of `rows`."""
        solver, canvases = self.solver(), {}
        noise = torch.stack([self.rows[i].noise() for i in rows])
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
                yield from (Preview(i, self.rows[i].image(patches), number + 1, len(solver.times))
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
