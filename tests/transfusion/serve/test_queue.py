"""What waits for the engine: requests beyond its rows and its cache, calls, and what becomes of them at its end."""
import threading

import pytest

from tests.transfusion.serve.clients import until
from tests.transfusion.serve.test_engine import alone, same
from transfusion import Text
from transfusion.generate.sampling import Sampling
from transfusion.serve.engine import Cancelled, Closed, Engine, QueueFull
from transfusion.serve.request import Failed, Finished, Limits, Request


def test_cancelling_frees_the_place_of_what_runs_and_of_what_waits(model, gate):
    engine = Engine(model, rows=1)
    gate.hold(engine)
    slow = Request([Text("a")], Sampling(steps=200, max_new_tokens=0), draw=True)
    running, waiting, last = (engine.submit(slow) for _ in range(3))
    waiting.cancel()
    assert isinstance([*waiting.events()][-1].error, Cancelled), "what waits ends at once, while a pass is under way"
    running.cancel()
    gate.set()
    with pytest.raises(Cancelled, match="the request was cancelled"):
        running.result()
    last.cancel()
    assert isinstance([*last.events()][-1], Failed)
    done = engine.submit(Request([Text("a")], Sampling(max_new_tokens=1, max_images=0)))
    done.result()
    done.cancel()
    stats = engine.stats()
    assert stats["denoising_steps"] < 200 and stats["cancelled"] == 3 and stats["cache_tokens_used"] == 0
    engine.close()


def test_free_rows_take_requests_beside_the_queue(model, gate):
    engine = Engine(model, rows=3, queue=1)
    gate.hold(engine)
    request = Request([Text("a")], Sampling(max_new_tokens=1, max_images=0))
    tickets = [engine.submit(request) for _ in range(4)]
    with pytest.raises(QueueFull):
        engine.submit(request)
    gate.set()
    for ticket in tickets:
        ticket.result()
    engine.close()


def test_a_full_queue_refuses_and_takes_again_when_it_is_not(model, gate):
    engine = Engine(model, rows=1, queue=2)
    gate.hold(engine)
    request = Request([Text("a")], Sampling(max_new_tokens=1, max_images=0))
    tickets = [engine.submit(request)]
    until(lambda: engine.stats()["running"])
    tickets += [engine.submit(request) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait; 2 fit; try again later"):
        engine.submit(request)
    gate.set()
    for ticket in tickets:
        ticket.result()
    engine.submit(request).result()
    assert engine.stats()["refused"] == 1
    engine.close()


def test_a_cache_that_is_full_lets_requests_wait_until_others_give_their_tokens_back(model):
    engine = Engine(model, rows=8, limits=Limits(cache_tokens=96))
    requests = [Request([Text("a")], Sampling(max_new_tokens=20, max_images=0, seed=i)) for i in range(8)]
    for request, ticket in [(request, engine.submit(request)) for request in requests]:
        same(ticket.result(), alone(model, request))
    assert engine.stats()["cache_tokens"] == 96 and engine.stats()["cache_tokens_used"] == 0
    assert engine.stats()["cache_bytes"] == 96 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, D, fp32
    engine.close()


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_what_waits_and_runs_or_drops_it(model, gate, drain):
    request, engine = Request([Text("a")], Sampling(steps=20, max_new_tokens=0), draw=True), Engine(model, rows=1)
    gate.hold(engine)
    tickets = [engine.submit(request) for _ in range(3)]
    closing = threading.Thread(target=engine.close, args=(drain,))
    closing.start()
    until(lambda: not engine.alive and (drain or all(ticket.running.cancelled for ticket in tickets)))
    gate.set()
    closing.join()
    ends = [[*ticket.events()][-1] for ticket in tickets]
    assert all(isinstance(end, Finished if drain else Failed) for end in ends)
    with pytest.raises(Closed):
        engine.submit(request)
    assert not engine._thread.is_alive()


def test_functions_run_on_the_engines_thread(engine):
    assert engine.call(lambda: threading.current_thread().name).result() == "transfusion-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result()


def test_a_call_that_is_cancelled_is_left_out_and_the_engine_goes_on(model):
    engine, hold, ran = Engine(model), threading.Event(), []
    first = engine.call(lambda: hold.wait(20))
    second, third = (engine.call(lambda n=n: ran.append(n)) for n in (2, 3))
    assert second.cancel()
    hold.set()
    third.result(20)
    assert first.result() and ran == [3] and engine.alive
    engine.close()
    assert not engine.alive


def test_a_call_that_is_cancelled_does_not_disturb_the_end_of_an_engine_that_failed(model, monkeypatch):
    """The thread ends by an error of its own while one call is cancelled, another waits, and a request waits."""
    engine, hold = Engine(model), threading.Event()
    engine.call(lambda: hold.wait(20))
    ticket = engine.submit(Request([Text("a")], Sampling(max_new_tokens=2, max_images=0)))
    engine._admit = lambda: (engine.call(lambda: None).cancel(), calls.append(engine.call(lambda: None)), 1 / 0)
    calls = []
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    hold.set()
    assert isinstance([*ticket.events()][-1].error, Closed)
    engine._thread.join(20)
    with pytest.raises(Closed, match="the engine ended"):
        calls[0].result(20)
