"""Pictures from folders: how they are read, turned, cut and scaled, and which are left out."""
import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from transfusion.data.dataset import SPLITS
from transfusion.data.model_images import image_of, load_image
from transfusion.data.picture_files import PictureFolder, PictureFolderSettings, describe, read_picture


def test_a_folders_pictures_are_their_middle_squares_resized_and_bad_files_are_left_out_and_named(folder):
    settings = PictureFolderSettings(folder=folder, size=8)
    train_set, held_out = (settings.open(split).pictures for split in ("train", "held-out"))
    assert len(train_set) + len(held_out) == 40 and 0 < len(held_out) < 12
    assert not set(train_set.paths) & set(held_out.paths)
    skipped = train_set.skipped + held_out.skipped
    assert sorted(path.name for path in skipped) == ["broken.png", "half.png"]
    lines = [describe(pictures, settings, "train") for pictures in (train_set, held_out)]
    assert (sum(path.name in line for path in skipped for line in lines) == 2
            and sum("cannot be read are left out" in line for line in lines) >= 1)
    batch = train_set[torch.tensor([0, 5])]
    assert batch.shape == (2, *train_set.shape[1:]) == (2, 3, 8, 8)
    torch.testing.assert_close(batch[0, :, 4, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(batch[0, :, 4, 7], torch.tensor([-1.0, -1.0, 1.0]))
    assert PictureFolder(dataclasses.replace(settings, channels=1)).shape[1:] == (1, 8, 8)


def test_names_of_files_that_are_no_utf8_are_names(tmp_path):
    for number in range(20):
        Picture.new("RGB", (8, 8)).save(tmp_path / os.fsdecode(b"caf\xe9%d.png" % number), "PNG")
    parts = [PictureFolder(PictureFolderSettings(folder=tmp_path, size=8), split).paths for split in SPLITS]
    assert len(set(parts[0]) | set(parts[1])) == 20 == len(parts[0]) + len(parts[1])


def test_pictures_stand_as_their_camera_held_them_and_16_bits_are_scaled(tmp_path):
    picture = Picture.new("RGB", (8, 8), "red")
    picture.paste("blue", (0, 0, 8, 4))
    exif = Picture.Exif()
    exif[0x0112] = 6  # turned a quarter
    for i in range(20):
        picture.save(tmp_path / f"{i}.png", exif=exif)
    turned = read_picture(tmp_path / "0.png", 8, 3)
    torch.testing.assert_close(turned[:, 4, 7], torch.tensor([-1.0, -1.0, 1.0]))
    torch.testing.assert_close(turned[:, 4, 0], torch.tensor([1.0, -1.0, -1.0]))
    Picture.new("I;16", (8, 8), 40_000).save(tmp_path / "deep.png")
    (tmp_path / "deep.pgm").write_bytes(b"P5 8 8 65535\n" + (40_000).to_bytes(2, "big") * 64)
    Picture.new("F", (8, 8), 0.5).save(tmp_path / "float.tiff")
    folders = [PictureFolder(PictureFolderSettings(folder=tmp_path, size=8), split) for split in ("train", "held-out")]
    assert sorted(path.name for folder in folders for path in folder.skipped) == ["float.tiff"]
    for name in ("deep.png", "deep.pgm"):
        deep = read_picture(tmp_path / name, 8, 3)
        torch.testing.assert_close(deep, torch.full((3, 8, 8), round(40_000 * 255 / 65_535) / 127.5 - 1))
    with pytest.raises(ValueError, match="float.tiff is not a picture that can be read .pixels of kind F"):
        read_picture(tmp_path / "float.tiff", 8, 3)


def test_transparent_parts_are_white(tmp_path):
    Picture.new("RGBA", (6, 6), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read_picture(tmp_path / "clear.png", 4, 3), torch.ones(3, 4, 4))


@pytest.mark.parametrize("kind", ["turned", "16 bits", "palette with a hole"])
def test_a_picture_that_pillow_holds_is_what_its_file_is(tmp_path, kind):
    picture, options = Picture.new("RGB", (16, 8), "white"), {}
    picture.paste("black", (0, 0, 8, 8))
    if kind == "turned":
        options["exif"] = Picture.Exif()
        options["exif"][0x0112] = 6
    elif kind == "16 bits":
        picture = Picture.fromarray(np.full((8, 16), 30_000, np.uint16))
    else:
        picture, options = picture.quantize(4), {"transparency": 0}
    path = tmp_path / ("a.jpg" if kind == "turned" else "a.png")
    picture.save(path, **options)
    config = SimpleNamespace(image_channels=1, image_size=(8, 8))
    assert torch.equal(load_image(path, config).latent, image_of(Picture.open(path), config).latent)
