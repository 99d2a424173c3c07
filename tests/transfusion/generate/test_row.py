"""One prompt's row: which token it takes, what ends it, and how many positions it may need."""
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from tests.transfusion.conftest import tiny_model
from tests.transfusion.generate.test_decoding import spelled, words_or_bytes
from tests.transfusion.generate.test_generation import same
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.generate.decoding import CUT
from transfusion.generate.row import DONE, RANKED, Row, likely
from transfusion.generate.sampling import LONGEST_STOP, Sampling
from transfusion.sequence import encode


def test_nucleus_sampling_never_leaves_the_nucleus(model):
    greedy = model.generate([Text("a")], max_new_tokens=5, max_images=0)
    nucleus = model.generate([Text("a")], max_new_tokens=5, max_images=0, temperature=1.0, top_p=1e-6, seed=3)
    assert [p.text for p in greedy] == [p.text for p in nucleus]


def test_a_long_stop_costs_no_more_than_what_is_written(model):
    """At each token no beginning of it is looked for that is longer than the text so far."""
    taken = []

    class Counted(str):
        def __getitem__(self, place):
            taken.append(place)
            return str(self)[place]

    stop = Counted("\0" * LONGEST_STOP)
    row = Row(model, [Text("a")], Sampling(stop=(stop,)), (1, 1), 0)
    token, = model.tokenizer.encode("a", add_special_tokens=False)
    assert row.take(token) == "a" and len(taken) <= 1
    with pytest.raises(ValueError, match="stop is .{,300}; texts, .* of at most 256 characters each$"):
        Sampling(stop=("a" * 2**20,))


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-40, 1e-6])
def test_a_tiny_temperature_takes_the_likeliest_token(model, temperature):
    options = dict(max_new_tokens=5, max_images=0, seed=3)
    same(model.generate([Text("a")], temperature=temperature, **options), model.generate([Text("a")], **options))


def test_a_huge_temperature_takes_any_token_that_may_be_written(model):
    row = Row(model, [Text("a")], Sampling(temperature=1e300, max_images=0), (1, 1), 0)
    scores = torch.linspace(0, 1e4, len(model.tokenizer))
    found = {row.choose(scores) for _ in range(20 * len(scores))}
    assert found.isdisjoint({model.config.boi_token_id, model.config.eoi_token_id})
    assert len(found) > len(scores) / 2


def test_top_p_and_min_p_leave_the_tokens_that_their_papers_say(model):
    def drawn(**options):
        row = Row(model, [Text("a")], Sampling(temperature=1.0, max_images=0, **options), (1, 1), 0)
        return {row.choose(scores) for _ in range(400)}

    tokens = model.tokenizer.convert_tokens_to_ids(list("abcd"))
    scores = torch.full((len(model.tokenizer),), -torch.inf)
    scores[tokens] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    a, b, c, d = tokens
    assert drawn() == {a, b, c, d}
    assert drawn(top_p=0.6) == drawn(top_p=0.79) == {a, b}   # the smallest set that holds as much
    assert drawn(top_p=0.49) == {a} and drawn(top_p=0.81) == {a, b, c}
    assert drawn(min_p=0.2) == {a, b, c} and drawn(min_p=0.4) == {a, b}   # times 0.5, the likeliest's


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0])
@pytest.mark.parametrize(("top_p", "min_p"), [(0.0, 0.0), (0.3, 0.0), (0.9, 0.0), (1.0, 0.5), (0.999, 1e-4)])
def test_the_likely_tokens_are_those_of_all_that_are_sorted(spread, top_p, min_p):
    size = 40 * RANKED
    chances = (torch.randn(size, generator=torch.Generator().manual_seed(1)) * spread).softmax(-1)
    found, tokens = likely(chances, top_p, min_p)
    dense = torch.zeros(size).index_put_((tokens,), found)
    ranked, order = chances.double().sort(descending=True)
    within = (ranked.cumsum(0) - ranked < top_p) & (ranked >= min_p * ranked[0])
    within[0] = True
    assert abs(int((dense > 0).sum()) - int(within.sum())) <= 1e-4 * size    # sums are rounded
    few = min(int((dense > 0).sum()), int(within.sum()))
    assert torch.equal(dense[order[:few]], chances[order[:few]]) or spread == 0  # equal chances have no order
    assert torch.equal(dense[dense > 0], chances[dense > 0])


