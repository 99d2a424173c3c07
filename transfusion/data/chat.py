"""Conversations to parts: a chat template around the turns, loss on the assistant's words only.

    vicuna_v1   SYSTEM USER: question ASSISTANT: answer</s>USER: ...            LLaVA-1.5's, id for id
    llama_2     [INST] <<SYS>>...<</SYS>> question [/INST] answer </s><s>[INST] ...
    chatml      <|im_start|>user ... <|im_end|>                                  Qwen's
    tokenizer   the tokenizer's own `chat_template`, such as SmolLM2's
    plain       pictures and answers alone: LLaVA's template for pre-training

The text between two pictures is tokenized in one piece, as LLaVA does, and then cut where the loss begins and ends: a
token is a target if its last character is the assistant's or ends its turn. So no word is tokenized otherwise because a
loss begins in front of it. Names of special tokens count as tokens only where a template wrote them; in the words of a
conversation they are spelled out.
"""
import contextlib
import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate, groupby, takewhile
from typing import Annotated, NamedTuple

from jinja2 import TemplateError

from transfusion.data.sources.record import DataError, PictureRef, Record, Turn, joined
from transfusion.sequence import Text
from transfusion.sequence.parts import check_unicode
from transfusion.settings import OneOf, check

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CHATML = "You are a helpful assistant."
TEMPLATES = ("vicuna_v1", "llama_2", "chatml", "tokenizer", "plain")
ONE_SYSTEM = ("vicuna_v1", "llama_2")  # these have one place for what the system says, in front of all else
DAY = datetime(2024, 7, 26)  # what templates that write a date are told: a text must not change from day to day
NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are written out."""

    template: Annotated[str, OneOf(TEMPLATES)] = "vicuna_v1"
    """vicuna_v1, llama_2, chatml, plain, or the tokenizer's own"""
    system: str | None = None
    """what the system says where a conversation does not say it; None: what the template has; "": nothing, unless
    the tokenizer's own template says something by itself"""
    image_position: Annotated[str, OneOf(("keep", "front"))] = "keep"
    """of a turn's pictures: where the author put them, or in front of its text, each with a new line, as in LLaVA"""


@dataclass(frozen=True)
class EncodedText(Text):
    """Text whose tokens are known already, as they were cut from a longer text."""

    ids: tuple[int, ...] = ()

    def token_ids(self, tokenizer, config) -> tuple[int, ...]:
        """Return its tokens."""
        return self.ids


class Piece(NamedTuple):
    """Text that a template (`said` is False) or an author wrote, and whether the model is trained to write it."""

    text: str
    loss: bool = False
    said: bool = False


Part = Text | PictureRef
Pieces = list[Piece | PictureRef]


