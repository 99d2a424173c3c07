"""What a page shows of answers on their way: pictures as HTML, without a page's library."""
import html
from dataclasses import dataclass, field

from transfusion.generate.generation import Drawn, Event, Preview, Written
from transfusion.sequence import Image
from transfusion.serve.pictures import PictureReader

SMALL = 128  # pixels


@dataclass
class Answer:
    """An answer so far: texts and pictures in order, and the newest preview of the picture that is being drawn."""

    seed: int
    parts: list[str | Image] = field(default_factory=list)
    preview: Preview | None = None
    stopped: bool = False
    made: tuple[bool, str] | None = None  # what `figure` made last: a picture is decoded once

    def take(self, event: Event) -> None:
        """Take what happened; events of other kinds change nothing."""
        self.made = None
        if isinstance(event, Preview):
            self.preview = event
        elif isinstance(event, Drawn):
            self.parts.append(event.image)
            self.preview = None
        elif isinstance(event, Written) and self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += event.text
        elif isinstance(event, Written):
            self.parts.append(event.text)

    def figure(self, pictures: PictureReader) -> str:
        """The one picture of the answer, or its preview, as HTML."""
        if self.made is None or self.made[0] != self.stopped:
            self.made = self.stopped, self._figure(pictures)
        return self.made[1]

    def _figure(self, pictures: PictureReader) -> str:
        if self.parts:
            return figure(pictures.url(self.parts[0]), pictures.size, f"seed {self.seed}", f"seed-{self.seed}.png")
        return preview_figure(self.preview, pictures, f"seed {self.seed}", self.stopped)


def figures(answers: list[Answer], pictures: PictureReader) -> str:
    """Pictures beside each other, as many as fit, below them their seeds or how far they are."""
    kind = "figures several" if len(answers) > 1 else "figures"
    return f'<div class="{kind}">{"".join(answer.figure(pictures) for answer in answers)}</div>'


def figure(url: str, size: tuple[int, int], caption: str, name: str) -> str:
    """A drawn picture with what can be done with it."""
    return (f'<figure>{_img(url, size, caption)}<figcaption>{html.escape(caption)}</figcaption><div class="uses">'
            f'<a href="{html.escape(url)}" download="{html.escape(name)}">Save</a>'
            '<button type="button" data-use="edit">Edit</button>'
            '<button type="button" data-use="select">Ask</button></div></figure>')


def preview_figure(preview: Preview | None, pictures: PictureReader, caption: str = "", stopped: bool = False) -> str:
    """A picture that is being drawn, or was until it was stopped; None before its first step."""
    words = [*([caption] if caption else []), *(["stopped"] if stopped else [])]
    if preview is None:
        shown, done = '<div class="empty"></div>', ""
        words += [] if stopped else ["waits"]
    else:
        words.append(f"step {preview.step} of {preview.steps}")
        shown = _img(pictures.url(preview.image), pictures.size, " · ".join(words))
        done = f' value="{preview.step}" max="{preview.steps}"'
    bar = "" if stopped else f"<progress{done}></progress>"
    return f"<figure>{shown}{bar}<figcaption>{html.escape(' · '.join(words))}</figcaption></figure>"


def is_small(size: tuple[int, int]) -> bool:
    """Whether pictures of a size are enlarged without being blurred."""
    return max(size) < SMALL


def notice(message: str) -> str:
    """A message that stays until the next request; nothing for none."""
    return f'<div class="notice" role="alert">{html.escape(message)}</div>' if message else ""


def _img(url: str, size: tuple[int, int], alt: str) -> str:
    kind = "small" if is_small(size) else "large"
    return f'<img class="{kind}" src="{html.escape(url)}" alt="{html.escape(alt)}">'
