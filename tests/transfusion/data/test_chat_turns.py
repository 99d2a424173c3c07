"""Turns that templates may not know: of the system in other places, without words, in pieces, in no Unicode text."""
import pytest

from tests.transfusion.data.test_chat import HELLO, MISTRAL, SMOL, byte_level, encoded_ids, llama_like, record, written
from transfusion.data.chat import ChatSettings, chat_parts, question_parts
from transfusion.data.sources import DataError, PictureRef, Record, Turn


@pytest.fixture(scope="module")
def legacy():
    return llama_like(True)


def said(*turns):
    """A conversation of (role, words)."""
    return Record("test, row 0", turns=tuple(Turn(role, (words,)) for role, words in turns))


ASKED = [("user", "hi"), ("assistant", "hello"), ("system", "the bus"), ("user", "the cat"), ("assistant", "the mat")]


@pytest.mark.parametrize("front", ["front", "keep"])
@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2"])
def test_what_the_system_says_behind_others_is_never_the_assistants(legacy, template, front):
    settings = ChatSettings(template=template, image_position=front)
    refused = f"test, row 0: turn 2 is the system's and stands behind others, where the template '{template}' has no"
    for make, turns in ((chat_parts, ASKED), (question_parts, ASKED[:4])):
        with pytest.raises(DataError, match=refused) as error:
            make(said(*turns), legacy, settings)
        assert error.value.kind == "system behind others"


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2"])
def test_turns_of_the_system_in_front_are_one_with_a_blank_line_between(legacy, template):
    settings = ChatSettings(template=template)
    several = said(("system", "Be short."), ("system", ""), ("system", "Be kind."), *ASKED[:2])
    one = said(("system", "Be short.\n\nBe kind."), *ASKED[:2])
    assert chat_parts(several, legacy, settings) == chat_parts(one, legacy, settings)


@pytest.mark.parametrize("template, tokenizer", [("chatml", byte_level()), ("tokenizer", byte_level(SMOL))],
                         ids=["chatml", "tokenizer"])
def test_templates_that_name_each_turns_speaker_write_the_system_where_it_speaks(template, tokenizer):
    turns = [("system", "S"), ("system", "T"), *ASKED]
    parts = chat_parts(said(*turns), tokenizer, ChatSettings(template=template))
    whole = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)
    assert "".join(part.text for part in parts) == whole.removesuffix("<|im_end|>\n")
    assert written(parts).count("[") == 2, "the assistant's two answers are learned"


def stripping():
    """A tokenizer whose template takes white space from both ends of a turn."""
    tokenizer = llama_like(True)
    tokenizer.chat_template = MISTRAL
    return tokenizer


@pytest.mark.parametrize("template, make", [
    ("vicuna_v1", lambda: llama_like(True)), ("llama_2", lambda: llama_like(True)), ("chatml", byte_level),
    ("tokenizer", lambda: byte_level(SMOL)), ("tokenizer", stripping), ("plain", lambda: llama_like(True))])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_turn_without_parts_is_one_of_no_words(template, make, empty):
    tokenizer, settings = make(), ChatSettings(template=template)
    turns = record(HELLO[:3]).turns

    def asked(parts):
        replaced = [*turns[:empty], Turn(turns[empty].role, parts), *turns[empty + 1:]]
        return encoded_ids(question_parts(Record("r", turns=tuple(replaced)), tokenizer, settings), tokenizer)

    assert asked(()) == asked(("",))


def test_a_turn_in_pieces_is_stripped_as_the_whole():
    tokenizer, picture = stripping(), PictureRef(b"", loss=False)
    pieces, whole = (question_parts(Record("r", turns=(Turn("user", parts),)), tokenizer,
                                    ChatSettings(template="tokenizer"))
                     for parts in ((" ", " hi", picture, "cat ", " "), ("hi", picture, "cat")))
    assert pieces == whole


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("speaker", [0, 1])
def test_a_text_that_utf8_cannot_write_is_refused_by_its_words(legacy, template, speaker):
    turns = [("user", "hi"), ("assistant", "hello")]
    turns[speaker] = turns[speaker][0], "a\ud800"
    with pytest.raises(ValueError, match=r"^Text: text is 'a\\ud800', which is no Unicode text \(surrogates not all"):
        chat_parts(said(*turns), legacy, ChatSettings(template=template))