def chat_parts(record: Record, tokenizer, settings: ChatSettings, *, room: int | None = None,
               picture_tokens: Callable[[PictureRef], int] | None = None) -> list[Part]:
    """Return a conversation as parts for `transfusion.sequence.encode`, which adds BOS and the last EOS.

    room: tokens that fit, with BOS and EOS. Of a longer conversation the last questions are left out with their
        answers, so that neither a picture nor an answer is cut.
    picture_tokens: how many tokens a picture takes, with BOI and EOI.

    Raises:
        ValueError: settings that do not fit, a template that this tokenizer cannot write, or a text that UTF-8 cannot.
        DataError: no target is in it, not even the first answer fits, or the template refuses its turns, such as one of
            the system behind others.
    """
    check("chat_parts", settings)
    turns = _with_system(record, settings)
    ends = [i + 1 for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not ends:
        raise DataError(record.where, "there is no turn of the assistant, so nothing to train on; at least one fits",
                        "no target")
    parts = _parts(record, turns[:ends[-1]], tokenizer, settings)
    if room is not None and length(parts, tokenizer, picture_tokens) > room:
        parts = _longest_that_fits(record, turns, ends, tokenizer, settings, room, picture_tokens)
    if not any(part.loss for part in parts):
        raise DataError(record.where, "nothing in it is a target; a turn of the assistant with text or a picture fits",
                        "no target")
    return parts


def question_parts(record: Record, tokenizer, settings: ChatSettings) -> list[Part]:
    """Return a conversation up to where an answer to its last question begins, as `chat_parts` writes it in training.

    Raises:
        ValueError: settings that do not fit, a template that this tokenizer cannot write, or a text that UTF-8 cannot.
        DataError: its last turn is not the user's, or the template refuses its turns.
    """
    check("question_parts", settings)
    if not record.turns or record.turns[-1].role != "user":
        raise DataError(record.where, "its last turn is not the user's; a question fits", "no question")
    turns = _with_system(record, settings)
    answered = _parts(record, (*turns, Turn("assistant", ("A",))), tokenizer, settings)
    ends = [i for i, part in enumerate(answered) if not part.loss]  # the answer's loss is in the parts behind
    return answered[:ends[-1] + 1] if ends else []


def turn_end(tokenizer, settings: ChatSettings) -> str:
    """Return the text that ends an answer in the template where it is not EOS, such as `<|im_end|>`; else "".

    A model was trained to write it before EOS, so what it says ends there.
    """
    end = "<|im_end|>" if settings.template == "chatml" else _answer_slot(tokenizer, settings).ending.strip()
    return "" if end == tokenizer.eos_token else end


def turn_spaces(tokenizer, settings: ChatSettings) -> bool:
    """Return whether a model is trained to write the template's own spaces around an answer's words."""
    slot = _answer_slot(tokenizer, settings)
    return settings.template in ("vicuna_v1", "llama_2") or slot.before.endswith(" ") or slot.ending.startswith(" ")


def length(parts: Sequence[Part], tokenizer, picture_tokens: Callable[[PictureRef], int] | None = None) -> int:
    """Tokens of a conversation's parts in a document, with BOS and EOS."""
    ids = [part.ids for part in parts[:1] if isinstance(part, EncodedText)]
    begins = bool(ids) and ids[0][:1] == (tokenizer.bos_token_id,)
    return 2 - begins + sum(len(part.ids) if isinstance(part, EncodedText) else picture_tokens(part) for part in parts)


def _longest_that_fits(record, turns, ends, tokenizer, settings, room, picture_tokens) -> list[Part]:
    """As many exchanges from the first on as fit, found by halving: more of them are never shorter."""
    fitting, low, high = None, 1, len(ends) - 1
    while low <= high:
        middle = (low + high) // 2
        parts = _parts(record, turns[:ends[middle - 1]], tokenizer, settings)
        if length(parts, tokenizer, picture_tokens) <= room:
            fitting, low = parts, middle + 1
        else:
            high = middle - 1
    if fitting is None:
        raise DataError(
            record.where,
            f"its first question and answer are longer than {room} tokens; shorter ones, or longer rows, fit",
            "too long",
        )
    return fitting


def _with_system(record: Record, settings: ChatSettings) -> tuple[Turn, ...]:
    turns = record.turns
    if settings.image_position == "front":
        turns = tuple(map(_pictures_first, turns))
    if settings.template in ONE_SYSTEM:
        turns = _one_system(record.where, turns, settings.template)
    if settings.system and turns[:1] and turns[0].role != "system":
        return Turn("system", (settings.system,)), *turns
    return turns


def _one_system(where: str, turns: tuple[Turn, ...], template: str) -> tuple[Turn, ...]:
    """Make one turn of the system's in front, a blank line between them; one behind others has no place.

    Raises:
        DataError: there is one behind others, whose words would be the assistant's.
    """
    front = list(takewhile(lambda turn: turn.role == "system", turns))
    rest = turns[len(front):]
    if late := [i for i, turn in enumerate(rest, len(front)) if turn.role == "system"]:
        raise DataError(where, f"turn {late[0]} is the system's and stands behind others, where the template "
                        f"{template!r} has no place for it; turns of the system in front of all others, or another "
                        "template, such as 'chatml', fit", "system behind others")
    if len(front) < 2:
        return turns
    parts = [part for turn in front if turn.text for part in ("\n\n", *turn.parts)]
    return Turn("system", tuple(parts[1:])), *rest


def _pictures_first(turn: Turn) -> Turn:
    """LLaVA's order: "<image>" and a new line for each picture, then the text without white space around it."""
    pictures = [part for part in turn.parts if isinstance(part, PictureRef)]
    if not pictures:
        return turn
    text = "".join(part for part in turn.parts if isinstance(part, str)).strip()
    parts = [part for picture in pictures for part in (picture, "\n")]
    return replace(turn, parts=tuple([*parts[:-1], f"\n{text}"] if text else parts[:-1]))


def _parts(record: Record, turns: Sequence[Turn], tokenizer, settings: ChatSettings) -> list[Part]:
    """Parts of these turns, up to the last target; the EOS behind it is left to `encode`."""
    try:
        pieces = _WRITE[settings.template](turns, settings, tokenizer)
    except TemplateError as error:
        raise DataError(record.where, f"the tokenizer's template refuses it ({error})", "template") from error
    parts = []
    for is_picture, run in groupby(pieces, lambda piece: isinstance(piece, PictureRef)):
        run = list(run)
        parts += run if is_picture else _encoded(run, tokenizer)
    while parts and not parts[-1].loss and isinstance(parts[-1], Text):
        parts.pop()
    if parts and isinstance(parts[-1], EncodedText) and parts[-1].ids[-1] == tokenizer.eos_token_id:
        ids, text = parts[-1].ids[:-1], parts[-1].text.removesuffix(tokenizer.eos_token)
        parts[-1:] = [replace(parts[-1], ids=ids, text=text)] if ids else []
    return parts


def _encoded(pieces: list[Piece], tokenizer) -> Iterator[EncodedText]:
    """Tokenize a run of pieces as one text; yield it cut where the loss changes.

    Raises:
        ValueError: a text that is no Unicode text.
    """
    pieces = [piece for piece in pieces if piece.text]
    for piece in pieces:
        check_unicode(piece.text)
    text = "".join(piece.text for piece in pieces)
    if not text:
        return
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                        verbose=False)
    special, starts = _special(tokenizer, len(tokenizer)), [0, *accumulate(len(piece.text) for piece in pieces)]
    tokens = []
    for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        # A token without characters, such as a prefix "▁", belongs to what follows it.
        last = stop - 1 if stop > start else min(start, len(text) - 1)
        piece = pieces[bisect_right(starts, last) - 1]
        spelled = _spelled(tokenizer, text[start:stop]) if piece.said and number in special else (number,)
        tokens += [(one, piece.loss, start) for one in spelled]
    begins = [i for i, token in enumerate(tokens) if i == 0 or token[1] != tokens[i - 1][1]]
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        chosen = tokens[begin:end]
        cut = text[chosen[0][2] if begin else 0:tokens[end][2] if end < len(tokens) else len(text)]
        yield EncodedText(cut, chosen[0][1], True, tuple(one for one, _, _ in chosen))


