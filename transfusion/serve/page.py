"""A page in the browser, on the same engine as the HTTP interface and beside it: `transfusion app --model DIR`.

What a request is stands in `transfusion.serve.fields`, how pictures are shown in `transfusion.serve.shown`; here are
the page's parts and what happens when they are used. A visitor who stops or leaves frees the place of his requests.
"""
import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import gradio as gr
import uvicorn
from anyio import to_thread
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from gradio.processing_utils import save_bytes_to_cache

from transfusion.diffusion.guidance import Guidance
from transfusion.diffusion.solvers import SOLVERS
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Image
from transfusion.serve.copied_code import curl_code, python_code
from transfusion.serve.engine import Engine
from transfusion.serve.fields import ANSWERS, LABELS, Call, Fields, draw, edit, requests_of, talk, told
from transfusion.serve.listening import AnnouncedServer
from transfusion.serve.pictures import PictureReader
from transfusion.serve.sent_files import take_sent_files_alone
from transfusion.serve.server import LEFT, Answers, reading
from transfusion.serve.shown import Answer, figures, is_small, notice, preview_figure
from transfusion.serve.wire import ApiError

PAUSE = 0.1  # seconds between two states of an answer that are sent
CACHE_SECONDS = 3600  # how long pictures that visitors sent and saw stay on the disk
MOST_AT_ONCE = 16  # `n` of the wire
CSS = """
.figures {display: grid; gap: 12px; grid-template-columns: minmax(0, 360px)}
.figures.several {grid-template-columns: repeat(auto-fill, minmax(200px, 1fr))}
@media (max-width: 640px) {.figures.several {grid-template-columns: 1fr 1fr}}
.figures figure {margin: 0; max-width: 512px}
figure img, figure .empty {width: 100% !important; aspect-ratio: 1; margin: 0 !important; border-radius: 6px;
                           object-fit: contain; background: var(--background-fill-secondary)}
.message figure {margin: 0; width: min(50vw, 240px)}
.message :has(figure), .message figure, .message:has(figure) {opacity: 1 !important}
input[type=radio]:checked:hover {background-color: var(--checkbox-background-color-selected) !important;
                                 background-image: var(--radio-circle) !important}
[data-testid=user] .image-frame img, [data-testid=bot] .image-frame img {
  width: min(50vw, 240px); height: auto; aspect-ratio: 1; object-fit: contain}
#picture .image-frame img {width: 100%; height: 100%; object-fit: contain}
img.small, .small-pictures .image-frame img {image-rendering: pixelated}
button[aria-label="Share"] {display: none !important}
figure progress {display: block; width: 100%; height: 6px; margin: 6px 0; appearance: none; border: 0}
figure progress, figure progress::-webkit-progress-bar {border-radius: 3px; background: var(--border-color-primary)}
figure progress::-webkit-progress-value {border-radius: 3px; background: var(--primary-500)}
figure progress::-moz-progress-bar {border-radius: 3px; background: var(--primary-500)}
figure figcaption {margin-top: 4px; font-size: 0.85em; color: var(--body-text-color-subdued)}
figure .uses {display: flex; gap: 6px; margin-top: 4px}
figure .uses > * {padding: 4px 9px; border-radius: 6px; border: 0; margin: 0 !important; font: inherit;
                  font-size: 0.85em; line-height: 1.5; cursor: pointer;
                  text-decoration: none !important; color: var(--button-secondary-text-color) !important;
                  background: var(--button-secondary-background-fill)}
.notices:not(:has(.notice)), .figures-block:not(:has(figure)) {display: none !important}
.notice {padding: 10px 12px; border-radius: 6px; border: 1px solid #dc2626; color: #b91c1c; background: #fef2f2}
.dark .notice {color: #fecaca; background: #450a0a}
"""
USES = """element.addEventListener("click", (event) => {
  const use = event.target.dataset.use;
  if (use) trigger(use, {url: event.target.closest("figure").querySelector("img").src});
});"""


