"""Talk with a model in the terminal: `transfusion chat --model DIR`.

What is typed goes to the model, and its answer is shown as it is written. Lines that begin with a slash are commands:

    /image FILE    show the model a picture, together with what is typed next
    /draw TEXT     let it draw, whatever it would have done
    /save FILE     write the newest drawn picture
    /seed N        of the next answer; each one takes the seed after the last
    /new           forget the conversation
    /help, /quit

Ctrl-C ends an answer, and what it has written stays; Ctrl-D ends the conversation.
"""
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TextIO

from PIL import Image as Picture
from tyro.conf import arg

from transfusion.data.model_images import check_picture_path, load_image, pixels_of, save_image
from transfusion.data.picture_files import to_picture
from transfusion.data.sources.record import PictureRef, Turn, joined
from transfusion.generate.generation import Drawn, Written
from transfusion.generate.sampling import Sampling
from transfusion.model.loading import load_model
from transfusion.sequence import Image, Part
from transfusion.serve.turns import NO_TEMPLATE, TEMPLATE_NAMES, answer_options, parts_of
from transfusion.settings import OneOf, check, nearest, shown

HELP = "\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    /"))
WIDEST = 64  # columns of a picture in the terminal


@dataclass(frozen=True)
class TalkSettings:
    """Talk with a model: what is typed is answered, with pictures where it draws them; /help lists commands."""

    model: Path
    """directory of a checkpoint"""
    template: Annotated[str, OneOf(TEMPLATE_NAMES)] = NO_TEMPLATE
    """how the conversation becomes a prompt: none, its texts and pictures in order, or the template of training"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    sampling: Annotated[Sampling, arg(name="")] = Sampling()


class Left(Exception):
    """The user ends the conversation."""


class Talk:
    """A conversation: its turns so far, the pictures in them, and the seed of the next answer.

    Args:
        model: a `Transfusion` with its tokenizer.
        settings: how it answers.
        out: where answers are written.
    """

    def __init__(self, model, settings: TalkSettings, out: TextIO):
        self.model, self.settings, self.out, self.seed = model, settings, out, settings.sampling.seed
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image, "/draw": self._draw, "/save": self._save, "/seed": self._seed, "/new": self._new,
            "/help": self._help, "/quit": self._quit}
        self._new("")

    def say(self, line: str) -> None:
        """Take what the user typed.

        Raises:
            ValueError: a command that does not fit, a conversation that the template or the model refuses, or whatever
                else fails, such as want of memory; the conversation is then as it was.
            Left: the user ends it.
        """
        name, _, rest = line.strip().partition(" ")
        try:
            if not name.startswith("/"):
                self._answer(line.strip(), self._written)
            elif name in self.commands:
                self.commands[name](rest.strip())
            else:
                raise ValueError(f"{name[:60]} is no command; {', '.join(self.commands)} fit"
                                 f"{nearest(name, self.commands)}")
        except (ValueError, Left):
            raise
        except Exception as error:  # an error ends its line, not the conversation
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _answer(self, text: str, answered: Callable[[list[Part]], Iterator[str | Image]]) -> None:
        """Put the user's turn, show the answer as it comes, and keep both."""
        asked = Turn("user", (*self.shown, *([text] if text else [])))
        if not asked.parts:
            return
        prompt = parts_of((*self.turns, asked), self.images, self.model.tokenizer, self.settings.template)
        said = []
        try:
            for piece in answered(prompt):
                said.append(self._show(piece))
        except KeyboardInterrupt as stop:
            if str(stop):  # a signal that ends the command, not Ctrl-C
                raise
        print(file=self.out, flush=True)
        self.turns += [asked, Turn("assistant", joined(said))]
        self.shown, self.seed = [], self.seed + 1

    def _written(self, prompt: list[Part]) -> Iterator[str | Image]:
        """What the model writes and draws."""
        sampling = replace(self.settings.sampling, seed=self.seed,
                           **answer_options(self.settings.template, self.model.tokenizer))
        for event in self.model.stream(prompt, **vars(sampling)):
            if isinstance(event, Written):
                yield event.text
            elif isinstance(event, Drawn):
                yield event.image

    def _drawn(self, prompt: list[Part]) -> Iterator[Image]:
        """The one picture that it has to draw."""
        yield self.model.draw([prompt], **self.settings.sampling.of_one_image() | {"seed": self.seed})[0]

    def _show(self, piece: str | Image) -> str | PictureRef:
        """Show a piece of an answer; return it as a turn holds it."""
        if isinstance(piece, str):
            print(piece, end="", file=self.out, flush=True)
            return piece
        self.newest = piece
        print("\n" + in_terminal(to_picture(pixels_of(piece, self.model.vae)), self.out), file=self.out, flush=True)
        return self._named(piece)

    def _named(self, image: Image) -> PictureRef:
        """Keep a picture under a name of its own."""
        name = f"picture {len(self.images) + 1}"
        self.images[name] = image
        return PictureRef(b"", loss=False, name=name)

    def _image(self, path: str) -> None:
        if not path:
            raise ValueError("/image: there is no file; /image FILE fits")
        self.shown.append(self._named(load_image(Path(os.path.expanduser(path)), self.model.config, self.model.vae)))
        print(f"{path} is shown with what you type next", file=self.out, flush=True)

    def _draw(self, text: str) -> None:
        if not (text or self.shown):
            raise ValueError("/draw: there is nothing to draw; /draw TEXT fits, such as /draw a handwritten seven")
        self._answer(text, self._drawn)

    def _save(self, path: str) -> None:
        if self.newest is None or not path:
            raise ValueError("/save: " + ("there is no file; /save FILE.png fits" if self.newest is not None else
                                          "nothing is drawn yet; /draw TEXT draws"))
        place = Path(os.path.expanduser(path))
        try:
            check_picture_path(place, "/save: FILE")
            save_image(self.newest, place, self.model.vae)
        except OSError as error:
            raise ValueError(f"/save: FILE is {shown(path)}, which cannot be written ({error.strerror or error}); "
                             "another place or a shorter name fits") from error
        print(f"written to {path}", file=self.out, flush=True)

    def _seed(self, number: str) -> None:
        if not number.removeprefix("-").isdecimal() or len(number) > 20:
            raise ValueError(f"/seed: N is {shown(number)}; a whole number fits")
        check("/seed", replace(self.settings.sampling, seed=int(number)))
        self.seed = int(number)

    def _new(self, _: str) -> None:
        self.turns: list[Turn] = []
        self.images: dict[str, Image] = {}
        self.shown: list[PictureRef] = []      # pictures of the next turn
        self.newest: Image | None = None

    def _help(self, _: str) -> None:
        print(HELP, file=self.out, flush=True)

    def _quit(self, _: str) -> None:
        raise Left


