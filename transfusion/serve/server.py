"""An HTTP server with OpenAI's interface in front of an engine.

    GET  /v1/models                the one model there is
    POST /v1/chat/completions      text and pictures in and out, whole or as server-sent events; previews where asked
    POST /v1/completions           text alone
    POST /v1/images/generations    a picture for a prompt
    POST /v1/images/edits          a picture for pictures and an instruction (multipart)
    GET  /health, /metrics         whether it runs; numbers for Prometheus

A client that leaves frees its place. Errors have OpenAI's shape: 400 a request that does not fit, 401 a wrong key, 413
too many bytes, 429 too many requests wait, 500 and 503 the server's own.
"""
import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from transfusion.generate.generation import Drawn, Preview, Written
from transfusion.sequence import Image, Part, Text
from transfusion.serve.engine import COUNTERS, Cancelled, Closed, Engine, QueueFull, Unread
from transfusion.serve.guard import Guard, error_response
from transfusion.serve.pictures import PictureReader
from transfusion.serve.request import Failed, Finished
from transfusion.serve.request import Request as Asked
from transfusion.serve.wire import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    ImageBody,
    TextBody,
    chat_requests,
    image_requests,
    refused,
    shows_other_hosts,
    shows_pictures,
)

LOG = logging.getLogger(__name__)
MEGABYTE = 2**20
FETCHES = 8  # requests that wait for pictures of other hosts at once, on threads of their own
LEFT = 499  # the status of a client that left, which only logs see


class Answers:
    """The n answers to one HTTP request: their tickets, and their events as they come."""

    def __init__(self, engine: Engine, request: Request):
        self.engine, self.request, self.tickets = engine, request, []
        self.done: dict[int, Finished] = {}  # by the number of the answer
        self.loop, self.unread, self.news = asyncio.get_running_loop(), [], asyncio.Event()
        self.watch: asyncio.Task | None = None

    async def submit(self, asked: list[Asked]) -> None:
        """Hand requests to the engine; all of them, or none. From now on a client that leaves cancels them.

        Raises:
            ValueError, QueueFull, Closed: one was refused, as by `Engine.submit`.
        """
        self.unread = [Unread() for _ in asked]
        try:
            for number, one in enumerate(asked):
                await run_in_threadpool(self._submit, number, one)
        except BaseException:
            self.cancel()
            raise
        self.watch = asyncio.create_task(self._watch())

    def _submit(self, number: int, asked: Asked) -> None:
        self.tickets.append(self.engine.submit(asked, partial(self._tell, number)))

    def cancel(self) -> None:
        """Leave all that are not done."""
        for ticket in self.tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple]:
        """(number of the answer, event) until all are done; who is slow misses previews.

        Raises:
            ApiError: one of them failed.
        """
        try:
            while len(self.done) < len(self.tickets):
                await self.news.wait()
                self.news.clear()
                for number, unread in enumerate(self.unread):
                    while unread:
                        event = unread.popleft()
                        if isinstance(event, Failed):
                            raise of_the_server(event.error)
                        if isinstance(event, Finished):
                            self.done[number] = event
                        yield number, event
        finally:
            self.close()

    def close(self) -> None:
        """Leave all that are not done, and look no more whether the client left."""
        if self.watch is not None:
            self.watch.cancel()
        self.cancel()

    async def finished(self) -> list[Finished]:
        """Wait for all, in their order."""
        found = {number: event async for number, event in self.events() if isinstance(event, Finished)}
        return [found[number] for number in range(len(self.tickets))]

    def _tell(self, number: int, event) -> None:
        self.loop.call_soon_threadsafe(self._keep, number, event)

    def _keep(self, number: int, event) -> None:
        self.unread[number].add(event)
        self.news.set()

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()


