"""Pages: what is shared, what is left to read, and which known page makes room."""
import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion import Text
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, encode
from transfusion.serve.engine import Engine
from transfusion.serve.pages import PAGE, Pages
from transfusion.serve.request import Limits, Request


def document(tokens, *images):
    tokens = list(tokens)
    return Document(tokens, [False] * len(tokens), [(start, patches, (4, 4), False) for start, patches in images])


def test_a_known_beginning_is_shared_and_at_least_one_token_is_left_to_read():
    pages, prompt = Pages(8), document(range(2 * PAGE))
    first, read = pages.take(40, prompt)
    assert (len(first), read) == (3, 0)
    pages.remember(first, prompt)
    again, read = pages.take(40, prompt)
    assert read == PAGE and again[0] == first[0] and again[1] != first[1]
    longer, read = pages.take(40, document(range(2 * PAGE + 1)))
    assert read == 2 * PAGE and longer[:2] == first[:2]
    other, read = pages.take(16, document([7, *range(1, 40)]))
    assert read == 0 and other[0] not in first
    assert pages.users[first[0]] == 3 and pages.users[first[1]] == 2


@pytest.mark.parametrize("start,read", [(20, 3 * PAGE), (16, 3 * PAGE), (32, 3 * PAGE), (40, 2 * PAGE)])
def test_a_beginning_does_not_end_inside_an_image_and_knows_images_apart(start, read):
    prompt = document(range(3 * PAGE + 9), (start, torch.ones(16, 4)))
    pages = Pages(16)
    own, _ = pages.take(len(prompt.tokens), prompt)
    pages.remember(own, prompt)
    assert pages.take(len(prompt.tokens), prompt)[1] == read
    other_image = document(prompt.tokens, (start, torch.zeros(16, 4)))
    assert pages.take(len(prompt.tokens), other_image)[1] == start // PAGE * PAGE


def test_what_was_given_back_first_makes_room_first_and_nothing_in_use_does():
    pages = Pages(3)
    prompts = [document([n] * (PAGE + 1)) for n in range(3)]
    for prompt in prompts:
        own, _ = pages.take(PAGE, prompt)
        pages.remember(own, prompt)
        pages.give_back(own)
    assert pages.available == 3
    held, read = pages.take(PAGE, prompts[0])
    assert read == PAGE and pages.available == 2
    pages.take(PAGE)
    assert pages.available == 1 and pages.take(PAGE, prompts[2])[1] == PAGE
    assert pages.available == 0 and pages.users[held[0]] == 1


def test_a_prompt_loses_its_end_before_its_beginning():
    pages, prompt = Pages(4), document(range(4 * PAGE))
    own, _ = pages.take(4 * PAGE, prompt)
    pages.remember(own, prompt)
    pages.give_back(own)
    for left in (3, 2, 1):  # the one page that is taken and given back makes room each time
        pages.take(PAGE)
        longer = document(range(4 * PAGE + 1))
        found, read = pages.take(left * PAGE, longer)
        assert read == left * PAGE and found == own[:left]
        pages.give_back(found)


def test_what_would_never_fit_the_pool_s_pages_is_refused():
    model = tiny_model()
    engine = Engine(model, limits=Limits(cache_tokens=32))  # two pages of 16
    parts = [Text("a")]
    text = 13 - len(encode(parts, model.tokenizer, model.config, end=False).tokens)
    options = Sampling(image_size=(2, 2), max_new_tokens=text, guidance=3.0)  # 17 tokens and 3: three pages
    with pytest.raises(ValueError, match="that takes 20 cached tokens, of which 32 fit"):
        engine.submit(Request(parts, options, draw=True))
    engine.close()