def in_terminal(picture: Picture.Image, out: TextIO) -> str:
    """A picture as half-block characters, two pixels above each other in one, where `out` shows colours; else words."""
    if not out.isatty() or os.environ.get("TERM") in (None, "dumb") or os.environ.get("NO_COLOR"):
        return f"[a picture of {picture.width}x{picture.height}; /save FILE writes it]"
    width = min(WIDEST, shutil.get_terminal_size().columns, max(picture.width, 16))
    height = max(2, round(picture.height * width / picture.width / 2) * 2)
    shown = picture.convert("RGB").resize((width, height), Picture.Resampling.BOX if width < picture.width else
                                          Picture.Resampling.NEAREST)
    lines = []
    for y in range(0, height, 2):
        pairs = ((shown.getpixel((x, y)), shown.getpixel((x, y + 1))) for x in range(width))
        cells = (f"\x1b[{colour(38, top)};{colour(48, bottom)}m\N{UPPER HALF BLOCK}" for top, bottom in pairs)
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def colour(layer: int, rgb: tuple[int, int, int]) -> str:
    """What sets the colour of a character (layer 38) or of the ground behind it (48) in a terminal."""
    return f"{layer};2;{rgb[0]};{rgb[1]};{rgb[2]}"


def chat(settings: TalkSettings) -> None:
    """Run `transfusion chat`: read lines until they end."""
    check("chat", settings)
    talk = Talk(load_model(settings.model, settings.device), settings, sys.stdout)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - lines can be edited, and earlier ones come back
        print("/help lists commands, Ctrl-D ends", flush=True)
    while True:
        try:
            talk.say(input("> " if sys.stdin.isatty() else ""))
        except (EOFError, Left):
            return
        except ValueError as error:
            print(f"error: {error}", flush=True)
