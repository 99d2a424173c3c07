"""The benchmark of serving: it measures a real server, and wrong answers and what is left behind end with 1."""
import base64
import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image as Picture

from benchmarks import serve, serve_client, serve_endurance
from benchmarks.serve_client import Answer, Asked, is_same
from benchmarks.serve_endurance import Endurance
from tests.transfusion.conftest import tiny_model

HELD = {"threads": 6, "files": 8, "tasks": 3, "running": 0, "waiting": 0, "cache_tokens_used": 0}


@pytest.fixture
def few(monkeypatch):
    """Pictures of two steps and few requests, for a server that may be slow to answer."""
    monkeypatch.setattr(serve_client, "STEPS", 2)
    monkeypatch.setattr(serve_client, "DISTINCT", 3)
    monkeypatch.setattr(serve, "LEAST", 4)
    monkeypatch.setattr(serve, "TURNS", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")
    where = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_model().save_pretrained(where)
    return where


@pytest.fixture
def one_server(checkpoint, monkeypatch):
    """One process stands for all servers, for each takes seconds to begin."""
    with serve_client.Server(checkpoint, rows=16, queue=8) as server:
        for module in (serve, serve_endurance):
            monkeypatch.setattr(module, "Server", lambda model, **options: contextlib.nullcontext(server))
        yield server


def flat(count=100):
    return [(number, 500_000_000 + 1000 * (number % 7)) for number in range(count)]


def test_the_command_measures_a_server_and_writes_the_file_the_page_and_the_plot(
        checkpoint, one_server, tmp_path, few, monkeypatch):
    monkeypatch.setattr(serve, "WORDS", {kind: serve.WORDS[kind] for kind in ("previews", "texts")})
    arguments = ["--model", str(checkpoint), "--out", str(tmp_path), "--quick", "--commit", "0123456789abc"]
    assert serve.main([*arguments, "--requests", "60"]) == 0
    endurance, *loads = json.loads((tmp_path / "serve-cpu-0123456789.json").read_text())["rows"]
    assert len(loads) == len(serve.WORDS) * 2 * 2 and all(row["checked"] for row in loads)
    for row in loads:
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"] and row["per_second"] > 0
        assert row["cpu_ms_per_request"] > 0 and ("first_preview_ms" in row) == (row["kind"] == "previews")
        if row["kind"] in ("texts", "previews"):
            first = row["first_text_ms" if row["kind"] == "texts" else "first_preview_ms"]
            assert 0 < first["p50"] < row["latency_ms"]["p50"]
    assert endurance["counts"]["finished"] > 20 and endurance["held"]["running"] == 0
    kinds = sum(endurance["counts"].get(kind, 0) for kind in serve_endurance.KINDS)
    assert kinds == endurance["requests"] == 60
    page = (tmp_path / "serve-cpu-0123456789.md").read_text()
    assert page.count("| up to 32 tokens |") == 2 and "60 requests by 32 clients" in page
    pytest.importorskip("matplotlib")
    assert (tmp_path / "serve-cpu-0123456789.png").stat().st_size > 1000


def test_an_answer_that_is_another_than_alone_ends_with_1_and_without_a_number(tmp_path, few, monkeypatch):
    class Fake(contextlib.nullcontext):
        port, process = 0, None

        def __init__(self, model, **options):
            super().__init__(self)

        def cpu_seconds(self):
            return 0.0

        def resident(self):
            return 500_000_000

        def held(self):
            return HELD

        def metrics(self):
            return {"refused": 0}

    for module in (serve, serve_endurance):
        monkeypatch.setattr(module, "Server", Fake)
    tokens = itertools.count()  # no two answers are the same
    monkeypatch.setattr(serve, "ask", lambda port, asked: Answer([str(next(tokens))], 0.1, {}))
    monkeypatch.setattr(serve_endurance, "ask", serve.ask)
    monkeypatch.setattr(serve, "ask_all", lambda port, asked, clients: [serve.ask(port, one) for one in asked])
    monkeypatch.setattr(serve, "kinds", lambda port: {
        kind: [serve_client.text(0), serve_client.text(1)] for kind in serve.WORDS})
    monkeypatch.setattr(serve, "about", lambda model: {"parameters": 1, "image_size": "8x8"})
    monkeypatch.setattr(serve_endurance, "SHARES", {})
    monkeypatch.setattr(serve_endurance, "REST", 0)
    arguments = ["--model", "none", "--out", str(tmp_path), "--quick", "--commit", "0123456789abc"]
    assert serve.main([*arguments, "--requests", "5"]) == 1
    report = json.loads((tmp_path / "serve-cpu-0123456789.json").read_text())
    assert not report["rows"] and "has another answer than alone" in report["notes"][-1]
    assert "5 requests went wrong" in report["notes"][0]


def test_pictures_may_differ_by_one_grey_level_and_texts_not_at_all():
    grey = np.full((8, 8), 7, dtype=np.int16)
    assert is_same(["a", grey], ["a", grey + 1]) and not is_same([grey], [grey + 2])
    assert not is_same(["a"], ["a "]) and not is_same(["a"], [grey]) and not is_same([grey], [grey[:4]])
    assert not is_same(["a"], ["a", grey])


@pytest.mark.parametrize("change,says", [
    (dict(failures=["request 3: another answer"]), "1 requests went wrong: request 3"),
    (dict(after=HELD | {"threads": 7}), "'threads': 7.* and held .*'threads': 6"),
    (dict(after=HELD | {"tasks": 4}), "'tasks': 4"),
    (dict(before=HELD | {"running": 1}, after=HELD | {"running": 1}), "requests are left"),
    (dict(before=HELD | {"cache_tokens_used": 16}, after=HELD | {"cache_tokens_used": 16}), "requests are left"),
    (dict(resident=[(number, 500_000_000 + 300_000 * number) for number in range(100)]), "memory grew by"),
    (dict(counts={"finished": 0}), "no request was asked to the end")])
def test_what_a_server_keeps_or_gets_wrong_fails_the_endurance_run(change, says):
    fine = dict(counts={"finished": 3}, failures=[], resident=flat(), before=HELD, after=HELD)
    Endurance(**fine).check()
    with pytest.raises(AssertionError, match=says):
        Endurance(**fine | change).check()


def test_an_answer_is_read_with_the_times_of_its_first_pieces(monkeypatch):
    file = io.BytesIO()
    Picture.new("L", (8, 8), 9).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    deltas = [{"role": "assistant", "content": ""}, {"content": "a "}, {"content": "b"},
              {"preview": {"url": url, "step": 1, "steps": 2}},
              {"content": [{"type": "image_url", "image_url": {"url": url}}]}, {}]
    sent = "".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas)

    class Response(io.BytesIO):
        status, headers = 200, {"Content-Type": "text/event-stream; charset=utf-8"}

        def __call__(self, *_):
            return self

    monkeypatch.setattr(serve_client, "request", Response(f"{sent}data: [DONE]\n\n".encode()))
    answer = serve_client.ask(0, Asked("/v1/chat/completions", {}))
    assert is_same(answer.parts, ["a b", np.full((8, 8), 9)])
    assert 0 < answer.first["text"] <= answer.first["preview"] <= answer.first["image"] <= answer.seconds
    monkeypatch.setattr(serve_client, "request", Response(sent.encode()))
    with pytest.raises(RuntimeError, match=r"without \[DONE\]"):
        serve_client.ask(0, Asked("/v1/chat/completions", {}))
