"""What stands in front of the server: the key, how many bytes a request may have, and that they come."""
import asyncio

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion.serve.engine import Engine

for package in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")

from fastapi.testclient import TestClient  # noqa: E402

from transfusion.serve.guard import TOGETHER, Guard  # noqa: E402
from transfusion.serve.server import make_app  # noqa: E402


def test_a_key_is_asked_for_where_one_is_set():
    with TestClient(make_app(Engine(tiny_model()), "tiny", api_key="secret")) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_request_has_at_most_so_many_bytes():
    with TestClient(make_app(Engine(tiny_model()), "tiny", max_megabytes=1)) as client:
        for length, status in ((2**20, 400), (2**20 + 1, 413)):
            assert client.post("/v1/completions", content=b"x" * length).status_code == status


def test_a_body_that_stops_coming_holds_no_place(monkeypatch):
    async def receive():
        given.append(None)
        if len(given) > 1:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        sent.append(message)

    given, sent = [], []
    monkeypatch.setattr("transfusion.serve.guard.PATIENCE", 0.05)
    guard = Guard(None, api_key=None, max_bytes=2**20)
    asyncio.run(asyncio.wait_for(guard({"type": "http", "path": "/v1/completions", "headers": []}, receive, send), 10))
    assert sent[0]["status"] == 408 and b"nothing more of the request came for 0.05 seconds" in sent[1]["body"]


def asked(guard, path, pieces, api_key=None):
    """The status that a guard answers a request of some pieces with, and how many of them it read."""
    waiting, sent = list(pieces), []

    async def receive():
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "headers": []}, receive, send))
    return sent[0]["status"], len(pieces) - len(waiting)


def test_what_comes_with_a_question_for_health_is_not_read():
    async def app(scope, receive, send):
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(app, api_key="secret", max_bytes=8)
    assert asked(guard, "/health", [b"x" * 4] * 3) == (200, 0)
    assert asked(guard, "/v1/models", [b"x" * 4] * 3) == (401, 0)


def test_all_requests_together_hold_so_many_bytes_and_no_more_once_they_are_answered():
    held = []

    async def app(scope, receive, send):
        held.append(guard.held)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(app, api_key=None, max_bytes=8)
    assert asked(guard, "/v1/completions", [b"x" * 4] * 2) == (200, 2) and held == [8] and guard.held == 0
    assert asked(guard, "/v1/completions", [b"x" * 4] * 3) == (413, 3) and guard.held == 0
    guard.held = TOGETHER * 8 - 4
    assert asked(guard, "/v1/completions", [b"x" * 4] * 2) == (503, 2) and guard.held == TOGETHER * 8 - 4
    assert asked(guard, "/v1/completions", [b"x" * 4]) == (200, 1)
