"""Grids of pictures, sizes read from headers, and every kind of file that is hard to read."""

import errno
import io
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from PIL import PngImagePlugin

from transfusion.data.grids import PADDING, Grids, GridSettings, grid_list, picture_size
from transfusion.data.picture_files import open_picture, read_picture
from transfusion.data.sources.record import DataError, PictureFile, PictureRef


def gradient(width, height, mode="RGB"):
    """A picture whose corners differ."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), np.full_like(x, 40)], -1)
    return Picture.fromarray(pixels.astype(np.uint8)).convert(mode)


def written(picture, kind="PNG", **options):
    """A reference to the bytes of a picture."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return PictureRef(file.getvalue(), loss=True, name=f"a.{kind.lower()}")


def turned(orientation):
    exif = Picture.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("side, aspect", [(16, 2.0), (8, 2.0), (16, 3.0), (32, 2.0), (4, 2.0)])
def test_grids_have_about_the_area_of_the_square_and_all_shapes_up_to_the_widest(side, aspect):
    grids = grid_list(side, aspect)
    assert (side, side) in grids and len(set(grids)) == len(grids) and {(c, r) for r, c in grids} == set(grids)
    for rows, columns in grids:
        assert abs(rows * columns / side**2 - 1) < 0.13 and max(rows / columns, columns / rows) <= aspect + 1e-6
    ratios = sorted(columns / rows for rows, columns in grids)
    assert ratios[-1] > 0.8 * aspect and max(b / a for a, b in zip(ratios, ratios[1:])) < 1.7


def test_the_nearest_grid_cuts_off_the_least():
    grids = Grids(GridSettings(side=256), 16)
    for width, height in ((640, 480), (480, 640), (100, 100), (1000, 10), (3, 2), (1920, 1080)):
        rows, columns = grids.nearest(width, height)
        kept = [min(width / height / (c / r), c / r / (width / height)) for r, c in grids.grids]
        assert min(width / height / (columns / rows), columns / rows / (width / height)) == pytest.approx(max(kept))
    assert grids.nearest(512, 512) == (16, 16) and grids.nearest(5000, 10) == (12, 21)


def test_pictures_are_cropped_to_their_grid_and_keep_their_shape():
    grids, picture = Grids(GridSettings(side=64), 8), written(gradient(300, 200))
    rows, columns = grids.of(picture)
    pixels = grids.pixels(picture, (rows, columns))
    assert pixels.shape == (3, rows * 8, columns * 8) and columns > rows
    assert (
        pixels[0, 0, 0] < -0.8 and pixels[0, 0, -1] > 0.8 and pixels[1, -1, 0] > 0.8
    )  # the corners are where they were
    assert torch.equal(grids.pixels(picture, (rows, columns), flipped=True), pixels.flip(-1))


def test_padding_keeps_the_whole_picture_in_the_middle_of_a_square():
    grids, picture = Grids(GridSettings(side=64, mode="pad"), 8), written(Picture.new("RGB", (100, 50), "red"))
    assert grids.of(picture) == (8, 8)
    pixels = ((grids.pixels(picture, (8, 8)) + 1) * 127.5).round().int()
    assert pixels[:, 2, 32].tolist() == list(PADDING) and pixels[:, 61, 32].tolist() == list(PADDING)
    assert pixels[:, 32, 1].tolist() == [255, 0, 0] and pixels[:, 32, 62].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(12_000, 1), (1, 12_000)])
def test_the_square_around_a_strip_fits_memory(monkeypatch, size):
    new, sides = Picture.new, []
    monkeypatch.setattr(Picture, "new", lambda mode, size, *more: sides.append(max(size)) or new(mode, size, *more))
    pixels = Grids(GridSettings(side=16, mode="pad"), 8).fitted(new("RGB", size, "red"), (2, 2))
    assert pixels.shape == (3, 16, 16) and 0 < max(sides) <= 8192


