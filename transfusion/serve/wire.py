"""OpenAI's wire format: request bodies, their fields as `Sampling`, messages as parts, and errors.

What OpenAI has no field for stands beside its fields or in "extra_body", where curl's users copy it from the client's
examples: num_inference_steps, guidance_scale, image_guidance_scale, sampler, seed, size, max_images, previews.
"""
import re
import secrets
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transfusion.data.sources.record import PictureRef, Turn
from transfusion.diffusion.guidance import Guidance
from transfusion.files import spelled
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Image, Part, Text
from transfusion.serve.pictures import PictureReader
from transfusion.serve.remote import Fetching
from transfusion.serve.request import Request
from transfusion.serve.turns import answer_options, parts_of
from transfusion.settings import shown

WIRE_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "image_size": "size",
              "max_new_tokens": "max_tokens"}
GUIDANCE_NAMES = {"text": "guidance_scale", "image": "image_guidance_scale"}  # elsewhere these are a text and a picture
MOST_SAID = 1000  # characters of a message
READING = ("image", "image_url")  # which the project's messages about pictures begin with
UNKNOWN_HERE = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty",
                "response_format", "audio", "mask", "background", "best_of", "echo", "suffix",
                "output_format", "output_compression", "partial_images")
OTHER_NAMES = WIRE_NAMES | {"image_guidance": "image_guidance_scale", "width": "size", "height": "size"}
"""what options are called elsewhere, in Python among others, and here"""
NOT_SERVED = {"guidance_interval": ([0, 1],), "guidance_rescale": (0,), "top_k": (0, -1), "repetition_penalty": (1,),
              "negative_prompt": ("",)}
"""options of other servers and of Python alone that an answer does not heed, each with the values that ask nothing"""


class ApiError(Exception):
    """An error with its HTTP status and, where one is at fault, the name of the field.

    What UTF-8 cannot write of both is spelled out, and what is long is cut: they may repeat what the client sent.
    """

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(spelled(message[:MOST_SAID]))
        self.status, self.param = status, param and spelled(param[:MOST_SAID])

    def body(self) -> dict:
        """The error as OpenAI writes it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        code = {401: "invalid_api_key", 404: "model_not_found" if self.param == "model" else None}.get(self.status)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": code}}


def refused(error: ValueError, prompt: str) -> ApiError:
    """A ValueError of the project, "<op>: <argument> is ...", as an error 400 that calls the argument as the wire does.

    `prompt` is the field that the engine's `parts`, and their texts, came from.
    """
    message = str(error)
    op, _, rest = message.partition(": ")
    if op in READING:
        return ApiError(400, message, op)
    found = re.match(r"(\w+)(?:\[\d+\])?(?: is .*)", rest if op.isidentifier() else message, re.DOTALL)
    names = {**{name: name for name in FIELDS}, **WIRE_NAMES, "parts": prompt, "text": prompt, "image": "image"}
    names |= GUIDANCE_NAMES if op == "Guidance" else {}
    if not found or found[1] not in names:
        return ApiError(400, message)
    return ApiError(400, names[found[1]] + found[0][len(found[1]):], names[found[1]])


class Body(BaseModel):
    """What all requests may say."""

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(None, max_length=256)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stream: bool = False
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    sampler: str | None = Field(None, max_length=64)
    size: str | None = Field(None, max_length=64)
    previews: bool = False

    @model_validator(mode="before")
    @classmethod
    def _merged(cls, given: Any) -> Any:
        """Fields of "extra_body" count as fields, null as left out; what is not served and matters is refused."""
        if not isinstance(given, dict):
            return given
        inner = given.get("extra_body")
        if not (inner is None or isinstance(inner, dict)):
            raise ApiError(400, f"extra_body is {repr(inner)[:40]}; an object fits", "extra_body")
        merged = {**given, **(inner or {})}
        given = {name: value for name, value in merged.items() if name != "extra_body" and value is not None}
        cls._check_names(given)
        return given

    @classmethod
    def _check_names(cls, given: dict) -> None:
        """Refuse what would change an answer under another name or on another server, and here would be left out."""
        for name in UNKNOWN_HERE:
            value = given.get(name)
            asks = bool(value) or name == "logprobs" and type(value) is int  # 0 asks for those of the text itself
            if asks and value not in cls.served().get(name, ()):
                raise ApiError(400, f"{name} is not served; leave it out", name)
        for name, ours in OTHER_NAMES.items():
            if name in given:
                raise ApiError(400, f"{name} is not an option here; {ours} fits", name)
        for name, idle in NOT_SERVED.items():
            if name in given and given[name] not in idle:
                raise ApiError(400, f"{name} is not served; leave it out", name)

    @classmethod
    def served(cls) -> dict[str, tuple]:
        """What fields may be that are refused otherwise."""
        return {"response_format": ({"type": "text"},), "best_of": (1,)}

    def sampling(self, pictures: PictureReader, number: int, **more) -> Sampling:
        """The options of the answer `number` of n, whose seed is `number` after the request's."""
        guidance = Guidance() if self.guidance_scale is None else Guidance(self.guidance_scale)
        if self.image_guidance_scale is not None:
            guidance = Guidance(guidance.text, self.image_guidance_scale)
        named = {"steps": self.num_inference_steps, "sampler": self.sampler,
                 "image_size": pictures.image_size(self.size)} | more
        return Sampling(seed=self.start_seed() + number, guidance=guidance,
                        previews=self.previews and self.stream,  # a whole answer has none
                        **{name: value for name, value in named.items() if value is not None})

    def start_seed(self) -> int:
        """The seed that was given, or one by chance, which the answer names."""
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        return self.seed


