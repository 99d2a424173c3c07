"""The page in a browser: what a visitor does and sees, at the width of a desktop and of a phone.

Each test saves screenshots into its `tmp_path`; `--basetemp DIR` keeps them where they can be looked at.
"""
import contextlib
import os
import re
import shutil
import socket
import threading
from urllib.parse import urlsplit

import pytest
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import until
from transfusion.serve.engine import Engine

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio", reason="gradio is not installed; pip install 'tfkernels[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed; apt-get install chromium", allow_module_level=True)

import uvicorn  # noqa: E402

from transfusion.serve.page import Page, PageServer, add_page  # noqa: E402
from transfusion.serve.server import make_app  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
STEPS = "100"  # enough that a picture is still being drawn when it is looked at


@contextlib.contextmanager
def running(engine, name="digits"):
    """The address of a page on an engine."""
    page = Page(engine, name, examples=("a handwritten seven", "a handwritten two"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        both = add_page(make_app(engine, name), page, max_megabytes=4)
        server = PageServer(uvicorn.Config(both, log_level="warning"), f"the page of {name} is up", page)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "an open page keeps the server from its end"


@pytest.fixture(scope="module")
def engine():
    engine = Engine(tiny_model(), rows=4, queue=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine):
    with running(engine) as where:
        yield where


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started, contextlib.closing(
            started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)) as chromium:
        yield chromium


class Visitor:
    """A browser's page and what a visitor does on it; `hosts` are those that were asked for anything."""

    def __init__(self, browser, address, kind, folder):
        width, height = SIZES[kind]
        self.page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=kind == "phone",
                                     has_touch=kind == "phone")
        self.page.set_default_timeout(30_000)
        self.hosts, self.folder, self.kind = set(), folder, kind
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(address)
        self.page.get_by_role("tab", name="Talk").wait_for()

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).first.click()

    def fill(self, label, text):
        field = self.page.get_by_label(label, exact=True).filter(visible=True).first
        field.fill(text)
        field.blur()

    def set(self, slider, value):
        self.fill(f"number input for {slider}", value)

    def say(self, text):
        box = self.page.get_by_placeholder("Write, or drop a picture here")
        box.fill(text)
        box.press("Enter")

    def show(self, selector):
        self.page.locator(selector).scroll_into_view_if_needed()

    def shot(self, what, whole=True):
        self.page.screenshot(path=self.folder / f"{self.kind}-{what}.png", full_page=whole)
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[self.kind][0], f"{what} is {width} pixels wide"

    def see(self, selector, text=None, count=1):
        """Wait for visible elements, with a text, and return them."""
        found = self.page.locator(selector, has_text=text).filter(visible=True)
        playwright.expect(found).to_have_count(count, timeout=60_000)
        return found


@pytest.fixture
def visit(browser, address, tmp_path):
    opened = []

    def open_page(kind="desktop"):
        opened.append(Visitor(browser, address, kind, tmp_path))
        return opened[-1]

    yield open_page
    for visitor in opened:
        visitor.page.screenshot(path=tmp_path / f"{visitor.kind}-end.png", full_page=True)
        visitor.page.close()


