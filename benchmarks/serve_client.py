"""A server of `transfusion serve` in a process of its own, requests to it, and when what of an answer came.

The client is Python's own HTTP client, one connection for each request. An answer is read as it is streamed, so that
the first token and the first preview have their times. Two answers are the same if their texts are equal and their
pictures differ by no more than one of 255 grey levels, which is what rounding may do to a pixel (docs/serving.md).
"""
import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as Picture

from transfusion.recipes.digits import DIGIT_NAMES

STEPS, GUIDANCE = 20, 3
DISTINCT = 8    # requests of each kind
PATIENCE = 600  # seconds that a client waits for news


class Asked(NamedTuple):
    """A request: where it goes and the fields of its JSON."""

    path: str
    fields: dict

    @property
    def body(self) -> bytes:
        """The fields as they are sent."""
        return json.dumps(self.fields).encode()


class Answer(NamedTuple):
    """What came: texts and pictures (H, W) or (H, W, 3) in order, and the seconds until the end and the first pieces.

    `first` has the seconds to the first text, preview and image, where there was one.
    """

    parts: list[str | np.ndarray]
    seconds: float
    first: dict[str, float]


class Server:
    """`transfusion serve` on a free port of this machine, with one thread for the model's products.

    With a second thread a shared machine would measure how long the one waits for the other's core.
    """

    def __init__(self, model: Path, **options: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "transfusion.cli", "serve", "--model", str(model), "--port", str(self.port)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def __enter__(self) -> "Server":
        if not self.process.stdout.readline().startswith(b"serving"):
            self.close()
            raise RuntimeError(f"transfusion serve ended with {self.process.returncode} before it listened")
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process: what runs is finished, but not waited for longer than a minute."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics, by their names without "transfusion_" and "_total"."""
        with request(self.port, "GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        named = (line.split() for line in lines if not line.startswith("#"))
        return {name.removeprefix("transfusion_").removesuffix("_total"): float(value) for name, value in named}

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        return int(self._proc("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """Seconds of a core that the process has had so far."""
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def held(self) -> dict[str, int]:
        """How many threads, open files and asyncio tasks it has, and what it holds for requests.

        Files are counted first: the server still holds the connection that has just asked for its metrics.
        """
        folders = {name: len(os.listdir(f"/proc/{self.process.pid}/{folder}"))
                   for name, folder in (("threads", "task"), ("files", "fd"))}
        found = self.metrics()
        return folders | {name: int(found[name]) for name in ("tasks", "running", "waiting", "cache_tokens_used")}

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


@contextmanager
def request(port: int, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
    """The response to a request, whose connection is closed at the end, also where not all of it was read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def ask(port: int, asked: Asked) -> Answer:
    """Ask and read the whole answer.

    Raises:
        RuntimeError: it is an error, whole or in its stream.
    """
    began, first, parts = time.perf_counter(), {}, []
    with request(port, "POST", asked.path, asked.body) as response:
        if response.status != 200:
            raise RuntimeError(f"{asked.path} answers {response.status}: {response.read()[:300]!r}")
        for kind, piece in pieces(response):
            first.setdefault(kind, time.perf_counter() - began)
            if kind == "image":
                parts.append(piece)
            elif kind == "text" and parts and isinstance(parts[-1], str):
                parts[-1] += piece
            elif kind == "text":
                parts.append(piece)
    seconds = time.perf_counter() - began
    return Answer([part if isinstance(part, str) else decoded(part) for part in parts], seconds, first)


def pieces(response: http.client.HTTPResponse) -> Iterator[tuple[str, str | bytes]]:
    """("text", some text) and ("preview" or "image", a PNG file) as they come."""
    for answer in answers(response):
        if "error" in answer:
            raise RuntimeError(f"the stream ends with {answer['error']}")
        yield from (("image", base64.b64decode(one["b64_json"])) for one in answer.get("data", ()))
        for choice in answer.get("choices", ()):
            said = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            if "preview" in said:
                yield "preview", from_url(said["preview"]["url"])
            content = said.get("content") or []  # an empty text is none
            for part in [{"text": content}] if isinstance(content, str) else content:
                yield ("text", part["text"]) if "text" in part else ("image", from_url(part["image_url"]["url"]))


def answers(response: http.client.HTTPResponse) -> Iterator[dict]:
    """The JSON of a response: one object, or one for each event of a stream that ends as it should."""
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        yield json.loads(response.read())
        return
    while (line := response.readline()) != b"data: [DONE]\n":
        if not line:
            raise RuntimeError("the stream ended without [DONE]")
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def from_url(url: str) -> bytes:
    """The file in a data: URL."""
    return base64.b64decode(url.partition(",")[2])


def decoded(file: bytes) -> np.ndarray:
    """A picture's pixels."""
    with Picture.open(io.BytesIO(file)) as picture:
        return np.asarray(picture).astype(np.int16)


def is_same(ours: list[str | np.ndarray], theirs: list[str | np.ndarray]) -> bool:
    """Whether two answers are the same: equal texts, and pictures equal to one grey level."""
    if [type(part) for part in ours] != [type(part) for part in theirs]:
        return False
    return all(a == b if isinstance(a, str) else a.shape == b.shape and np.abs(a - b).max() <= 1
               for a, b in zip(ours, theirs))


def ask_all(port: int, asked: list[Asked], clients: int) -> list[Answer]:
    """Answers to all requests, by so many clients, each of which asks anew when it has its answer."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda one: ask(port, one), asked))


def drawing(seed: int) -> Asked:
    """A picture, whole."""
    return Asked("/v1/images/generations", {"prompt": f"a handwritten {DIGIT_NAMES[seed % 10]}", "seed": seed,
                                            "num_inference_steps": STEPS, "guidance_scale": GUIDANCE})


def previewed(seed: int) -> Asked:
    """The same picture, streamed with a preview of each step."""
    fields = drawing(seed).fields
    return Asked("/v1/chat/completions", {
        **{name: value for name, value in fields.items() if name != "prompt"}, "stream": True, "previews": True,
        "modalities": ["image"], "messages": [{"role": "user", "content": fields["prompt"]}]})


def text(seed: int) -> Asked:
    """Up to 32 tokens, streamed."""
    return Asked("/v1/completions", {"prompt": "a", "max_tokens": 32, "seed": seed, "stream": True})


def description(seed: int, picture: bytes) -> Asked:
    """What the model says of a picture, streamed."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return Asked("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "modalities": ["text"],
                                          "max_tokens": 16, "seed": seed, "stream": True})


def kinds(port: int) -> dict[str, list[Asked]]:
    """A few requests of each kind, with seeds; the pictures to be described are drawn by the model."""
    drawings = [drawing(seed) for seed in range(DISTINCT)]
    texts = [text(seed) for seed in range(DISTINCT)]
    described = [description(seed, picture(port, one)) for seed, one in enumerate(drawings)]
    mixture = [one for three in zip(drawings, texts, described) for one in three]
    return {"drawings": drawings, "previews": [previewed(seed) for seed in range(DISTINCT)], "texts": texts,
            "mixture": mixture}


def picture(port: int, asked: Asked) -> bytes:
    """The file of a picture that is asked for."""
    with request(port, "POST", asked.path, asked.body) as response:
        return next(piece for kind, piece in pieces(response) if kind == "image")
