"""The page without a browser: what its parts do, who leaves, who is refused."""
import asyncio
import base64
import os
import threading
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import until
from transfusion import Text
from transfusion.generate.sampling import Sampling
from transfusion.serve.engine import Engine
from transfusion.serve.request import Limits, Request

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio", reason="gradio is not installed; pip install 'tfkernels[app]'")

import gradio as gr  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from gradio.context import LocalContext  # noqa: E402
from gradio.state_holder import SessionState  # noqa: E402

from transfusion.serve.fields import Fields, draw  # noqa: E402
from transfusion.serve.page import Page, add_page  # noqa: E402

ASKED = Request([Text("a")], Sampling(steps=2, max_new_tokens=0), draw=True)
PICTURE = Path(__file__).parents[3] / "docs" / "page.png"  # a picture that nobody sent


@pytest.fixture
def page():
    page = Page(Engine(tiny_model(), rows=2, queue=2), "tiny", examples=("a handwritten seven",))
    yield page
    page.engine.close(drain=False)


def visitor(session):
    return SimpleNamespace(session_hash=session, request=SimpleNamespace(
        url=SimpleNamespace(scheme="http", netloc="here:7860")))


def values(page, **changed):
    """What the page's parts hold, some of them changed by their names."""
    given = {page.prompt: "a", page.new_seed: False, page.chat: [], page.box: {"text": "", "files": []},
             page.picture: None, page.instruction: "a", **{part: part.value for part in page.controls.values()}}
    parts = {**page.controls, **{name: getattr(page, name) for name in changed if name not in page.controls}}
    return given | {parts[name]: value for name, value in changed.items()}


async def last(changes):
    """All changes of a handler, the newest of each part."""
    found = {}
    async for change in changes:
        found |= change
    return found


@contextmanager
def held(engine):
    """The engine waits between two passes."""
    hold = threading.Event()
    engine.call(lambda: hold.wait(60))
    try:
        yield
    finally:
        hold.set()


def test_a_drawing_shows_its_seeds_and_the_code_that_draws_it_again(page):
    found = asyncio.run(last(page._draw(values(page, count=2, steps=2, seed=5), visitor("one"))))
    assert found[page.drawn].count("<img") == 2 and "seed 5" in found[page.drawn] and "seed 6" in found[page.drawn]
    assert found[page.controls["seed"]] == 5 and found[page.draw_notice] == "" and page.visits == {}
    assert "base_url='http://here:7860/v1'" in found[page.python] and '"seed": 5' in found[page.curl]


def test_each_request_gets_a_new_seed_where_that_is_wished(page):
    seeds = [page._fields(values(page, new_seed=True)).seed for _ in range(4)]
    assert len(set(seeds)) == 4 and page._fields(values(page, seed=None)).seed is not None


@pytest.mark.parametrize("changed, message", [
    ({"prompt": " "}, "The prompt is empty; some text fits"),
    ({"size": "7x8"}, "Size is &#x27;7x8&#x27;; multiples of 2 fit"),
    ({"steps": 999}, "Steps is 999; at most 250 fit"),
    ({"count": 99}, "Pictures at once")])
def test_what_does_not_fit_is_said_on_the_page_in_its_words(page, changed, message):
    found = asyncio.run(last(page._draw(values(page, **changed), visitor("one"))))
    assert message in found[page.draw_notice] and page.drawn not in found and page.visits == {}
    assert found[page.draw_stop]["interactive"] is False


def test_an_edit_without_a_picture_is_answered_with_what_to_do(page):
    found = asyncio.run(last(page._edit(values(page), visitor("one"))))
    assert "The picture is missing; drop one into its field" in found[page.edit_notice]


def test_a_full_queue_is_said_and_what_was_typed_comes_back(page):
    typed = {"text": "a", "files": []}
    with held(page.engine):
        waiting = [page.engine.submit(ASKED) for _ in range(2)]
        found = asyncio.run(last(page._talk(values(page, box=typed), visitor("one"))))
    assert "2 requests wait; 2 fit; try again later" in found[page.talk_notice]
    assert found[page.box] == typed and found[page.chat] == []
    for ticket in waiting:
        ticket.result()