def test_the_central_square_is_one_grid_for_every_picture():
    grids = Grids(GridSettings(side=32, mode="centre"), 8)
    assert grids.grids == ((4, 4),) and grids.of(written(gradient(300, 20))) == (4, 4)
    picture = written(gradient(90, 30))
    assert torch.equal(grids.pixels(picture, (4, 4)), read_picture(picture.open(), 32, 3))


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            GridSettings(side=250),
            "grids: side has 250x250 pixels and a patch of this model is 16 pixels wide; multiples of 16 fit, "
            "such as 256x256",
        ),
        (GridSettings(sizes=((256, 256), (192, 330))), "sizes has 192x330 pixels .* such as 192x336"),
        (GridSettings(mode="pad", sizes=((256, 256),)), "mode 'crop' fits sizes"),
        (GridSettings(mode="squash"), "grids: mode is 'squash'; one of 'crop', 'pad', 'centre' fits"),
        (GridSettings(aspect=0.5), "grids: aspect is 0.5"),
        (GridSettings(sizes=()), "grids: sizes is .."),
    ],
)
def test_grids_that_do_not_fit_the_patch_size_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Grids(settings, 16)


def test_named_sizes_are_the_grids():
    grids = Grids(GridSettings(sizes=((64, 64), (32, 128))), 16)
    assert grids.grids == ((4, 4), (2, 8)) and grids.nearest(100, 20) == (2, 8)


def test_of_sizes_of_one_shape_a_picture_takes_the_nearest():
    grids = Grids(GridSettings(sizes=((32, 32), (32, 64), (64, 64), (64, 128))), 8)
    for size, grid in (((32, 32), (4, 4)), ((64, 64), (8, 8)), ((40, 40), (4, 4)), ((50, 50), (8, 8)),
                       ((1000, 1000), (8, 8)), ((5, 5), (4, 4)), ((64, 32), (4, 8)), ((300, 150), (8, 16))):
        assert grids.nearest(*size) == grid, size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(kind, orientation):
    picture = written(gradient(40, 24), kind, exif=turned(orientation))
    assert picture_size(picture) == open_picture(picture.open()).size == ((24, 40) if orientation > 4 else (40, 24))


def test_a_png_whose_exif_stands_behind_its_pixels_is_turned_too():
    plain, chunk = written(gradient(40, 24)).file, io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"eXIf", turned(6).tobytes().removeprefix(b"Exif\0\0"))
    late = PictureRef(plain[:-12] + chunk.getvalue() + plain[-12:], loss=True)
    assert picture_size(late) == open_picture(late.open()).size == (24, 40)


def test_sizes_are_read_without_decoding(monkeypatch):
    pictures = [written(gradient(40, 24), kind, exif=turned(6)) for kind in ("JPEG", "PNG", "WEBP")] + [
        written(gradient(40, 24), "GIF")
    ]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert [picture_size(picture) for picture in pictures] == [(24, 40)] * 3 + [(40, 24)]


@pytest.mark.parametrize(
    "picture",
    [
        written(gradient(40, 24).convert("P", palette=Picture.Palette.ADAPTIVE)),
        written(gradient(40, 24, "CMYK"), "JPEG", quality=95),
        written(gradient(40, 24, "RGBA")),
        written(gradient(40, 24), "GIF", save_all=True, append_images=[Picture.new("RGB", (40, 24), "black")] * 2),
        written(gradient(40, 24), "WEBP", lossless=True),
        written(gradient(40, 24), "BMP"),
    ],
    ids=["palette", "cmyk", "alpha", "animated", "webp", "bmp"],
)
def test_pictures_of_every_kind_are_read_rightly(picture):
    grids = Grids(GridSettings(sizes=((24, 40),)), 8)
    wanted = grids.pixels(written(gradient(40, 24)), (3, 5))
    assert picture_size(picture) == (40, 24)
    assert (grids.pixels(picture, (3, 5)) - wanted).abs().mean() < 0.06


