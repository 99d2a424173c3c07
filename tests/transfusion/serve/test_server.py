"""The server: what each address answers, its errors, slow hosts and clients that leave, and OpenAI's own client."""
import asyncio
import base64
import contextlib
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import DRAW, AtOnce, chat, data_url, png, until
from transfusion import Text
from transfusion.data.picture_files import to_picture
from transfusion.generate.sampling import Sampling
from transfusion.serve import remote
from transfusion.serve.engine import Cancelled, Engine
from transfusion.serve.pictures import PictureReader
from transfusion.serve.request import Request

for package in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")

import uvicorn  # noqa: E402
from fastapi.responses import StreamingResponse  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from transfusion.serve import listening  # noqa: E402
from transfusion.serve.server import FETCHES, LEFT, Answers, make_app, of_the_server  # noqa: E402
from transfusion.serve.wire import ChatBody  # noqa: E402

ROOT = Path(__file__).parents[3]


def decoded(text):
    return Picture.open(io.BytesIO(base64.b64decode(text.removeprefix("data:image/png;base64,"))))


def drawn(model, prompt, **options):
    return to_picture(model.draw([prompt], steps=2, **options)[0].latent).tobytes()


def events(response):
    """The chunks of server-sent events."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_model_and_the_servers_health_are_told(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_text_is_what_the_model_generates(served):
    model, _, client = served
    body = {"prompt": ["a", "a handwritten seven"], "max_tokens": 5, "temperature": 0, "top_p": None}
    answer = client.post("/v1/completions", json=body).json()
    for choice, prompt in zip(answer["choices"], body["prompt"], strict=True):
        part, = model.generate([Text(prompt)], max_new_tokens=5, max_images=0)
        assert choice["text"] == part.text and choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 10
    chunks = events(client.post("/v1/completions", json={**body, "prompt": "a", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post("/v1/completions", json=asked))
    assert last["choices"] == [] and last["usage"] == answer["usage"] and last["object"] == "text_completion"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert not any("usage" in chunk for chunk in events(client.post("/v1/completions", json={**body, "stream": True})))


def test_a_prompt_counts_once_whatever_number_of_answers_it_has(client):
    def usage(**body):
        return client.post("/v1/completions", json={"max_tokens": 2, **body}).json()["usage"]

    one, two = usage(prompt="a"), usage(prompt="a handwritten seven")
    assert usage(prompt="a", n=3)["prompt_tokens"] == one["prompt_tokens"]
    both = usage(prompt=["a", "a handwritten seven"], n=2)
    assert both["prompt_tokens"] == one["prompt_tokens"] + two["prompt_tokens"]
    assert both["total_tokens"] == both["prompt_tokens"] + both["completion_tokens"]
    asked = {"prompt": "a", "n": 3, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    *_, last = events(client.post("/v1/completions", json=asked))
    assert last["usage"]["prompt_tokens"] == one["prompt_tokens"]


def test_texts_are_answered_while_many_pictures_are_read(served, monkeypatch):
    _, _, client = served
    going_on, began = threading.Event(), time.monotonic()
    content = [{"type": "image_url", "image_url": {"url": data_url(png())}}]
    monkeypatch.setattr(PictureReader, "read_url", lambda *_: going_on.wait(60))
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    threads = [threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": body})
               for _ in range(45)]
    for thread in threads:
        thread.start()
    try:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert time.monotonic() - began < 50, "it did not wait for the pictures"
    finally:
        going_on.set()
        for thread in threads:
            thread.join()


def test_a_picture_is_what_the_model_draws_and_n_of_them_have_seeds_one_after_the_other(served):
    model, _, client = served
    answer = client.post("/v1/images/generations", json={"prompt": "a seven", "n": 2, **DRAW}).json()
    assert answer["seed"] == 3
    for number, one in enumerate(answer["data"]):
        assert decoded(one["b64_json"]).tobytes() == drawn(model, "a seven", seed=3 + number)
    inner = {"prompt": "a seven", "extra_body": {**DRAW, "guidance_scale": 1.0}, "size": "12x4",
             "response_format": "url"}
    one, = client.post("/v1/images/generations", json=inner).json()["data"]
    assert decoded(one["url"]).size == (12, 4)
    assert decoded(one["url"]).tobytes() == drawn(model, "a seven", seed=3, guidance=1.0, image_size=(4, 12))


def test_without_a_seed_every_request_has_its_own_and_names_it(client):
    body = {"prompt": "a seven", "num_inference_steps": 1}
    first, other = (client.post("/v1/images/generations", json=body).json() for _ in range(2))
    assert first["seed"] != other["seed"] and first["data"] != other["data"]
    assert client.post("/v1/images/generations", json={**body, "seed": first["seed"]}).json()["data"] == first["data"]


def test_an_edit_reads_the_picture(served):
    _, _, client = served
    files = {"image": ("a.png", png(), "image/png")}
    fields = {"prompt": "a two", "num_inference_steps": "2", "seed": "3"}
    one, = client.post("/v1/images/edits", files=files, data=fields).json()["data"]
    other, = client.post("/v1/images/edits", files={"image": ("a.png", png(colour=9))}, data=fields).json()["data"]
    assert decoded(one["b64_json"]).size == (8, 8) and one != other


def test_an_edit_that_names_the_format_that_is_served_is_answered(client):
    fields = {"prompt": "a", "num_inference_steps": "1", "output_format": "png"}
    assert client.post("/v1/images/edits", files={"image": ("a.png", png())}, data=fields).status_code == 200


def test_previews_are_made_for_streams_alone(served):
    reader = PictureReader(served[1])
    for stream in (True, False):
        body = ChatBody(messages=[{"role": "user", "content": "a"}], previews=True, stream=stream)
        assert body.sampling(reader, 0).previews is stream


def test_a_client_that_reads_slowly_misses_previews_and_nothing_else(served):
    """Of 50 steps nothing is read until all are done."""
    class Stays:
        async def receive(self):
            await asyncio.Event().wait()

    async def read_late(engine):
        answers = Answers(engine, Stays())
        sampling = Sampling(steps=50, previews=True, max_new_tokens=0)
        await answers.submit([Request([Text("a")], sampling, draw=True) for _ in range(2)])
        before = engine.stats()["finished"]
        await asyncio.to_thread(until, lambda: engine.stats()["finished"] == before + 2)
        await asyncio.sleep(0.05)
        assert sum(map(len, answers.unread)) == 6
        return [event async for event in answers.events()]

    found = asyncio.run(read_late(served[1]))
    for number in range(2):
        preview, drawn, finished = (event for owner, event in found if owner == number)
        assert preview.step == 50 and drawn.image is finished.parts[0]


def test_a_chat_reads_pictures_and_answers_with_text_and_pictures_whole_or_in_a_stream(served):
    content = [{"type": "text", "text": "a seven"}, {"type": "image_url", "image_url": {"url": data_url(png())}}]
    _, _, client = served
    text = chat(client, content, max_tokens=4, seed=1, modalities=["text"]).json()["choices"][0]
    assert isinstance(text["message"]["content"], str) and text["message"]["role"] == "assistant"
    fields = dict(modalities=["image"], previews=True, **DRAW)
    whole, = chat(client, content, **fields).json()["choices"][0]["message"]["content"]
    chunks = events(chat(client, content, stream=True, stream_options={"include_usage": True}, **fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert [delta["preview"]["step"] for delta in deltas if "preview" in delta] in ([1, 2], [2])
    streamed, = (delta["content"][0] for delta in deltas if delta.get("content"))
    assert streamed == whole and whole["type"] == "image_url"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["prompt_tokens"] > 18
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    written = events(chat(client, "a seven", stream=True, max_tokens=6, seed=2, max_images=0, temperature=0))
    joined = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in written)
    plain = chat(client, "a seven", max_tokens=6, seed=2, max_images=0, temperature=0).json()
    assert joined and joined == plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize("image_url", [
    {}, {"url": None}, {"url": 3}, 3, {"url": "http://localhost/a.png"}, {"url": "http://localhost:99999/a.png"},
    {"url": "http://[::1/"}, {"url": "ftp://a"}, {"url": "http://\ud800.x/"}, {"url": "http://a.x/\ud800"}])
def test_a_url_that_cannot_be_fetched_is_the_clients_error_also_where_remote_ones_are_allowed(image_url):
    with TestClient(make_app(Engine(tiny_model()), "tiny", allow_remote=True), raise_server_exceptions=False) as client:
        answer = chat(client, [{"type": "image_url", "image_url": image_url}])
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "image_url" and error["message"].startswith("image_url: ")


def pictures_of_other_hosts(count):
    return [{"type": "image_url", "image_url": {"url": "http://a.example/a.png"}}] * count


def test_pictures_of_one_request_are_fetched_within_one_time(monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.5)
    monkeypatch.setattr(remote, "_get", lambda url, most, end: (time.sleep(0.2), remote._left(end), (None, png()))[-1])
    with TestClient(make_app(Engine(tiny_model()), "tiny", allow_remote=True)) as client:
        for count, status in ((1, 200), (4, 400)):
            assert chat(client, pictures_of_other_hosts(count), max_tokens=1, max_images=0).status_code == status


def test_slow_hosts_hold_threads_of_their_own_alone(monkeypatch):
    hold, fetching = threading.Event(), AtOnce()

    def slow(*_):
        with fetching:
            hold.wait(20)
        return None, png()

    monkeypatch.setattr(remote, "_get", slow)
    engine = Engine(tiny_model(), queue=64)
    app = make_app(engine, "tiny", allow_remote=True)
    with TestClient(app) as client, ThreadPoolExecutor(50) as pool:
        waiting = [pool.submit(chat, client, pictures_of_other_hosts(1), max_tokens=1, max_images=0) for _ in range(50)]
        until(lambda: fetching.most == FETCHES)
        time.sleep(0.5)
        began = time.monotonic()
        assert chat(client, "a", max_tokens=1, max_images=0).status_code == 200
        assert time.monotonic() - began < 5 and fetching.most == FETCHES
        hold.set()
        assert {answer.result().status_code for answer in waiting} == {200}


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError])
def test_an_error_of_the_server_is_a_500_that_tells_nothing_of_it(served, monkeypatch, caplog, kind):
    """A ValueError while a request runs is not the client's either; the server's log has what it says."""
    _, engine, client = served
    told = {"message": f"the request failed ({kind.__name__})", "type": "server_error", "param": None, "code": None}

    def fails(*_):
        raise kind("steps is 3: a secret")

    with monkeypatch.context() as broken:
        broken.setattr(engine.cache, "run", fails)
        answer = client.post("/v1/images/generations", json={"prompt": "a", **DRAW})
        assert answer.status_code == 500 and answer.json()["error"] == told
        assert "a secret" in caplog.text
        assert events(chat(client, "a", stream=True))[-1]["error"] == told
    with monkeypatch.context() as broken:
        broken.setattr("transfusion.serve.pictures.to_picture", fails)
        answer = client.post("/v1/images/generations", json={"prompt": "a", **DRAW})
        assert answer.status_code == 500 and answer.json()["error"] == told
        assert events(chat(client, "a", stream=True, modalities=["image"], **DRAW))[-1]["error"] == told
    assert client.post("/v1/images/generations", json={"prompt": "a", **DRAW}).status_code == 200


def test_a_full_queue_is_a_429(served):
    _, engine, client = served
    hold = threading.Event()
    engine.call(lambda: hold.wait(20))
    waiting = [engine.submit(Request([Text("a")], Sampling(max_new_tokens=1, max_images=0)))
               for _ in range(engine.rows + engine.queue)]
    answer = client.post("/v1/images/generations", json={"prompt": "a", **DRAW})
    hold.set()
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    for ticket in waiting:
        ticket.result()


def test_openai_s_own_defaults_and_a_model_by_its_name_fit(client):
    name = client.get("/v1/models").json()["data"][0]["id"]
    assert client.get(f"/v1/models/{name}").json()["id"] == name
    missing = client.get("/v1/models/gpt")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "best_of": 1}).status_code == 200
    drawn = client.post("/v1/images/generations", json={"prompt": "a", "background": "auto", **DRAW})
    assert drawn.status_code == 200


def test_numbers_are_there_for_prometheus(client):
    client.post("/v1/images/generations", json={"prompt": "a", **DRAW})
    metrics = client.get("/metrics").text
    found = dict(re.findall(r"^(transfusion_\w+) (\d+)$", metrics, re.MULTILINE))
    assert int(found["transfusion_drawn_images_total"]) > 0 and found["transfusion_running"] == "0"
    assert "# TYPE transfusion_finished_total counter" in metrics and "# TYPE transfusion_cache_bytes gauge" in metrics


@pytest.fixture(scope="module")
def address():
    """A server that listens on a port of its own, and its engine."""
    engine = Engine(tiny_model(), rows=4)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "digits"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine
    server.should_exit = True
    thread.join()
    assert not engine.alive


def test_a_client_that_stopped_reading_does_not_hold_a_server_that_ends(monkeypatch, capsys):
    monkeypatch.setattr(listening, "UNREAD", 0.5)
    engine = Engine(tiny_model(), rows=1)
    app = make_app(engine, "digits")
    app.add_api_route("/much", lambda: StreamingResponse(itertools.repeat(bytes(2**20), 2**10)), response_model=None)
    server = listening.AnnouncedServer(uvicorn.Config(app, port=0, log_level="warning"), "it listens", engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    with socket.create_connection(server.servers[0].sockets[0].getsockname()) as client:
        client.sendall(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(2**16)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not engine.alive
    assert capsys.readouterr().out == "it listens\n"


def test_openais_client_talks_draws_and_edits(address):
    openai = pytest.importorskip("openai", reason="openai is not installed; pip install openai")
    client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["digits"]
    image = client.images.generate(model="digits", prompt="a seven", size="8x8", extra_body=DRAW).data[0].b64_json
    assert decoded(image).size == (8, 8)
    edited = client.images.edit(model="digits", image=("a.png", png()), prompt="a two", extra_body=DRAW)
    assert decoded(edited.data[0].b64_json).size == (8, 8)
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": data_url(png())}}]
    messages = [{"role": "user", "content": content}]
    options = dict(model="digits", messages=messages, max_tokens=5, seed=2, extra_body={"max_images": 0})
    answer = client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert client.completions.create(model="digits", prompt="a", max_tokens=3).usage.completion_tokens <= 3
    with pytest.raises(openai.BadRequestError, match="num_inference_steps|steps is 999"):
        client.images.generate(prompt="a", extra_body={"num_inference_steps": 999})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(address, stream):
    import http.client

    where, engine = address
    before = engine.stats()["cancelled"]
    connection = http.client.HTTPConnection(where.removeprefix("http://"))
    body = {"messages": [{"role": "user", "content": "a"}], "modalities": ["image"], "num_inference_steps": 250,
            "stream": stream, "size": "64x64"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: engine.stats()["running"])
    connection.close()
    until(lambda: not engine.stats()["running"])
    assert engine.stats()["cancelled"] == before + 1 and engine.stats()["cache_tokens_used"] == 0


def test_the_log_holds_errors_of_the_server_and_not_clients_that_left(caplog):
    assert of_the_server(Cancelled("the request was cancelled")).status == LEFT and not caplog.records
    assert of_the_server(RuntimeError("no memory")).status == 500 and "no memory" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_before_anything_could_be_sent_frees_its_place(stream):
    """An ASGI server of version 2.4 raises at the first send, and the answer's events are never asked for."""
    engine = Engine(tiny_model())
    app, hold, body = make_app(engine, "tiny"), threading.Event(), {
        "messages": [{"role": "user", "content": "a"}], "modalities": ["image"], "num_inference_steps": 250,
        "stream": stream}
    given = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/v1/chat/completions",
             "headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1"}

    async def receive():
        return given.pop() if given else {"type": "http.disconnect"}

    async def send(message):
        raise OSError("the client left")

    async def ask():
        with contextlib.suppress(Exception):
            await app(scope, receive, send)
        await asyncio.to_thread(until, lambda: engine.stats()["cancelled"])

    engine.call(lambda: hold.wait(20))
    asyncio.run(ask())
    hold.set()
    engine.close()
    assert engine.stats()["cancelled"] == 1 and engine.stats()["finished"] == 0


@pytest.mark.parametrize("language", ["sh", "py"])
def test_the_examples_of_the_page_run_as_they_stand(address, tmp_path, language):
    """Blocks of docs/serving.md for a server that runs: curl, and Python with OpenAI's client."""
    if language == "py":
        pytest.importorskip("openai", reason="openai is not installed; pip install openai")
    elif shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    page = (ROOT / "docs" / "serving.md").read_text().replace("http://127.0.0.1:8000", address[0])
    examples = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert examples
    (tmp_path / "seven.png").write_bytes(png())
    for code in examples:
        run = [sys.executable, "-c", code] if language == "py" else ["sh", "-euc", code]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout + done.stderr
    if language == "py":
        assert Picture.open(tmp_path / "drawn.png").size == (8, 8)