def test_tokens_are_drawn_as_often_as_they_are_likely_and_impossible_ones_never(model):
    chances = torch.rand(len(model.tokenizer), generator=torch.Generator().manual_seed(2))
    chances[[0, 7, len(chances) - 1]] = 0
    chances[[model.config.boi_token_id, model.config.eoi_token_id]] = 0
    row, draws = Row(model, [Text("a")], Sampling(temperature=2.0, max_images=0), (1, 1), 0), 20_000
    counts = torch.zeros(len(chances))
    for _ in range(draws):
        counts[row.choose(2 * chances.log())] += 1
    expected = draws * chances / chances.sum()
    possible = chances > 0
    assert counts[~possible].sum() == 0
    error = ((counts - expected)[possible].square() / expected[possible]).sum()           # chi^2
    freedom = int(possible.sum()) - 1
    assert abs(error - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_logits_that_are_not_finite_are_refused(model, bad, options):
    row = Row(model, [Text("a")], Sampling(temperature=1.0, **options), (1, 1), 0)
    scores = torch.zeros(len(model.tokenizer))
    scores[3] = bad
    with pytest.raises(ValueError, match="not finite|is nan"):
        row.choose(scores)


def learned_positions():
    """A model whose decoder has a table of 16 positions; an image takes 6."""
    model = tiny_model()
    config = GPT2Config(vocab_size=len(model.tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2,
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return Transfusion(TransfusionConfig(
        text_config=config, image_channels=1, image_size=(4, 4), patch_size=2, boi_token_id=model.config.boi_token_id,
        eoi_token_id=model.config.eoi_token_id), model.tokenizer).eval()


def test_a_decoder_that_learned_its_positions_is_asked_for_no_more():
    model, learned = tiny_model(), learned_positions()
    assert learned.backbone.room == 16 and model.backbone.room is None
    assert learned.draw(["a"], steps=1)[0].latent.shape == (1, 4, 4)
    with pytest.raises(ValueError, match="the prompt has .* tokens and what is made of it may have 6; 16, the dec"):
        learned.draw(["a handwritten seven and a handwritten five and more"], steps=1)
    with pytest.raises(ValueError, match="may have 20; 16"):
        learned.generate([Text("a")], max_new_tokens=20, max_images=0)
    with pytest.raises(ValueError, match="may have 26; 16"):
        learned.draw(["a"], steps=1, max_new_tokens=20)


def test_a_row_that_has_used_all_positions_waits_for_one_that_still_writes(monkeypatch):
    learned = learned_positions()
    plain, boi, calls = learned.tokenizer.encode("a", add_special_tokens=False)[0], learned.config.boi_token_id, []

    def logits(x):
        calls.append(len(x))
        scores = torch.zeros(*x.shape[:-1], learned.config.text_config.vocab_size)
        scores[..., plain] = 1
        for row, begins_to_draw in enumerate((3, 1)):
            if len(calls) == begins_to_draw:
                scores[row, ..., boi] = 2
        return scores

    monkeypatch.setattr(learned.backbone, "logits", logits)
    written = 16 - len(encode([Text("a")], learned.tokenizer, learned.config, end=False).tokens) - 6
    first, second = learned.generate_batch([[Text("a")]] * 2, max_new_tokens=written, max_images=1, steps=1)
    assert [type(part) for part in first] == [Text, Image, Text] and [type(part) for part in second] == [Image, Text]
    assert set(calls) == {2} and len(calls) == 3 + written + 1, "until both draw, behind that, and to end"


@pytest.mark.parametrize("special, told", [(False, " cat"), (True, "cat")])
def test_an_answer_behind_a_template_begins_anew_and_text_behind_text_goes_on(model, special, told):
    row = Row(model, [Text("a", special=special)], Sampling(), (1, 1), 0, decoder=words_or_bytes())
    row.document(False)
    row.eos, row.config = -1, SimpleNamespace(boi_token_id=-2)
    for token in (*spelled(row.decoder, "cat"), row.eos):
        row.take(token)
    row.finish()
    assert row.parts[0].text == told


def test_what_was_told_of_a_text_is_all_of_it_also_where_its_last_character_is_cut(model):
    tokenizer = words_or_bytes()
    row = Row(model, [Text("a")], Sampling(), (1, 1), 0, decoder=tokenizer)
    tokens = spelled(tokenizer, "cat caf\u00e9\u4e2d")[:-1]
    row.eos, row.config = -1, SimpleNamespace(boi_token_id=-2)
    told = "".join(filter(None, (row.take(token) for token in [*tokens, row.eos])))
    row.finish()
    assert told == row.parts[0].text == "catcaf\u00e9" + 2 * CUT


@pytest.mark.parametrize("written,told", [
    (" White cat ", "White cat"), ("White", "White"), ("  two ", " two"), (" ", ""), ("\n a", "\n a"), (" a  ", "a ")])
@pytest.mark.parametrize("stop", [(), (" c",)])
def test_the_spaces_that_a_template_puts_around_an_answer_are_not_told(model, written, told, stop):
    tokens = model.tokenizer.encode(written, add_special_tokens=False)
    assert model.tokenizer.decode(tokens) == written
    for spaces in (True, False):
        row = Row(model, [Text("a", special=True)], Sampling(turn_spaces=spaces, stop=stop or None), (1, 1), 0)
        row.document(False)
        streamed = "".join(filter(None, (row.take(token) for token in [*tokens, row.eos] if row.state != DONE)))
        row.finish()
        expected = (told if spaces else written).partition(" c" if stop else "\0")[0]
        assert streamed == expected == "".join(part.text for part in row.parts)
