"""A request: what it asks for, what it may ask for, and its program from the prompt to its end.

The program is a generator that reads top to bottom: it yields what the model is to run and is sent the answers. An
engine runs many of them together (`transfusion.serve.engine`).
"""
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.diffusion.objective import solve
from transfusion.generate.generation import Drawn, Event, Preview, Written
from transfusion.generate.row import DONE, DRAWING, WRITING, Row, check_options, guidance_of, solver_of
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, Part
from transfusion.serve.pages import PAGE
from transfusion.serve.ragged_cache import Context, Denoise, Feed
from transfusion.settings import Count, check, check_value, shown

Ask = Feed | Denoise
MOST_STOPS = 4  # texts that end a row, each compared with what is written at every token


class Finished(NamedTuple):
    """A request is done: its parts, why it ended ("stop" or "length"), and tokens of prompt and text."""

    parts: list[Part]
    reason: str
    prompt_tokens: int
    written_tokens: int


class Failed(NamedTuple):
    """A request ended without a result."""

    error: Exception


@dataclass(frozen=True)
class Request:
    """What to go on from, and how. `draw` forces one image right behind the parts."""

    parts: list[Part]
    sampling: Sampling = Sampling()
    draw: bool = False

    def __post_init__(self):
        check_value("Request", "sampling", self.sampling, Sampling)
        check_value("Request", "draw", self.draw, bool)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much memory all have together."""

    request_tokens: Count = 4096
    """cached tokens of one request: prompt, text and images that it may write, and its guidance's contexts"""
    cache_tokens: Count = 16384
    """cached tokens of all requests that run: the pool, which is allocated at the start"""
    steps: Count = 250
    """denoising steps of an image"""
    pixels: Count = 2**20
    """height times width of an image, in the model's own pixels or latents"""
    images: Count = 8
    """images that one request draws"""

    def __post_init__(self):
        check("Limits", self)


