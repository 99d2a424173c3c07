"""A pipeline that is called as diffusers' are, for programs that draw with those.

    pipe = TransfusionPipeline.from_pretrained("runs/digits")
    pipe("a handwritten seven", num_inference_steps=50, guidance_scale=3.0).images[0]

Its images are those of `Transfusion.draw`, to the bit. It is no subclass of diffusers' DiffusionPipeline, which is
assembled from a model_index.json and a folder for each part: a Transfusion checkpoint is one model, and the directory
that this pipeline loads and saves is the model's own.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm

from transfusion.data.model_images import decoded, image_of, pixel_factor
from transfusion.data.picture_files import to_picture
from transfusion.diffusion.guidance import Guidance, Scale
from transfusion.generate.generation import Preview
from transfusion.generate.row import check_options, solver_of
from transfusion.generate.sampling import Sampling
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Image, Text
from transfusion.settings import Count, check_value

_OP = "TransfusionPipeline"
OUTPUTS = ("pil", "pt", "np", "latent")


class ImagePipelineOutput(NamedTuple):
    """What a pipeline returns, as diffusers' class of this name."""

    images: list[Picture.Image] | Tensor | np.ndarray


class TransfusionPipeline:
    """A Transfusion that draws, called with diffusers' words."""

    def __init__(self, model: Transfusion):
        self.model = model
        self._bar: dict = {}

    @classmethod
    def from_pretrained(cls, path, *, torch_dtype: torch.dtype | None = None, **options) -> "TransfusionPipeline":
        """Load a checkpoint; options are those of `Transfusion.from_pretrained`, and diffusers' name of `dtype`."""
        if torch_dtype is not None:
            options["dtype"] = torch_dtype
        return cls(Transfusion.from_pretrained(path, **options).eval())

    def save_pretrained(self, path, **options) -> None:
        """Write the model's checkpoint; options are those of `Transfusion.save_pretrained`."""
        self.model.save_pretrained(path, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def to(self, *where) -> "TransfusionPipeline":
        """Move the model to a device, its autoencoder with it, or to a dtype; return the pipeline."""
        self.model.to(*where)
        if self.model.vae is not None:
            self.model.vae.to(self.device)
        return self

    def set_progress_bar_config(self, **options) -> None:
        """Set options of tqdm for the bar of denoising steps.

        disable=True also spares the previews that move it, each of which waits for the device.
        """
        self._bar = options

    def __call__(
        self,
        prompt: str | list[str],
        *,
        image: Picture.Image | list[Picture.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Guidance = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["TransfusionPipeline", int, float, dict], object] | None = None,
        return_dict: bool = True,
        sampler: str = "ddim",
    ) -> ImagePipelineOutput | tuple:
        """Draw images of prompts, all of them as one batch.

        Args:
            prompt: a text or several.
            image: pictures that are edited as the prompts say, one or as many as there are prompts.
            height, width: of the pictures in pixels; None: the model's own.
            num_inference_steps: denoising steps.
            guidance_scale: of the prompt, 1 for none; or a `Guidance`.
            num_images_per_prompt: images of each prompt, which stand one after the other.
            generator: a fresh one's seed is that of `Transfusion.draw`: image i draws from seed + i. One that was used
                before, by this pipeline too, gives a seed that is drawn from it. A list has one for each image. None:
                a seed that is drawn from torch's default generator.
            output_type: "pil" pictures; "pt" (N, C, H, W) or "np" (N, H, W, C), both in [0, 1]; "latent" what `draw`
                returns, (N, C, h, w).
            callback_on_step_end: called with the pipeline, the number of the step from 0, its time and
                {"latents": (N, C, h, w), what the images would come out as}; what it returns is not read.
            return_dict: False returns a plain tuple of the images.
            sampler: the solver, as in `Sampling`.

        Raises:
            ValueError: an argument that does not fit, named.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"{_OP}: output_type is {output_type!r}; one of {', '.join(map(repr, OUTPUTS))} fits")
        for name, value, kind in (("num_images_per_prompt", num_images_per_prompt, Count),
                                  ("num_inference_steps", num_inference_steps, Count),
                                  ("guidance_scale", guidance_scale, Guidance | Scale)):
            check_value(_OP, name, value, kind)
        prompts = [one for one in self._prompts(prompt, image) for _ in range(num_images_per_prompt)]
        options = Sampling(steps=num_inference_steps, guidance=guidance_scale, sampler=sampler,
                           image_size=self._size(height, width),
                           previews=callback_on_step_end is not None or not self._bar.get("disable"))
        grid = check_options(self.model, options)
        times = solver_of(self.model, options, grid).times.tolist()
        with tqdm(total=len(times), **self._bar) as bar:
            steps = _Steps(self, times, len(prompts), callback_on_step_end, bar)
            drawn = self.model.draw(prompts, seeds=_seeds(generator, len(prompts)), on_event=steps,
                                    **options.of_one_image())
        images = self._as_type(torch.stack([one.latent for one in drawn]), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _prompts(self, prompt, image) -> list[list[Text | Image]]:
        """Each prompt as parts: the picture that it edits, where there is one, and its text."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise ValueError(f"{_OP}: prompt is {prompt!r}; a text or a list of texts fits")
        if image is None:
            return [[Text(one)] for one in prompts]
        images = image if isinstance(image, (list, tuple)) else [image] * len(prompts)
        if len(images) != len(prompts) or not all(isinstance(one, Picture.Image) for one in images):
            raise ValueError(f"{_OP}: image is {image!r} and there are {len(prompts)} prompts; a PIL image, or a list "
                             "with one for each prompt, fits")
        return [[image_of(one, self.model.config, self.model.vae, _OP), Text(text)]
                for one, text in zip(images, prompts)]

    def _size(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """Height and width in the model's latents."""
        factor = pixel_factor(self.model.vae)
        sides = [own * factor if given is None else given
                 for given, own in zip((height, width), self.model.config.image_size)]
        for name, side in zip(("height", "width"), sides):
            check_value(_OP, name, side, Count)
            if side % (factor * self.model.config.patch_size):
                raise ValueError(f"{_OP}: {name} is {side}; multiples of {factor * self.model.config.patch_size} fit")
        return sides[0] // factor, sides[1] // factor

    def _as_type(self, latents: Tensor, output_type: str) -> list[Picture.Image] | Tensor | np.ndarray:
        if output_type == "latent":
            return latents
        pixels = decoded(latents, self.model.vae)
        if output_type == "pil":
            return [to_picture(one) for one in pixels]
        pixels = (pixels.clamp(-1, 1) + 1) / 2
        return pixels if output_type == "pt" else pixels.movedim(1, -1).numpy()


class _Steps:
    """Moves the bar and calls back when the previews of a whole batch have come: once after each denoising step."""

    def __init__(self, pipe: TransfusionPipeline, times: list[float], rows: int, callback, bar: tqdm):
        self.pipe, self.times, self.rows, self.callback, self.bar, self.seen = pipe, times, rows, callback, bar, []

    def __call__(self, event) -> None:
        if not isinstance(event, Preview):
            return
        self.seen.append(event.image.latent)
        if len(self.seen) == self.rows:
            self.bar.update()
            step, latents, self.seen = event.step - 1, torch.stack(self.seen), []
            if self.callback is not None:
                self.callback(self.pipe, step, self.times[step], {"latents": latents})


def _seeds(given: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """The seeds of `count` images; see `TransfusionPipeline.__call__`."""
    if given is None:
        first = int(torch.randint(2**31, ()))
        return list(range(first, first + count))
    if isinstance(given, torch.Generator):
        first = _seed(given)
        return list(range(first, first + count))
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in given):
        raise ValueError(f"{_OP}: generator is {given!r}; a torch.Generator or a list of them fits")
    if len(given) != count:
        raise ValueError(f"{_OP}: generator is a list of {len(given)} and there are {count} images; one for each fits")
    return [_seed(one) for one in given]


def _seed(generator: torch.Generator) -> int:
    """A fresh generator's seed, or a number drawn from a used one; either way it counts as used afterwards."""
    untouched = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    fresh = torch.equal(untouched.get_state(), generator.get_state())
    drawn = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    return generator.initial_seed() if fresh else drawn
