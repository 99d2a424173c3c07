"""A conversation in the terminal: what is said, shown, kept and refused."""
import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from transfusion import Text
from transfusion.generate.generation import Drawn, Written
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Image
from transfusion.serve.chat import Left, Talk, TalkSettings, in_terminal

FEW = Sampling(max_new_tokens=6, max_images=0, steps=2)


class Terminal(io.StringIO):
    """Takes text and says that it shows colours."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def talk(model, tmp_path):
    return Talk(model, TalkSettings(tmp_path, sampling=FEW), io.StringIO())


@pytest.fixture
def picture(tmp_path):
    Picture.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_an_answer_is_what_the_model_writes_behind_all_that_was_said(talk, model):
    first = model.generate([Text("a seven")], max_new_tokens=6, max_images=0, seed=0)
    talk.say("a seven")
    assert talk.out.getvalue().strip() == "".join(part.text for part in first).strip()
    said = "".join(talk.turns[1].parts)
    second = model.generate([Text("a seven"), *([Text(said)] if said else []), Text("two")], max_new_tokens=6,
                            max_images=0, seed=1)
    talk.say("two")
    assert "".join(talk.turns[3].parts) == "".join(part.text for part in second)
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2


def test_an_answer_is_kept_as_one_text_whatever_pieces_it_came_in(talk, monkeypatch):
    image = talk.model.draw(["a"], steps=1)[0]
    pieces = [Written(0, "one"), Written(0, " two"), Drawn(0, image), Written(0, "t"), Written(0, "hree")]
    prompts = []
    monkeypatch.setattr(talk.model, "stream", lambda prompt, **options: prompts.append(prompt) or iter(pieces))
    talk.say("a seven")
    first, picture, last = talk.turns[1].parts
    assert (first, last) == ("one two", "three") and talk.images[picture.name] is image
    talk.say("two")
    assert prompts[1] == [Text("a seven"), Text("one two"), image, Text("three"), Text("two")]


@pytest.mark.parametrize("template", ["none", "vicuna_v1", "tokenizer"])
def test_an_answer_without_words_goes_on(model, tmp_path, monkeypatch, template):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] | trim }}"
                        "{{ eos_token }}{% endfor %}")
    talk = Talk(model, TalkSettings(tmp_path, template=template, sampling=FEW), io.StringIO())
    monkeypatch.setattr(talk.model, "stream", lambda prompt, **options: iter(()))
    talk.say("a seven")
    talk.say("two")
    assert [turn.parts for turn in talk.turns] == [("a seven",), (), ("two",), ()]


def test_a_picture_is_shown_with_what_is_typed_next(talk, picture):
    talk.say(f"/image {picture}")
    assert not talk.turns and str(picture) in talk.out.getvalue()
    talk.say("what is it?")
    shown, question = talk.turns[0].parts
    assert isinstance(talk.images[shown.name], Image) and question == "what is it?"
    assert not talk.shown


def test_a_drawn_picture_is_that_of_draw_and_can_be_saved(talk, model, tmp_path):
    talk.say("/seed 7")
    talk.say("/draw a seven")
    expected = model.draw(["a seven"], steps=2, seed=7)[0]
    assert (talk.newest.latent == expected.latent).all() and talk.seed == 8
    assert "[a picture of 8x8; /save FILE writes it]" in talk.out.getvalue()
    talk.say(f"/save {tmp_path / 'seven.png'}")
    with Picture.open(tmp_path / "seven.png") as saved:
        assert saved.size == (8, 8)
    talk.say("/draw two")  # behind the first picture
    assert len(talk.images) == 2


def test_new_forgets_and_quit_leaves(talk):
    talk.say("a seven")
    talk.say("/new")
    assert not talk.turns and not talk.images
    with pytest.raises(Left):
        talk.say("/quit")
    talk.say("/help")
    assert "/image FILE" in talk.out.getvalue()
    talk.say("   ")
    assert not talk.turns


@pytest.mark.parametrize("line,said", [
    ("/imag x.png", "/imag is no command; .*did you mean /image"), ("/image", "/image FILE fits"),
    ("/image nowhere.png", "nowhere.png"), ("/draw", "/draw TEXT fits"), ("/save x.png", "nothing is drawn yet"),
    ("/seed x", "N is 'x'; a whole number fits"), ("/seed 99999999999999999999", "seed is 99999999999999999999")])
def test_what_does_not_fit_is_said_and_changes_nothing(talk, line, said):
    talk.say("a seven")
    before = list(talk.turns), talk.seed
    with pytest.raises(ValueError, match=said):
        talk.say(line)
    assert (talk.turns, talk.seed) == before


@pytest.mark.parametrize("line,said", [
    ("/image ~nosuchuser/a.png", "~nosuchuser/a.png is not a picture that can be read"),
    ("/save a.tiff/b.png", "/save: the directory of FILE"),
    (f"/save {'a' * 300}.png", r"/save: FILE is '(a{199})\.\.\., which cannot be written \(File name too long\)"),
    (f"/save {'a' * 250}.png", "which cannot be written .File name too long"),  # as it is, but not written aside
    (f"/seed {'9' * 5000}", r"/seed: N is '9{199}\.\.\.; a whole number fits"),
    (f"/{'a' * 300}", "/a{59} is no command")])
def test_no_line_ends_the_conversation(talk, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tiff").touch()
    talk.say("/draw a seven")
    before = list(talk.turns), talk.seed, talk.newest
    with pytest.raises(ValueError, match=said):
        talk.say(line)
    assert (talk.turns, talk.seed, talk.newest) == before
    talk.say("/save ~nosuchuser.png")
    assert (tmp_path / "~nosuchuser.png").is_file()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, EOFError, MemoryError])
def test_an_error_of_the_model_leaves_the_conversation_as_it_was(talk, monkeypatch, kind):
    def fails(*_):
        raise kind("no memory")

    talk.say("a seven")
    before = list(talk.turns), talk.seed
    with monkeypatch.context() as broken:
        broken.setattr(talk.model.backbone, "forward", fails)
        with pytest.raises(ValueError, match=f"{kind.__name__}: no memory"):
            talk.say("two")
    assert (talk.turns, talk.seed) == before
    talk.say("two")
    assert len(talk.turns) == 4


def test_ctrl_c_ends_an_answer_and_a_signal_ends_the_command(talk, monkeypatch):
    def stream(prompt, **options):
        yield from ()
        raise KeyboardInterrupt(*stop)

    monkeypatch.setattr(talk.model, "stream", stream)
    stop = ()
    talk.say("a seven")
    assert talk.turns[1].parts == ()
    stop = ("by SIGTERM",)
    with pytest.raises(KeyboardInterrupt):
        talk.say("two")


def test_a_picture_has_two_pixels_in_a_character_where_colours_are_shown(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    picture = Picture.new("RGB", (32, 32), "red")
    picture.paste("blue", (0, 1, 32, 2))
    first, *rest = in_terminal(picture, Terminal()).split("\n")
    assert len(rest) == 15 and first.count("\N{UPPER HALF BLOCK}") == 32
    assert first.startswith("\x1b[38;2;255;0;0;48;2;0;0;255m") and first.endswith("\x1b[0m")
    monkeypatch.setenv("TERM", "dumb")
    assert in_terminal(picture, Terminal()) == "[a picture of 32x32; /save FILE writes it]"


def test_lines_from_a_pipe_are_answered_and_errors_leave_it_running(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "transfusion.cli", "chat", "--model", str(tmp_path / "model"),
               "--max-new-tokens", "4", "--max-images", "0", "--steps", "2"]
    lines = f"/draw a seven\n/nothing\n/image ~nosuchuser/a.png\n/save {tmp_path / 'out.png'}\n"
    found = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "a picture of 8x8" in found.stdout and "error: /nothing is no command" in found.stdout
    assert "error: read_picture: ~nosuchuser/a.png is not a picture" in found.stdout
    assert (tmp_path / "out.png").is_file()


def test_in_a_terminal_it_asks_shows_colours_and_ends_with_the_input(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "transfusion.cli", "chat", "--model", str(tmp_path / "model"), "--steps", "2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    seen, deadline = "", time.monotonic() + 240
    os.write(ours, b"/draw a seven\n")
    while seen.partition("\x1b[0m")[2].count("> ") < 1 and time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            seen += os.read(ours, 65536).decode(errors="replace")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0, process.stderr.read()
    process.stderr.close()
    for end in (ours, theirs):
        os.close(end)
    assert "> " in seen and "\N{UPPER HALF BLOCK}" in seen
