"""The server: what each address answers, what it refuses and with which status, and OpenAI's own client."""
import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.test_engine import until
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
from fastapi.testclient import TestClient  # noqa: E402

from transfusion.serve.server import FETCHES, LEFT, Answers, make_app, of_the_server  # noqa: E402
from transfusion.serve.wire import ApiError, ChatBody  # noqa: E402

ROOT = Path(__file__).parents[3]
DRAW = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def served():
    """A tiny model, its engine and a client of its server."""
    model = tiny_model()
    engine = Engine(model, rows=4, queue=4)
    with TestClient(make_app(engine, "tiny"), raise_server_exceptions=False) as client:
        yield model, engine, client


@pytest.fixture
def client(served):
    return served[2]


def png(size=(9, 7), colour=128):
    file = io.BytesIO()
    Picture.new("L", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def decoded(text):
    return Picture.open(io.BytesIO(base64.b64decode(text.removeprefix("data:image/png;base64,"))))


def drawn(model, prompt, **options):
    return to_picture(model.draw([prompt], steps=2, **options)[0].latent).tobytes()


def events(response):
    """The chunks of server-sent events."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post(client, path, body):
    """What a body is answered; in ASCII, as the client of the tests cannot write what UTF-8 cannot."""
    return client.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})


def chat(client, content, **fields):
    return post(client, "chat/completions", {"messages": [{"role": "user", "content": content}], **fields})


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
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


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


@pytest.mark.parametrize("files,fields,param", [
    ({"mask": ("m.png", png(), "image/png")}, {}, "mask"), ({"other": ("o.png", b"")}, {}, "other"),
    ({}, {"extra_body": "[" * 100_000}, "extra_body"), ({}, {"extra_body": "3"}, "extra_body"),
    ({}, {"extra_body": "{"}, "extra_body"), ({}, {"extra_body": f'{{"seed": {"9" * 5000}}}'}, "extra_body"),
    ({}, {"output_format": "jpeg"}, "output_format")])
def test_what_an_edit_does_not_serve_is_refused_by_its_name(client, files, fields, param):
    answer = client.post("/v1/images/edits", files={"image": ("a.png", png()), **files}, data={"prompt": "a", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


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


def bomb():
    """A PNG of a few bytes whose header says 50,000 x 50,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    pieces = {b"IHDR": struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes(50_001)),
              b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*piece) for piece in pieces.items())


@pytest.mark.parametrize("fields,status,param,message", [
    ({"num_inference_steps": 251}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 2**60}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 2**70}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps", "steps is 0"),
    ({"guidance_scale": 1e300}, 400, "guidance_scale", "is 1e+300; a number of at least 0 and at most 10000.0"),
    ({"image_guidance_scale": 1e300}, 400, "image_guidance_scale", "at most 10000.0"),
    ({"guidance_scale": -1}, 400, "guidance_scale", "is -1.0"),
    ({"size": "big"}, 400, "size", "WIDTHxHEIGHT fits"),
    ({"size": "7x8"}, 400, "size", "size is '7x8'; multiples of 2 fit"),
    ({"size": "0x8"}, 400, "size", "size is '0x8'; multiples of 2 fit"),
    ({"size": "4000x4000"}, 400, "size", "size is '4000x4000'; at most 1048576 pixels in all fit"),
    ({"prompt": "a" * 30_000}, 400, "prompt", "prompt is of"),
    ({"output_format": "webp"}, 400, "output_format", "output_format is not served"),
    ({"output_compression": 50}, 400, "output_compression", "not served"),
    ({"partial_images": 2}, 400, "partial_images", "not served"),
    ({"extra_body": 3}, 400, "extra_body", "extra_body is 3; an object fits"),
    ({"extra_body": "\ud800"}, 400, "extra_body", r"extra_body is '\ud800'; an object fits"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 9}, 400, "n", "n is 9; at most 8 answers fit this server at once, 4 that run and 4 that wait"),
    ({"model": "gpt"}, 404, "model", "'tiny' fits"),
    ({"model": "a" * 2**20}, 400, "model", "at most 256 characters"),
    ({"sampler": "a" * 2**20}, 400, "sampler", "at most 64 characters"),
    ({"sampler": "ddin"}, 400, "sampler", "did you mean 'ddim'?"),
    ({"size": "x" * 2**20}, 400, "size", "at most 64 characters"),
    ({"prompt": " "}, 400, "prompt", "prompt is empty"),
    ({"mask": "x"}, 400, "mask", "mask is not served"),
    ({"stream": True}, 400, "stream", "/v1/chat/completions streams"),
])
def test_a_field_that_does_not_fit_is_refused_by_its_name(client, fields, status, param, message):
    answer = post(client, "images/generations", {"prompt": "a", **DRAW, **fields})
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields", [
    {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e300}, {"guidance_scale": 1e4}, {"seed": -2**63},
    {"guidance_scale": 1e4, "image_guidance_scale": 1e4}, {"guidance_scale": 5e-324}, {"top_p": 0, "min_p": 1}])
