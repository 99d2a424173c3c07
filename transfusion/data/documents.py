"""From a record to the document that the model reads: its parts are arranged, encoded and cut to length.

An outline is a `Document` for which no picture was decoded: its images have a range in place of their patches. It is
made from text and from pictures' headers alone, and its tokens and targets are those of the document: the plan counts
outlines, the loader makes documents.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.data.arrays import fingerprint
from transfusion.data.chat import EncodedText
from transfusion.data.dataset import CONTEXTS
from transfusion.data.grids import Grids
from transfusion.data.sources.record import DataError, PictureRef, Record
from transfusion.data.stored_latents import PosteriorStore
from transfusion.sequence import Document, Image, Text, encode, with_clean_copies

Parts = list[Text | PictureRef]


class Encoded(NamedTuple):
    """A document, and pictures (channels, H, W) uint8 that an autoencoder has yet to encode: one an image, or none.

    noises: a seed for the latent of each of these pictures.
    """

    document: Document
    pictures: tuple[Tensor, ...]
    noises: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What of a model's configuration decides how documents are encoded; `factor`: pixels to a latent's position."""

    boi_token_id: int
    eoi_token_id: int
    image_channels: int
    patch_size: int
    factor: int = 1

    @classmethod
    def of(cls, config, factor: int = 1) -> "Kind":
        """Take it from a `TransfusionConfig`; `factor` is its autoencoder's, 1 where it draws pixels."""
        names = "boi_token_id", "eoi_token_id", "image_channels", "patch_size"
        return cls(**{name: getattr(config, name) for name in names}, factor=factor)


