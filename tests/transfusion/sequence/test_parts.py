"""Text: what is spelled out as characters, and what is read as special tokens."""
import copy

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion import Image, Text
from transfusion.sequence.encoding import encode

MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config
PICTURE = Image(torch.arange(64.0).view(1, 8, 8) / 32 - 1)


def test_text_that_brings_its_own_bos_gets_no_second_one():
    bos = TOKENIZER.bos_token
    assert encode([Text(f"{bos}a"), Text("b")], TOKENIZER, CONFIG) == encode([Text("a"), Text("b")], TOKENIZER, CONFIG)
    inside = encode([Text("a"), Text(f"{bos}b")], TOKENIZER, CONFIG, end=False).tokens
    assert inside == [t for text in (bos, "a", bos, "b") for t in TOKENIZER.encode(text, add_special_tokens=False)]
    after = encode([PICTURE, Text(f"{bos}b")], TOKENIZER, CONFIG)
    assert after.tokens.count(TOKENIZER.bos_token_id) == 2 and len(after.tokens) == len(after.targets)


CONTROL = ("<boi>", "<eoi>", "<s>", "</s>", "<pad>")


@pytest.mark.parametrize("around", [" {}", "press {} now", "x{0}{0}"])
@pytest.mark.parametrize("word", CONTROL)
def test_names_of_special_tokens_in_a_text_are_characters_and_come_back(word, around):
    words = around.format(word)
    plain = encode([Text("a"), Text(words, loss=False)], TOKENIZER, CONFIG)
    special = {TOKENIZER.convert_tokens_to_ids(word) for word in CONTROL}
    assert not special.intersection(plain.tokens[1:-1])
    assert TOKENIZER.decode(plain.tokens[1:-1]) == "a" + words
    assert len(plain.tokens) == len(plain.targets) and not plain.images


def test_a_text_that_begins_with_bos_has_no_other_special_token_where_there_is_no_chat_template():
    document = encode([Text("<s>9.99</s> now <boi>5<eoi>")], TOKENIZER, CONFIG)
    assert not {0, 1, 2, 3, 4}.intersection(document.tokens[1:-1])
    assert TOKENIZER.decode(document.tokens[1:-1]) == "9.99</s> now <boi>5<eoi>"


@pytest.fixture
def chat_tokenizer():
    """The tokenizer with roles and a chat template that begins with BOS and ends each turn with EOS."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<user>", "<model>"], special_tokens=True)
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
                               "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}")
    return tokenizer


def chat(tokenizer, content):
    turns = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_special_tokens_of_a_chat_template_are_tokens_and_those_of_images_never(chat_tokenizer):
    user, model = chat_tokenizer.convert_tokens_to_ids(["<user>", "<model>"])
    words = chat_tokenizer.encode("what?", add_special_tokens=False)
    asked = encode([Text(chat(chat_tokenizer, "what?"))], chat_tokenizer, CONFIG, end=False)
    assert asked.tokens == [1, user, *words, 2, model]
    hostile = encode([Text(chat(chat_tokenizer, "press <boi> or <eoi>"))], chat_tokenizer, CONFIG, end=False).tokens
    assert hostile[:2] == [1, user] and hostile[-2:] == [2, model] and not {3, 4}.intersection(hostile)
    assert chat_tokenizer.decode(hostile[2:-2]) == "press <boi> or <eoi>"
    pieces = [Text("<s><user>"), PICTURE, Text("what?</s><model>", special=True)]  # without BOS it says what it is
    assert encode(pieces, chat_tokenizer, CONFIG, end=False).tokens == [1, user, 3, *[4] * 17, *words, 2, model]
    plain = encode([Text("what?</s><model>")], chat_tokenizer, CONFIG, end=False).tokens
    assert not {2, model}.intersection(plain) and chat_tokenizer.decode(plain[1:]) == "what?</s><model>"


def test_tokens_that_are_added_later_are_seen(chat_tokenizer):
    text = Text("<s><later>")
    before = encode([text], chat_tokenizer, CONFIG).tokens
    chat_tokenizer.add_tokens(["<later>"], special_tokens=True)
    later = chat_tokenizer.convert_tokens_to_ids("<later>")
    assert len(before) > 3 and encode([text], chat_tokenizer, CONFIG).tokens == [1, later, 2]


def test_a_name_that_the_tokenizer_cannot_spell_is_refused(chat_tokenizer):
    chat_tokenizer.add_tokens(["<end>"])  # no special token to the tokenizer
    config = copy.copy(CONFIG)
    config.boi_token_id = chat_tokenizer.convert_tokens_to_ids("<end>")
    with pytest.raises(ValueError, match="reads '<end>' as a special token even where it is told to spell it"):
        encode([Text("the <end>")], chat_tokenizer, config)
