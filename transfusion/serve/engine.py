"""The engine: one thread owns a model and runs many requests on it, each as if it were alone.

Requests are admitted while others run (continuous batching, Orca, OSDI 2022): a row of text joins at any token and an
image at any denoising step. Every round asks each running request what it needs next, a token, a prompt or one step of
an image, and answers all that fit together in one pass, whatever their times, numbers of steps, guidance and lengths.
The program of a request is `Running.program`; an error in it ends that request alone.

Each request draws its random numbers from its own seed, so its result does not depend on its company: texts are equal
and images differ by the rounding of matrix products of other shapes: in float32 on a CPU by at most 9.5e-6 of an
image's largest value in 555 random ones of three models (tests/transfusion/serve/test_engine.py allows 2e-5).
"""
import copy
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from transfusion.generate.generation import Event, Preview, as_parts
from transfusion.generate.row import check_options
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, Part, Text
from transfusion.serve.ragged_cache import Denoise, Feed, RaggedCache
from transfusion.serve.request import Failed, Finished, Limits, Request, Running
from transfusion.settings import check_value

COUNTERS = ("submitted", "finished", "failed", "cancelled", "refused", "passes", "rows_in_passes", "reused_tokens",
            "written_tokens", "drawn_images", "denoising_steps")  # numbers that only grow
SHORT = 127  # tokens: contexts up to here share passes, whatever their lengths
FEW = 7      # new tokens: up to here they share passes, for another pass costs more than the padding of these


class QueueFull(RuntimeError):
    """As many requests wait as may wait; try again later."""