@functools.lru_cache(maxsize=8)
def _special(tokenizer, size: int) -> frozenset[int]:
    """Ids of special tokens; `size` keeps apart what the tokenizer had before tokens were added and has after."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"chat_parts: the tokenizer is a {type(tokenizer).__name__}, which does not say where its tokens "
            "stand; a fast one (tokenizers' backend) fits"
        )
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def _spelled(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _said(turn: Turn, loss: bool = False, strip: bool = False) -> Pieces:
    """A turn's own words and pictures; `strip` takes white space from both its ends."""
    parts = list(joined(turn.parts))
    if strip and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if strip and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part if isinstance(part, PictureRef) else Piece(part, loss, said=True) for part in parts]


def _split_system(turns: Sequence[Turn], settings: ChatSettings, default: str) -> tuple[Pieces, Sequence[Turn]]:
    """What the system says, and the other turns."""
    if turns[0].role == "system":
        return _said(turns[0]), turns[1:]
    system = default if settings.system is None else settings.system
    return [Piece(system)] if system else [], turns


def _vicuna_v1(turns: Sequence[Turn], settings: ChatSettings, tokenizer) -> Pieces:
    system, turns = _split_system(turns, settings, VICUNA)
    pieces = [*system, Piece(" ")] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [Piece("USER: "), *_said(turn), Piece(" ")]
        else:
            pieces += [Piece("ASSISTANT:"), Piece(" ", True), *_said(turn, True), Piece(tokenizer.eos_token, True)]
    return pieces


def _llama_2(turns: Sequence[Turn], settings: ChatSettings, tokenizer) -> Pieces:
    system, turns = _split_system(turns, settings, LLAMA_2)
    head = [Piece("<<SYS>>\n"), *system, Piece("\n<</SYS>>\n\n")] if system else []
    pieces = []
    for turn in turns:
        if turn.role == "user":
            pieces += [
                Piece(tokenizer.bos_token if pieces else ""),
                Piece("[INST] "),
                *head,
                *_said(turn),
                Piece(" [/INST]"),
            ]
            head = []
        else:
            pieces += [Piece(" ", True), *_said(turn, True), Piece(" ", True), Piece(tokenizer.eos_token, True)]
    return pieces


