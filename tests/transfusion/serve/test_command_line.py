"""The command `transfusion serve`: what it starts, how it ends, and what it says where its packages are missing."""
import sys

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion.cli import main
from transfusion.serve import command_line


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "digits")
    return tmp_path / "digits"


def test_without_the_servers_packages_it_says_how_to_get_them(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"uvicorn is not installed; pip install 'tfkernels\[serve\]' fits"):
        main(["serve", "--model", str(checkpoint)])


def test_it_serves_the_checkpoint_on_this_machine_alone_and_ends_cleanly(checkpoint, monkeypatch, capsys):
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; pip install 'tfkernels[serve]'")
    pytest.importorskip("fastapi", reason="fastapi is not installed; pip install 'tfkernels[serve]'")
    engines, started, engine = [], [], command_line.Engine

    def make(*given, **more):
        engines.append(engine(*given, **more))
        return engines[0]

    monkeypatch.setattr(command_line, "Engine", make)

    def run(server):
        started.append((server.config.host, server.config.port, engines[0].alive))
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    main(["serve", "--model", str(checkpoint), "--rows", "3", "--queue", "5", "--limits.steps", "7"])
    assert started == [("127.0.0.1", 8000, True)] and not engines[0].alive
    assert (engines[0].rows, engines[0].queue, engines[0].limits.steps) == (3, 5, 7)
    assert "stopped; what ran is finished" in capsys.readouterr().out