@dataclass(eq=False)
class Running:
    """A request and its place: the contexts it has, what it asks for and the answers so far.

    Raises:
        ValueError: a request that does not fit the model or the limits; the argument is named.
    """

    request: Request
    model: object
    limits: Limits
    tell: Callable[[Event | Finished | Failed], None]
    remember: Callable[[list[int], Document], None]
    counts: Counter
    decoder: object  # a tokenizer of the engine's own
    contexts: dict[str, Context] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    answers: list[Tensor | None] = field(default_factory=list)
    cancelled: bool = False

    def __post_init__(self):
        model, options, most = self.model, self.request.sampling, self.limits.steps
        if options.steps > most:  # before anything, for a solver holds numbers of every step
            raise ValueError(f"submit: steps is {options.steps}; at most {most} fit")
        if len(options.stop or ()) > MOST_STOPS:
            raise ValueError(f"submit: stop is {shown(options.stop)}; at most {MOST_STOPS} texts fit")
        grid = check_options(model, options)
        self.guidance = guidance_of(options)
        self.row = Row(model, self.request.parts, options, grid, options.seed, self.decoder)
        self.document = self.row.document(self.request.draw)
        self.sizes = self._sizes()
        self._check()
        self.coroutine = self.program()

    def _sizes(self) -> dict[str, int]:
        """Tokens of each context that the request may need at most."""
        options, patches = self.request.sampling, self.row.grid[0] * self.row.grid[1]
        images = max(options.max_images, int(self.request.draw))
        sizes = {"whole": len(self.document.tokens) + options.max_new_tokens + images * (patches + 2)}
        given = sum(len(x) + 2 for _, x, *_ in self.document.images)
        others = {"nothing": 2 + patches, "images": 1 + given + images * (patches + 2)}
        return sizes | {name: others[name] for name in self.guidance.contexts[1:] if images}

    def _check(self) -> None:
        """Refuse what is over the limits."""
        limits, options, model = self.limits, self.request.sampling, self.model
        height, width = (side * model.config.patch_size for side in self.row.grid)
        tokens, at_most = sum(self.sizes.values()), min(limits.request_tokens, limits.cache_tokens)
        pages = sum(-(-size // PAGE) * PAGE for size in self.sizes.values())
        written = options.max_new_tokens
        is_text = written and tokens - written <= at_most  # without text it would fit
        for name, value, fits, what in (
                ("image_size", (height, width), height * width <= limits.pixels,
                 f"at most {limits.pixels} pixels in all fit"),
                ("max_images", options.max_images, options.max_images <= limits.images,
                 f"at most {limits.images} fit"),
                ("cuda_graph", options.cuda_graph, not options.cuda_graph, "False fits an engine, whose rows change"),
                ("max_new_tokens" if is_text else "parts",
                 f"{written} and the prompt of {len(self.document.tokens)} tokens" if is_text else
                 f"of {len(self.document.tokens)} tokens and max_new_tokens {written}",
                 tokens <= at_most and pages <= limits.cache_tokens,
                 f"with images and guidance that takes {tokens} cached tokens, of which {at_most} fit; a shorter "
                 "prompt, less text or fewer or smaller images fit")):
            if not fits:
                raise ValueError(f"submit: {name} is {value}; {what}")

    def program(self) -> Generator[list[Ask], list[Tensor], Finished]:
        """The request from its prompt to its end: yields what the model is to run and is sent the answers."""
        row, whole = self.row, self.contexts["whole"]
        self.counts["reused_tokens"] += whole.length
        scores, = yield [Feed(whole, _behind(self.document, whole.length))]
        self.remember(whole.pages, self.document)
        row.state = DRAWING if self.request.draw else WRITING
        while True:
            while row.state == WRITING:
                token = row.choose(scores)
                text = row.take(token)
                self.counts["written_tokens"] += token not in (row.eos, row.config.boi_token_id)
                if text is not None:
                    self.tell(Written(0, text))
                if row.state != DONE:
                    scores, = yield [Feed(whole, Document([token], [False], []))]
            if row.state == DONE:
                break
            patches = yield from self.image()
            self.tell(Drawn(0, row.drawn(patches)))
            self.counts["drawn_images"] += 1
            if row.written >= row.options.max_new_tokens:
                break
            eoi = row.config.eoi_token_id
            tokens = [eoi] * (len(patches) + 1)
            image = Document(tokens, [False] * len(tokens), [(0, patches, row.grid, False)])
            scores, = yield [Feed(whole, image)]
        row.finish()
        is_full = not row.stopped and row.written >= row.options.max_new_tokens > 0
        return Finished(row.parts, "length" if is_full else "stop", len(self.document.tokens), row.written)

    def image(self) -> Generator[list[Ask], list[Tensor], Tensor]:
        """One image from noise to patches (P, patch_dim) on the host, as `generation` draws it."""
        row, model, guidance = self.row, self.model, self.guidance
        solver, asked = solver_of(model, row.options, row.grid), {"whole"}
        x = solver.start(row.noise()[None]).to(model.device)                               # (1, P, patch_dim)
        for number, t in enumerate(solver.times.tolist()):
            given = solver.input(x, number)
            names = guidance.contexts if guidance.active(t) else ("whole",)
            if missing := [name for name in names if name not in asked]:
                for name in missing:
                    self.contexts[name].length = 0  # of an earlier image
                yield [Feed(self.contexts[name], row.context(name)) for name in missing]
                asked.update(missing)
            predictions = yield [Denoise(self.contexts[name], given[0], row.grid, t) for name in names]
            prediction = guidance.combine(torch.stack(predictions)[:, None])
            x = solver.advance(x, prediction, number)
            self.counts["denoising_steps"] += 1
            if row.options.previews:
                estimate = solve(model.objective, given, prediction, torch.full((), t, device=x.device))[0]
                self.tell(Preview(0, row.image(estimate[0]), number + 1, len(solver.times)))
        return x[0].cpu()


def _behind(document: Document, read: int) -> Document:
    """What of a document stands behind its first `read` tokens, which cut no image."""
    images = [(start - read, *image) for start, *image in document.images if start >= read]
    return Document(document.tokens[read:], document.targets[read:], images)