class TextBody(Body):
    """What requests for text say."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: str | list[str] | None = None
    max_images: int | None = None
    stream_options: dict | None = None

    def sampling(self, pictures: PictureReader, number: int, **more) -> Sampling:
        """As `Body.sampling`."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop) if self.stop else None
        given = {"max_new_tokens": self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
                 "temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p, "stop": stop,
                 "max_images": self.max_images}
        return super().sampling(pictures, number, **given | more)


class ChatBody(TextBody):
    """/v1/chat/completions. `modalities` of text alone never draws, of image alone draws at once."""

    messages: list[dict] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] | None = None


class CompletionBody(TextBody):
    """/v1/completions."""

    prompt: str | list[str]


class ImageBody(Body):
    """/v1/images/generations and, with pictures, /v1/images/edits."""

    prompt: str = ""
    response_format: Literal["b64_json", "url"] = "b64_json"

    @classmethod
    def served(cls) -> dict[str, tuple]:
        """As `Body.served`."""
        return {"response_format": ("b64_json", "url"), "output_format": ("png",), "background": ("auto",)}


FIELDS = {name for kind in (ChatBody, CompletionBody, ImageBody) for name in kind.model_fields}


def chat_requests(body: ChatBody, pictures: PictureReader, template: str) -> list[Request]:
    """The n requests of a conversation.

    Raises:
        ApiError, ValueError: as `prompt_of`, or an option that does not fit.
    """
    kinds = body.modalities or ["text", "image"]
    more = {} if "image" in kinds else {"max_images": 0}
    more |= {} if "text" in kinds else {"max_new_tokens": 0, "max_images": 1}
    parts = prompt_of(body.messages, pictures, template)
    with pictures.engine.tokenizing:
        more |= answer_options(template, pictures.engine.model.tokenizer)
    return [Request(parts, body.sampling(pictures, number, **more), draw="text" not in kinds)
            for number in range(body.n)]


def image_requests(body: ImageBody, images: list[Image], pictures: PictureReader) -> list[Request]:
    """The n requests of a picture for a prompt or, with `images`, of an edit of these.

    Raises:
        ApiError: there is neither a prompt nor a picture.
        ValueError: an option that does not fit.
    """
    text = [Text(body.prompt)] if body.prompt.strip() else []
    if not (images or text):
        raise ApiError(400, "prompt is empty; some text fits, such as 'a handwritten seven'", "prompt")
    return [Request([*images, *text], body.sampling(pictures, number, max_new_tokens=0, max_images=1), draw=True)
            for number in range(body.n)]


def prompt_of(messages: list[dict], pictures: PictureReader, template: str) -> list[Part]:
    """Messages as the parts to go on from, see `parts_of`.

    Raises:
        ApiError: a message of another shape, named.
        ValueError: a picture that cannot be read, or turns that the template refuses.
    """
    images: dict[str, Image] = {}
    fit = pictures.engine.limits.request_tokens
    if len(messages) > fit:  # each takes some tokens of a template's, which takes time to write out
        raise ApiError(400, f"messages has {len(messages)} messages; at most {fit} fit, a token for each", "messages")
    fetching = Fetching()
    pictures.check_count(len(_pictures(messages)))
    turns = tuple(Turn(_role(message, at), tuple(_content(message, at, pictures, images, fetching)))
                  for at, message in enumerate(messages))
    pictures.engine.check_texts(part for turn in turns for part in turn.parts if isinstance(part, str))
    with pictures.engine.tokenizing:
        return parts_of(turns, images, pictures.engine.model.tokenizer, template)


def shows_pictures(messages: list[dict]) -> bool:
    """Whether messages hold a picture."""
    return bool(_pictures(messages))


def shows_other_hosts(messages: list[dict]) -> bool:
    """Whether a picture of messages is to be fetched from somewhere."""
    return any(not str(_url(part)).startswith("data:") for part in _pictures(messages))


def _pictures(messages: list[dict]) -> list[dict]:
    """The parts of messages that are pictures."""
    return [part for message in messages for part in _parts(message) if _kind(part) == "image_url"]


def _url(part: dict) -> object:
    """What a part that is a picture gives as its URL."""
    given = part.get("image_url")
    return given.get("url") if isinstance(given, dict) else given


def _role(message: dict, at: int) -> str:
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"messages[{at}].role is {shown(role)}; system, user and assistant fit", "messages")
    return "system" if role == "developer" else role


def _content(message: dict, at: int, pictures: PictureReader, images: dict[str, Image],
             fetching: Fetching) -> Iterator[str | PictureRef]:
    """The texts and pictures of a message; pictures are read into `images` by their names."""
    for number, part in enumerate(_parts(message)):
        kind = _kind(part)
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind == "image_url":
            name = f"messages[{at}].content[{number}]"
            images[name] = pictures.read_url(_url(part), fetching)
            yield PictureRef(b"", loss=False, name=name)
        else:
            raise ApiError(400, f"messages[{at}].content[{number}] is of type {shown(kind)}; text with a \"text\" "
                           "and image_url with {\"url\": \"data:...\"} fit", "messages")


def _parts(message: dict) -> list:
    """A message's content as a list, whatever it holds; a text alone is a list of one."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else [None]


def _kind(part: object) -> object:
    """What a part of a message says it is, or its class where it is no object."""
    return part.get("type") if isinstance(part, dict) else type(part).__name__