def test_numbers_at_their_ends_are_answered(client, fields):
    options = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, **DRAW, **fields}
    for modalities in (["text"], ["image"]):
        answer = client.post("/v1/chat/completions", json={**options, "modalities": modalities})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("fields,param,message", [
    ({"max_tokens": 5000}, "max_tokens", "max_tokens is 5000 and the prompt of 2 tokens"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"top_p": 2}, "top_p", "top_p is 2.0"),
    ({"n": 16}, "n", "n is 16; at most 8 answers fit"),
    ({"prompt": ["a"] * 3, "n": 3}, "prompt", "prompt is 3 texts and n 3; at most 8 answers fit this server at once"),
    ({"prompt": ["a"] * 65}, "prompt", "prompt is 65 texts and n 1; 1 to 64 answers fit"),
    ({"prompt": [1, 2]}, "prompt", "prompt: Input should be a valid string"),
    ({"stop": ""}, "stop", "1 to 4 texts, none of them empty, fit"),
    ({"stop": list("abcde")}, "stop", "1 to 4 texts, none of them empty, fit"),
    ({"stop": "a" * 2**20}, "stop", "of at most 256 characters each"),
])
def test_a_field_of_texts_that_does_not_fit_is_refused_by_its_name(client, fields, param, message):
    answer = client.post("/v1/completions", json={"prompt": "a", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"]


@pytest.mark.parametrize("content,message", [
    (3, "of type 'NoneType'"),
    ([{"type": "a" * 2**20}], "aaa...; text"),
    ([{"type": "audio"}], "of type 'audio'; text"),
    ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}], "--allow-remote"),
    ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "a data: URL fits"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}], "not base64"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA\u00e9"}}], "image_url: url is not base64"),
    ([{"type": "image_url", "image_url": {"url": data_url(b"no picture")}}], "no picture that can be read"),
    ("a" * 2**20, "messages is of 1048576 characters"),
    ([{"type": "image_url", "image_url": {"url": data_url(bomb())}}], "no picture that can be read"),
    ([{"type": "image_url", "image_url": {"url": data_url(png((9000, 9000)))}}], "a picture is 9000x9000"),
])
def test_a_message_that_cannot_be_read_is_refused(client, content, message):
    answer = chat(client, content)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_long_role_is_not_repeated(client):
    answer = post(client, "chat/completions", {"messages": [{"role": "a" * 2**20, "content": "a"}]})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and len(message) < 300 and "aaa...; system, user and assistant fit" in message


