"""The parts of a document: Text and Image, what a user gives and gets back."""
import functools
from dataclasses import dataclass

from torch import Tensor

SHORT = 200  # characters of texts whose tokens are kept: captions come again, and long texts would fill the memory


@dataclass(frozen=True)
class Text:
    """A run of text; `loss=False` for text the model reads but is not trained to write (questions, instructions).

    Text is characters: "<boi>", "</s>" and other names of special tokens in it are spelled out, and decoding gives
    them back. Special tokens are read only in what a chat template wrote. That is text that begins with BOS, where
    the tokenizer has a template, and text of which `special=True` says that it is a template's or a piece of it. BOI
    and EOI are never read, for only an image has them. A BOS at the beginning of a text is always one.
    """

    text: str
    loss: bool = True
    special: bool = False

    def token_ids(self, tokenizer, config) -> tuple[int, ...]:
        """Return its tokens."""
        images, template = (config.boi_token_id, config.eoi_token_id), bool(tokenizer.chat_template)
        is_short = isinstance(self.text, str) and len(self.text) <= SHORT
        tokenize = _token_ids if is_short else _token_ids.__wrapped__
        return tokenize(tokenizer, len(tokenizer), self.text, self.special, template, images)


@dataclass(frozen=True, eq=False)
class Image:
    """An image or its VAE latent, (channels, height, width), values around [-1, 1].

    `loss=False` for an image that the model only reads: it stays clean, has no loss, and its BOI is no target.
    """

    latent: Tensor
    loss: bool = True


Part = Text | Image


def check_unicode(text: str) -> None:
    """Refuse a text that UTF-8 cannot write, such as one with half of a surrogate pair, which no tokenizer takes.

    Raises:
        ValueError: it is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Text: text is {text[:60]!r}, which is no Unicode text ({error.reason}); "
                         "what UTF-8 can write fits") from None


@functools.lru_cache(maxsize=2**14)
def _token_ids(tokenizer, size: int, text: str, special: bool, template: bool, images: tuple) -> tuple[int, ...]:
    """Tokens of a text: special tokens are spelled out or, in a chat template's text, read, but for `images`: BOI, EOI.

    `size`, the tokenizer's, keeps apart what it made before tokens were added and what it makes after.
    """
    if not isinstance(text, str):
        raise ValueError(f"Text: text is a {type(text).__name__}; a str fits")
    check_unicode(text)
    bos = tokenizer.bos_token
    begins = bool(bos) and text.startswith(bos)
    if special or begins and template:
        found = _ids(tokenizer, text, split=False)
        spelled = {i: _spelled(tokenizer, tokenizer.convert_ids_to_tokens(i), images) for i in images if i in found}
        return tuple(i for one in found for i in spelled.get(one, (one,)))
    if begins:
        return tokenizer.bos_token_id, *_spelled(tokenizer, text[len(bos):], images)
    return _spelled(tokenizer, text, images)


def _spelled(tokenizer, text: str, images: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of a text in which no special token is read."""
    ids = _ids(tokenizer, text, split=True)
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, *images} - {tokenizer.unk_token_id}
    if found := control.intersection(ids):
        raise ValueError(f"Text: text is {text[:60]!r}, in which this tokenizer reads "
                         f"{tokenizer.convert_ids_to_tokens(min(found))!r} as a special token even where it is told to "
                         "spell it; text without it fits")
    return ids


def _ids(tokenizer, text: str, *, split: bool) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))
