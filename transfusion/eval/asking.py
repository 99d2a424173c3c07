"""Questions about pictures, put to a model as training puts them, and its answers.

A question with its pictures is a conversation of one turn: the chat template, the pictures' sizes and the tokenization
are those of training (`transfusion.data.chat`, `transfusion.data.grids`). The prompt ends where the loss of an answer
begins.
"""
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from PIL import Image as Picture
from tqdm import tqdm

from transfusion.data.chat import TEMPLATES, ChatSettings, chat_parts, question_parts, turn_end, turn_spaces
from transfusion.data.grids import MODES, Grids, GridSettings
from transfusion.data.mixture import read_mixture
from transfusion.data.model_images import picture_shape, pixel_factor
from transfusion.data.sources.record import PictureRef, Record, Turn
from transfusion.generate.generation import generate_batch, read
from transfusion.generate.row import check_finite
from transfusion.sequence import Document, Image, Part, Text, encode
from transfusion.settings import Count, OneOf


class Question(NamedTuple):
    """A text and the pictures that stand before it, upright and RGB or RGBA."""

    text: str
    pictures: tuple[Picture.Image, ...] = ()
    where: str = "a question"
    """for messages"""
    shown_last: bool = False
    """the pictures stand behind the text"""


class Likelihood(NamedTuple):
    """The log-probability of an answer, whether each of its tokens is the likeliest, and how many it has."""

    log_probability: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Asking:
    """How questions are put; the settings of a mixture's file, where the model was trained on one."""

    chat: ChatSettings
    pictures: GridSettings

    def about(self, prompts: str) -> dict[str, str]:
        """Return the fields of a result that say how `prompts` were put and their pictures shown."""
        return {"prompts": f"{prompts}; template {self.chat.template}",
                "resize": f"{self.pictures.mode}, side {self.pictures.side}"}


@dataclass(frozen=True)
class AskingSettings:
    """How questions are put: as the mixture says that the model was trained on, or as LLaVA does."""

    mixture: Path | None = None
    """the file of the mixture that the model was trained on, whose chat and pictures count; the three options below
    are then left out"""
    template: Annotated[str, OneOf(TEMPLATES)] = "vicuna_v1"
    """the chat template"""
    mode: Annotated[str, OneOf(MODES)] = "pad"
    """pictures are padded to a square, cropped to the nearest grid, or cut to their central square"""
    side: Count | None = None
    """pixels of a picture's side; None: as the model draws"""
    max_new_tokens: Count | None = None
    """tokens of an answer at most; None: as many as the benchmark says, and 32 of questions of one's own"""

    def asking(self, model) -> Asking:
        """Return what `Asker` takes.

        Raises:
            ValueError: options that do not fit, or beside a mixture that says them.
        """
        if self.mixture is not None:
            if (self.template, self.mode, self.side) != ("vicuna_v1", "pad", None):
                raise ValueError(f"eval: mixture is {str(self.mixture)!r}, which says how pictures are shown and what "
                                 "template is written; leave template, mode and side out")
            mixture = read_mixture(self.mixture)
            return Asking(mixture.chat, mixture.pictures)
        side = self.side or model.config.image_size[0] * pixel_factor(model.vae)
        return Asking(ChatSettings(template=self.template, image_position="front"),
                      GridSettings(side=side, mode=self.mode))