class Visit:
    """A visitor's request: whether he has stopped it or left, and whether its conversation is cleared."""

    def __init__(self):
        self.left, self.cleared = asyncio.Event(), False

    @property
    def gone(self) -> bool:
        """Whether he has stopped it or left."""
        return self.left.is_set()

    async def receive(self) -> dict:
        """As of a request over HTTP: what comes next is that he is gone."""
        await self.left.wait()
        return {"type": "http.disconnect"}


class Page:
    """The page's parts and what they do.

    Args:
        engine: runs the requests.
        name: of the model.
        template: how a conversation becomes a prompt, as of the server.
        examples: prompts to click.
    """

    def __init__(self, engine: Engine, name: str, *, template: str = "none", examples: tuple[str, ...] = ()):
        self.engine, self.pictures, self.name, self.template = engine, PictureReader(engine), name, template
        self.examples, self.kind = examples, "small-pictures" if is_small(self.pictures.size) else "large-pictures"
        self.visits: dict[str, set[Visit]] = {}  # by session
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as self.blocks:
            gr.Markdown(f"## {name}")
            with gr.Row():
                with gr.Column(scale=3, min_width=320), gr.Tabs() as self.tabs:
                    self._talk_tab()
                    self._draw_tab()
                    self._edit_tab()
                with gr.Column(scale=1, min_width=260):
                    self._settings()
            with gr.Accordion("The last request as code", open=False):
                self._code()
            self._wire()
            self.blocks.unload(self._leave)
        self.blocks.queue(default_concurrency_limit=None, api_open=False)  # the engine's queue has the limit

    @property
    def is_busy(self) -> bool:
        """Whether requests run or wait."""
        stats = self.engine.stats()
        return bool(stats["running"] or stats["waiting"])

    def _talk_tab(self) -> None:
        with gr.Tab("Talk", id="talk"):
            self.chat = gr.Chatbot(show_label=False, height="55vh", buttons=["copy"], feedback_options=None,
                                   elem_classes=self.kind,
                                   placeholder="Write something, or show the model a picture and ask about it.")
            self.talk_notice = gr.HTML(elem_classes="notices")
            self.box = gr.MultimodalTextbox(show_label=False, file_types=["image"], file_count="multiple",
                                            placeholder="Write, or drop a picture here", sources=["upload"])
            with gr.Row():
                self.answer = gr.Radio(list(ANSWERS), label="Answer with", value=next(iter(ANSWERS)), scale=3,
                                       min_width=300)
                self.talk_stop = gr.Button("Stop", interactive=False, min_width=100)
            if self.examples:
                gr.Examples([[{"text": text, "files": []}] for text in self.examples], [self.box], label="Examples")

    def _draw_tab(self) -> None:
        with gr.Tab("Draw", id="draw"):
            self.prompt = gr.Textbox(label="What to draw", placeholder=next(iter(self.examples), ""), lines=2)
            with gr.Row():
                self.draw_button = gr.Button("Draw", variant="primary", min_width=100)
                self.draw_stop = gr.Button("Stop", interactive=False, min_width=100)
            self.draw_notice = gr.HTML(elem_classes="notices")
            self.drawn = gr.HTML(js_on_load=USES, elem_id="drawn", elem_classes="figures-block")
            if self.examples:
                gr.Examples([[text] for text in self.examples], [self.prompt], label="Examples")

    def _edit_tab(self) -> None:
        with gr.Tab("Edit", id="edit"):
            self.picture = gr.Image(label="Picture", type="filepath", image_mode=None, format="png", height=260,
                                    sources=["upload", "clipboard"], buttons=[], elem_id="picture",
                                    elem_classes=self.kind)
            self.instruction = gr.Textbox(label="What to change", lines=2)
            with gr.Row():
                self.edit_button = gr.Button("Edit", variant="primary", min_width=100)
                self.edit_stop = gr.Button("Stop", interactive=False, min_width=100)
            self.edit_notice = gr.HTML(elem_classes="notices")
            self.edited = gr.HTML(js_on_load=USES, elem_id="edited", elem_classes="figures-block")
            if self.examples:
                gr.Examples([[text] for text in self.examples], [self.instruction], label="Examples")

    def _settings(self) -> None:
        limits, (height, width), unit = self.engine.limits, self.pictures.size, self.pictures.factor
        step, usual = unit * self.pictures.patch_size, Sampling()
        sizes = [f"{across * width}x{down * height}" for across, down in ((1, 1), (2, 1), (1, 2), (2, 2))
                 if across * width * down * height <= limits.pixels * unit**2]
        with gr.Group():
            seed = gr.Number(label=LABELS["seed"], precision=0, value=0)
            self.new_seed = gr.Checkbox(label="A new seed for each request", value=True)
        self.controls = {
            "seed": seed,
            "count": _count(min(MOST_AT_ONCE, self.engine.rows), 1, label=LABELS["n"],
                            info="variations to draw and edit: their seeds follow one another"),
            "steps": _count(limits.steps, usual.steps, label=LABELS["num_inference_steps"],
                            info="more are finer and take longer"),
            "guidance": gr.Slider(1, 15, Guidance().text, step=0.1, label=LABELS["guidance_scale"],
                                  info="how closely pictures follow the prompt"),
            "size": gr.Dropdown(sizes, value=next(iter(sizes), None), label=LABELS["size"], allow_custom_value=True,
                                info=f"width x height, multiples of {step}"),
        }
        with gr.Accordion("More", open=False):
            self.controls |= {
                "image_guidance": gr.Number(label=LABELS["image_guidance_scale"], value=None, minimum=0,
                                            info="for edits: how closely the picture is kept; empty: as the prompt"),
                "sampler": gr.Dropdown(list(SOLVERS), value=usual.sampler, label=LABELS["sampler"]),
                "max_tokens": gr.Number(label=LABELS["max_tokens"], precision=0, minimum=1, value=usual.max_new_tokens,
                                        info="in tokens"),
                "temperature": gr.Slider(0, 2, 0, step=0.05, label=LABELS["temperature"],
                                         info="0 takes the likeliest word, more is more various"),
            }
        self.controls["answer"] = self.answer

    def _code(self) -> None:
        gr.Markdown("Pictures are read from files beside the code. `pip install openai` brings Python's client.")
        with gr.Tab("Python"):
            self.python = gr.Code(language="python", show_label=False, interactive=False, wrap_lines=True,
                                  show_line_numbers=False, max_lines=24, elem_id="python")
        with gr.Tab("curl"):
            self.curl = gr.Code(language="shell", show_label=False, interactive=False, wrap_lines=True,
                                show_line_numbers=False, max_lines=24, elem_id="curl")

    def _wire(self) -> None:
        """Say what each part does."""
        controls, code = {*self.controls.values(), self.new_seed}, {self.controls["seed"], self.python, self.curl}
        self.box.submit(self._talk, {self.chat, self.box, *controls},
                        {self.chat, self.box, self.talk_notice, self.talk_stop, *code}, show_progress="hidden")
        for start, run, given, shown in (
                ((self.draw_button.click, self.prompt.submit), self._draw, {self.prompt},
                 {self.drawn, self.draw_notice, self.draw_stop}),
                ((self.edit_button.click, self.instruction.submit), self._edit, {self.picture, self.instruction},
                 {self.edited, self.edit_notice, self.edit_stop})):
            gr.on(start, run, {*given, *controls}, {*shown, *code}, show_progress="hidden", trigger_mode="once")
        for stop in (self.talk_stop, self.draw_stop, self.edit_stop):
            stop.click(self._leave, queue=False)
        self.chat.clear(self._forget, None, {self.chat, self.talk_notice}, queue=False)
        for shown in (self.drawn, self.edited):
            shown.edit(self._use_for_edit, None, {self.picture, self.tabs}, queue=False)
            shown.select(self._use_for_question, None, {self.box, self.tabs}, queue=False)

    async def _draw(self, values: dict, request: gr.Request):
        fields = self._fields(values)
        async for change in self._run(lambda: draw(values[self.prompt] or "", fields), fields, self.draw_notice,
                                      self.draw_stop, lambda found: {self.drawn: figures(found, self.pictures)},
                                      request):
            yield change

    async def _edit(self, values: dict, request: gr.Request):
        fields = self._fields(values)
        async for change in self._run(lambda: edit(values[self.picture], values[self.instruction] or "", fields),
                                      fields, self.edit_notice, self.edit_stop,
                                      lambda found: {self.edited: figures(found, self.pictures)}, request):
            yield change

    async def _talk(self, values: dict, request: gr.Request):
        fields, typed, before = self._fields(values), values[self.box], list(values[self.chat] or [])
        content = [{"path": path} for path in typed["files"]]
        content += [{"type": "text", "text": typed["text"]}] if typed["text"] else []
        if not content:
            yield {self.talk_notice: notice("There is nothing to answer; write something, or drop a picture")}
            return
        history, kept = [*before, {"role": "user", "content": content}], {}
        yield {self.chat: history, self.box: None}
        error = ""
        async for change in self._run(lambda: talk(history, fields), fields, self.talk_notice, self.talk_stop,
                                      lambda found: {self.chat: history + self._messages(found[0], kept)}, request):
            error = change.get(self.talk_notice) or error
            yield change
        if error:
            yield {self.chat: before, self.box: typed}

    async def _run(self, make: Callable[[], Call], fields: Fields, told_in: gr.HTML, stop: gr.Button,
                   show: Callable[[list[Answer]], dict], request: gr.Request) -> AsyncIterator[dict]:
        """Make a call and show its answers as they come, or why there are none."""
        yield {told_in: "", stop: gr.update(interactive=True)}
        try:
            call, url = make(), request.request.url
            server = f"{url.scheme}://{url.netloc}"
            yield {self.controls["seed"]: fields.seed, self.python: python_code(call, server, self.name),
                   self.curl: curl_code(call, server)}
            async with aclosing(self._answers(call, request.session_hash)) as answers:
                async for found in answers:
                    yield await run_in_threadpool(show, found)
        except ApiError as error:
            yield {told_in: notice(told(error))}
        yield {stop: gr.update(interactive=False)}

    async def _answers(self, call: Call, session: str) -> AsyncIterator[list[Answer]]:
        """The answers of a call so far, now and then, and at the end.

        Raises:
            ApiError: a call that does not fit, too many that wait, or an error of the model's.
        """
        visit, visits = Visit(), self.visits.setdefault(session, set())
        visits.add(visit)
        found: list[Answer] = []
        answers = Answers(self.engine, visit)
        try:
            with reading("messages" if call.address == "chat/completions" else "prompt"):
                asked = await to_thread.run_sync(requests_of, call, self.pictures, self.template,
                                                 limiter=self.pictures.reading)
                await answers.submit(asked)
            found, last = [Answer(one.sampling.seed) for one in asked], time.monotonic()
            yield found
            async with aclosing(answers.events()) as events:
                async for number, event in events:
                    found[number].take(event)
                    if visit.gone:
                        break
                    if time.monotonic() - last >= PAUSE:
                        yield found
                        last = time.monotonic()
        except ApiError as error:
            if error.status != LEFT:
                raise
        finally:
            answers.close()  # also of what nobody waited for, whose page was closed at once
            visits.discard(visit)
            if not visits:
                self.visits.pop(session, None)
        for answer in found:
            answer.stopped = visit.gone
        if not visit.cleared:
            yield found

    def _messages(self, answer: Answer, kept: dict[int, str]) -> list[dict]:
        """An answer as the Chatbot shows it; `kept` are files of its pictures that were written already."""
        content = []
        for number, part in enumerate(answer.parts):
            if isinstance(part, Image) and number not in kept:
                kept[number] = self._keep(self.pictures.png(part), f"answer-{answer.seed}-{number}.png")
            content.append({"path": kept[number], "alt_text": "a picture that the model drew"} if number in kept else
                           {"type": "text", "text": part})
        if answer.preview is not None and not answer.stopped:
            content.append({"type": "text", "text": preview_figure(answer.preview, self.pictures)})
        return [{"role": "assistant", "content": content}] if content else []

    def _keep(self, png: str, name: str) -> str:
        """Write a picture to the folder from which gradio sends files, and which it empties."""
        return save_bytes_to_cache(base64.b64decode(png), name, self.chat.GRADIO_CACHE)

    def _fields(self, values: dict) -> Fields:
        """The settings; the seed by chance where it is empty or each request has a new one."""
        given = {name: values[control] for name, control in self.controls.items()}
        if values[self.new_seed] or given["seed"] is None:
            given["seed"] = secrets.randbelow(2**31)
        return Fields(**{name: None if value == "" else value for name, value in given.items()})

    async def _leave(self, request: gr.Request) -> None:
        """Stop all requests of a visitor; their places are free at the next pass."""
        for visit in self.visits.get(request.session_hash, ()):
            visit.left.set()

    async def _forget(self, request: gr.Request) -> dict:
        for visit in self.visits.get(request.session_hash, ()):
            visit.cleared = True
        await self._leave(request)
        return {self.chat: [], self.talk_notice: ""}

    def _use_for_edit(self, event: gr.EventData) -> dict:
        return {self.picture: self._used(event), self.tabs: gr.Tabs(selected="edit")}

    def _use_for_question(self, event: gr.EventData) -> dict:
        return {self.box: {"text": "", "files": [self._used(event)]}, self.tabs: gr.Tabs(selected="talk")}

    def _used(self, event: gr.EventData) -> str:
        """The file of a picture whose button was pressed."""
        return self._keep(event.url.partition(",")[2], "drawn.png")