def test_errors_of_prompts_and_pictures_name_these_and_those_of_guidance_its_scales(client):
    torn = io.BytesIO()
    Picture.effect_noise((64, 64), 50).save(torn, "PNG")
    torn, broken = torn.getvalue()[:2000], "a\ud800"
    in_a_chat = [{"type": "image_url", "image_url": {"url": data_url(torn)}}]
    for answer, param, message in (
            (client.post("/v1/images/edits", files={"image": ("a.png", torn)}, data={"prompt": "a"}), "image",
             "image is not a picture that can be read"),
            (chat(client, in_a_chat), "image", "image is not a picture that can be read"),
            (post(client, "images/generations", {"prompt": broken}), "prompt", r"prompt is 'a\ud800'"),
            (post(client, "completions", {"prompt": broken}), "prompt", r"prompt is 'a\ud800'"),
            (chat(client, broken), "messages", r"messages is 'a\ud800'"),
            (chat(client, "a", guidance_scale=-1), "guidance_scale", "guidance_scale is -1.0"),
            (chat(client, "a", image_guidance_scale=-1), "image_guidance_scale", "image_guidance_scale is -1.0")):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and error["message"].startswith(message)


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
    hold, lock, now, most = threading.Event(), threading.Lock(), [0], [0]

    def slow(*_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        hold.wait(20)
        with lock:
            now[0] -= 1
        return None, png()

    monkeypatch.setattr(remote, "_get", slow)
    engine = Engine(tiny_model(), queue=64)
    app = make_app(engine, "tiny", allow_remote=True)
    with TestClient(app) as client, ThreadPoolExecutor(50) as pool:
        waiting = [pool.submit(chat, client, pictures_of_other_hosts(1), max_tokens=1, max_images=0) for _ in range(50)]
        until(lambda: most[0] == FETCHES)
        time.sleep(0.5)
        began = time.monotonic()
        assert chat(client, "a", max_tokens=1, max_images=0).status_code == 200
        assert time.monotonic() - began < 5 and most[0] == FETCHES
        hold.set()
        assert {answer.result().status_code for answer in waiting} == {200}


@pytest.mark.parametrize("body,status", [
    (b"{", 400), (b"[]", 400), (b'{"messages": []}', 400), (b'{"messages": [{"role": "x"}]}', 400), (b"x" * 2**20, 400),
    (b'{"messages": ' + b"[" * 100_000, 400), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b"x" * (33 * 2**20), 413)])
def test_malformed_and_large_bodies_are_answered_in_openais_shape(client, body, status):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"


def test_an_error_says_in_utf8_and_not_at_any_length_what_the_client_sent():
    message = ApiError(400, "url is \ud800" + "a" * 2**20).body()["error"]["message"]
    assert message.startswith("url is \\ud800a") and len(message.encode()) < 1100


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
    waiting = [engine.submit(Request([Text("a")], Sampling(max_new_tokens=1, max_images=0))) for _ in range(4)]
    answer = client.post("/v1/images/generations", json={"prompt": "a", **DRAW})
    hold.set()
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    for ticket in waiting:
        ticket.result()


def test_more_answers_than_ever_fit_at_once_are_no_429(served):
    _, engine, client = served
    before = engine.stats()["submitted"]
    edit = client.post("/v1/images/edits", files={"image": ("a.png", png())}, data={"prompt": "a", "n": "9"})
    for answer in (chat(client, "a", n=9), edit):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "n" and "at most 8 answers fit" in error["message"]
    assert engine.stats()["submitted"] == before
    several = chat(client, "a", n=4, max_tokens=2, max_images=0)
    assert several.status_code == 200 and len(several.json()["choices"]) == 4


def test_more_pictures_than_fit_are_refused_before_one_is_read(client, monkeypatch):
    monkeypatch.setattr("transfusion.serve.pictures.PictureReader.read", lambda *_: pytest.fail("one was read"))
    answers = [
        chat(client, [{"type": "image_url", "image_url": {"url": data_url(png())}}] * 228),
        client.post("/v1/images/edits", files=[("image[]", ("a.png", png()))] * 228)]
    for answer in answers:
        assert answer.status_code == 400 and "there are 228; at most 227 fit" in answer.json()["error"]["message"]


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