def test_sixteen_bits_and_transparency_are_read_rightly():
    grids = Grids(GridSettings(side=16), 16)
    deep = written(Picture.fromarray(np.full((16, 16), 65535 // 2, dtype=np.uint16)))
    assert grids.pixels(deep, (1, 1)).mean().abs() < 0.01
    clear = written(Picture.new("RGBA", (16, 16), (0, 0, 0, 0)))
    assert grids.pixels(clear, (1, 1)).min() == 1  # white


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_pictures_take_a_shorter_way_to_the_same_pixels(mode, channels):
    grids, plain = Grids(GridSettings(side=16), 16, channels), gradient(50, 37, mode)
    short, long = (grids.pixels(written(picture), (1, 1)) for picture in (plain, plain.convert("RGBA")))
    assert open_picture(written(plain).open()).mode == "RGB" and torch.equal(short, long)


def huge():
    """A PNG whose header says 60,000 x 60,000."""
    data = io.BytesIO()
    data.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(data, b"IHDR", (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    PngImagePlugin.putchunk(data, b"IDAT", b"\0" * 10)
    PngImagePlugin.putchunk(data, b"IEND")
    return PictureRef(data.getvalue(), loss=True, name="huge.png")


@pytest.mark.parametrize(
    "picture, kind, words",
    [
        (PictureRef(b"", True, "empty.png"), "empty picture", "empty.png: the picture's file is empty"),
        (
            PictureRef(b"no picture at all", True, "a.txt"),
            "unreadable picture",
            "a.txt: this is not a picture that can be read",
        ),
        (PictureRef(PictureFile("/nowhere/a.png"), True), "missing picture", "/nowhere/a.png"),
        (
            PictureRef(written(gradient(40, 24)).file[:12], True, "cut.png"),
            "unreadable picture",
            "cut.png: this is not a picture",
        ),
        (
            huge(),
            "picture too large",
            "huge.png: the picture is too large: .*60000|huge.png: the picture is too large: .*3600000000",
        ),
    ],
    ids=["empty", "text", "missing", "cut in the header", "huge"],
)
def test_pictures_that_cannot_be_read_are_named_with_the_reason(picture, kind, words):
    with pytest.raises(DataError, match=words) as error:
        picture_size(picture)
    assert error.value.kind == kind
    with pytest.raises(DataError):
        Grids(GridSettings(side=16), 16).pixels(picture, (1, 1))


def test_a_picture_cut_off_in_its_pixels_has_a_size_and_is_refused_when_it_is_decoded():
    for kind in ("PNG", "JPEG"):
        whole = written(gradient(200, 160), kind)
        cut = PictureRef(whole.file[: len(whole.file) * 2 // 3], True, "cut")
        assert picture_size(cut) == (200, 160)
        with pytest.raises(DataError, match="cut is not a picture that can be read") as error:
            Grids(GridSettings(side=16), 16).pixels(cut, (1, 1))
        assert error.value.kind == "unreadable picture"


def test_a_picture_inside_a_larger_file_is_read_as_one_of_its_own(tmp_path):
    inner = written(gradient(40, 24), "JPEG", exif=turned(6)).file
    (tmp_path / "a.tar").write_bytes(b"x" * 512 + inner + b"y" * 512)
    piece = PictureRef(PictureFile(str(tmp_path / "a.tar"), 512, len(inner), "0001.jpg"), True)
    assert picture_size(piece) == (24, 40)
    grids = Grids(GridSettings(side=16), 16)
    assert torch.equal(grids.pixels(piece, (1, 1)), grids.pixels(PictureRef(inner, True), (1, 1)))


def test_a_file_that_cannot_be_read_is_a_picture_that_cannot():
    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    picture = PictureRef(b"", loss=False, name="a.tar, 1.jpg")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PictureRef, "open", lambda self: Broken())
        with pytest.raises(DataError, match="a.tar, 1.jpg.*Input/output error") as found:
            picture_size(picture)
    assert found.value.kind == "unreadable picture"


def test_no_other_program_is_run_for_a_picture_whatever_its_file_is_called(tmp_path, monkeypatch):
    """EPS is drawn by Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(eps)
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="not a picture that can be read"):
        picture_size(PictureRef(eps, loss=False, name="a.jpg"))
