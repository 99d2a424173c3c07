"""Folders of files: what links lead to counts once, and what cannot be read is not passed over."""
import os

import pytest
from PIL import Image as Picture

from transfusion.data.picture_files import PictureFolder, PictureFolderSettings
from transfusion.data.sources.imagefolder import ImageFolderSettings
from transfusion.eval.picture_features import picture_files


@pytest.fixture
def folder(tmp_path):
    """Pictures in folders, one of which is elsewhere and two of which are links in a circle or to one that is there."""
    for place in (tmp_path / "pictures" / "cat", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        for number in range(10):
            Picture.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{place.name}{number}.png")
    (tmp_path / "pictures" / "a_dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "again").symlink_to("cat")
    (tmp_path / "pictures" / "cat" / "up").symlink_to("..")
    return tmp_path / "pictures"


def _labels(folder):
    source = ImageFolderSettings(folder).open()
    return [source[number].captions[0] for number in range(len(source))]


def _all(folder):
    return [path for split in ("train", "held-out")
            for path in PictureFolder(PictureFolderSettings(folder=folder, size=8), split).paths]


def test_folders_that_are_links_count_and_none_counts_twice(folder):
    assert _labels(folder) == ["a dog"] * 10 + ["cat"] * 10
    expected = [folder / f"{place}{number}.png" for place in ("a_dog/elsewhere", "cat/cat") for number in range(10)]
    assert picture_files(folder) == sorted(_all(folder)) == expected


@pytest.mark.parametrize("read", [_labels, _all, picture_files])
def test_a_folder_that_cannot_be_read_is_no_empty_one(folder, monkeypatch, read):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="pictures/cat' cannot be read .Permission denied"):
        read(folder)
