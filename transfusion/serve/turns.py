"""A conversation's turns as the parts that a model goes on from."""
from collections.abc import Mapping, Sequence

from transfusion.data.chat import TEMPLATES, ChatSettings, question_parts, turn_end, turn_spaces
from transfusion.data.sources.record import PictureRef, Record, Turn
from transfusion.sequence import Image, Part, Text

NO_TEMPLATE = "none"
TEMPLATE_NAMES = (NO_TEMPLATE, *TEMPLATES)


def parts_of(turns: Sequence[Turn], images: Mapping[str, Image], tokenizer, template: str) -> list[Part]:
    """Return the parts of turns whose pictures are called by the names of `images`.

    With the template "none" these are all texts and pictures in order; others are those of training, up to where the
    assistant's answer begins.

    Raises:
        ValueError: turns that the template refuses.
    """
    if template == NO_TEMPLATE:
        given = [part for turn in turns for part in turn.parts if part != ""]
        return [Text(part) if isinstance(part, str) else images[part.name] for part in given]
    parts = question_parts(Record("the conversation", turns=tuple(turns)), tokenizer, ChatSettings(template=template))
    return [images[part.name] if isinstance(part, PictureRef) else part for part in parts]


def answer_options(template: str, tokenizer) -> dict[str, str | bool]:
    """Return the options of `TextSampling` that a template of `TEMPLATE_NAMES` asks for: how its answers begin and end.
    """
    if template == NO_TEMPLATE:
        return {"turn_end": "", "turn_spaces": False}
    settings = ChatSettings(template=template)
    return {"turn_end": turn_end(tokenizer, settings), "turn_spaces": turn_spaces(tokenizer, settings)}