class Documents:
    """Makes documents of records.

    Args:
        tokenizer: of the model.
        kind: of the model's configuration.
        grids: sizes of pictures.
        template: makes parts of a conversation; it is called with the record, the tokens that fit (`max_length`) and a
            function that tells the tokens of a picture. Without one, conversations are refused.
        context: what later tokens read of an image that is drawn: noised, its noised patches, or clean, a clean copy.
        max_length: tokens that a document is cut to, before an image where the cut would go through it; of a pair whose
            picture is drawn the caption is cut, in either order. None: never cut.
        name: of the template, in fingerprints.
        store: latents of pictures that were encoded ahead.
    """

    def __init__(self, tokenizer, kind: Kind, grids: Grids, *, template: Callable[..., Parts] | None = None,
                 context: str = "noised", max_length: int | None = None, name: str = "",
                 store: PosteriorStore | None = None):
        if context not in CONTEXTS:
            raise ValueError(f"Documents: context is {context!r}; {' or '.join(map(repr, CONTEXTS))} fits")
        if grids.cell != kind.patch_size * kind.factor:
            raise ValueError(f"Documents: grids are of cells of {grids.cell} pixels and the model's patches are "
                             f"{kind.patch_size * kind.factor} pixels wide; equal ones fit")
        self.tokenizer, self.kind, self.grids, self.template = tokenizer, kind, grids, template
        self.context, self.max_length, self.name, self.store = context, max_length, name, store

    def fingerprint(self) -> str:
        """Return what changes when a length may."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rule = ["by size"] if self.grids.several_of_a_shape else []  # before this rule they had other lengths
        return fingerprint(
            backend.to_str() if backend is not None else self.tokenizer.get_vocab(), str(self.tokenizer.chat_template),
            self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, vars(self.kind), self.grids.grids,
            self.grids.mode, self.name, self.context, self.max_length, *rule)

    def parts(self, record: Record, image_first: bool = False, dropped: bool = False, caption: int = 0) -> Parts:
        """Arrange a record; the options are for pairs: which caption, whether it is left out, or behind the picture.

        A picture that is only read stands before its caption, which is never left out: it is what is learned then.

        Raises:
            DataError: a record without anything in it, a conversation without a template, or a picture that is drawn
                and longer than `max_length`. ValueError: a caption that cannot be tokenized.
        """
        if record.turns:
            if self.template is None:
                raise DataError(record.where, "this is a conversation, and there is no chat template; one fits",
                                "no chat template")
            return list(self.template(record, self.max_length, self.picture_tokens))
        if record.parts:
            return list(record.parts)
        if record.picture is None and not record.captions:
            raise DataError(record.where, "there is nothing in this record; text or a picture fits", "empty record")
        drawn = record.picture is not None and record.picture.loss
        texts = [Text(record.captions[caption])] if record.captions and not (dropped and drawn) else []
        if drawn:
            return self._drawn_pair(record, texts, image_first)
        return texts if record.picture is None else [record.picture, *texts]

    def _drawn_pair(self, record: Record, texts: list[Text], image_first: bool) -> Parts:
        """A picture that is drawn and its caption, of one length in both orders: the order is chosen after counting.

        Where `max_length` is reached, the picture stays and the caption is cut. Behind the picture `cut` does that: it
        takes EOS away, which would teach that the caption ends there. Before it, EOS ends the picture and stays.
        """
        texts = [self._without_bos(text) for text in texts]
        if self.max_length is not None:
            room = self.max_length - self.picture_tokens(record.picture) - 2  # of the caption, between BOS and EOS
            if room < -1:
                raise DataError(record.where, f"its picture and BOS are {self.max_length - room - 1} tokens, and "
                                f"max_length is {self.max_length}; a larger max_length, or smaller pictures, fit",
                                "picture longer than max_length")
            if room < 1:
                texts = [text for text in texts if len(text.ids) <= room]
            elif not image_first:
                texts = [replace(text, ids=text.ids[:room]) for text in texts]
        return [record.picture, *texts] if image_first else [*texts, record.picture]

    def _without_bos(self, text: Text) -> EncodedText:
        """A caption as it is behind BOS, so that it is as long behind a picture."""
        ids, bos = text.token_ids(self.tokenizer, self.kind), self.tokenizer.bos_token_id
        while ids[:1] == (bos,):
            ids = ids[1:]
        return EncodedText(text.text, text.loss, ids=ids)

    def picture_tokens(self, picture: PictureRef) -> int:
        """Tokens that a picture takes, with BOI and EOI.

        Raises:
            DataError: its header cannot be read.
        """
        rows, columns = self.grids.of(picture)
        return rows * columns + 2

    def outline(self, parts: Parts) -> Document:
        """Return the outline of arranged parts, as long as their document.

        Raises:
            DataError: a picture's header cannot be read. ValueError: text that cannot be tokenized.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        tokens, targets, images, text_seen, read = [bos], [False], [], False, ()
        for part in parts:
            if isinstance(part, PictureRef):
                grid = self.grids.of(part)
                count = grid[0] * grid[1]
                read += () if part.loss else (len(images),)
                images.append((len(tokens) + 1, range(count), grid, not text_seen))
                tokens += [self.kind.boi_token_id] + [self.kind.eoi_token_id] * (count + 1)
                targets += [part.loss] + [False] * (count + 1)
            else:
                ids = part.token_ids(self.tokenizer, self.kind)
                ids = ids[1:] if tokens == [bos] and ids[:1] == (bos,) else ids  # as `encode` does
                tokens += ids
                targets += [part.loss] * len(ids)
                text_seen = text_seen or bool(ids)
        return self._finish(Document([*tokens, eos], [*targets, text_seen], images, read=read))

    def encode(self, parts: Parts, flipped: bool = False, noise: int = 0) -> Encoded:
        """Decode the pictures of arranged parts and encode all; where an autoencoder is to encode them, latents are 0.

        Where the store holds latents of all of them, these are drawn and nothing is decoded. `noise` is the seed of
        latents, whoever draws them.

        Raises:
            DataError: a picture cannot be read. ValueError: text that cannot be tokenized.
        """
        latents = self._stored(parts, flipped, noise)
        found, pictures, noises = [], [], []
        for number, part in enumerate(parts):
            if number in latents:
                found.append(Image(latents[number], part.loss))
            elif isinstance(part, PictureRef):
                grid = self.grids.of(part)
                pixels = self.grids.pixels(part, grid, flipped)
                if self.kind.factor > 1:
                    pictures.append(((pixels + 1) * 127.5).round().byte())
                    noises.append((noise + number) % 2**64)
                    pixels = torch.zeros(self.kind.image_channels, *(side * self.kind.patch_size for side in grid))
                found.append(Image(pixels, part.loss))
            else:
                found.append(part)
        whole = encode(found, self.tokenizer, self.kind)
        document = self._finish(whole)
        kept = slice(len(document.images) - len(document.hidden))
        return Encoded(document, tuple(pictures[kept]), tuple(noises[kept]))

    def _stored(self, parts: Parts, flipped: bool, noise: int) -> dict[int, Tensor]:
        """Latents of the pictures by their places among the parts: of all of them, or of none."""
        latents: dict[int, Tensor] = {}
        for number, part in enumerate(parts if self.store is not None else ()):
            if isinstance(part, PictureRef):
                size = tuple(side * self.grids.cell for side in self.grids.of(part))
                latent = self.store.draw(part, size, self.grids.mode, flipped, (noise + number) % 2**64)
                if latent is None:
                    return {}
                latents[number] = latent
        return latents

    def _finish(self, document: Document) -> Document:
        document = cut(document, self.max_length)
        return with_clean_copies(document) if self.context == "clean" else document


def cut(document: Document, length: int | None) -> Document:
    """Return the first `length` tokens of a document; an image that would be cut through goes, from BOI to EOI."""
    if length is None or len(document.tokens) <= length:
        return document
    stop, images = length, []
    for start, patches, *others in document.images:
        if start + len(patches) + 1 > length:
            stop = min(stop, start - 1)
            break
        images.append((start, patches, *others))
    read = tuple(n for n in document.read if n < len(images))
    return Document(document.tokens[:stop], document.targets[:stop], images, read=read)


def has_target(document: Document, eos: int) -> bool:
    """Whether anything is learned from a document: text, or an image that is drawn. BOI and a last EOS do not count."""
    if len(document.images) > len(document.read) + len(document.hidden):
        return True
    return True in (document.targets[:-1] if document.tokens[-1] == eos else document.targets)


def extra_area(document: Document) -> int:
    """Pairs of tokens that see each other beyond the causal ones: inside images; less those that clean copies hide."""
    hidden = set(document.hidden)
    inside = sum(len(patches) * (len(patches) - 1) // 2 for _, patches, *_ in document.images)
    out = sum(len(patches) * (len(document.tokens) - start - len(patches))
              for n, (start, patches, *_) in enumerate(document.images) if n in hidden)
    return inside - out
