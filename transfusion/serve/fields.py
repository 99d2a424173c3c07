"""What a page's fields ask for, as the body that a client of the HTTP interface would send; no page is needed here.

A page makes its requests from that body as the server does, so what it runs is what the copied code asks for
(`transfusion.serve.copied_code`). Pictures stand in a body as `PictureFile`; `filled` writes them out.
"""
import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transfusion.serve.pictures import PictureReader
from transfusion.serve.request import Request
from transfusion.serve.wire import ApiError, ChatBody, ImageBody, chat_requests, image_requests

ANSWERS = {"text and pictures": None, "text": ["text"], "a picture": ["image"]}  # as `modalities`
LABELS = {"seed": "Seed", "num_inference_steps": "Steps", "guidance_scale": "Guidance", "sampler": "Sampler",
          "image_guidance_scale": "Picture guidance", "size": "Size", "n": "Pictures at once", "prompt": "The prompt",
          "messages": "The conversation", "max_tokens": "Longest answer", "temperature": "Temperature",
          "image": "The picture"}
"""What the page calls the fields of the wire."""


@dataclass(frozen=True)
class PictureFile:
    """A picture that a message shows: a file of this machine, which the copied code calls by its name alone."""

    path: Path

    def __repr__(self) -> str:
        return f"data_url({self.path.name!r})"

    def read(self) -> bytes:
        """The file.

        Raises:
            ApiError: it is gone.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise ApiError(400, "image is kept no longer; send it again, in a new conversation", "image") from None

    def url(self) -> str:
        """The file as a data: URL."""
        return f"data:image/png;base64,{base64.b64encode(self.read()).decode()}"


@dataclass(frozen=True)
class Fields:
    """The page's settings; None where a field is empty, and then the server's default holds."""

    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    sampler: str | None = None
    size: str | None = None
    count: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    answer: str = "text and pictures"

    def of_pictures(self) -> dict:
        """The fields of the wire that say how pictures are drawn."""
        return _given({"seed": self.seed, "num_inference_steps": self.steps, "guidance_scale": self.guidance,
                       "image_guidance_scale": self.image_guidance, "sampler": self.sampler, "size": self.size})

    def of_text(self) -> dict:
        """The fields of the wire that say how an answer is written."""
        return _given({"max_tokens": self.max_tokens, "temperature": self.temperature,
                       "modalities": ANSWERS[self.answer]})


class Call(NamedTuple):
    """One call of the interface: the address behind /v1/, its body and, for an edit, the pictures beside it."""

    address: str
    body: dict
    pictures: tuple[Path, ...] = ()


def talk(history: list[dict], fields: Fields) -> Call:
    """The call that answers a conversation as gradio's Chatbot holds it."""
    return Call("chat/completions", {"messages": messages_of(history), **fields.of_text(), **fields.of_pictures()})


def draw(prompt: str, fields: Fields) -> Call:
    """The call that draws a prompt, as many pictures as `count`, whose seeds follow one another."""
    return Call("images/generations", {"prompt": prompt, **_given({"n": fields.count}), **fields.of_pictures()})


def edit(picture: str | Path | None, prompt: str, fields: Fields) -> Call:
    """The call that edits a picture as the prompt says.

    Raises:
        ApiError: there is no picture.
    """
    if picture is None:
        raise ApiError(400, "image is missing; drop one into its field, or take one that was drawn", "image")
    return draw(prompt, fields)._replace(address="images/edits", pictures=(Path(picture),))


def requests_of(call: Call, pictures: PictureReader, template: str) -> list[Request]:
    """The requests of a call, with previews: those that the server makes of the same call.

    Raises:
        ApiError, ValueError: as `wire.chat_requests` and `wire.image_requests`.
    """
    body = {**filled(call.body, PictureFile.url), "stream": True, "previews": True}
    if call.address == "chat/completions":
        return chat_requests(ChatBody(**body), pictures, template)
    images = [pictures.read(PictureFile(path).read()) for path in call.pictures]
    return image_requests(ImageBody(**body), images, pictures)


def messages_of(history: Iterable[dict]) -> list[dict]:
    """OpenAI's messages of a Chatbot's, of which several by one speaker in a row are one."""
    messages: list[dict] = []
    for said in history:
        if not messages or messages[-1]["role"] != said["role"]:
            messages.append({"role": said["role"], "content": []})
        content = said["content"] if isinstance(said["content"], list) else [said["content"]]
        messages[-1]["content"] += map(_part, content)
    for message in messages:
        if [part["type"] for part in message["content"]] == ["text"]:
            message["content"] = message["content"][0]["text"]
    return messages


def filled(value: object, write: Callable[[PictureFile], str]) -> object:
    """A body with its pictures written as `write` does."""
    if isinstance(value, PictureFile):
        return write(value)
    if isinstance(value, dict):
        return {name: filled(part, write) for name, part in value.items()}
    return [filled(part, write) for part in value] if isinstance(value, list) else value


def told(error: ApiError) -> str:
    """An error as the page shows it: the wire's name of a field is replaced by the page's."""
    message = str(error).removeprefix("submit: ")
    label = LABELS.get(error.param or "")
    if label is None or not message.startswith(error.param):
        return message
    return label + message[len(error.param):]


def _part(said: str | dict) -> dict:
    """A piece of a Chatbot's message, text or file, as OpenAI's."""
    if isinstance(said, str):
        return {"type": "text", "text": said}
    if "text" in said:
        return {"type": "text", "text": said["text"]}
    path = Path(said["file"]["path"] if "file" in said else said["path"])
    return {"type": "image_url", "image_url": {"url": PictureFile(path)}}


def _given(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}
