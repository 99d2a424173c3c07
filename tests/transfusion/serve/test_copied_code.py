"""Copied code: what Python and curl send is read as the requests that the page makes."""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import until
from transfusion import Text
from transfusion.serve.engine import Engine
from transfusion.serve.pictures import PictureReader

pytest.importorskip("pydantic", reason="pydantic is not installed; pip install 'tfkernels[serve]'")

from transfusion.serve.copied_code import curl_code, python_code  # noqa: E402
from transfusion.serve.fields import Fields, draw, edit, requests_of, talk  # noqa: E402
from transfusion.serve.wire import ChatBody, ImageBody, chat_requests, image_requests  # noqa: E402

HARD = "costs $5 `ls` $(ls) \\ \\\\n \"both\" 'kinds'\nJSON\n\tü \0 @x ${HOME} \\u0000"
SETTINGS = Fields(seed=7, steps=2, guidance=2.5, image_guidance=1.5, sampler="heun", size="8x4", max_tokens=3,
                  temperature=0.5)
NAME = "it's a $(picture), \"one\" \\ of; many.png"


@pytest.fixture(scope="module")
def engine():
    engine = Engine(tiny_model(), rows=4, queue=8)
    yield engine
    engine.close()


@pytest.fixture(params=["talk", "talk, a picture", "draw", "edit", "the server's defaults"])
def call(request, tmp_path):
    path = tmp_path / NAME
    picture = Picture.new("L", (8, 8))
    picture.putdata(range(0, 256, 4))
    picture.save(path)
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": str(path)}}, {"type": "text", "text": HARD}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seen"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"path": str(path)}]}]
    return {"talk": lambda: talk(history[:1], replace(SETTINGS, answer="text")),
            "talk, a picture": lambda: talk(history, replace(SETTINGS, answer="a picture")),
            "draw": lambda: draw(HARD.replace("\0", ""), replace(SETTINGS, count=3)),
            "edit": lambda: edit(path, HARD.replace("\0", ""), replace(SETTINGS, count=2)),
            "the server's defaults": lambda: draw("a", Fields(seed=0))}[request.param]()


def assert_same(asked, found):
    """Requests of equal texts, pictures and options; previews alone may differ, for code does not stream."""
    assert len(asked) == len(found) > 0
    for one, other in zip(asked, found):
        assert [type(part) for part in one.parts] == [type(part) for part in other.parts]
        for part, twin in zip(one.parts, other.parts):
            same = part.text == twin.text if isinstance(part, Text) else torch.equal(part.latent, twin.latent)
            assert same, (part, twin)
        assert replace(one.sampling, previews=False) == replace(other.sampling, previews=False)
        assert one.draw == other.draw and one.sampling.previews


def read(address, body, files, pictures):
    """The requests that the server makes of a body."""
    body.pop("model", None)
    if address.endswith("chat/completions"):
        return chat_requests(ChatBody(**body), pictures, "none")
    return image_requests(ImageBody(**body), [pictures.read(file.read_bytes()) for file in files], pictures)


def test_what_the_copied_python_sends_is_the_pages_request(call, engine, tmp_path, monkeypatch):
    sent = []

    def function(name):
        def send(**given):
            sent.append((name, given))
            said = SimpleNamespace(message=SimpleNamespace(content="said"))
            return SimpleNamespace(choices=[said], data=[])
        return send

    client = SimpleNamespace(
        chat=SimpleNamespace(completions=SimpleNamespace(create=function("chat/completions"))),
        images=SimpleNamespace(generate=function("images/generations"), edit=function("images/edits")))
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=lambda **_: client))
    monkeypatch.chdir(tmp_path)
    exec(compile(python_code(call, "http://here:8000", "tiny"), "copied", "exec"), {"__name__": "copied"})
    (address, body), = sent
    files = [tmp_path / body.pop("image")] if "image" in body else []
    pictures = PictureReader(engine)
    assert address == call.address and body["model"] == "tiny"
    assert_same(requests_of(call, pictures, "none"), read(address, body, files, pictures))


def test_what_the_copied_curl_sends_is_the_pages_request(call, engine, tmp_path):
    """A program called curl writes down what the shell gave it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "curl").write_text(f"#!{sys.executable}\nimport json, sys\n"
                                   "given = '' if '-F' in sys.argv else sys.stdin.read()\n"
                                   "json.dump([sys.argv[1:], given], open('sent.json', 'w'))\n")
    (programs / "curl").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-euc", curl_code(call, "http://here:8000")], cwd=tmp_path, check=True,
                   env=os.environ | {"PATH": path}, timeout=60)
    (_, address, *options), given = json.loads((tmp_path / "sent.json").read_text())
    assert address == f"http://here:8000/v1/{call.address}"
    fields = [value.partition("=") for option, value in zip(options, options[1:]) if option == "--form-string"]
    files = [value for option, value in zip(options, options[1:]) if option == "-F"]
    escaped = NAME.replace("\\", "\\\\").replace('"', '\\"')
    assert files == [f'image=@"{escaped}"'] * len(call.pictures)
    body = {name: value for name, _, value in fields} if files else json.loads(given)
    pictures = PictureReader(engine)
    assert_same(requests_of(call, pictures, "none"),
                read(address, body, [tmp_path / NAME] * len(files), pictures))


@pytest.mark.parametrize("language", ["Python", "curl"])
def test_a_server_gets_the_pages_requests_from_copied_code(call, engine, tmp_path, monkeypatch, language):
    """The real clients and a real server."""
    pytest.importorskip("fastapi", reason="fastapi is not installed; pip install 'tfkernels[serve]'")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; pip install 'tfkernels[serve]'")
    if language == "Python":
        pytest.importorskip("openai", reason="openai is not installed; pip install openai")
    elif shutil.which("curl") is None:
        pytest.skip("curl is not installed; apt-get install curl")
    from transfusion.serve.server import make_app
    asked, submit = [], engine.submit

    def record(request, on_event):
        asked.append(request)
        return submit(request, on_event)

    monkeypatch.setattr(engine, "submit", record)
    monkeypatch.setattr(engine, "close", lambda: None)  # it serves the other tests, too
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(engine, "tiny"), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        run = ([sys.executable, "-c", python_code(call, address, "tiny")] if language == "Python" else
               ["sh", "-euc", curl_code(call, address)])
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        server.should_exit = True
        thread.join(30)
    assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout + done.stderr
    assert_same(requests_of(call, PictureReader(engine), "none"), asked)
    if language == "Python" and "images" in call.address:
        assert len(list(tmp_path.glob("picture-*.png"))) == call.body.get("n", 1)
