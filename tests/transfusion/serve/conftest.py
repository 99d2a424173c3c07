"""Engines that tests share, and a server."""
import threading

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion.serve.engine import Engine


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close(drain=False)


@pytest.fixture
def gate(monkeypatch):
    """Holds an engine's passes until it is opened: requests can come together, and be counted while they run."""

    class Gate(threading.Event):
        def hold(self, engine):
            self.clear()
            run = engine.cache.run
            monkeypatch.setattr(engine.cache, "run", lambda asks: (self.wait(20), run(asks))[1])

    return Gate()


@pytest.fixture(scope="module")
def served():
    """A tiny model, its engine and a client of its server."""
    for package in ("fastapi", "uvicorn", "multipart"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")
    from fastapi.testclient import TestClient

    from transfusion.serve.server import make_app
    model = tiny_model()
    engine = Engine(model, rows=4, queue=4)
    with TestClient(make_app(engine, "tiny"), raise_server_exceptions=False) as client:
        yield model, engine, client


@pytest.fixture
def client(served):
    return served[2]
