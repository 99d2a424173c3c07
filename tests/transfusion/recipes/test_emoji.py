"""Named emoji: what the package holds, what is held out, and how the sheets are fetched and made."""
import io
import json
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture

from transfusion import Image, Text
from transfusion.data.dataset import Arrangement
from transfusion.recipes import emoji as module
from transfusion.recipes import emoji_fetch
from transfusion.recipes.emoji import SHIPPED, STYLES, Emoji, read_sheet
from transfusion.recipes.emoji_fetch import Fetch, fetch


@pytest.fixture(scope="module")
def splits():
    return {split: Emoji(split) for split in ("train", "held-out", "all")}


def pairs(dataset):
    return set(zip(dataset.labels.tolist(), dataset.styles.tolist()))


def test_a_held_out_pair_is_never_trained_on_and_its_name_is_in_the_other_style(splits):
    train, held_out = pairs(splits["train"]), pairs(splits["held-out"])
    assert len(held_out) == 174 and len(splits["all"].names) == 1870
    assert not train & held_out and train | held_out == pairs(splits["all"])
    assert all((label, 1 - style) in train for label, style in held_out)
    assert abs(Counter(style for _, style in held_out)[0] - 87) <= 9


def test_no_picture_is_in_both_splits_and_every_choice_of_categories_holds_out_the_same(splits):
    pictures = {split: [picture.numpy().tobytes() for picture in dataset.pictures] for split, dataset in splits.items()}
    assert not set(pictures["train"]) & set(pictures["held-out"])
    styles = [[name.numpy().tobytes() for name in splits["all"].pictures[splits["all"].styles == style]]
              for style in range(len(STYLES))]
    assert all(len(set(drawn)) == len(drawn) == len(splits["all"].names) for drawn in styles)
    few = Emoji("held-out", categories=module.LIVELY)
    named = {(splits["all"].names[label], style) for label, style in pairs(splits["held-out"])}
    assert len(few.labels) == 53 and {(few.names[label], style) for label, style in pairs(few)} <= named


def test_names_pictures_and_styles_belong_together(splits):
    dataset = splits["all"]
    assert len(set(dataset.names)) == len(dataset.names)
    for name, strong in (("red apple", 0), ("green apple", 1), ("blue heart", 2)):
        for style in range(len(STYLES)):
            found = (dataset.labels == dataset.names.index(name)) & (dataset.styles == style)
            picture = dataset.pictures[found][0]
            colour = picture[:, (picture < 0.9).any(0)].mean(1)
            assert colour.argmax() == strong, (name, STYLES[style], colour)
    assert {dataset.category_names[i] for i in dataset.categories.unique()} == set(module.CATEGORIES)
    apple = dataset.names.index("red apple")
    assert dataset.kind_names[dataset.kinds[dataset.labels == apple][0]] == "food fruit"


def test_tiles_are_the_sheets_own_pixels_on_white(splits):
    tiles = read_sheet(SHIPPED / "noto.webp", 32, 1905)
    with Picture.open(SHIPPED / "noto.webp") as sheet:
        crop = sheet.convert("RGB").crop((2 * 32, 3 * 32, 3 * 32, 4 * 32))  # column 2 of row 3
    expected = torch.frombuffer(
        bytearray(crop.tobytes()), dtype=torch.uint8
    ).view(32, 32, 3).movedim(-1, 0).float() / 127.5 - 1
    assert torch.equal(tiles[3 * module.COLUMNS + 2], expected)
    assert (tiles[:, :, 0, 0] == 1).all(1).double().mean() > 0.8  # most corners are background


@pytest.mark.parametrize("name, words",
                         [("red apple", "a red apple"), ("owl", "an owl"), ("unicorn face", "a unicorn face"),
                          ("grapes", "grapes"), ("european castle", "a european castle"), ("compass", "a compass")])
def test_captions_have_articles(name, words):
    assert Emoji.caption(name, "noto") == f"{words}, noto style"


