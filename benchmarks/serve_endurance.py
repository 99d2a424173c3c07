"""A server under clients that misbehave: thousands of requests, of which some leave, are malformed or ask too much.

What must hold at the end: every finished answer is the one that the same request got alone; every wrong request was
refused with the right status; nothing runs, waits or holds the cache; threads, files and tasks are as before; memory
has stayed flat.

    leaves     the client reads some events of a stream and closes its connection
    cancelled  the client closes its connection while a picture is drawn, and reads nothing
    malformed  no JSON, or fields of other types
    over       more steps, pixels, tokens or text than the limits allow
    the rest   are asked to the end and compared

More clients ask than the server lets run and wait, so that some are answered 429; they ask again until they are let in.
"""
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from benchmarks.serve_client import Answer, Asked, Server, answers, ask, is_same, request

SHARES = {"leaves": 0.15, "cancelled": 0.05, "malformed": 0.1, "over": 0.05}  # the rest is asked to the end
REST = 11.0     # seconds; the server's idle threads, which anyio keeps for 10, end at the first request behind it
GROWTH = 0.02   # of memory, from the second fifth of the requests to the last
SAMPLES = 200   # of memory
LOOKS = 5

MALFORMED = (  # address, body, and the status that it must be answered
    ("/v1/chat/completions", b"", 400),
    ("/v1/chat/completions", b"{\"messages\": [", 400),
    ("/v1/chat/completions", b"\xff\xfe\x00", 400),
    ("/v1/chat/completions", b"{\"messages\": \"a\"}", 400),
    ("/v1/chat/completions", b"{\"messages\": [{\"role\": 3, \"content\": \"a\"}]}", 400),
    ("/v1/chat/completions", b"{\"messages\": [{\"role\": \"user\", \"content\": [7]}]}", 400),
    ("/v1/chat/completions", b"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", "
                             b"\"image_url\": {\"url\": \"data:image/png;base64,AAAA\"}}]}]}", 400),
    ("/v1/completions", b"{\"prompt\": {}}", 400),
    ("/v1/completions", b"[" * 5000, 400),
    ("/v1/images/generations", b"{\"prompt\": \"a\", \"num_inference_steps\": \"many\"}", 400),
    ("/v1/images/generations", b"{\"prompt\": \"a\", \"size\": \"8 by 8\"}", 400),
    ("/v1/images/edits", b"{\"prompt\": \"a\"}", 400),
    ("/v1/nothing", b"{}", 404),
)
OVER = (  # address, fields, and the field that the refusal must name
    ("/v1/images/generations", {"prompt": "a", "num_inference_steps": 100_000}, "num_inference_steps"),
    ("/v1/images/generations", {"prompt": "a", "num_inference_steps": 2**60}, "num_inference_steps"),
    ("/v1/images/generations", {"prompt": "a", "size": "99992x99992"}, "size"),
    ("/v1/images/generations", {"prompt": "a", "n": 1000}, "n"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1_000_000}, "max_tokens"),
    ("/v1/completions", {"prompt": "a" * 500_000}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_images": 1000}, "max_images"),
)


