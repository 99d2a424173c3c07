"""The commands `transfusion sample`, from a prompt to picture files, and `transfusion caption`, from these to text."""
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image as Picture
from tyro.conf import arg

from transfusion.data.picture_files import read_picture, to_picture
from transfusion.files import check_writable, written
from transfusion.generate.sampling import Sampling, TextSampling
from transfusion.model.loading import load_model
from transfusion.model.vae import VAE
from transfusion.sequence import Image, Text


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


def load_image(path: Path, config, vae: VAE | None = None) -> Image:
    """Read a picture file as training does: in the model's channels and size, in [-1, 1], or as its VAE's latent."""
    channels, factor = (config.image_channels, 1) if vae is None else (vae.picture_channels, vae.factor)
    if channels not in (1, 3):
        raise ValueError(f"load_image: the model's images have {channels} channels and no VAE; picture files fit "
                         "models of 1 (grey) or 3 (colour), or with a VAE (transfusion init --vae)")
    pixels = read_picture(path, tuple(side * factor for side in config.image_size), channels)
    return Image(pixels if vae is None else vae.encode(pixels[None])[0])


def save_image(image: Image, path: Path, vae: VAE | None = None) -> None:
    """Write an image of 1 or 3 channels, or what the VAE makes of its latent, as a picture file, in one piece."""
    pixels = image.latent if vae is None else vae.decode(image.latent[None])[0]
    with written(path) as aside:
        to_picture(pixels).save(aside)


def check_picture_path(path: Path) -> None:
    """Refuse a path that no picture can be written to; its directory is made where it is missing.

    Raises:
        ValueError: a suffix of no kind of picture that Pillow writes, a directory, or one that cannot be written into.
    """
    Picture.init()
    kind = Picture.registered_extensions().get(path.suffix.lower())
    try:
        for mode in ("L", "RGB"):
            Picture.new(mode, (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"sample: out is {str(path)!r}, whose suffix {path.suffix!r} names no kind of picture that "
                         "can be written; .png, .jpg and .webp fit") from error
    if path.is_dir():
        raise ValueError(f"sample: out is {str(path)!r}, which is a directory; "
                         f"a file such as {str(path / 'sample.png')!r} fits")
    check_writable("sample: the directory of out", path.parent)


def sample(options: Sample) -> None:
    """Run `transfusion sample`."""
    check_picture_path(options.out)
    model = load_model(options.model, options.device)
    if options.image is None and not options.prompt.strip():
        raise ValueError("sample: prompt is empty; some text fits, e.g. --prompt 'a handwritten seven'")
    given = [] if options.image is None else [load_image(options.image, model.config, model.vae)]
    given += [Text(options.prompt)] if options.prompt.strip() else []
    if options.draw:
        limits = ("max_new_tokens", "max_images")  # of what the model chooses to write and draw
        parts = model.draw([given], **{k: v for k, v in vars(options.sampling).items() if k not in limits})
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
