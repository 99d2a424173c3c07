"""transformers' any-to-any pipeline for a Transfusion: texts, pictures and chats in, text and pictures out.

    from transformers import pipeline
    pipe = pipeline("any-to-any", model="runs/digits", pipeline_class=TransfusionAnyToAnyPipeline)
    pipe(text="a handwritten seven", generation_mode="image")[0]["generated_image"]

Words and records are those of transformers' AnyToAnyPipeline. That class itself needs a processor and makes token ids
of everything; here the model reads pictures and draws them, and a batch of prompts runs as one.
"""
from collections.abc import Iterator
from pathlib import Path

from PIL import Image as Picture
from transformers import Pipeline

from transfusion.data.model_images import image_of, load_image, pictures_of
from transfusion.data.sources.record import PictureRef, Turn
from transfusion.sequence import Image, Part, Text
from transfusion.serve.turns import NO_TEMPLATE, TEMPLATE_NAMES, answer_options, parts_of
from transfusion.settings import nearest

_OP = "TransfusionAnyToAnyPipeline"
MODES = ("text", "image")
OPTIONS_OF_RECORDS = ("generation_mode", "return_full_text")
ROLES = ("system", "user", "assistant")


class TransfusionAnyToAnyPipeline(Pipeline):
    """See `__call__`; made by transformers' `pipeline` or of a model: `TransfusionAnyToAnyPipeline(model=model)`."""

    _load_processor = _load_tokenizer = _load_image_processor = _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, model, **options):
        super().__init__(model=model.eval(), **options)
        if model.vae is not None:
            model.vae.to(self.device)

    def __call__(self, text=None, images=None, **options) -> list[dict] | list[list[dict]]:
        """Go on from texts, pictures or chats; all that are given at once run as one batch.

        Args:
            text: a text, a chat, or a list of texts or of chats. A chat is a list of {"role": ..., "content": ...},
                whose content is a text or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}.
            images: of texts: the pictures in front of it, one or a list; of a list of texts a list with one such item
                for each. A picture is one of PIL or the path of a file; nothing is fetched.
            generation_mode: "text" writes, "image" draws one picture, None leaves both to the model.
            return_full_text: False returns what is new; True, the default, puts what was given before it, a chat as
                the messages and the assistant's answer.
            template: of chats: "none" puts texts and pictures one after the other; others are those of training.
            max_new_tokens, temperature, steps, guidance, seed, ...: the fields of `Sampling`, here or as a dict
                `generate_kwargs`; transformers' do_sample=True is temperature 1 and False temperature 0, its
                stop_sequence is `stop`.

        Returns:
            For each prompt a record: "input_text" and, by the mode, "generated_text", "generated_image" (PIL) or, of
            None, "generated_text" and the list "images"; a list of records for each of several chats.

        Raises:
            ValueError: an argument that does not fit, named.
        """
        prompts, nested = _prompts(text, images)
        records = super().__call__({"prompts": prompts}, **options)
        return [[record] for record in records] if nested else records

    def _sanitize_parameters(self, generate_kwargs=None, **options):
        """transformers' hook: the options of the three steps below, those that are given alone."""
        options |= generate_kwargs or {}
        template, do_sample, stop_sequence = (options.pop(name, None) for name in
                                              ("template", "do_sample", "stop_sequence"))
        if template is not None and template not in TEMPLATE_NAMES:
            raise ValueError(f"{_OP}: template is {template!r}; one of {', '.join(map(repr, TEMPLATE_NAMES))} "
                             f"fits{nearest(str(template), TEMPLATE_NAMES, repr)}")
        if options.get("generation_mode") not in (None, *MODES):
            raise ValueError(f"{_OP}: generation_mode is {options['generation_mode']!r}; None, 'text' or 'image' fits")
        if options.get("generation_mode") == "text" and options.get("max_images"):
            raise ValueError(f"{_OP}: max_images is {options['max_images']} and generation_mode 'text', which draws "
                             "none; leave one of them out")
        if do_sample is not None:
            options["temperature"] = options.get("temperature", 1.0) if do_sample else 0.0
        if stop_sequence is not None:
            options["stop"] = (stop_sequence,) if isinstance(stop_sequence, str) else tuple(stop_sequence)
        records = {name: options[name] for name in OPTIONS_OF_RECORDS if name in options}
        options.pop("return_full_text", None)
        return {} if template is None else {"template": template}, options, records

    def preprocess(self, inputs: dict, template: str = NO_TEMPLATE) -> dict:
        """transformers' hook: prompts as the parts that the model goes on from."""
        return {"given": [given for given, _ in inputs["prompts"]],
                "parts": [self._parts(given, images, template) for given, images in inputs["prompts"]],
                "answer": answer_options(template, self.model.tokenizer)}

    def _forward(self, inputs: dict, generation_mode: str | None = None, **options) -> dict:
        """transformers' hook: run the model."""
        if generation_mode == "image":
            answers = [[image] for image in self.model.draw(inputs["parts"], **options)]
        else:
            options |= {"max_images": 0} if generation_mode == "text" else {}
            answers = self.model.generate_batch(inputs["parts"], **inputs["answer"] | options)
        return {"given": inputs["given"], "answers": answers}

    def postprocess(self, outputs: dict, generation_mode: str | None = None, return_full_text: bool = True) -> list:
        """transformers' hook: what the model wrote and drew, as records."""
        return [self._record(given, answer, generation_mode, return_full_text)
                for given, answer in zip(outputs["given"], outputs["answers"])]

    def save_pretrained(self, save_directory, **options) -> None:
        """Write the model's checkpoint."""
        self.model.save_pretrained(save_directory, **options)

    def _parts(self, given: str | list[dict] | None, images: list, template: str) -> list[Part]:
        """A prompt's parts; a chat's own pictures are called by their places in it."""
        if not isinstance(given, list):
            return [*map(self._image, images), *([Text(given)] if given else [])]
        found: dict[str, Image] = {}
        turns = [Turn(message["role"], tuple(self._content(message["content"], f"text[{at}]", found)))
                 for at, message in enumerate(given)]
        return parts_of(turns, found, self.model.tokenizer, template)

    def _content(self, content, where: str, found: dict[str, Image]) -> Iterator[str | PictureRef]:
        """The parts of a message; its pictures are read into `found`."""
        for number, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
            kind, name = part.get("type") if isinstance(part, dict) else None, f"{where}['content'][{number}]"
            picture = next((part[key] for key in ("image", "path", "url") if key in part), None) if kind else None
            if kind == "text" and isinstance(part.get("text"), str):
                yield part["text"]
            elif kind == "image" and picture is not None:
                found[name] = self._image(picture)
                yield PictureRef(b"", loss=False, name=name)
            else:
                raise ValueError(f"{_OP}: {name} is {part!r}; " '{"type": "text", "text": ...} or {"type": "image", '
                                 '"image": ...} fits')

    def _image(self, given) -> Image:
        """A picture, of PIL or a file's path, as the model's image."""
        if isinstance(given, Picture.Image):
            return image_of(given, self.model.config, self.model.vae, _OP)
        if isinstance(given, (str, Path)) and "://" not in str(given):
            return load_image(Path(given), self.model.config, self.model.vae)
        raise ValueError(f"{_OP}: an image is {given!r}; a PIL image or a file's path fits; addresses are not fetched")

    def _record(self, given, answer: list[Part], mode: str | None, full: bool) -> dict:
        """One prompt's record."""
        text = "".join(part.text for part in answer if isinstance(part, Text))
        shown = pictures_of([part for part in answer if isinstance(part, Image)], self.model.vae)
        if mode == "image":
            return {"input_text": given, "generated_image": shown[0]}
        if full and isinstance(given, list):
            left = iter(shown)
            parts = [{"type": "text", "text": part.text} if isinstance(part, Text) else
                     {"type": "image", "image": next(left)} for part in answer]
            said = [*given, {"role": "assistant", "content": text if mode == "text" else parts}]
        else:
            said = (given or "") + text if full else text
        record = {"input_text": given, "generated_text": said}
        return record if mode == "text" else record | {"images": shown}


