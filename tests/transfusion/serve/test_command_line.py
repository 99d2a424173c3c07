"""`transfusion serve` and `transfusion app`: what they start, how they end, what they say if packages are missing."""
import contextlib
import ctypes
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import until
from transfusion import Text
from transfusion.cli import main
from transfusion.generate.sampling import Sampling
from transfusion.serve import command_line
from transfusion.serve.engine import Engine
from transfusion.serve.request import Request

PACKAGES = {"serve": ("uvicorn", "fastapi"), "app": ("uvicorn", "fastapi", "gradio")}


def need(command):
    for package in PACKAGES[command]:
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[{command}]'")


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "digits")
    return tmp_path / "digits"


@pytest.mark.parametrize("command, package", [("serve", "uvicorn"), ("app", "gradio")])
def test_without_a_commands_packages_it_says_how_to_get_them(checkpoint, monkeypatch, command, package):
    need("serve")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "transfusion.serve.page", raising=False)
    with pytest.raises(SystemExit, match=rf"{package} is not installed; pip install 'tfkernels\[{command}\]' fits"):
        main([command, "--model", str(checkpoint)])


@pytest.mark.parametrize("command, port", [("serve", 8000), ("app", 7860)])
def test_it_serves_a_checkpoint_on_this_machine_alone_and_ends_cleanly(checkpoint, monkeypatch, capsys, command, port):
    need(command)
    import uvicorn
    engines, started, engine = [], [], command_line.Engine

    def make(*given, **more):
        engines.append(engine(*given, **more))
        return engines[0]

    monkeypatch.setattr(command_line, "Engine", make)

    def run(server):
        started.append((server.config.host, server.config.port, engines[0].alive))
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    main([command, "--model", str(checkpoint), "--rows", "3", "--queue", "5", "--limits.steps", "7"])
    assert started == [("127.0.0.1", port, True)] and not engines[0].alive
    assert (engines[0].rows, engines[0].queue, engines[0].limits.steps) == (3, 5, 7)
    assert "stopped; what ran is finished" in capsys.readouterr().out


def test_threads_share_one_arena_of_glibc_and_other_c_libraries_stay_as_they_are(monkeypatch):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: asked.append(given)))
    command_line.share_one_arena()
    assert asked == [(-8, 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    command_line.share_one_arena()


def test_gradio_counts_nobody_who_uses_the_page(checkpoint):
    """Whether gradio may count its users is read when it is imported, so that is asked in a process of its own."""
    need("app")
    code = ("import sys, uvicorn; from transfusion.cli import main\n"
            "uvicorn.Server.run = lambda server: None\n"
            f"main(['app', '--model', {str(checkpoint)!r}])\n"
            "import gradio.analytics; assert not gradio.analytics.analytics_enabled()\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_port_that_is_taken_or_none_is_not_said_to_be_served(checkpoint, capsys):
    need("serve")
    with pytest.raises(ValueError, match="port is 70000; a whole number of at least 1 and at most 65535 fits"):
        command_line.ServeSettings(checkpoint, port=70_000)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["serve", "--model", str(checkpoint), "--port", str(taken.getsockname()[1])])
    assert "serving" not in capsys.readouterr().out


def test_a_server_says_where_it_is_when_it_listens_and_a_signal_lets_it_finish_what_it_draws(checkpoint):
    need("serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transfusion.cli", "serve", "--model", str(checkpoint), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert f"serving {checkpoint} at http://127.0.0.1:{port}/v1" in server.stdout.readline()
            body = {"prompt": "a", "num_inference_steps": 150, "size": "32x32", "seed": 1}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
            deadline = time.monotonic() + 60
            while "transfusion_running 1" not in metrics(port) and time.monotonic() < deadline:
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["data"][0]["b64_json"]
            server.wait(60)
        finally:
            server.kill()


@pytest.mark.parametrize("is_second, ended, said", [(False, "finished", "stopped; what ran is finished"),
                                                    (True, "cancelled", "stopped; what ran is left unfinished")])
def test_what_runs_is_finished_unless_a_second_interrupt_comes(capsys, is_second, ended, said):
    engine, told = Engine(tiny_model(), rows=1, queue=4), []

    def run():
        for _ in range(3):
            engine.submit(Request([Text("a")], Sampling(steps=250, max_new_tokens=0), draw=True),
                          lambda event: told.append(capsys.readouterr().out))
        raise KeyboardInterrupt

    command_line._listen(engine, SimpleNamespace(run=run, force_exit=is_second))
    assert engine.stats()[ended] == 3 and not engine.alive
    assert set(told) == {""} and said in capsys.readouterr().out, "it is said when it is so"


@pytest.mark.parametrize("command", ["serve", "app"])
def test_a_server_that_is_interrupted_twice_ends_at_once_and_says_what_it_left(checkpoint, command):
    need(command)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transfusion.cli", command, "--model", str(checkpoint), "--port", str(port),
               "--rows", "1", "--limits.steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            server.stdout.readline()
            body = {"prompt": "a", "num_inference_steps": 100_000}  # minutes
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
            until(lambda: "transfusion_running 1" in metrics(port))
            server.send_signal(signal.SIGINT)
            until(lambda: is_closed(port))
            server.send_signal(signal.SIGINT)
            said, _ = server.communicate(timeout=30)
            assert said == "stopped; what ran is left unfinished\n"
        finally:
            server.kill()


def is_closed(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return True
    return False


def metrics(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    with contextlib.closing(connection):
        return connection.getresponse().read().decode()
