"""Pictures of other hosts: public addresses alone, also behind redirects, and no more bytes than fit."""
import contextlib
import http.server
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from transfusion.serve import remote


@pytest.fixture
def host(monkeypatch):
    """A server on this machine that counts as public under the name it is asked by."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.strip("/")
            self.send_response({"picture": 200, "large": 200, "gone": 404}.get(kind, 302))
            targets = {"inside": "http://10.0.0.7/secret", "loop": "/loop", "once": "/picture",
                       "file": "file:///etc/passwd", "bracket": "http://[::1"}
            if kind in targets:
                self.send_header("Location", targets[kind])
            self.end_headers()
            self.wfile.write({"picture": b"bytes", "large": b"x" * 101}.get(kind, b""))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    checked = remote.is_public
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or checked(address))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_also_behind_a_redirect(host):
    assert remote.fetch(f"{host}/picture", 100) == remote.fetch(f"{host}/once", 100) == b"bytes"


def test_a_host_is_asked_by_its_name_and_a_port_that_is_the_schemes_own_is_left_out(monkeypatch):
    asked = []

    class Silent:
        def sendall(self, data):
            asked.append(data.decode())
            raise OSError("enough")

        def close(self):
            pass

    monkeypatch.setattr(remote, "_connected", lambda *_: Silent())
    monkeypatch.setattr(remote, "_Socket", lambda plain, end: plain)
    monkeypatch.setattr(remote.ssl, "create_default_context", lambda: SimpleNamespace(wrap_socket=lambda s, **_: s))
    for url in ("https://a.example/x", "http://a.example/x", "https://a.example:8443/x"):
        with pytest.raises(ValueError, match="enough"):
            remote.fetch(url, 1)
    assert [re.search("Host: (.*)\r", one)[1] for one in asked] == ["a.example", "a.example", "a.example:8443"]
    assert all(re.search("User-Agent: transfusion/", one) for one in asked)


def test_where_one_address_of_a_host_does_not_answer_the_next_is_asked(monkeypatch):
    tried, found = [], [(0, 0, 0, "", (address, 80, 0, 0)) for address in ("2606:4700::1", "8.8.8.8", "8.8.4.4")]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: found)

    def connect(address, timeout):
        tried.append(address)
        if address[0] != "8.8.8.8":
            raise OSError("no route")
        return "connection"

    monkeypatch.setattr(remote.socket, "create_connection", connect)
    assert remote._connected("a.example", 80, time.monotonic() + 5) == "connection"
    assert tried == [("2606:4700::1", 80), ("8.8.8.8", 80)]
    found.pop(1)
    with pytest.raises(OSError, match="no route"):
        remote._connected("a.example", 80, time.monotonic() + 5)


@pytest.mark.parametrize("path,message", [
    ("inside", "10.0.0.7 is at 10.0.0.7, which is not public"), ("loop", "more than 3 redirects"),
    ("file", "data:, http: and https: fit"),
    ("bracket", r"image_url: 'http://127.*/bracket' redirects to 'http://\[::1' \(Invalid IPv6 URL\)"),
    ("gone", "answers 404"), ("large", "more than 100 bytes")])
def test_what_leads_inside_or_is_too_large_is_refused(host, path, message):
    with pytest.raises(ValueError, match=message):
        remote.fetch(f"{host}/{path}", 100)


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/a", "http://localhost/a", "http://[::1]/a", "http://169.254.169.254/latest", "http://10.1.2.3/",
    "http://[::ffff:10.0.0.1]/", "http://[64:ff9b::a00:1]/", "http://0.0.0.0/", "ftp://example.org/a", "http:///a",
    "nothing", "http://localhost:99999/", "http://[::1/", f"http://{'a' * 99}.example/", "http://a b/"])
def test_no_address_that_is_not_public_is_connected_to(monkeypatch, url):
    monkeypatch.setattr(remote.socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ValueError, match="image_url"):
        remote.fetch(url, 100)


def test_a_url_that_utf8_cannot_write_is_spelled_out():
    for url in ("http://\ud800.x/", "http://[::1\ud800/"):
        with pytest.raises(ValueError, match=r"http://.*\\ud800") as raised:
            remote.fetch(url, 100)
        str(raised.value).encode()


def test_an_address_is_public_or_not():
    assert remote.is_public("8.8.8.8") and remote.is_public("2606:4700::1111")
    assert remote.is_public("64:ff9b::808:808") and remote.is_public("2002:808:808::1")
    for inside in ("192.168.1.1", "fe80::1%eth0", "fd00::1", "224.0.0.1", "100.64.0.1", "::ffff:127.0.0.1", "::", "::1",
                   "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:a00:1::1", "2002:7f00:1::", "::10.0.0.1", "::127.0.0.1",
                   "2001:0:a00:1::f5ff:fffe"):
        assert not remote.is_public(inside)


def test_all_files_of_a_request_have_one_time_together_and_what_lies_between_takes_none_of_it(monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 2.0)
    monkeypatch.setattr(remote, "_get", lambda url, most, end: (time.sleep(0.75), remote._left(end), (None, b"a"))[-1])
    fetching = remote.Fetching()
    assert fetching.fetch("http://a/", 1) == b"a"
    time.sleep(2.0)
    assert fetching.fetch("http://a/", 1) == b"a"
    with pytest.raises(ValueError, match="'http://a/' cannot be fetched .more than 2.0 seconds for all"):
        fetching.fetch("http://a/", 1)


def test_no_name_is_looked_up_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(ValueError, match="cannot be fetched .more than"):
        remote.fetch("http://a.example/", 1, time.monotonic())


@pytest.mark.parametrize("kind", ["head", "body", "redirects"])
def test_a_host_that_answers_bit_by_bit_is_left_when_the_time_of_all_is_over(monkeypatch, kind):
    """No single wait of its is long."""
    monkeypatch.setattr(remote, "SECONDS", 0.6)
    monkeypatch.setattr(remote, "is_public", lambda address: True)
    server, left = socket.create_server(("127.0.0.1", 0)), threading.Event()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/"

    def answer(connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(4096)
            if kind == "redirects":
                left.wait(0.25)
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /\r\nConnection: close\r\n\r\n")
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (kind == "body"))
            for _ in range(100):
                connection.sendall(b"a")
                if left.wait(0.1):
                    return

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot be fetched .*(seconds|timed out)"):
        remote.fetch(url, 10_000)
    assert time.monotonic() - began < 5
    left.set()
    server.close()