class PageServer(AnnouncedServer):
    """A server that finishes what runs and then lets open pages go, which would hold their connections for ever."""

    def __init__(self, config: uvicorn.Config, line: str, page: Page):
        super().__init__(config, line, page.engine)
        self.page = page

    async def shutdown(self, sockets=None) -> None:
        """As uvicorn's; a second Ctrl-C does not wait."""
        for server in self.servers:
            server.close()
        while self.page.is_busy and not self.force_exit:
            await asyncio.sleep(PAUSE)
        self.config.app.routes[-1].app.stop_event.set()  # of gradio's application, which `add_page` mounted last
        await super().shutdown(sockets)


def add_page(app: FastAPI, page: Page, max_megabytes: int) -> FastAPI:
    """Put the page at the root of the HTTP interface; nothing is loaded from or told to other hosts."""
    for part in (page.chat, page.box, page.picture):
        take_sent_files_alone(part)
    page.blocks.has_launched = True  # or a mounted page would let visitors name any file of this machine as theirs
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(app, page.blocks, "/", footer_links=[], run_history=False, show_error=False,
                               max_file_size=f"{max_megabytes}mb", ssr_mode=False, enable_monitoring=False, pwa=False,
                               mcp_server=False, theme=theme, css=CSS)


def _count(most: int, value: int, **more) -> gr.components.Component:
    """A number from 1 to `most`: a slider, or 1 to look at where nothing else fits, for which gradio has no slider."""
    if most == 1:
        return gr.Number(1, precision=0, interactive=False, **more)
    return gr.Slider(1, most, min(value, most), step=1, **more)