def test_documents_hold_a_picture_and_words_that_are_about_it(splits):
    dataset, generator, texts = splits["train"], torch.Generator().manual_seed(0), set(splits["train"].texts())
    orders = Counter()
    for _ in range(300):
        parts = dataset.document(generator, Arrangement(caption_first=0.8, caption_dropout=0.1))
        orders[tuple(type(part).__name__ for part in parts)] += 1
        image = next(part.latent for part in parts if isinstance(part, Image))
        for part in parts:
            if isinstance(part, Text):
                assert part.text in texts
                i = (dataset.pictures == image).flatten(1).all(1).nonzero()[0, 0]
                assert part.text in (dataset.caption_of(i),
                                     f"{dataset.kind_names[dataset.kinds[i]]}, {STYLES[dataset.styles[i]]} style")
    assert abs(orders["Image", "Text"] - 60) < 28 and abs(orders["Image",] - 24) < 18 and sum(orders.values()) == 300


def archive(path, style, names):
    """An npm package of squares, one colour a name; the last one is half transparent."""
    folder, _, _ = emoji_fetch.PACKAGES[style]
    rows = [{"name": name.upper(), "category": "Objects", "subcategory": "other-object", "sort_order": -i,
             "image": f"{i}.png", "has_img_google": True, "has_img_twitter": True} for i, name in enumerate(names)]
    with tarfile.open(path, "w:gz") as tar:
        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for i in range(len(names)):
            stream = io.BytesIO()
            Picture.new("RGBA", (64, 64), (40 * i, 100, 200, 255 if i < len(names) - 1 else 128)).save(stream, "PNG")
            add(f"package/img/{folder}/64/{i}.png", stream.getvalue())
        add("package/emoji.json", json.dumps(rows).encode())
    return path


def test_fetched_archives_become_sheets_that_read_back(tmp_path, monkeypatch):
    names = ["cup", "fork", "spoon"]
    styles = {package: style for style, (_, package, _) in emoji_fetch.PACKAGES.items()}
    monkeypatch.setattr(
        emoji_fetch, "fetch_package",
        lambda package, _, scratch: archive(scratch / f"{styles[package]}.tgz", styles[package], names))
    dataset = Emoji("all", fetch(Fetch(size=16, out=tmp_path / "sheets")))
    assert dataset.names == names[::-1] and dataset.image_shape == (3, 16, 16)  # in sort_order
    cup = dataset.pictures[(dataset.labels == dataset.names.index("cup")) & (dataset.styles == 0)][0]
    expected = torch.tensor([0, 100, 200]).view(3, 1, 1) / 127.5 - 1
    assert (cup - expected).abs().max() <= 4.01 / 127.5
    spoon = dataset.pictures[(dataset.labels == dataset.names.index("spoon")) & (dataset.styles == 1)][0]
    # half of it is white
    assert (spoon[:, 0, 0] - (torch.tensor([80 + 255, 100 + 255, 200 + 255]) / 255 - 1)).abs().max() < 0.05
    assert (tmp_path / "sheets" / "licences" / "README.md").is_file()


def test_a_package_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    def pack(command, **_):
        (tmp_path / "x.tgz").write_bytes(b"something else")
        return SimpleNamespace(returncode=0, stdout="x.tgz\n", stderr="")
    monkeypatch.setattr(emoji_fetch.subprocess, "run", pack)
    with pytest.raises(ValueError, match="nothing of it is used"):
        emoji_fetch.fetch_package("a@1", "its hash", tmp_path)


def test_bad_settings_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="size is 48"):
        fetch(Fetch(size=48, out=tmp_path))
    monkeypatch.setattr(emoji_fetch.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not on the PATH"):
        fetch(Fetch(out=tmp_path))
    with pytest.raises(ValueError, match="holds no names.json"):
        Emoji(sheets=tmp_path)
