"""The `transfusion` command: init, train, sample, caption, vae."""
import difflib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image as Picture

from transfusion.command import plain_errors
from transfusion.data.picture_files import read_picture
from transfusion.diffusion.guidance import Guidance
from transfusion.files import check_writable, written
from transfusion.model.transfusion import Transfusion
from transfusion.model.vae import VAE
from transfusion.sequence.packing import Image, Text


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
    """draw an image right after the prompt; --no-draw leaves the choice to the model"""
    steps: int = 50
    """denoising steps"""
    sampler: str = "ddim"
    """ddim (Euler on the straight path), dpm++, unipc or heun"""
    guidance: float = 2.0
    """classifier-free guidance scale of the prompt; 1 is none"""
    image_guidance: float | None = None
    """scale of the given image alone, for editing; None does not tell it from the text"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """times between which guidance is on"""
    guidance_rescale: float = 0.0
    """share of the prediction that is given back the spread of the unguided one"""
    size: tuple[int, int] | None = None
    """height and width; the model's own by default"""
    max_new_tokens: int = 64
    """text tokens at most"""
    max_images: int = 4
    """images at most"""
    temperature: float = 0.0
    """of the text; 0 takes the likeliest token"""
    top_p: float = 1.0
    """sample text from the smallest set of tokens that holds this much probability"""
    min_p: float = 0.0
    """sample only tokens at least this many times as likely as the likeliest"""
    seed: int = 0
    """of the noise and the text"""


@dataclass(frozen=True)
class Caption:
    """Write the text that follows an image."""

    model: Path
    """directory of a checkpoint"""
    images: tuple[Path, ...]
    """image files"""
    question: str = ""
    """what is asked about each; empty: what the model writes after an image"""
    max_new_tokens: int = 64
    """text tokens at most"""


def load_image(path: Path, config, vae: VAE | None = None) -> Image:
    """Read a picture file as training does: the model's channels and size, in [-1, 1], or what its VAE makes of it."""
    channels, factor = (config.image_channels, 1) if vae is None else (vae.picture_channels, vae.factor)
    if channels not in (1, 3):
        raise ValueError(f"load_image: the model's images have {channels} channels and no VAE; picture files fit models of 1 (grey) or 3 (colour), "
                         "or with a VAE (transfusion init --vae)")
    pixels = read_picture(path, tuple(side * factor for side in config.image_size), channels)
    return Image(pixels if vae is None else vae.encode(pixels[None])[0])


def save_image(image: Image, path: Path, vae: VAE | None = None) -> None:
    """Write an image of 1 or 3 channels, or what the VAE makes of its latent, as a picture file, in one piece."""
    pixels = image.latent if vae is None else vae.decode(image.latent[None])[0]
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).squeeze(-1)
    with written(path) as aside:
        Picture.fromarray(pixels.numpy()).save(aside)


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
        raise ValueError(f"sample: out is {str(path)!r}, whose suffix {path.suffix!r} names no kind of picture that can be written; .png, .jpg and .webp "
                         "fit") from error
    if path.is_dir():
        raise ValueError(f"sample: out is {str(path)!r}, which is a directory; a file such as {str(path / 'sample.png')!r} fits")
    check_writable("sample: the directory of out", path.parent)


def sample(options: Sample) -> None:
    """Run `transfusion sample`."""
    check_picture_path(options.out)
    model = Transfusion.from_pretrained(options.model).eval()
    guidance = Guidance(options.guidance, options.image_guidance, options.guidance_interval, options.guidance_rescale)
    settings = {name: getattr(options, name) for name in ("steps", "sampler", "temperature", "top_p", "min_p", "seed")}
    settings |= {"image_size": options.size, "guidance": guidance}
    if options.image is None and not options.prompt.strip():
        raise ValueError("sample: prompt is empty; some text fits, e.g. --prompt 'a handwritten seven'")
    given = [] if options.image is None else [load_image(options.image, model.config, model.vae)]
    given += [Text(options.prompt)] if options.prompt.strip() else []
    if options.draw:
        parts = model.draw([given], **settings)
    else:
        parts = model.generate(given, max_new_tokens=options.max_new_tokens, max_images=options.max_images, **settings)
    drawn = 0
    for part in parts:
        if isinstance(part, Text):
            print(part.text.strip())
            continue
        drawn += 1
        path = options.out if drawn == 1 else options.out.with_stem(f"{options.out.stem}-{drawn}")
        save_image(part, path, model.vae)
        print(f"[{path}]")


def caption(options: Caption) -> None:
    """Run `transfusion caption`."""
    model = Transfusion.from_pretrained(options.model).eval()
    images = [load_image(path, model.config, model.vae) for path in options.images]
    for path, text in zip(options.images, model.caption(images, options.question, max_new_tokens=options.max_new_tokens)):
        print(f"{path}: {text}")


def _init(args: list[str]) -> None:
    from transfusion.model.from_language_model import InitSettings, init
    init(tyro.cli(InitSettings, args=args, prog="transfusion init"))


def _train(args: list[str]) -> None:
    from transfusion.recipes.command_line import train_main
    train_main(args)


def _vae_train(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_train_main
    vae_train_main(args)


def _vae_eval(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_eval_main
    vae_eval_main(args)


def _vae_encode(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_encode_main
    vae_encode_main(args)


VAE_VERBS = {
    "train": ("train an autoencoder from a preset", _vae_train),
    "eval": ("measure an autoencoder on held-out pictures", _vae_eval),
    "encode": ("compute the latents of a data set and keep them", _vae_encode),
}
VERBS = {
    "init": ("make a model from a pretrained language model", _init),
    "train": ("train a model from a preset", _train),
    "sample": ("draw or write from a prompt", lambda args: sample(tyro.cli(Sample, args=args, prog="transfusion sample"))),
    "caption": ("write what follows an image", lambda args: caption(tyro.cli(Caption, args=args, prog="transfusion caption"))),
    "vae": ("train an autoencoder, measure it, cache latents", lambda args: run_verb("transfusion vae", VAE_VERBS, args)),
}


def run_verb(prog: str, verbs: dict, args: list[str]) -> None:
    """Run the verb that `args` begin with, or say which there are."""
    if not args or args[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<10}{summary}\n" for name, (summary, _) in verbs.items())
        print(f"usage: {prog} VERB ...\n\n{lines}\n`{prog} VERB --help` tells more")
        return
    if args[0] not in verbs:
        near = difflib.get_close_matches(args[0], verbs, n=1)
        raise SystemExit(f"error: {args[0]!r} is not a verb; {', '.join(verbs)} fit" + (f"; did you mean {near[0]}?" if near else ""))
    with plain_errors():
        verbs[args[0]][1](args[1:])


def main(args: list[str] | None = None) -> None:
    """Entry point of the `transfusion` command."""
    run_verb("transfusion", VERBS, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
