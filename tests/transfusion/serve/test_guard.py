"""What stands in front of the server: the key, how many bytes a request may have, and that they come."""
import asyncio

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion.serve.engine import Engine

for package in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")

from fastapi.testclient import TestClient  # noqa: E402

from transfusion.serve.guard import Guard  # noqa: E402
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