def _chatml(turns: Sequence[Turn], settings: ChatSettings, tokenizer) -> Pieces:
    for token in ("<|im_start|>", "<|im_end|>"):
        if not _is_token(tokenizer, len(tokenizer), token):
            raise ValueError(
                f"chat_parts: template is 'chatml', and the tokenizer has no token {token!r}; add it, or choose "
                f"another of {', '.join(map(repr, TEMPLATES))}"
            )
    system, turns = _split_system(turns, settings, CHATML)
    pieces = [Piece("<|im_start|>system\n"), *system, Piece("<|im_end|>\n")] if system else []
    for turn in turns:
        loss = turn.role == "assistant"
        pieces += [Piece(f"<|im_start|>{turn.role}\n"), *_said(turn, loss), Piece("<|im_end|>", loss), Piece("\n")]
    return pieces


@functools.lru_cache(maxsize=64)
def _is_token(tokenizer, size: int, token: str) -> bool:
    return len(tokenizer.encode(token, add_special_tokens=False)) == 1


def _plain(turns: Sequence[Turn], settings: ChatSettings, tokenizer) -> Pieces:
    """Each turn's words and a new line.

    Of a single question with pictures and its answer, the question's words are left out, as LLaVA does.
    """
    turns = [turn for turn in turns if turn.role != "system"]
    pictures = [part for part in turns[0].parts if isinstance(part, PictureRef)]
    if len(turns) == 2 and pictures:
        return [*pictures, *_said(turns[1], True), Piece("\n", True)]
    pieces = []
    for turn in turns:
        loss = turn.role == "assistant"
        pieces += [*_said(turn, loss), Piece("\n", loss)]
    return pieces


def _own_template(turns: Sequence[Turn], settings: ChatSettings, tokenizer) -> Pieces:
    """The tokenizer's template around the turns.

    The loss of an answer includes a space in front of it and the token that ends it.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "chat_parts: template is 'tokenizer', and the tokenizer has no chat_template; choose another of "
            f"{', '.join(map(repr, TEMPLATES))}"
        )
    frame = _frame(tokenizer, str(tokenizer.chat_template), tuple(turn.role for turn in turns))
    pieces = [Piece(frame[0].before)]
    for turn, slot, following in zip(turns, frame, [*frame[1:], None]):
        loss = turn.role == "assistant"
        if loss and pieces[-1].text.endswith(" "):
            pieces[-1:] = [Piece(pieces[-1].text[:-1]), Piece(" ", True)]
        pieces += _said(turn, loss, slot.strip)
        ending = len(slot.ending) if loss else 0
        between = slot.ending + (following.before if following else "")
        pieces += [Piece(between[:ending], True), Piece(between[ending:])]
    return pieces


class Slot(NamedTuple):
    """A turn's place in a template: the text before it, the token that ends it, and whether its text is stripped."""

    before: str
    ending: str
    strip: bool


def _answer_slot(tokenizer, settings: ChatSettings) -> Slot:
    """The first answer's place in the tokenizer's own template; an empty one where it is another, or refuses it."""
    if settings.template == "tokenizer" and tokenizer.chat_template:
        with contextlib.suppress(TemplateError):  # what is asked says why it is refused
            return _frame(tokenizer, str(tokenizer.chat_template), ("user", "assistant"))[1]
    return Slot("", "", False)


@functools.lru_cache(maxsize=128)
def _frame(tokenizer, template: str, roles: tuple[str, ...]) -> tuple[Slot, ...]:
    """Write a conversation of marks with the tokenizer's template; return what stands around the marks."""
    marks = [f"\t\ue000{i}\ue001\t" for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
    fixed = NOW.sub(lambda now: f"'{DAY.strftime(now[2])}'", template)
    written = tokenizer.apply_chat_template(messages, chat_template=fixed if fixed != template else None,
                                            tokenize=False, date_string=DAY.strftime("%d %b %Y"))
    pattern = "(\t?)\ue000(\\d+)\ue001(\t?)"
    found = list(re.finditer(pattern, written))
    if [int(match[2]) for match in found] != list(range(len(roles))):
        raise ValueError(
            f"chat_parts: template is 'tokenizer', whose template writes turns {[int(m[2]) for m in found]} of "
            f"{len(roles)}; one that writes each once, in order, fits"
        )
    slots, at = [], 0
    special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    for match, following in zip(found, [*found[1:], None]):
        rest = written[match.end():following.start() if following else len(written)]
        token = next((token for token in special if rest.lstrip().startswith(token)), "")
        ending = rest[:rest.index(token) + len(token)] if token else ""
        slots.append(Slot(written[at:match.start()], ending, not match[1]))
        at = match.end() + len(ending)
    return tuple(slots)


_WRITE = {"vicuna_v1": _vicuna_v1, "llama_2": _llama_2, "chatml": _chatml, "tokenizer": _own_template, "plain": _plain}
