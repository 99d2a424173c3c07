"""Pictures on the wire, with an autoencoder: into its latents and back, by the engine's thread."""
import base64
import io
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.model.test_vae import autoencoder
from tests.transfusion.serve.clients import AtOnce
from transfusion.data.picture_files import fit_picture, open_picture, to_picture
from transfusion.model.vae import VAE
from transfusion.sequence import Image
from transfusion.serve.pictures import AT_ONCE, PictureReader
from transfusion.serve.request import Limits


class Engine:
    """An engine whose calls run at once and are counted."""

    def __init__(self, vae, channels=8):
        self.model = SimpleNamespace(vae=vae, config=SimpleNamespace(image_channels=channels, image_size=(4, 6),
                                                                        patch_size=2))
        self.limits = Limits()
        self.calls = 0

    def call(self, function):
        self.calls += 1
        future = Future()
        future.set_result(function())
        return future


def test_a_picture_becomes_the_autoencoders_latent_and_a_latent_its_picture():
    vae, picture, file = VAE(autoencoder()), Picture.new("RGB", (50, 30), "red"), io.BytesIO()
    engine = Engine(vae)
    reader = PictureReader(engine)
    picture.paste("blue", (20, 0, 50, 30))
    picture.save(file, "PNG")
    latent = reader.read(file.getvalue()).latent
    assert torch.equal(latent, vae.encode(fit_picture(picture, (16, 24), 3)[None])[0]) and latent.shape == (8, 4, 6)
    url = reader.url(Image(latent))
    drawn = Picture.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert drawn.size == (24, 16) and drawn.tobytes() == to_picture(vae.decode(latent[None])[0]).tobytes()
    assert torch.equal(reader.read_url(url).latent, vae.encode(fit_picture(drawn, (16, 24), 3)[None])[0])
    assert engine.calls == 3


def test_sizes_are_in_pixels_and_width_comes_first():
    reader = PictureReader(Engine(VAE(autoencoder())))
    assert reader.image_size("32x16") == (4, 8) and reader.image_size(None) is reader.image_size("auto") is None
    for size, message in (("10x16", "multiples of 8 fit"), ("12x16", "multiples of 8 fit"),
                          ("0x16", "multiples of 8 fit"), ("80000x80000", "at most 16777216"),
                          ("16", "WIDTHxHEIGHT fits, such as 24x16"),
                          ("16x" * 2**20, r"x1\.\.\.; WIDTHxHEIGHT fits"),
                          ("16x-4", "WIDTHxHEIGHT"), ("²x4", "WIDTHxHEIGHT"), ("1" * 9 + "x4", "WIDTHxHEIGHT")):
        with pytest.raises(ValueError, match=f"size is .*{message}"):
            reader.image_size(size)


def test_a_model_of_latents_without_an_autoencoder_is_refused():
    with pytest.raises(ValueError, match="8 channels and no VAE"):
        PictureReader(Engine(None))
    assert PictureReader(Engine(None, channels=1)).size == (4, 6)


def file(kind, size=(50, 30)):
    made = io.BytesIO()
    Picture.new("RGB", size, "red").save(made, kind)
    return made.getvalue()


def test_four_kinds_of_file_are_read_and_no_other_decoder_of_pillow_is_asked():
    reader = PictureReader(Engine(None, channels=3))
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        assert reader.read(file(kind)).latent.shape == (3, 4, 6)
    for kind in ("BMP", "TIFF", "PPM", "ICO", "TGA", "PCX"):
        with pytest.raises(ValueError, match="no picture that can be read .*; PNG, JPEG, WebP and GIF fit"):
            reader.read(file(kind))


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr("transfusion.serve.pictures.open_picture", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="a picture is 4097x4096; at most 16777216 pixels fit"):
        PictureReader(Engine(None, channels=3)).read(file("PNG", (4097, 4096)))


def test_only_so_many_pictures_are_decoded_at_once(monkeypatch):
    reader, decoding = PictureReader(Engine(None, channels=3)), AtOnce()

    def counted(*given, **more):
        with decoding:
            time.sleep(0.01)
        return open_picture(*given, **more)

    monkeypatch.setattr("transfusion.serve.pictures.open_picture", counted)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(reader.read, [file("PNG")] * 16))
    assert len(found) == 16 and decoding.most == AT_ONCE


def test_more_pictures_than_a_request_has_tokens_for_are_refused():
    reader = PictureReader(Engine(None, channels=3))
    reader.check_count(4096 // 8)
    with pytest.raises(ValueError, match="there are 513; at most 512 fit, of 8 tokens each"):
        reader.check_count(513)