class Asker:
    """Puts questions to a model, several at once."""

    def __init__(self, model, asking: Asking):
        if model.tokenizer is None:
            raise ValueError("eval: the model has no tokenizer; a checkpoint that was saved with one fits")
        channels, *_ = picture_shape(model.config, model.vae)
        self.model, self.asking = model, asking
        self.grids = Grids(asking.pictures, model.config.patch_size * pixel_factor(model.vae), channels)
        self.room = model.config.text_config.get_text_config().max_position_embeddings
        self.turn_end = turn_end(model.tokenizer, asking.chat)
        self.turn_spaces = turn_spaces(model.tokenizer, asking.chat)

    def prompt(self, question: Question) -> list[Part]:
        """Return a question's parts, up to where the answer begins."""
        parts = question_parts(_record(question), self.model.tokenizer, self.asking.chat)
        return self._with_pictures(parts, question)

    def answers(self, questions: Sequence[Question], *, max_new_tokens: int, stop: tuple[str, ...] = (),
                **sampling) -> list[str | None]:
        """Return an answer to each question, without white space around it; `sampling` as in `generate_batch`.

        No more is written than the model has positions for behind the question, and the answer to one that fills them
        is None. Questions with less room than others are asked apart, so that no answer depends on its neighbours.
        """
        prompts, groups = [self.prompt(question) for question in questions], defaultdict(list)
        for number, prompt in enumerate(prompts):
            length = len(encode(prompt, self.model.tokenizer, self.model.config, end=False).tokens)
            if length < self.room:
                groups[min(max_new_tokens, self.room - length)].append(number)
            else:
                tqdm.write(f"left out: {questions[number].where} has {length:,} tokens with its pictures and the model "
                           f"has {self.room:,} positions")
        said: list[str | None] = [None] * len(questions)
        for most, numbers in groups.items():
            written = generate_batch(self.model, [prompts[number] for number in numbers], max_images=0,
                                     max_new_tokens=most, stop=stop or None, turn_end=self.turn_end, **sampling)
            for number, parts in zip(numbers, written):
                said[number] = "".join(part.text for part in parts if isinstance(part, Text)).strip()
        return said

    @torch.inference_mode()
    def likelihoods(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Likelihood]:
        """Return for each question how likely an answer is: sum_i log p(answer_i | prompt, answer_<i).

        Neither EOS nor what else a template ends an answer with is a part of it. Where question and answer have more
        tokens than the model has positions, it is not likely at all (-inf).

        Raises:
            ValueError: it is not a finite number.
        """
        documents = []
        for question, answer in zip(questions, answers):
            parts = chat_parts(_record(question, answer), self.model.tokenizer, self.asking.chat)
            documents.append(encode(self._with_pictures(parts, question), self.model.tokenizer, self.model.config,
                                    end=False))
        fit = [document for document in documents if len(document.tokens) <= self.room]
        hidden, found = iter(read(self.model, fit)[1] if fit else ()), []
        for document, question in zip(documents, questions):
            if len(document.tokens) > self.room:
                tqdm.write(f"not weighed: {question.where} has {len(document.tokens):,} tokens with its pictures and "
                           f"an answer, and the model has {self.room:,} positions")
                found.append(Likelihood(-math.inf, False, 1))
                continue
            states = next(hidden)
            places = self._of_answer(document)
            ids = torch.tensor([document.tokens[i] for i in places], device=states.device)
            behind = len(states) - len(document.tokens)  # padding stands left
            before = torch.tensor([behind + i - 1 for i in places], device=states.device)
            scores = self.model.backbone.logits(states[before]).float().log_softmax(-1)
            total = float(scores.gather(1, ids[:, None]).sum())
            check_finite("eval", total)
            found.append(Likelihood(total, bool((scores.argmax(1) == ids).all()), len(ids)))
        return found

    def _of_answer(self, document: Document) -> list[int]:
        """The places of an answer's tokens, without those that its template ends it with."""
        places = [i for i, target in enumerate(document.targets) if target]
        while places:
            last = self.model.tokenizer.decode([document.tokens[places[-1]]])
            if last != self.turn_end and not (self.turn_spaces and not last.strip()):
                break
            places.pop()
        return places

    def _with_pictures(self, parts: Iterable[Text | PictureRef], question: Question) -> list[Part]:
        """The parts with images in the places of pictures, in order."""
        pictures = iter(question.pictures)
        return [self._image(next(pictures)) if isinstance(part, PictureRef) else part for part in parts]

    def _image(self, picture: Picture.Image) -> Image:
        pixels = self.grids.fitted(picture, self.grids.nearest(*picture.size))
        return Image(pixels if self.model.vae is None else self.model.vae.encode(pixels[None])[0], loss=False)


def _record(question: Question, answer: str | None = None) -> Record:
    """A question as a conversation, as LLaVA's data have one: pictures and text parted by new lines."""
    pictures = [PictureRef(b"", loss=False, name=question.where) for _ in question.pictures]
    shown = [part for picture in pictures for part in (picture, "\n")]
    said = (question.text, *reversed(shown)) if question.shown_last else (*shown, question.text)
    turns = [Turn("user", said)]
    turns += [] if answer is None else [Turn("assistant", (answer,))]
    return Record(question.where, turns=tuple(turns))