class Api:
    """What each address does."""

    def __init__(self, engine: Engine, pictures: PictureReader, name: str, template: str):
        self.engine, self.pictures, self.name, self.template = engine, pictures, name, template
        self.created = int(time.time())
        self.fetching = CapacityLimiter(FETCHES)

    async def models(self) -> dict:
        """The model there is, in a list."""
        return {"object": "list", "data": [await self.one_model(self.name)]}

    async def one_model(self, name: str) -> dict:
        """The model there is, by its name."""
        if name != self.name:
            raise ApiError(404, f"model is {name!r}; {self.name!r} fits", "model")
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "transfusion"}

    async def health(self) -> JSONResponse:
        """Whether requests are run."""
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "ended"}, 200 if alive else 503)

    async def metrics(self) -> PlainTextResponse:
        """The engine's numbers, and how many tasks the server has, as Prometheus reads them."""
        lines = []
        for name, value in {**self.engine.stats(), "tasks": len(asyncio.all_tasks())}.items():
            is_counter = name in COUNTERS
            full = f"transfusion_{name}{'_total' if is_counter else ''}"
            lines += [f"# TYPE {full} {'counter' if is_counter else 'gauge'}", f"{full} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """/v1/chat/completions."""
        self._check(body)
        with reading("messages"):
            fetches = self.pictures.remote_bytes is not None and shows_other_hosts(body.messages)
            reads = self.pictures.reading if shows_pictures(body.messages) else None
            answers = await self._start(request, chat_requests, body, self.pictures, self.template,
                                        limiter=self.fetching if fetches else reads)
        head = self._head("chatcmpl", body)
        if body.stream:
            head["object"] = "chat.completion.chunk"
            return self._streamed(body, head, answers, self._chat_chunks(head, answers))
        done = await answers.finished()
        choices = [{"index": number, "finish_reason": one.reason, "logprobs": None,
                    "message": {"role": "assistant", "content": await self._content(one.parts)}}
                   for number, one in enumerate(done)]
        usage = _usage(answers.done, body.n)
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """/v1/completions."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not 1 <= len(prompts) * body.n <= 64:
            raise ApiError(400, f"prompt is {len(prompts)} texts and n {body.n}; 1 to 64 answers fit", "prompt")
        self._check(body, len(prompts))
        with reading("prompt"):
            answers = await self._start(request, lambda: [
                Asked([Text(prompt)], body.sampling(self.pictures, number, max_images=0))
                for prompt in prompts for number in range(body.n)])
        head = {**self._head("cmpl", body), "object": "text_completion"}
        if body.stream:
            return self._streamed(body, head, answers, self._text_chunks(head, answers))
        done = await answers.finished()
        choices = [{"index": number, "text": _text(one.parts), "finish_reason": one.reason, "logprobs": None}
                   for number, one in enumerate(done)]
        return JSONResponse({**head, "choices": choices, "usage": _usage(answers.done, body.n)})

    async def draw(self, body: ImageBody, request: Request) -> dict:
        """/v1/images/generations."""
        self._check(body)
        return await self._drawn(body, [], request)

    async def edit(self, request: Request) -> dict:
        """/v1/images/edits: a multipart form with one picture or several and the fields of a generation."""
        async with _form(request) as form:
            files = [value for name, value in form.multi_items()
                     if name in ("image", "image[]") and isinstance(value, UploadFile)]
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name not in ("image", "image[]"):
                    raise ApiError(400, f"{name} is not served as a file; image and image[] fit", name)
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            if isinstance(fields.get("extra_body"), str):
                fields["extra_body"] = _json("extra_body", fields["extra_body"])
            with reading("prompt"):
                body = ImageBody(**fields)
                self._check(body)
                if not files:
                    raise ApiError(400, "image is missing; a picture file fits", "image")
                self.pictures.check_count(len(files))
                images = [await to_thread.run_sync(self.pictures.read, await file.read(),
                                                   limiter=self.pictures.reading) for file in files]
        return await self._drawn(body, images, request)

    async def _drawn(self, body: ImageBody, images: list[Image], request: Request) -> dict:
        if body.stream:
            raise ApiError(400, "stream is True; False fits here; /v1/chat/completions streams pictures", "stream")
        with reading("prompt"):
            answers = await self._start(request, image_requests, body, images, self.pictures)
        drawn = [next(part for part in one.parts if isinstance(part, Image)) for one in await answers.finished()]
        write = self.pictures.png if body.response_format == "b64_json" else self.pictures.url
        return {"created": int(time.time()), "seed": body.start_seed(),
                "data": [{body.response_format: await run_in_threadpool(write, image)} for image in drawn]}

    async def _start(self, request: Request, asked: Callable[..., list[Asked]], *given,
                     limiter: CapacityLimiter | None = None) -> Answers:
        """Hand what `asked` makes of a body to the engine; it is made on a thread of `limiter` or of all requests."""
        answers = Answers(self.engine, request)
        await answers.submit(await to_thread.run_sync(partial(asked, *given), limiter=limiter))
        return answers

    def _streamed(self, body: TextBody, head: dict, answers: Answers, chunks: AsyncIterator[dict]) -> StreamingResponse:
        """Chunks as server-sent events and, where the body asks for it, how many tokens were read and written."""
        async def lines():
            try:
                counts = bool((body.stream_options or {}).get("include_usage"))
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk | ({'usage': None} if counts else {}))}\n\n"
                if counts:
                    usage = _usage(answers.done, body.n)
                    yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            except Exception as error:  # the status is sent already
                told = error if isinstance(error, ApiError) else of_the_server(error)
                yield f"data: {json.dumps(told.body())}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _chat_chunks(self, head: dict, answers: Answers):
        def chunk(number: int, delta: dict, reason: str | None = None) -> dict:
            return {**head, "choices": [{"index": number, "delta": delta, "finish_reason": reason}]}

        for number in range(len(answers.tickets)):
            yield chunk(number, {"role": "assistant", "content": ""})
        async for number, event in answers.events():
            if isinstance(event, Written):
                yield chunk(number, {"content": event.text})
            elif isinstance(event, Drawn):
                yield chunk(number, {"content": await self._content([event.image])})
            elif isinstance(event, Preview):
                url = await run_in_threadpool(self.pictures.url, event.image)
                yield chunk(number, {"preview": {"url": url, "step": event.step, "steps": event.steps}})
            else:
                yield chunk(number, {}, event.reason)

    async def _text_chunks(self, head: dict, answers: Answers):
        async for number, event in answers.events():
            text, reason = (event.text, None) if isinstance(event, Written) else ("", event.reason)
            yield {**head, "choices": [{"index": number, "text": text, "finish_reason": reason, "logprobs": None}]}

    async def _content(self, parts: list[Part]) -> str | list[dict]:
        """Parts as a message's content: a text alone as such, anything else as a list."""
        if all(isinstance(part, Text) for part in parts):
            return _text(parts)
        return [{"type": "text", "text": part.text} if isinstance(part, Text) else
                {"type": "image_url", "image_url": {"url": await run_in_threadpool(self.pictures.url, part)}}
                for part in parts]

    def _head(self, kind: str, body: Body) -> dict:
        return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name,
                "seed": body.start_seed()}

    def _check(self, body: Body, prompts: int = 1) -> None:
        """Refuse another model, and more answers than run and wait at once, which asking again would not let in."""
        if body.model not in (None, "", self.name):
            raise ApiError(404, f"model is {body.model!r}; {self.name!r} fits", "model")
        rows, queue = self.engine.rows, self.engine.queue
        if prompts * body.n > rows + queue:
            asked = f"n is {body.n}" if prompts == 1 else f"prompt is {prompts} texts and n {body.n}"
            raise ApiError(400, f"{asked}; at most {rows + queue} answers fit this server at once, {rows} that run and "
                           f"{queue} that wait", asked.split()[0])


