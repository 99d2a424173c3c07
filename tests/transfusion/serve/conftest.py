"""A server that tests share."""
import pytest

from tests.transfusion.conftest import tiny_model
from transfusion.serve.engine import Engine


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