class Cancelled(RuntimeError):
    """The request was cancelled."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


class Unread(deque):
    """Events that nobody has read yet. Of previews that follow one another the newest alone stays."""

    def add(self, event: Event | Finished | Failed) -> None:
        """Put an event behind the others."""
        if self and isinstance(event, Preview) and isinstance(self[-1], Preview):
            self[-1] = event
        else:
            self.append(event)


class Ticket:
    """A request on its way. Its events go to `on_event`, on the engine's thread, or are read once, from `events`.

    A reader that is slower than the model misses previews, nothing else.
    `on_event` hands an event on and returns; it must not call the engine, whose locks may be held.
    """

    def __init__(self, engine: "Engine", on_event: Callable[[Event | Finished | Failed], None] | None):
        self._engine, self.running = engine, None
        self._unread, self._change, self._ended = Unread(), threading.Condition(), False
        self._is_read_here, self._on_event = on_event is None, on_event or self._keep

    def events(self) -> Iterator[Event | Finished | Failed]:
        """What happens, as it happens: Written, Preview and Drawn, and at the end Finished or Failed.

        Raises:
            ValueError: they go to `on_event`, or were read to the end already.
        """
        self._check_readable("events")
        return self._events()

    def _events(self) -> Iterator[Event | Finished | Failed]:
        while not self._ended:
            with self._change:
                self._change.wait_for(lambda: self._unread)
                event = self._unread.popleft()
            self._ended = isinstance(event, (Finished, Failed))
            yield event

    def _keep(self, event: Event | Finished | Failed) -> None:
        with self._change:
            self._unread.add(event)
            self._change.notify()

    def _check_readable(self, op: str) -> None:
        if not self._is_read_here:
            raise ValueError(f"{op}: on_event is {self._on_event!r}, which is told what happens; None fits a ticket "
                             "that is read")
        if self._ended:
            raise ValueError(f"{op}: the end was read already; one reader fits, keep what it gets")

    def result(self) -> list[Part]:
        """Wait for the end and return the parts; a failure is raised.

        Raises:
            ValueError: as `events`.
        """
        self._check_readable("result")
        *_, last = self._events()
        if isinstance(last, Failed):
            raise last.error
        return last.parts

    def cancel(self) -> None:
        """Leave; the place is free at the next pass. A request that has ended stays as it is."""
        self._engine._cancel(self.running)

    def tell(self, event: Event | Finished | Failed) -> None:
        """Hand an event on to whoever listens; one that fails to take it has left."""
        try:
            self._on_event(event)
        except Exception:
            self.running.cancelled = True


class Engine:
    """Runs requests on a model.

    Args:
        model: a `Transfusion` with its tokenizer, in evaluation mode; from now on the engine's thread alone runs it.
        rows: requests that run at once.
        queue: requests that wait at most; one more raises `QueueFull`.
        limits: what a request may ask for and how large the cache is; None for those of `Limits`.
    """

    def __init__(self, model, rows: int = 16, queue: int = 64, *, limits: Limits | None = None):
        for name, value in (("rows", rows), ("queue", queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Engine: {name} is {value!r}; a whole number from 1 on fits")
        check_value("Engine", "limits", limits, Limits | None)
        check_options(model, Sampling())
        limits = limits or Limits()
        self.model, self.rows, self.queue, self.limits = model, rows, queue, limits
        self.cache = RaggedCache(model, limits.cache_tokens)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._calls: deque[tuple[Future, Callable]] = deque()
        self._counts: Counter = Counter()
        self._closing = False
        self._change = threading.Condition()    # guards all of the above
        self.tokenizing = threading.Lock()     # the model's tokenizer, whose settings change while it encodes
        self._decoder = copy.deepcopy(model.tokenizer)  # the thread's own: it waits for nobody who encodes a long text
        self._longest = max(map(len, model.tokenizer.get_vocab()))  # characters of a token
        self._thread = threading.Thread(target=self._loop, name="transfusion-engine", daemon=True)
        self._thread.start()
        try:
            self.call(self._allocate).result()
        except BaseException:
            self.close(drain=False)  # or its thread would keep the model, and no smaller cache would find room
            raise

    @property
    def alive(self) -> bool:
        """Whether it runs requests: not closed, and its thread has not failed."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: Request, on_event: Callable | None = None) -> Ticket:
        """Let a request wait for its turn.

        Raises:
            ValueError: a request that does not fit the model or is over the limits; the argument is named.
            QueueFull: too many wait.
            Closed: the engine is being closed.
        """
        if not isinstance(request, Request):
            raise ValueError(f"submit: request is a {type(request).__name__}; a Request fits, e.g. "
                             "Request([Text('a handwritten seven')])")
        ticket, parts = Ticket(self, on_event), as_parts("submit", "parts", request.parts)
        self.check_texts(part.text for part in parts if isinstance(part, Text))
        with self.tokenizing:
            ticket.running = running = Running(replace(request, parts=parts), self.model, self.limits, ticket.tell,
                                               self.cache.pages.remember, self._counts, self._decoder)
        with self._change:
            if self._closing:
                raise Closed("submit: the engine is closed; start another")
            if len(self._waiting) >= self.queue + max(0, self.rows - len(self._running)):  # free rows take some at once
                self._counts["refused"] += 1
                raise QueueFull(f"submit: {len(self._waiting)} requests wait; {self.queue} fit; try again later")
            self._waiting.append(running)
            self._counts["submitted"] += 1
            self._change.notify()
        return ticket

    def check_texts(self, texts: Iterable[str]) -> None:
        """Refuse a prompt whose texts cannot fit, before they are tokenized: no token has more than so many characters.

        Raises:
            ValueError: they have more characters than the longest tokens that fit.
        """
        characters, fit = sum(map(len, texts)), self.limits.request_tokens * self._longest
        if characters > fit:
            raise ValueError(f"submit: parts is of {characters} characters; at most {fit} fit, {self._longest} for "
                             f"each of {self.limits.request_tokens} tokens; a shorter prompt fits")

    def call(self, function: Callable[[], object]) -> Future:
        """Run a function on the engine's thread between two passes, such as the autoencoder's."""
        future: Future = Future()
        with self._change:
            if self._closing:
                raise Closed("call: the engine is closed; start another")
            self._calls.append((future, function))
            self._change.notify()
        return future

    def close(self, drain: bool = True) -> None:
        """Take no more requests and end: when all that wait and run are done or, without `drain`, now."""
        with self._change:
            self._closing = True
            for running in [] if drain else [*self._waiting, *self._running]:
                self._cancel(running)
            self._change.notify()
        self._thread.join()

    def stats(self) -> dict[str, int]:
        """Numbers of now (running, waiting, memory) and since the start (the rest)."""
        with self._change:
            return {"running": len(self._running), "waiting": len(self._waiting), "rows": self.rows,
                    "queue": self.queue, "cache_tokens": self.cache.tokens, "cache_tokens_used": self.cache.used,
                    "cache_bytes": self.cache.bytes, **{name: self._counts[name] for name in COUNTERS}}

    def _allocate(self) -> None:
        """Make the pool's memory by a pass of one token."""
        context = self.cache.open(1)
        self.cache.run([Feed(context, Document([self.model.tokenizer.eos_token_id], [False], []))])
        self.cache.close(context)

    def _cancel(self, running: Running) -> None:
        with self._change:
            running.cancelled = True
            if running in self._waiting:
                self._waiting.remove(running)
                self._end(running, Failed(Cancelled("the request was cancelled while it waited")))
            self._change.notify()

    def _loop(self) -> None:
        try:
            self._serve()
        finally:  # also after an error of the engine's own: nobody waits for what will not come
            with self._change:
                self._closing = True
                for running in [*self._waiting, *self._running]:
                    self._end(running, Failed(Closed("the engine ended")))
                self._waiting.clear()
                for future, _ in self._calls:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(Closed("the engine ended"))

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._running or self._calls or self._closing):
                    self._change.wait()
                if self._closing and not (self._waiting or self._running or self._calls):
                    return
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for future, function in calls:
                _answer(future, function)
            self._drop_cancelled()
            self._admit()
            self._round()

    def _drop_cancelled(self) -> None:
        with self._change:
            for running in [running for running in self._running if running.cancelled]:
                self._end(running, Failed(Cancelled("the request was cancelled")))

    def _admit(self) -> None:
        """Let requests in as they came while there are rows and room in the cache."""
        while True:
            with self._change:
                has_row = self._waiting and len(self._running) < self.rows
                if not has_row or not self.cache.fits(list(self._waiting[0].sizes.values())):
                    return
                self._running.append(running := self._waiting.popleft())
                running.contexts = {name: self.cache.open(size, running.document if name == "whole" else None)
                                    for name, size in running.sizes.items()}
            self._advance(running, None)

    def _round(self) -> None:
        """Answer what all running requests ask for."""
        groups: dict[tuple, list[tuple[Running, int]]] = {}
        for running in self._running:
            running.answers = [None] * len(running.asks)
            for number, ask in enumerate(running.asks):  # a group is padded to twice at most, or to FEW and SHORT
                size = len(ask.x) if isinstance(ask, Denoise) else len(ask.document.tokens)
                key = type(ask), max(size, FEW).bit_length(), max(ask.context.length, SHORT).bit_length()
                groups.setdefault(key, []).append((running, number))
        for members in groups.values():
            self._run([member for member in members if member[0] in self._running])
        for running in list(self._running):
            self._advance(running, running.answers)

    def _run(self, members: "list[tuple[Running, int]]") -> None:
        """One pass. If it fails, each request runs alone, and those that fail again end."""
        if not members:
            return
        try:
            found = self.cache.run([running.asks[number] for running, number in members])
            self._counts["passes"] += 1
            self._counts["rows_in_passes"] += len(members)
        except Exception as error:
            owners = list(dict.fromkeys(running for running, _ in members))
            if len(owners) == 1:
                with self._change:
                    self._end(owners[0], Failed(error))
                return
            for owner in owners:
                self._run([member for member in members if member[0] is owner])
            return
        for (running, number), answer in zip(members, found):
            running.answers[number] = answer

    def _advance(self, running: "Running", answers: list[Tensor] | None) -> None:
        """Let a request take its answers and ask for the next ones."""
        try:
            running.asks = running.coroutine.send(answers)
        except StopIteration as stop:
            with self._change:
                self._end(running, stop.value)
        except Exception as error:
            with self._change:
                self._end(running, Failed(error))

    def _end(self, running: "Running", event: Finished | Failed) -> None:
        """Free a request's place and tell it; called with `_change` held."""
        for context in running.contexts.values():
            self.cache.close(context)
        running.contexts = {}
        if running in self._running:
            self._running.remove(running)
        cancelled = isinstance(event, Failed) and isinstance(event.error, Cancelled)
        self._counts["cancelled" if cancelled else type(event).__name__.lower()] += 1
        running.tell(event)


def _answer(future: Future, function: Callable[[], object]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
