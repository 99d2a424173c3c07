"""Pictures on the wire: bytes of a file or a data: URL to the model's images, and images back to PNG."""
import base64
import io
import math
import threading
from collections.abc import Callable

from anyio import CapacityLimiter
from PIL import Image as Picture
from torch import Tensor

from transfusion.data.model_images import picture_shape, pixels_of
from transfusion.data.picture_files import UNREADABLE, fit_picture, open_picture, to_picture
from transfusion.sequence import Image
from transfusion.serve.engine import Closed, Engine
from transfusion.serve.remote import Fetching
from transfusion.settings import shown

MAX_PIXELS = 2**24  # of a picture that is sent: 64 MB decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's decoders of these alone meet what strangers send
AT_ONCE = 2  # pictures that are decoded, so that many requests do not take the memory of all their pictures


class PictureReader:
    """Reads and writes pictures for a model, whose autoencoder, if it has one, runs on the engine's thread."""

    def __init__(self, engine: Engine, remote_bytes: int | None = None):
        model = engine.model
        self.engine, self.vae, self.remote_bytes = engine, model.vae, remote_bytes
        self.channels, *size = picture_shape(model.config, self.vae)
        self.size = tuple(size)
        self.factor = self.size[0] // model.config.image_size[0]
        self.patch_size = model.config.patch_size
        self.tokens = math.prod(side // self.patch_size for side in model.config.image_size) + 2  # BOI and EOI
        self._decoding = threading.BoundedSemaphore(AT_ONCE)
        self.reading = CapacityLimiter(2 * AT_ONCE)  # threads of their own: all others would wait behind pictures
        if self.channels not in (1, 3):
            raise ValueError(f"serve: the model's images have {self.channels} channels and no VAE; models of 1 (grey) "
                             "or 3 (colour), or with a VAE, fit")

    def check_count(self, count: int) -> None:
        """Refuse more pictures than a request has tokens for, before any is decoded.

        Raises:
            ValueError: too many.
        """
        fit = self.engine.limits.request_tokens // self.tokens
        if count > fit:
            raise ValueError(f"image: there are {count}; at most {fit} fit, of {self.tokens} tokens each; fewer "
                             "pictures fit")

    def read_url(self, url: str, fetching: Fetching | None = None) -> Image:
        """The picture of a data: URL or, where remote ones are allowed, of an http(s) URL.

        `fetching` is the request's, where it may have several.

        Raises:
            ValueError: another URL, or no picture.
        """
        if not isinstance(url, str):
            raise ValueError(f"image_url: url is {str(url)[:40]}; a str fits, such as data:image/png;base64,...")
        if not url.startswith("data:"):
            if self.remote_bytes is None:
                raise ValueError(f"image_url: url is {url[:40]!r}; a data: URL fits, such as "
                                 "data:image/png;base64,...; start the server with --allow-remote for others")
            return self.read((fetching or Fetching()).fetch(url, self.remote_bytes))
        head, _, data = url.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"image_url: url begins with {head[:40]!r}; data:image/png;base64, fits")
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:  # binascii's, or that of characters that are not ASCII
            raise ValueError(f"image_url: url is not base64 ({error}); data:image/png;base64, and what base64 makes "
                             "of the file fit") from None
        return self.read(data)

    def read(self, data: bytes) -> Image:
        """The picture of a file's bytes, cropped and resized as in training; too large a one is not decoded.

        Raises:
            ValueError: no picture.
        """
        try:
            with Picture.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
        except UNREADABLE as error:
            raise ValueError(f"image: {len(data)} bytes are no picture that can be read ({type(error).__name__}); PNG, "
                             "JPEG, WebP and GIF fit") from None
        if width * height > MAX_PIXELS:
            raise ValueError(f"image: a picture is {width}x{height}; at most {MAX_PIXELS} pixels fit; make it smaller")
        with self._decoding:
            opened = open_picture(io.BytesIO(data), "image", only=FORMATS)
            pixels = fit_picture(opened, self.size, self.channels)
        if self.vae is None:
            return Image(pixels)
        return Image(self._run(lambda: self.vae.encode(pixels[None])[0]))

    def png(self, image: Image) -> str:
        """An image as base64 of a PNG file; not on the engine's thread."""
        pixels = image.latent if self.vae is None else self._run(lambda: pixels_of(image, self.vae))
        file = io.BytesIO()
        to_picture(pixels).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def _run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the autoencoder. An error in it is none of the picture that it is run for, whatever its class."""
        future = self.engine.call(function)
        if error := future.exception():
            raise error if isinstance(error, Closed) else RuntimeError("the autoencoder failed") from error
        return future.result()

    def url(self, image: Image) -> str:
        """An image as a data: URL."""
        return f"data:image/png;base64,{self.png(image)}"

    def image_size(self, size: str | None) -> tuple[int, int] | None:
        """Height and width in the model's latents of a size "WIDTHxHEIGHT" in pixels; None for the model's own.

        Raises:
            ValueError: another form, sides that the model does not draw, or more pixels than the limits allow.
        """
        if size in (None, "auto"):
            return None
        sides = size.split("x", 2)
        if len(sides) != 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 for side in sides):
            raise ValueError(f"size is {shown(size)}; WIDTHxHEIGHT fits, such as {self.size[1]}x{self.size[0]}, or "
                             "auto")
        (width, height), unit = map(int, sides), self.factor * self.patch_size
        if not width or not height or width % unit or height % unit:
            raise ValueError(f"size is {shown(size)}; multiples of {unit} fit, the side of a patch")
        pixels = self.engine.limits.pixels * self.factor**2
        if width * height > pixels:
            raise ValueError(f"size is {shown(size)}; at most {pixels} pixels in all fit")
        return height // self.factor, width // self.factor