@dataclass
class Endurance:
    """What so many requests by so many clients did to a server."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)  # (requests so far, bytes)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def growth(self) -> float:
        """By what share memory grew from the second fifth of the requests to the last, by the medians of both."""
        bytes_ = [bytes_ for _, bytes_ in sorted(self.resident)]
        fifth = max(1, len(bytes_) // 5)
        return statistics.median(bytes_[-fifth:]) / statistics.median(bytes_[fifth:2 * fifth]) - 1

    def check(self) -> None:
        """Raise an AssertionError that says what does not hold."""
        found = [f"{len(self.failures)} requests went wrong: {'; '.join(self.failures[:5])}"] if self.failures else []
        if not self.counts["finished"]:
            found.append("no request was asked to the end")
        if any(self.after[name] > self.before[name] for name in self.before):
            found.append(f"the server holds {self.after} and held {self.before}")
        if any(self.after[name] for name in ("running", "waiting", "cache_tokens_used")):
            found.append(f"requests are left: {self.after}")
        if not self.growth() <= GROWTH:
            found.append(f"memory grew by {self.growth():.1%}; {GROWTH:.0%} fit")
        assert not found, ". ".join(found)


def at_rest(server: Server, asked: Asked) -> dict[str, int]:
    """What a server holds when nobody has asked it for a while, and then one request that was answered."""
    time.sleep(REST)
    ask(server.port, asked)
    return held(server)


def held(server: Server) -> dict[str, int]:
    """What a server holds, by the least of a few looks: a connection that has just ended is open for a moment."""
    looks = []
    for _ in range(LOOKS):
        looks.append(server.held())
        time.sleep(0.1)
    return {name: min(look[name] for look in looks) for name in looks[0]}


def endure(server: Server, alone: list[tuple[Asked, Answer]], requests: int, clients: int, seed: int = 0) -> Endurance:
    """Ask `requests` times by `clients` at once; `alone` has requests and the answers that they got by themselves.

    The server has answered no two requests at once before.
    """
    found, lock, began = Endurance(before=held(server)), threading.Lock(), time.perf_counter()

    def one(number: int) -> None:
        choice = random.Random(f"{seed} {number}")
        outcome, failure = attempt(server.port, alone, choice)
        with lock:
            found.counts[outcome] += 1
            if failure:
                found.failures.append(f"request {number}: {failure}")
            if number % max(1, requests // SAMPLES) == 0:
                found.resident.append((number, server.resident()))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    found.seconds = time.perf_counter() - began
    found.after = at_rest(server, alone[0][0])
    found.counts["answered 429"] = int(server.metrics()["refused"])
    return found


def attempt(port: int, alone: list[tuple[Asked, Answer]], choice: random.Random) -> tuple[str, str | None]:
    """One request of a random kind: its kind, and what went wrong, if anything did."""
    kind, = choice.choices([*SHARES, "finished"], [*SHARES.values(), 1 - sum(SHARES.values())])
    try:
        return kind, KINDS[kind](port, alone, choice)
    except (OSError, RuntimeError, ValueError, json.JSONDecodeError) as error:
        return kind, f"{kind}: {type(error).__name__}: {error}"


def finishes(port: int, alone: list[tuple[Asked, Answer]], choice: random.Random) -> str | None:
    """A request to its end."""
    asked, expected = choice.choice(alone)
    while True:
        try:
            answer = ask(port, asked)
        except RuntimeError as error:
            if "answers 429" not in str(error):
                raise
            time.sleep(choice.uniform(0.05, 0.2))
        else:
            return None if is_same(answer.parts, expected.parts) else f"{asked} has another answer than alone"


def leaves(port: int, alone: list[tuple[Asked, Answer]], choice: random.Random) -> str | None:
    """Some events of a stream; the connection is closed behind them."""
    asked, _ = choice.choice([one for one in alone if one[0].fields.get("stream")])
    with request(port, "POST", asked.path, asked.body) as response:
        if response.status == 200:
            for _ in zip(range(choice.randint(1, 4)), answers(response)):
                pass
        return None if response.status in (200, 429) else f"a stream is answered {response.status}"


def is_cancelled(port: int, alone: list[tuple[Asked, Answer]], choice: random.Random) -> None:
    """A picture whose client closes its connection within a fifth of a second."""
    asked, _ = choice.choice([one for one in alone if one[0].path.endswith("generations")])
    head = f"POST {asked.path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(asked.body)}\r\n\r\n".encode() + asked.body)
        time.sleep(choice.uniform(0, 0.2))


def is_malformed(port: int, _, choice: random.Random) -> str | None:
    """A request that cannot be read."""
    path, body, status = choice.choice(MALFORMED)
    with request(port, "POST", path, body) as response:
        said = response.read()
        is_told = "error" in json.loads(said)
        return None if response.status == status and is_told else f"{path} {body[:60]!r}: {response.status} {said!r}"


def is_over(port: int, _, choice: random.Random) -> str | None:
    """A request over the limits."""
    path, fields, param = choice.choice(OVER)
    with request(port, "POST", path, json.dumps(fields).encode()) as response:
        said = response.read()
        is_named = json.loads(said)["error"]["param"] == param
        return None if response.status == 400 and is_named else f"{path}, {param}: {response.status} {said!r}"


KINDS: dict[str, Callable] = {"finished": finishes, "leaves": leaves, "cancelled": is_cancelled,
                              "malformed": is_malformed, "over": is_over}