def test_a_visitor_who_stops_or_leaves_frees_his_places_and_nobody_elses(page):
    async def both():
        mine = asyncio.create_task(last(page._draw(values(page, steps=250), visitor("mine"))))
        theirs = asyncio.create_task(last(page._draw(values(page, steps=10), visitor("theirs"))))
        await asyncio.to_thread(until, lambda: page.engine.stats()["denoising_steps"] > 4)
        await page._leave(visitor("mine"))
        found = await mine, await theirs
        await asyncio.to_thread(until, lambda: page.engine.stats()["cancelled"] == 1)
        return found

    mine, theirs = asyncio.run(both())
    assert page.engine.stats()["finished"] == 1 and page.visits == {}
    assert "stopped" in mine[page.drawn] and mine[page.draw_notice] == ""
    assert "stopped" not in theirs[page.drawn] and "Save" in theirs[page.drawn]


def test_an_answer_that_nobody_fetches_any_more_ends(page):
    """As gradio leaves a generator when a visitor's connection is gone."""
    async def leave():
        async with aclosing(page._draw(values(page, steps=250), visitor("gone"))) as changes:
            async for change in changes:
                if "step" in change.get(page.drawn, ""):
                    break
        await asyncio.to_thread(until, lambda: page.engine.stats()["cancelled"] == 1)

    asyncio.run(leave())
    assert page.visits == {}


def test_an_answer_whose_page_is_closed_at_once_ends(page):
    async def leave():
        answers = page._answers(draw("a", Fields(steps=250)), "gone")
        await anext(answers)
        await answers.aclose()
        await asyncio.to_thread(until, lambda: page.engine.stats()["cancelled"] == 1)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(leave()) == set() and page.visits == {}


def test_a_conversation_that_is_cleared_does_not_come_back_with_its_answer(page):
    async def clear():
        answer = page._talk(values(page, box={"text": "a", "files": []}, answer="a picture", steps=250), visitor("one"))
        seen = []
        async for change in answer:
            seen.append(change)
            if "figure" in str(change.get(page.chat)) and page.visits:
                assert await page._forget(visitor("one")) == {page.chat: [], page.talk_notice: ""}
                seen.clear()
        return seen

    assert all(page.chat not in change for change in asyncio.run(clear()))


def test_a_conversation_goes_on_with_the_pictures_that_it_holds(page):
    def say(text, before, **more):
        box = {"text": text, "files": []}
        return asyncio.run(last(page._talk(values(page, box=box, chat=before, steps=2, **more), visitor("one"))))

    drawn = say("a", [], answer="a picture")[page.chat]
    (picture,) = drawn[-1]["content"]
    assert [message["role"] for message in drawn] == ["user", "assistant"]
    assert Path(picture["path"]).read_bytes()[:4] == b"\x89PNG"
    found = say("b", drawn, answer="text", max_tokens=2)
    assert len(found[page.chat]) >= 3 and Path(picture["path"]).name in found[page.python]


def test_a_picture_whose_button_is_pressed_is_taken_along(page):
    event = SimpleNamespace(url="data:image/png;base64," + base64.b64encode(b"drawn").decode())
    for found in (page._use_for_edit(event)[page.picture], page._use_for_question(event)[page.box]["files"][0]):
        assert Path(found).read_bytes() == b"drawn"


def test_nothing_is_said_to_an_empty_line(page):
    found = asyncio.run(last(page._talk(values(page), visitor("one"))))
    assert "write something, or drop a picture" in found[page.talk_notice] and page.engine.stats()["submitted"] == 0


MARK = {"meta": {"_type": "gradio.FileData"}}  # by which gradio knows a file that it checks
MESSAGE = {"type": "component", "component": "file", "value": {"path": __file__}, "constructor_args": {}, "props": {}}


def taken(page, part, value):
    """What the handlers that read a part get of a value that a visitor's client sends."""
    LocalContext.blocks.set(page.blocks)
    for handler in (page._talk, page._edit):
        function = next(one for one in page.blocks.fns.values() if one.fn == handler)
        if part in function.inputs:
            sent = [value if one is part else {"text": "a", "files": []} if one is page.box else one.value
                    for one in function.inputs]
            found = asyncio.run(page.blocks.preprocess_data(function, sent, SessionState(page.blocks)))
            return found[function.inputs.index(part)]


def ways_of(page, file):
    """(part, value) of each way to give the page a file."""
    return ((page.chat, [{"role": "user", "content": [{"type": "file", "file": file}]}]),
            (page.box, {"text": "a", "files": [file]}), (page.picture, file))


