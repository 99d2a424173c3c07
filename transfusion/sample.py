"""The commands `transfusion sample`, from prompts to picture files, and `transfusion caption`, from these to text."""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from transfusion.data.model_images import check_channels, check_picture_path, load_image, save_image
from transfusion.generate.sampling import Sampling, TextSampling
from transfusion.model.loading import load_model
from transfusion.model.vae import VAE
from transfusion.sequence import Text
from transfusion.settings import Count, check


@dataclass(frozen=True)
class Sample:
    """Go on from a prompt: write text and draw images, saved beside --out; or draw a file of prompts into a folder."""

    model: Path
    """directory of a checkpoint"""
    prompt: str = ""
    """text to go on from"""
    prompts: Path | None = None
    """a file of prompts, in place of one: a .txt of lines, or a .jsonl of objects with a "prompt" and, where they
    differ, "seed", "steps", "sampler", "guidance", "image_size" and the "image" to edit; the same command goes on
    after a stop"""
    image: Path | None = None
    """an image that stands before the prompt: with --draw it is edited as the prompt says"""
    out: Path | None = None
    """where the image is written, None: sample.png; further images get -2, -3, ... before the suffix. With --prompts a
    folder for pictures/, prompts.jsonl and contact_sheet.png, None: samples"""
    draw: bool = True
    """draw one image right after the prompt; --no-draw leaves to the model what it writes and draws"""
    samples: Count | None = None
    """with --prompts: pictures of each; None: 4 of GenEval's prompts and 1 of any other"""
    batch: Count = 64
    """with --prompts: pictures drawn at once"""
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
    batch: Count = 64
    """images read at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    sampling: Annotated[TextSampling, arg(name="")] = TextSampling()


def sample(options: Sample) -> None:
    """Run `transfusion sample`."""
    check("sample", options)
    if options.prompts is not None:
        _sample_file(options)
        return
    _check_alone(options)
    out = Path("sample.png") if options.out is None else options.out
    check_picture_path(out)
    model = load_model(options.model, options.device)
    if options.draw:
        check_channels("sample", model.config, model.vae)
    if options.image is None and not options.prompt.strip():
        raise ValueError("sample: prompt is empty; some text fits, e.g. --prompt 'a handwritten seven', or a file of "
                         "prompts with --prompts")
    given = [] if options.image is None else [load_image(options.image, model.config, model.vae)]
    given += [Text(options.prompt)] if options.prompt.strip() else []
    if options.draw:
        parts = model.draw([given], **options.sampling.of_one_image())
    else:
        parts = model.generate(given, **vars(options.sampling))
    _write(parts, out, model.vae)


def _check_alone(options: Sample) -> None:
    """Refuse what would have no effect on one prompt."""
    for name in ("samples", "batch"):
        if getattr(options, name) != getattr(Sample, name):
            raise ValueError(f"sample: {name} is {getattr(options, name)} without prompts; a file of them fits, or "
                             f"leave --{name} out")
    if options.draw:
        options.sampling.check_one_image("sample", "add --no-draw")


def _sample_file(options: Sample) -> None:
    """Draw a file of prompts into a folder."""
    from transfusion.eval.draw import DrawSettings, draw  # what it needs for the contact sheet is no need of others
    for name, fits in (("prompt", "lines of the file"), ("image", "an \"image\" on lines of a .jsonl")):
        if getattr(options, name):
            raise ValueError(f"sample: {name} and prompts are given; one of them fits, or {fits}")
    if not options.draw:
        raise ValueError("sample: draw is False and prompts is given, of which each is drawn; leave --no-draw out")
    out = Path("samples") if options.out is None else options.out
    draw(DrawSettings(options.model, options.prompts, out, samples=options.samples, batch=options.batch,
                      device=options.device, sampling=options.sampling), "sample")


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
    check("caption", options)
    model = load_model(options.model, options.device)
    for path in options.images:
        if not path.is_file():
            load_image(path, model.config, model.vae)  # says so before anything is written
    for at in range(0, len(options.images), options.batch):
        paths = options.images[at:at + options.batch]
        images = [load_image(path, model.config, model.vae) for path in paths]
        sampling = vars(options.sampling) | {"seed": (options.sampling.seed + at) % 2**64}  # as all at once
        for path, text in zip(paths, model.caption(images, options.question, **sampling)):
            print(f"{path}: {text}", flush=True)
