"""Picture files as a model's images, and a model's images as picture files."""
import errno
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Picture
from torch import Tensor

from transfusion.data.picture_files import fit_picture, open_picture, to_picture, upright
from transfusion.files import check_writable, written
from transfusion.model.vae import VAE
from transfusion.sequence import Image

LONGEST_NAME = 230  # bytes, of 255: `written` puts some before it, and further pictures have -2, -3, ... behind it


def pixel_factor(vae: VAE | None = None) -> int:
    """Pixels of a picture's side for each element of a latent's; 1 without a VAE."""
    return 1 if vae is None else vae.factor


def picture_shape(config, vae: VAE | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the pictures of a model's own size."""
    channels = config.image_channels if vae is None else vae.picture_channels
    return channels, *(side * pixel_factor(vae) for side in config.image_size)


def decoded(latents: Tensor, vae: VAE | None = None) -> Tensor:
    """Pixels (N, C, H, W) of latents, which are pixels themselves without a VAE."""
    return latents if vae is None else vae.decode(latents)


def pixels_of(image: Image, vae: VAE | None = None) -> Tensor:
    """An image's pixels (C, H, W): its latent, or what the VAE decodes of that."""
    return decoded(image.latent[None], vae)[0]


def load_image(path: Path, config, vae: VAE | None = None) -> Image:
    """Read a picture file as training does: in the model's channels and size, in [-1, 1], or as its VAE's latent."""
    check_channels("load_image", config, vae)
    return image_of(open_picture(path), config, vae, "load_image")


def image_of(picture: Picture.Image, config, vae: VAE | None = None, op: str = "image_of") -> Image:
    """Make the model's image of a picture, as `load_image` does of a file. Errors begin with `op`."""
    check_channels(op, config, vae)
    channels, *size = picture_shape(config, vae)
    try:
        pixels = fit_picture(upright(picture), tuple(size), channels)
    except ValueError as error:
        raise ValueError(f"{op}: the picture has {error}") from error
    return Image(pixels if vae is None else vae.encode(pixels[None])[0])


def check_channels(op: str, config, vae: VAE | None) -> None:
    """Refuse a model whose images cannot be picture files. Errors begin with `op`."""
    if vae is None and config.image_channels not in (1, 3):
        raise ValueError(f"{op}: the model's images have {config.image_channels} channels and no VAE; picture files "
                         "fit models of 1 (grey) or 3 (colour), or with a VAE (transfusion init --vae)")


def pictures_of(images: Sequence[Image], vae: VAE | None = None) -> list[Picture.Image]:
    """The pictures of a model's images, of 1 or 3 channels or of what the VAE decodes of them."""
    return [to_picture(pixels_of(image, vae)) for image in images]


def save_image(image: Image, path: Path, vae: VAE | None = None) -> None:
    """Write an image of 1 or 3 channels, or what the VAE makes of its latent, as a picture file, in one piece."""
    with written(path) as aside:
        to_picture(pixels_of(image, vae)).save(aside)


def check_picture_path(path: Path, name: str = "sample: out") -> None:
    """Refuse a path, called `name`, that no picture can be written to; its directory is made where it is missing.

    Raises:
        ValueError: a suffix of no kind of picture that Pillow writes, a directory, or one that cannot be written into.
        OSError: a name that leaves no room for what is put before and behind it.
    """
    Picture.init()
    kind = Picture.registered_extensions().get(path.suffix.lower())
    try:
        for mode in ("L", "RGB"):
            Picture.new(mode, (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} is {str(path)!r}, whose suffix {path.suffix!r} names no kind of picture that "
                         "can be written; .png, .jpg and .webp fit") from error
    if path.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, which is a directory; "
                         f"a file such as {str(path / 'sample.png')!r} fits")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    check_writable(name.replace(": ", ": the directory of "), path.parent)