def make_app(engine: Engine, name: str, *, template: str = "none", api_key: str | None = None,
             allow_remote: bool = False, max_megabytes: int = 32) -> FastAPI:
    """The server's application around an engine, which it closes when it ends: what runs is finished."""
    max_bytes = max_megabytes * MEGABYTE
    api = Api(engine, PictureReader(engine, max_bytes if allow_remote else None), name, template)

    @asynccontextmanager
    async def lifespan(app):
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="transfusion", lifespan=lifespan)
    app.add_middleware(Guard, api_key=api_key, max_bytes=max_bytes)
    for path, function in (("/v1/models", api.models), ("/v1/models/{name:path}", api.one_model),
                           ("/health", api.health), ("/metrics", api.metrics)):
        app.add_api_route(path, function, methods=["GET"], response_model=None)
    for path, function in (("chat/completions", api.chat), ("completions", api.complete),
                           ("images/generations", api.draw), ("images/edits", api.edit)):
        app.add_api_route(f"/v1/{path}", function, methods=["POST"], response_model=None)
    for kind, told in ((ApiError, lambda error: error), (RequestValidationError, misread),
                       (HTTPException, lambda error: ApiError(error.status_code, str(error.detail))),
                       (Exception, of_the_server)):
        app.add_exception_handler(kind, partial(_handle, told))
    return app


async def _handle(told: Callable[[Exception], ApiError], request: Request, error: Exception) -> JSONResponse:
    return error_response(told(error))


@contextmanager
def reading(prompt: str) -> Iterator[None]:
    """While a request is read and handed to the engine, what does not fit is the client's error.

    `prompt` is the field of the prompt.
    """
    try:
        yield
    except QueueFull as error:
        raise ApiError(429, str(error)) from error
    except ValidationError as error:
        raise misread(error) from error
    except ValueError as error:
        raise refused(error, prompt) from error


def misread(error: ValidationError | RequestValidationError) -> ApiError:
    """An error of pydantic's, of the field that it is in."""
    first = error.errors()[0]
    field = next((step for step in first["loc"] if step != "body" and isinstance(step, str)), None)
    return ApiError(400, f"{field or 'the body'}: {first['msg']}", field)


def of_the_server(error: Exception) -> ApiError:
    """Any other error. The client hears no more than its kind; the server's log has all of it."""
    if isinstance(error, Closed):
        return ApiError(503, str(error))
    if isinstance(error, Cancelled):
        return ApiError(LEFT, str(error))
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed ({type(error).__name__})")


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """A request's form.

    Raises:
        ApiError: it cannot be read.
    """
    try:
        form = await request.form()
    except ValueError as error:  # of a charset whose name cannot be one
        raise ApiError(400, f"the form cannot be read ({error}); multipart/form-data in UTF-8 fits") from None
    try:
        yield form
    finally:
        await form.close()


def _json(name: str, text: str) -> dict:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of too many digits, or too deep
        raise ApiError(400, f"{name} is not JSON that can be read ({error}); an object fits", name) from None


def _text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def _usage(done: Mapping[int, Finished], n: int) -> dict:
    """Tokens of answers by their numbers, of which n follow one prompt: that is counted once."""
    prompt = sum(one.prompt_tokens for number, one in done.items() if number % n == 0)
    written = sum(one.written_tokens for one in done.values())
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
