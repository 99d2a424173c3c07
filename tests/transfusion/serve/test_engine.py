"""The engine: what a request gets alone and in company, its limits, and errors that stay its own."""
import random
import threading
import time

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.ranks import of_family
from tests.transfusion.serve.clients import until
from transfusion import Image, Text
from transfusion.diffusion.guidance import Guidance
from transfusion.generate.generation import Drawn, Preview, Written
from transfusion.generate.sampling import Sampling
from transfusion.serve.engine import FEW, SHORT, Engine
from transfusion.serve.request import Finished, Limits, Request

WORDS = ["a", "handwritten", "seven", "two", "and", "more", "of", "the"]


def random_request(choice: random.Random, pictures):
    parts = [Text(" ".join(choice.choices(WORDS, k=choice.randint(1, 9))))]
    if choice.random() < 0.4:
        parts.insert(choice.randint(0, 1), choice.choice(pictures))
    guidance = choice.choice([1.0, 3.0, Guidance(2.0, interval=(0.3, 0.8)), Guidance(2.0, image=1.5, rescale=0.5)])
    sampling = Sampling(
        max_new_tokens=choice.randint(0, 10), temperature=choice.choice([0.0, 1.0]), seed=choice.randint(0, 99),
        top_p=choice.choice([1.0, 0.8]), max_images=choice.randint(0, 2), steps=choice.randint(1, 5), guidance=guidance,
        image_size=choice.choice([None, (4, 12), (8, 8)]), sampler=choice.choice(["ddim", "dpm++", "heun"]))
    return Request(parts, sampling, draw=choice.random() < 0.5)


def same(ours, theirs, tolerance=1e-4):
    """Texts are equal, and images differ by at most `tolerance` of their largest value."""
    assert [type(part) for part in ours] == [type(part) for part in theirs]
    for a, b in zip(ours, theirs):
        if isinstance(a, Text):
            assert a.text == b.text
        else:
            assert a.latent.shape == b.latent.shape
            error = (a.latent - b.latent).abs().max() / b.latent.abs().max()
            assert error <= tolerance


def alone(model, request):
    """What the request gets from a batch of one."""
    options = vars(request.sampling)
    if not request.draw:
        return model.generate(request.parts, **options)
    return [model.draw([request.parts], **options | {"max_images": 1})[0]]


@pytest.mark.parametrize("seed", range(2))
def test_random_mixtures_get_what_each_request_gets_alone(model, pictures, seed):
    """Texts are equal, and images differ by no more than what the engine's docstring states."""
    choice = random.Random(seed)
    together, single = Engine(model, rows=5), Engine(model, rows=1)
    for _ in range(5):
        requests = [random_request(choice, pictures) for _ in range(choice.randint(2, 6))]
        tickets = []
        for request in requests:
            tickets.append(together.submit(request))
            time.sleep(choice.choice([0, 0, 0.003]))  # some come while others run
        for request, ticket in zip(requests, tickets):
            same(ticket.result(), single.submit(request).result(), tolerance=2e-5)
    stats, by_itself = together.stats(), single.stats()
    assert stats["rows_in_passes"] == by_itself["rows_in_passes"] and stats["passes"] < by_itself["passes"]
    assert stats["cache_tokens_used"] == stats["running"] == stats["waiting"] == stats["failed"] == 0
    together.close()
    single.close()


def test_a_request_gets_what_generate_and_draw_give(engine, model, pictures):
    choice, drawn = random.Random(1), 0
    for _ in range(8):
        request = random_request(choice, pictures)
        ours, theirs = engine.submit(request).result(), alone(model, request)
        if request.draw:  # draw gives its first image alone
            ours, drawn = [part for part in ours if isinstance(part, Image)][:1], drawn + 1
        same(ours, theirs)
    assert drawn > 2


@pytest.mark.parametrize("options", [
    dict(text_options=dict(image_attention="causal")), dict(text_options=dict(image_layers="unet")),
    dict(text_options=dict(image_layers="linear", objective="v"))])
def test_other_image_layers_and_objectives_are_served_alike(options, pictures):
    model = tiny_model(**options["text_options"])
    engine = Engine(model)
    requests = [Request([Text("a")], Sampling(steps=3, max_new_tokens=3), draw=True),
                Request([pictures[0], Text("a handwritten two")], Sampling(steps=2, image_size=(4, 12)), draw=True)]
    tickets = [engine.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets):
        same([part for part in ticket.result() if isinstance(part, Image)][:1], alone(model, request))
    engine.close()


