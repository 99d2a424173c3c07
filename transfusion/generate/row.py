"""One prompt on its way: how its next token is chosen, what it has written and drawn, and its own random numbers.

A batch of prompts (`transfusion.generate.generation`) and the engine of a server (`transfusion.serve.engine`) run the
model in different ways; what a row does with the model's answers is the same for both and stands here.
"""
import math

import torch
from torch import Tensor

from tfkernels import unpatchify
from transfusion.diffusion.guidance import Guidance
from transfusion.diffusion.solvers import DDIMSolver, HeunSolver, SchedulerSolver, make_solver
from transfusion.generate.decoding import CUT, Decoding
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, Image, Part, Text, encode

WRITING, DRAWING, DONE = range(3)
COLDEST, HOTTEST = 1e-30, 1e30  # temperatures that float32 bears: 0 / 0 and inf / inf are NaN
RANKED = 1024  # tokens that are ranked at first, to find the likely ones: to sort 152 thousand takes 12 ms


def check_options(model, options: Sampling) -> tuple[int, int]:
    """Return the grid of patches of an image that is drawn with `options`.

    Raises:
        ValueError: no tokenizer, options that do not fit the model, or layers that keep no cache.
    """
    if model.tokenizer is None or model.tokenizer.eos_token_id is None:
        raise ValueError("generate: the model has no tokenizer with an EOS; set model.tokenizer to the one that it "
                         "was trained with")
    layers = model.backbone.decoder.modules() if model.config.backbone == "decoder" else ()
    if model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError("generate: the model is in training mode and recomputes activations, so that its layers keep "
                         "no keys and values; call model.eval() first")
    grid = grid_of(model.config, options)
    solver_of(model, options, grid)  # refuses what does not fit before anything runs
    return grid