@pytest.mark.parametrize("mark", [MARK, {}, {"meta": {}}])
@pytest.mark.parametrize("path", ["/etc/hostname", __file__, str(PICTURE), "https://example.org/a.png"])
def test_a_visitor_gets_nothing_read_that_he_did_not_send(page, path, mark):
    add_page(FastAPI(), page, max_megabytes=4)
    for part, value in ways_of(page, {"path": path, **mark}):
        with pytest.raises(Exception, match="was not uploaded by a user|send the file|that was sent; send it|'meta'"):
            taken(page, part, value)


def test_a_picture_that_gradio_does_not_check_is_refused_before_it_is_opened(page, tmp_path):
    """Its own check passes over a file without the mark, which the picture's part takes none the less."""
    add_page(FastAPI(), page, max_megabytes=4)
    link = Path(page.picture.GRADIO_CACHE) / "linked.png"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(PICTURE)
    try:
        for path in (str(PICTURE), str(link), str(link.parent / ".." / tmp_path.name / "gone.png"), None):
            with pytest.raises(gr.Error, match="no file that was sent; send it"):
                taken(page, page.picture, {"path": path})
    finally:
        link.unlink()
    inline = {"path": None, "url": "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()}
    for path in (page._keep(inline["url"].partition(",")[2], "sent.png"), None):
        with pytest.raises(gr.Error, match="send it|send the file"):
            taken(page, page.picture, inline | {"path": path})


@pytest.mark.parametrize("component", ["file", "image", "textbox"])
def test_a_component_in_a_message_is_not_made(page, component):
    add_page(FastAPI(), page, max_megabytes=4)
    with pytest.raises(gr.Error, match="A message is neither text nor a picture"):
        taken(page, page.chat, [{"role": "user", "content": [MESSAGE | {"component": component}]}])


def test_what_a_visitor_sent_is_taken(page):
    add_page(FastAPI(), page, max_megabytes=4)
    path = page._keep(base64.b64encode(PICTURE.read_bytes()).decode(), "sent.png")
    (_, chat), (_, box), (_, picture) = [(part, taken(page, part, value))
                                         for part, value in ways_of(page, {"path": path, **MARK})]
    assert chat[0]["content"][0]["file"]["path"] == path and box["files"] == [path] and picture == path
    assert taken(page, page.chat, [{"role": "user", "content": [{"type": "text", "text": "a"}]}])


@pytest.mark.parametrize("asked", ["_draw", "_edit", "_talk"])
@pytest.mark.parametrize("how", ["_leave", "_forget"])
def test_a_request_that_waits_is_given_up_when_its_visitor_leaves(page, asked, how):
    async def leave():
        given = {"_edit": {"picture": page._keep(base64.b64encode(PICTURE.read_bytes()).decode(), "sent.png")},
                 "_talk": {"box": {"text": "a", "files": []}}}.get(asked, {})
        with held(page.engine):
            mine = asyncio.create_task(last(getattr(page, asked)(values(page, **given), visitor("mine"))))
            await asyncio.to_thread(until, lambda: page.engine.stats()["waiting"] == 1)
            await getattr(page, how)(visitor("mine"))
            found = await asyncio.wait_for(mine, 30)  # the engine is still held
            assert page.engine.stats()["waiting"] == 0 and page.engine.stats()["cancelled"] == 1
        return found

    found = asyncio.run(leave())
    assert page.visits == {} and found[getattr(page, f"{asked[1:]}_notice")] == ""
    if asked == "_draw" and how == "_leave":
        assert "stopped" in found[page.drawn]


@pytest.mark.parametrize("changed, rows", [({}, 1), ({"steps": 1}, 2), ({"pixels": 16}, 2)])
def test_a_page_starts_and_draws_under_the_narrowest_limits(changed, rows):
    page = Page(Engine(tiny_model(), rows=rows, limits=Limits(**changed)), "tiny")
    try:
        given = values(page)
        assert given[page.controls["count"]] == 1 and given[page.controls["steps"]] <= page.engine.limits.steps
        found = asyncio.run(last(page._draw(given, visitor("one"))))
        if "pixels" in changed:
            assert page.controls["size"].value is None and "at most 16 pixels in all fit" in found[page.draw_notice]
            found = asyncio.run(last(page._draw(values(page, size="4x4", steps=2), visitor("one"))))
        assert "Save" in found[page.drawn] and found[page.draw_notice] == ""
    finally:
        page.engine.close(drain=False)