@pytest.mark.parametrize("family,backbone,options", [
    ("mistral", "adaln", dict(sliding_window=7)), ("qwen3", "decoder", {}),
    ("gemma3_text", "decoder", dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"]))])
def test_other_decoders_are_served_alike_also_those_with_windows(family, backbone, options, pictures):
    """Rows of different lengths, so that windows begin at different columns; the last prompt's beginning is shared."""
    model = of_family(family, backbone, **options).eval()
    engine, long = Engine(model), "a handwritten seven and a handwritten two and more"
    prompts = [[Text("a")], [pictures[0], Text(long)], [Text(long), pictures[1], Text("a b c")], [Text(long)]]
    requests = [Request(prompt, Sampling(max_new_tokens=8, steps=3, seed=n), draw=n % 2 == 0)
                for n, prompt in enumerate([*prompts, *prompts])]
    tickets = [engine.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets):
        ours = ticket.result()
        same([part for part in ours if isinstance(part, Image)][:1] if request.draw else ours, alone(model, request))
    same(engine.submit(requests[-1]).result(), alone(model, requests[-1]))
    assert engine.stats()["reused_tokens"] >= 16
    engine.close()


def test_a_text_and_an_image_that_came_later_join_the_passes_of_what_runs(engine, gate):
    ended = []

    def submit(name, request):
        engine.submit(request, lambda event: isinstance(event, Finished) and ended.append(name))

    gate.hold(engine)
    submit("long", Request([Text("a")], Sampling(steps=40, guidance=1.0, max_new_tokens=0), draw=True))
    until(lambda: engine.stats()["running"])
    submit("short", Request([Text("a b c")], Sampling(steps=4, guidance=1.0, max_new_tokens=0), draw=True))
    submit("short", Request([Text("two")], Sampling(max_new_tokens=5, max_images=0)))
    gate.set()
    until(lambda: len(ended) == 3)
    assert ended == ["short", "short", "long"]
    assert engine.stats()["passes"] <= 41 + 8


def test_a_pass_gathers_twice_the_keys_that_its_rows_have_at_most_or_few(engine, monkeypatch):
    """A long context beside short ones is a pass of its own."""
    run, hold, shares = engine.cache.run, threading.Event(), []

    def counted(asks):
        sizes = [(ask.context.length, len(ask.document.tokens)) for ask in asks]
        columns = max(length for length, _ in sizes) + max(new for _, new in sizes)
        shares.append(columns * len(sizes) / (2 * sum(map(sum, sizes)) + SHORT * len(sizes)))
        return run(asks)

    monkeypatch.setattr(engine.cache, "run", counted)
    engine.call(lambda: hold.wait(20))
    tickets = [engine.submit(Request([Text("a " * length)], Sampling(max_new_tokens=3, max_images=0)))
               for length in (1, 2, 5, 30, 200)]
    hold.set()
    for ticket in tickets:
        ticket.result()
    assert max(shares) <= 1


def test_events_come_in_order_and_end_with_what_was_used(engine):
    told, ended = [], threading.Event()
    engine.submit(Request([Text("a")], Sampling(steps=3, previews=True, max_new_tokens=0), draw=True),
                  lambda event: (told.append(event), isinstance(event, Finished) and ended.set()))
    assert ended.wait(20)
    *previews, drawn, finished = told
    assert [(type(event), event.step, event.steps) for event in previews] == [(Preview, n, 3) for n in (1, 2, 3)]
    assert isinstance(drawn, Drawn) and finished.parts[0] is drawn.image
    torch.testing.assert_close(previews[-1].image.latent, drawn.image.latent, rtol=1e-4, atol=1e-4)
    ticket = engine.submit(Request([Text("a b")], Sampling(max_new_tokens=4, max_images=0, temperature=1.0, seed=5)))
    *written, finished = ticket.events()
    assert all(isinstance(event, Written) for event in written) and isinstance(finished, Finished)
    whole = "".join(part.text for part in finished.parts)
    assert whole and "".join(event.text for event in written) == whole
    assert finished.written_tokens <= 4 and finished.prompt_tokens == 1 + len(engine.model.tokenizer.encode("a b"))


def test_of_previews_that_nobody_read_the_newest_alone_stays(engine):
    ticket = engine.submit(Request([Text("a")], Sampling(steps=6, previews=True, max_new_tokens=0), draw=True))
    until(lambda: engine.stats()["finished"])
    preview, drawn, finished = ticket.events()
    assert (preview.step, preview.steps) == (6, 6) and isinstance(drawn, Drawn) and isinstance(finished, Finished)


def test_a_text_that_stops_a_request_with_its_last_token_is_why_it_ended(engine):
    def ask(tokens, stop=None):
        options = Sampling(max_new_tokens=tokens, max_images=0, temperature=1.0, seed=5, stop=stop)
        *written, finished = engine.submit(Request([Text("a b")], options)).events()
        text = "".join(part.text for part in finished.parts)
        assert "".join(event.text for event in written) == text
        return text, finished

    free, finished = ask(4)
    assert finished.reason == "length" and finished.written_tokens == 4 and len(free) > 2
    stopped, finished = ask(4, (free[-1],))
    assert finished.reason == "stop" and stopped == free[:free.index(free[-1])]
    same_text, finished = ask(4, (free[-1] + "\0",))
    assert finished.reason == "length" and same_text == free


@pytest.mark.parametrize("options,draw,name", [
    (dict(steps=251), True, "steps is 251; at most 250 fit"),
    (dict(steps=2**60), True, f"steps is {2**60}; at most 250 fit"),
    (dict(steps=2**70, sampler="unipc"), False, f"steps is {2**70}; at most 250 fit"),
    (dict(image_size=(2000, 2000)), True, r"image_size is \(2000, 2000\); at most 1048576 pixels"),
    (dict(image_size=(7, 8)), True, r"image_size is \(7, 8\) and the patch size 2"),
    (dict(max_images=9), False, "max_images is 9; at most 8 fit"),
    (dict(max_new_tokens=5000), False, "max_new_tokens is 5000 and the prompt of 2 tokens; .* of which 4096 fit"),
    (dict(image_size=(800, 800)), True, "parts is of 3 tokens and max_new_tokens 64; .* of which 4096 fit"),
    (dict(cuda_graph=True), False, "cuda_graph is True; False fits"),
])
def test_a_request_over_the_limits_is_refused_by_the_name_of_its_argument(engine, options, draw, name):
    with pytest.raises(ValueError, match=name):
        engine.submit(Request([Text("a")], Sampling(**options), draw=draw))
    with pytest.raises(ValueError, match="submit: parts is a int"):
        engine.submit(Request(3))
    with pytest.raises(ValueError, match=r"submit: parts\[0\].text is a int; a str fits"):
        engine.submit(Request([Text(5)]))
    for given in (3, [Text("a")], None):
        with pytest.raises(ValueError, match=f"submit: request is a {type(given).__name__}; a Request fits"):
            engine.submit(given)
    assert engine.stats()["submitted"] == 0


def test_what_runs_goes_on_while_a_prompt_is_tokenized(engine):
    request = Request([Text("a b")], Sampling(max_new_tokens=4, steps=2), draw=True)
    hold = threading.Event()
    engine.call(lambda: hold.wait(20))
    ticket = engine.submit(request)
    ended = threading.Thread(target=ticket.result, daemon=True)
    with engine.tokenizing:
        hold.set()
        ended.start()
        ended.join(20)
        assert not ended.is_alive()


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(engine, monkeypatch):
    longest = max(map(len, engine.model.tokenizer.get_vocab()))
    monkeypatch.setattr(Text, "token_ids", lambda *_: pytest.fail("it was tokenized"))
    for parts in ([Text("a" * (4096 * longest + 1))], [Text("a" * 4096 * longest), Text("a")]):
        with pytest.raises(ValueError, match=f"parts is of {4096 * longest + 1} characters; at most {4096 * longest}"):
            engine.submit(Request(parts, Sampling(max_new_tokens=0)))


def test_prompts_that_begin_alike_are_read_once_and_answered_as_if_each_were_alone(model, pictures):
    engine, start = Engine(model, limits=Limits(cache_tokens=512)), "a handwritten seven and two and more of the "
    long, options = "".join(f"{start}{n} " for n in range(3)), dict(max_new_tokens=6, seed=4, temperature=1.0, steps=2)
    requests = [Request(parts, Sampling(**options)) for parts in (
        [Text(long)], [Text(f"{long}seven")], [Text(start), pictures[0], Text(long)],
        [Text(start), pictures[0], Text(f"{long}two")], [Text(start), pictures[1], Text(f"{long}two")], [Text(long)])]
    reused = []
    for request in requests:
        before = engine.stats()["reused_tokens"]
        same(engine.submit(request).result(), alone(model, request))
        reused.append(engine.stats()["reused_tokens"] - before)
    first, tail, picture, same_picture, other_picture, again = reused
    prompt = len(engine.model.tokenizer.encode(long)) + 1
    assert first == 0 and prompt - 16 <= tail <= prompt and prompt - 16 <= again < prompt
    assert 0 < picture <= len(engine.model.tokenizer.encode(start)) + 1, "up to where the picture stands"
    assert same_picture > picture + 16 and other_picture == picture
    assert engine.stats()["cache_tokens_used"] == 0
    for n in range(20):  # known pages make room for others
        request = Request([Text(f"{n} {long}")], Sampling(max_new_tokens=4, max_images=0))
        same(engine.submit(request).result(), alone(model, request))
    engine.close()


def test_a_prompt_of_a_few_tokens_shares_the_pass_of_other_few_tokens(model):
    """Two prompts of other lengths take as many passes together as one alone."""
    requests = [Request([Text(text)], Sampling(max_new_tokens=4, max_images=0)) for text in ("a", "a a a")]
    lengths = {len(model.tokenizer.encode(request.parts[0].text)) + 1 for request in requests}
    assert len({length.bit_length() for length in lengths}) == 2 and max(lengths) <= FEW
    engine, passes = Engine(model), []
    for given in (requests[1:], requests):
        before, hold = engine.stats()["passes"], threading.Event()
        engine.call(lambda hold=hold: hold.wait(20))
        tickets = [engine.submit(request) for request in given]
        hold.set()
        for ticket in tickets:
            ticket.result()
        passes.append(engine.stats()["passes"] - before)
    engine.close()
    assert passes[0] == passes[1]


def test_an_error_in_one_request_touches_no_other(engine, model, monkeypatch):
    """One row's own program fails, another makes every pass fail that it is part of."""
    fine = [Request([Text("a b")], Sampling(max_new_tokens=6, max_images=0)),
            Request([Text("a")], Sampling(steps=3, max_new_tokens=0), draw=True)]
    expected, run = [alone(model, request) for request in fine], engine.cache.run

    def breaks(asks):
        if any(isinstance(x, float) for ask in asks for x in ask.document.tokens):
            raise RuntimeError("no such token")
        return run(asks)

    monkeypatch.setattr(engine.cache, "run", breaks)
    submit = engine.submit

    def poisoned(how):
        gone = submit(Request([Text("a b")], Sampling(max_new_tokens=50, max_images=0)))
        running = next((r for r in [*engine._waiting, *engine._running] if r is gone.running), None)
        if running is not None and how == "pass":
            running.row.take = lambda token: running.row.__dict__.update(state=0)
            running.row.choose = lambda scores: 1.5
        elif running is not None:
            running.row.choose = lambda scores: 1 / 0
        return gone

    for how in ("pass", "row"):
        hold = threading.Event()
        engine.call(lambda hold=hold: hold.wait(20))
        gone, tickets = poisoned(how), [submit(request) for request in fine]
        hold.set()
        for ticket, theirs in zip(tickets, expected):
            same(ticket.result(), theirs)
        with pytest.raises(RuntimeError if how == "pass" else ZeroDivisionError):
            gone.result()
    assert engine.stats()["failed"] == 2 and engine.stats()["cache_tokens_used"] == 0


def test_a_listener_that_fails_ends_its_own_request(engine):
    def gone(event):
        raise RuntimeError("the loop is closed")

    engine.submit(Request([Text("a")], Sampling(steps=50, previews=True), draw=True), on_event=gone)
    engine.submit(Request([Text("a")], Sampling(max_new_tokens=2, max_images=0))).result()
    until(lambda: not engine.stats()["running"])
    assert engine.stats()["cancelled"] == 1


def test_a_ticket_whose_events_go_elsewhere_or_were_read_refuses_to_wait_for_ever(engine):
    request, ended = Request([Text("a")], Sampling(max_new_tokens=2, max_images=0)), threading.Event()
    told = engine.submit(request, on_event=lambda event: isinstance(event, Finished) and ended.set())
    for op in ("events", "result"):
        with pytest.raises(ValueError, match=f"{op}: on_event is .*; None fits a ticket that is read"):
            getattr(told, op)()
    assert ended.wait(20)
    ticket = engine.submit(request)
    next(ticket.events())
    ticket.result()
    for op in ("events", "result"):
        with pytest.raises(ValueError, match=f"{op}: the end was read already"):
            getattr(ticket, op)()


def test_an_engine_that_finds_no_room_leaves_no_thread(model, monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transfusion.serve.engine.RaggedCache.run", run)
    before = set(threading.enumerate())
    with pytest.raises(torch.OutOfMemoryError):
        Engine(model)
    assert not {thread for thread in threading.enumerate() if thread.name == "transfusion-engine"} - before


def test_numbers_of_rows_that_mean_nothing_are_refused(model):
    for name in ("rows", "queue"):
        with pytest.raises(ValueError, match=f"Engine: {name} is 0; a whole number from 1 on fits"):
            Engine(model, **{name: 0})
    with pytest.raises(ValueError, match="steps is 0"):
        Limits(steps=0)
    with pytest.raises(ValueError, match="Engine: limits is {'steps': 3}; .* fit"):
        Engine(model, limits={"steps": 3})
    with pytest.raises(ValueError, match="Request: sampling is {'steps': 3}; .* fit"):
        Request([Text("a")], {"steps": 3})
    for draw in ("no", 1, None):
        with pytest.raises(ValueError, match=f"Request: draw is {draw!r}; True or False fits"):
            Request([Text("a")], draw=draw)