def tour(visitor):
    """Draw with previews, draw variations, edit, talk, be refused, copy the code; pictures of all."""
    stop = visitor.page.get_by_role("button", name="Stop").filter(visible=True)
    visitor.shot("start")
    visitor.open("Draw")
    visitor.press("a handwritten seven")
    playwright.expect(visitor.page.get_by_label("What to draw")).to_have_value("a handwritten seven")
    visitor.set("Steps", STEPS)
    visitor.press("Draw")
    visitor.see("#drawn figcaption", re.compile(r"step \d+ of"))
    visitor.shot("preview")
    visitor.see("#drawn figcaption", re.compile(r"^seed \d+$"))
    visitor.shot("drawn")
    visitor.set("Steps", "20")
    visitor.set("Pictures at once", "4")
    visitor.press("Draw")
    captions = visitor.see("#drawn figcaption", re.compile(r"^seed \d+$"), count=4).all_text_contents()
    first = int(captions[0].split()[1])
    assert captions == [f"seed {first + number}" for number in range(4)]
    visitor.shot("variations")
    visitor.set("Pictures at once", "2")
    visitor.page.locator("#drawn button[data-use=edit]").first.click()
    visitor.see("#picture img")
    visitor.fill("What to change", " and a handwritten two")
    visitor.press("Edit")
    visitor.see("#edited figcaption", re.compile(r"^seed \d+$"), count=2)
    visitor.shot("edited")
    visitor.page.locator("#edited button[data-use=select]").first.click()
    visitor.page.get_by_label("text", exact=True).check()
    visitor.say("")
    visitor.see("[data-testid=bot]", re.compile(r"\S"))
    playwright.expect(stop).to_be_disabled(timeout=60_000)
    visitor.page.get_by_label("a picture", exact=True).check()
    visitor.set("Steps", STEPS)
    visitor.say("a handwritten two")
    visitor.see("[data-testid=bot] figcaption", re.compile(r"step \d+ of"))
    visitor.shot("talk-preview")
    visitor.see("[data-testid=bot] .image-frame img")
    playwright.expect(stop).to_be_disabled(timeout=60_000)
    visitor.shot("talk")
    visitor.page.get_by_text("The last request as code").click()
    visitor.see("#python .cm-content", "client.chat.completions.create")
    visitor.show("#python")
    visitor.shot("python", whole=False)
    visitor.page.get_by_role("tab", name="curl").click()
    visitor.see("#curl .cm-content", "curl -s")
    visitor.show("#curl")
    visitor.shot("curl", whole=False)
    visitor.page.get_by_text("The last request as code").click()
    visitor.open("Draw")
    visitor.fill("Size", "7x9")
    visitor.press("Draw")
    visitor.see(".notice", "Size is '7x9'; multiples of 2 fit")
    visitor.shot("refused")


@pytest.mark.parametrize("kind", SIZES)
def test_a_visitor_draws_varies_edits_asks_and_copies_the_request(visit, address, kind):
    visitor = visit(kind)
    tour(visitor)
    assert visitor.hosts <= {urlsplit(address).netloc, ""}
    for shot in visitor.folder.glob("*.png"):
        assert Picture.open(shot).width == SIZES[kind][0]


def start_long_drawing(visitor, engine):
    """Begin a drawing that would take long; return how many were cancelled before."""
    before = engine.stats()["cancelled"]
    visitor.open("Draw")
    visitor.fill("What to draw", "a")
    visitor.set("Steps", "250")
    visitor.set("Pictures at once", "4")
    visitor.press("Draw")
    visitor.see("#drawn figcaption", re.compile(r"step \d+ of"), count=4)
    return before


def test_stop_ends_a_drawing_and_leaves_what_there_is_on_the_page(visit, engine):
    visitor = visit()
    before = start_long_drawing(visitor, engine)
    visitor.press("Stop")
    visitor.see("#drawn figcaption", "stopped", count=4)
    until(lambda: engine.stats()["cancelled"] == before + 4)
    visitor.shot("stopped")


def test_closing_the_page_frees_the_visitors_places(visit, engine):
    visitor = visit()
    before = start_long_drawing(visitor, engine)
    visitor.page.goto("about:blank")
    until(lambda: engine.stats()["cancelled"] == before + 4)


def test_a_picture_of_ones_own_is_dropped_and_asked_about(visit, tmp_path):
    Picture.new("RGB", (40, 30), "red").save(tmp_path / "red one.png")
    visitor = visit("phone")
    visitor.page.get_by_label("text", exact=True).check()
    visitor.page.locator("input[type=file]").first.set_input_files(tmp_path / "red one.png")
    visitor.see("[data-testid=multimodal-textbox] img, .thumbnail-item img, .thumbnails img")
    visitor.say("what is it?")
    visitor.see("[data-testid=bot]", re.compile(r"\S"))
    visitor.shot("asked")
    visitor.page.get_by_text("The last request as code").click()
    visitor.see("#python .cm-content", "red one.png")


def test_a_server_that_ends_finishes_what_it_draws_and_lets_open_pages_go(browser, tmp_path):
    engine = Engine(tiny_model(), rows=4, queue=4)
    with running(engine) as address:
        visitor = Visitor(browser, address, "desktop", tmp_path)
        start_long_drawing(visitor, engine)
    visitor.see("#drawn figcaption", re.compile(r"^seed \d+$"), count=4)
    visitor.page.close()
    assert engine.stats()["finished"] == 4 and engine.stats()["cancelled"] == 0 and not engine.alive