def _prompts(text, images) -> tuple[list[tuple[str | list[dict] | None, list]], bool]:
    """Each prompt with the pictures in front of it, and whether these are several chats."""
    if _is_chat(text) or isinstance(text, (list, tuple)) and text and all(map(_is_chat, text)):
        if images is not None:
            raise ValueError(f"{_OP}: images are given beside a chat; pictures in its messages fit")
        chats = [text] if _is_chat(text) else text
        return [(_checked(list(chat)), []) for chat in chats], chats is text
    if isinstance(text, (list, tuple)) and text and all(isinstance(one, str) for one in text):
        given = [None] * len(text) if images is None else images
        if not isinstance(given, (list, tuple)) or len(given) != len(text):
            raise ValueError(f"{_OP}: images is {images!r} and there are {len(text)} texts; a list with an item for "
                             "each fits")
        return [(one, _listed(own)) for one, own in zip(text, given)], False
    if not (isinstance(text, str) and text or text is None and images is not None):
        raise ValueError(f"{_OP}: text is {text!r}; a text, a chat or a list of one of these fits, or images alone")
    return [(text, _listed(images))], False


def _is_chat(given) -> bool:
    """Whether this is a list of messages."""
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(one, dict) for one in given)


def _checked(chat: list[dict]) -> list[dict]:
    for at, message in enumerate(chat):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), (str, list, tuple)):
            raise ValueError(f"{_OP}: text[{at}] is {message!r}; a dict with a role, one of "
                             f"{', '.join(map(repr, ROLES))}, and a content, a text or a list of parts, fits")
    return chat


def _listed(images) -> list:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