def likely(chances: Tensor, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """The chances (K,) of the tokens (K,) that may be drawn, the likeliest first; None: of all tokens in their order.

    chances (V,) are those of all tokens. Tokens that may not be drawn stand here with 0, if at all.
    """
    if top_p == 1 and min_p == 0:
        return chances, None
    count = RANKED
    while True:
        ranked, tokens = chances.topk(min(count, len(chances)))
        left_out = (ranked.cumsum(-1) - ranked >= top_p) | (ranked < min_p * ranked[0])
        if left_out[-1] or count >= len(chances):
            left_out[0] = False  # top_p 0 leaves the likeliest
            return ranked.masked_fill(left_out, 0), tokens
        count *= 8


def grid_of(config, options: Sampling) -> tuple[int, int]:
    """Return the grid of patches of an image that is drawn with `options`.

    Raises:
        ValueError: an image_size that is no multiple of the patch size.
    """
    size, patch = tuple(options.image_size or config.image_size), config.patch_size
    if any(side < patch or side % patch for side in size):
        raise ValueError(f"generate: image_size is {size} and the patch size {patch}; "
                         "multiples of the patch size fit")
    return size[0] // patch, size[1] // patch


def guidance_of(options: Sampling) -> Guidance:
    """The guidance of options, which may hold its scale alone."""
    return options.guidance if isinstance(options.guidance, Guidance) else Guidance(options.guidance)


def solver_of(model, options: Sampling, grid: tuple[int, int]) -> DDIMSolver | HeunSolver | SchedulerSolver:
    """A solver for one image of `grid`, or several of one size."""
    return make_solver(options.sampler, model.objective, options.steps, grid[0] * grid[1],
                       model.config.time_shift_tokens)


class Row:
    """One prompt: what it wrote since its last image, its finished parts and its own random numbers."""

    def __init__(self, model, prompt: list[Part], options: Sampling, grid: tuple[int, int], seed: int, decoder=None):
        self.model, self.config, self.prompt, self.options, self.grid = model, model.config, prompt, options, grid
        self.decoder = model.tokenizer if decoder is None else decoder  # makes text of tokens
        self.decoding = Decoding(self.decoder)  # of what was written since the last image
        self.eos = model.tokenizer.eos_token_id
        self.generator = torch.Generator().manual_seed(int(seed) if seed < 2**64 else int(seed) - 2**64)
        self.stop = (*(options.stop or ()), *([options.turn_end] if options.turn_end else ()))
        self.state, self.text = WRITING, ""
        self.parts: list[Part] = []
        self.images = self.written = 0
        self.stopped = False  # by one of the texts that end it

    def document(self, force_image: bool) -> Document:
        """The prompt, and the BOI of an image behind it where one is forced.

        Raises:
            ValueError: it may need more positions than the decoder has.
        """
        document = encode(self.prompt, self.model.tokenizer, self.config, end=False)
        image, options, room = self.grid[0] * self.grid[1] + 2, self.options, self.model.backbone.room
        more = options.max_new_tokens + max(options.max_images, int(force_image)) * image
        if room is not None and len(document.tokens) + more > room:
            raise ValueError(f"generate: the prompt has {len(document.tokens)} tokens and what is made of it may have "
                             f"{more}; {room}, the decoder's positions, fit; give less, or ask for less")
        if not force_image:
            self._go_on(document)
        return self._then_image(document) if force_image else document

    def _go_on(self, document: Document) -> None:
        """Read what will be written as going on with the text that the prompt ends with.

        Behind a chat's template, whose text is special, an answer begins anew.
        """
        last, before = self.prompt[-1] if self.prompt else None, document.tokens[-1:]
        if isinstance(last, Text) and last.text and not last.special and not self.decoder.decode(before).endswith(CUT):
            self.decoding = Decoding(self.decoder, before)

    def context(self, name: str) -> Document:
        """What stands before an image in a context of guidance, with the image's BOI.

        "nothing" is an empty prompt. "images" are those of the prompt and those that were drawn, without any text.
        """
        images = [part for part in (*self.prompt, *self.parts) if isinstance(part, Image)]
        if name == "nothing" or not images:
            return self._then_image(Document([self.model.tokenizer.bos_token_id], [False], []))
        return self._then_image(encode(images, self.model.tokenizer, self.config, end=False))

    def choose(self, scores: Tensor) -> int:
        """Pick the next token by logits (V,); EOS once enough is written."""
        options = self.options
        if self.written >= options.max_new_tokens:
            return self.eos
        scores = scores.clone()
        scores[self.config.eoi_token_id] = -torch.inf
        if self.images >= options.max_images:
            scores[self.config.boi_token_id] = -torch.inf
        if options.temperature == 0:
            best, token = scores.max(-1)  # NaN where a score is
            check_finite("generate", float(best))
            return int(token)
        temperature = min(max(options.temperature, COLDEST), HOTTEST)
        chances, tokens = likely(scores.sub_(scores.max()).div_(temperature).softmax(-1), options.top_p, options.min_p)
        reached = chances.cumsum(-1, dtype=torch.float64)
        check_finite("generate", float(reached[-1]))
        drawn = torch.rand((), dtype=torch.float64, generator=self.generator) * reached[-1]  # below the last
        place = torch.searchsorted(reached, drawn, right=True)
        return int(place if tokens is None else tokens[place])

    def take(self, token: int) -> str | None:
        """Add a token to what is written, or end or begin to draw; return what became readable, None for nothing.

        What may be the beginning of a text that ends the row is held back until it is known to be none.
        """
        whole = None
        if token == self.eos:
            self.state = DONE
        elif token == self.config.boi_token_id:
            self.state = DRAWING
        else:
            self.decoding.tokens.append(token)
            self.written += 1
            whole = self.decoding.text()
            self.stopped = self._before_stop(whole) != whole
            self.state = DONE if self.stopped else WRITING
        text = self._said(whole)
        if self.state != WRITING:
            return self._new(text)
        if text.endswith(CUT):  # a character of several tokens is not whole yet
            return None
        text = text[:len(text) - self._held_back(text)]
        return self._new(text.removesuffix(" ") if self.options.turn_spaces else text)

    def noise(self) -> Tensor:
        """The patches (P, patch_dim) from which the next image is drawn."""
        return torch.randn(self.grid[0] * self.grid[1], self.config.patch_dim, generator=self.generator)

    def image(self, patches: Tensor) -> Image:
        """An image on the host from its patches."""
        height, width = (side * self.config.patch_size for side in self.grid)
        patches = patches.float().cpu()
        check_finite("generate", float(patches.sum()))
        with torch.inference_mode(False):  # what users get may be changed and trained on
            return Image(unpatchify(patches.clone(), self.config.patch_size, height, width)[0])

    def drawn(self, patches: Tensor) -> Image:
        """Put the finished image of patches behind what was written, and go on writing."""
        self.finish()
        self.parts.append(self.image(patches))
        self.images += 1
        self.state = WRITING
        return self.parts[-1]

    def finish(self) -> None:
        """Make what was written since the last image a part, if it is anything."""
        text = self._said()
        self.parts += [Text(text)] if text else []
        self.decoding, self.text = Decoding(self.decoder), ""

    def _then_image(self, document: Document) -> Document:
        """The document and the BOI of an image behind it."""
        return document._replace(tokens=[*document.tokens, self.config.boi_token_id], targets=[*document.targets, True])

    def _said(self, whole: str | None = None) -> str:
        """What was written since the last image, `whole` if it is known, without what the template adds or ends with.
        """
        text = self._before_stop(self.decoding.text() if whole is None else whole)
        if self.options.turn_spaces:
            text = text if self.parts else text.removeprefix(" ")
            text = text.removesuffix(" ") if self.state == DONE else text
        return text

    def _new(self, text: str) -> str | None:
        """What of a text was not returned yet."""
        new, self.text = text[len(self.text):], text
        return new or None

    def _held_back(self, text: str) -> int:
        """Length of the longest end of a text that is a beginning of one that ends the row."""
        return max((n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1))
                    if text.endswith(stop[:n])), default=0)

    def _before_stop(self, text: str) -> str:
        """What of a text stands before the first of the texts that end it: all of it where none is there."""
        return text[:min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]


def check_finite(op: str, found: float) -> None:
    """Refuse what a model gave where it is not finite: all that follows would be noise that looks like an answer.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if not math.isfinite(found):
        raise ValueError(f"{op}: the model's outputs are not finite numbers; the dtype bfloat16 or float32, whose "
                         "range is wider than float16's, or an earlier checkpoint fits")
