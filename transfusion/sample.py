"""The commands `transfusion sample`, from a prompt to picture files, and `transfusion caption`, from these to text."""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from transfusion.data.model_images import check_picture_path, load_image, save_image
from transfusion.generate.sampling import Sampling, TextSampling
from transfusion.model.loading import load_model
from transfusion.model.vae import VAE
from transfusion.sequence import Text


@dataclass(frozen=True)
class Sample:
    """Go on from a prompt: write text and draw images; images are saved beside --out."""

    model: Path
    """directory of a checkpoint"""
    prompt: str
    """text to go on from"""
    image: Path | None = None
    """an image that stands before the prompt: with --draw it is edited as the prompt says"""
    out: Path = Path("sample.png")
    """where the image is written; further images get -2, -3, ... before the suffix"""
    draw: bool = True
    """draw one image right after the prompt; --no-draw leaves to the model what it writes and draws"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    sampling: Annotated[Sampling, arg(name="")] = Sampling()


@dataclass(frozen=True)
class Caption:
    """Write the text that follows an image."""

    model: Path
    """directory of a checkpoint"""
    images: tuple[Path, ...]
    """image files"""
    question: str = ""
    """what is asked about each; empty: what the model writes after an image"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    sampling: Annotated[TextSampling, arg(name="")] = TextSampling()


def sample(options: Sample) -> None:
    """Run `transfusion sample`."""
    check_picture_path(options.out)
    model = load_model(options.model, options.device)
    if options.image is None and not options.prompt.strip():
        raise ValueError("sample: prompt is empty; some text fits, e.g. --prompt 'a handwritten seven'")
    given = [] if options.image is None else [load_image(options.image, model.config, model.vae)]
    given += [Text(options.prompt)] if options.prompt.strip() else []
    if options.draw:
        parts = model.draw([given], **options.sampling.of_one_image())
    else:
        parts = model.generate(given, **vars(options.sampling))
    _write(parts, options.out, model.vae)


def _write(parts: list, out: Path, vae: VAE | None) -> None:
    """Print text, save images, and print where."""
    drawn = 0
    for part in parts:
        if isinstance(part, Text):
            print(part.text.strip())
            continue
        drawn += 1
        path = out if drawn == 1 else out.with_stem(f"{out.stem}-{drawn}")
        save_image(part, path, vae)
        print(f"[{path}]")


def caption(options: Caption) -> None:
    """Run `transfusion caption`."""
    model = load_model(options.model, options.device)
    images = [load_image(path, model.config, model.vae) for path in options.images]
    for path, text in zip(options.images, model.caption(images, options.question, **vars(options.sampling))):
        print(f"{path}: {text}")
