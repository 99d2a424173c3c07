"""Data sets: one of one's own works wherever a data set is named, and what all have in common happens once."""
import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch

from transfusion import Image, Text, Transfusion
from transfusion.data.dataset import Arrangement, CaptionedPictures, DatasetSettings, PictureDataset
from transfusion.data.latents import EncodeSettings, encode_dataset, open_dataset
from transfusion.recipes.digits import DigitsSettings
from transfusion.recipes.emoji import EmojiSettings
from transfusion.train import ModelSettings, OptimSettings, TrainConfig, train
from transfusion.train.autoencoder import AutoencoderSettings, VAEOptimSettings, VAETrainConfig
from transfusion.train.autoencoder import train as train_autoencoder


@dataclass(frozen=True)
class StripeSettings(DatasetSettings):
    """Grey pictures with a bright line, which captions name."""

    lines: int = 8
    """kinds of pictures"""

    name = "stripes"

    def open(self, split="train"):
        """Each line in the training split three times, in the held-out one once."""
        kinds = torch.arange(self.lines).repeat(3 if split == "train" else 1)
        pictures = torch.full((len(kinds), 1, 8, 8), -1.0)
        pictures[torch.arange(len(kinds)), 0, kinds] = 1.0
        return CaptionedPictures(pictures, [f"line {kind}" for kind in kinds.tolist()])


MODEL = ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64)
OPTIM = OptimSettings(steps=3, rows=2, seq_len=64, warmup=1, ema=0.5)


def test_a_data_set_of_ones_own_trains_a_model_and_an_autoencoder_and_is_encoded(tmp_path):
    config = TrainConfig(out=tmp_path / "model", model=MODEL, data=StripeSettings(), optim=OPTIM, device="cpu")
    train(config)
    assert Transfusion.from_pretrained(tmp_path / "model").config.image_channels == 1
    vae = train_autoencoder(VAETrainConfig(
        out=tmp_path / "vae", model=AutoencoderSettings(latent_channels=2, widths=(8, 16)), data=StripeSettings(),
        optim=VAEOptimSettings(steps=2, batch=4, warmup=1), device="cpu"))
    cache = encode_dataset(EncodeSettings(vae=vae, out=tmp_path / "latents", data=StripeSettings(), device="cpu"))
    dataset, opened = open_dataset(StripeSettings(latents=cache))
    assert dataset.image_shape == (2, 4, 4) and opened is not None and len(dataset.pictures) == 24
    latents = dataclasses.replace(config, out=tmp_path / "on-latents", data=StripeSettings(latents=cache))
    train(latents)
    assert Transfusion.from_pretrained(tmp_path / "on-latents").vae is not None


def test_a_run_goes_on_with_its_own_data_set_alone_and_says_which(tmp_path):
    config = TrainConfig(out=tmp_path, model=MODEL, data=StripeSettings(), optim=OPTIM, device="cpu", stop_after=1)
    train(config)
    saved = json.loads((tmp_path / "resume" / "run.json").read_text())["config"]["data"]
    assert saved["name"] == "stripes" and saved["lines"] == 8
    going_on = dataclasses.replace(config, resume=True, stop_after=2)
    with pytest.raises(ValueError, match="data.name is .* and was .* in the run saved"):
        train(dataclasses.replace(going_on, data=DigitsSettings()))
    with pytest.raises(ValueError, match="data.lines is 4 and was 8 in the run saved"):
        train(dataclasses.replace(going_on, data=StripeSettings(lines=4)))
    train(going_on)


def test_a_run_that_an_earlier_version_saved_goes_on_by_the_name_of_its_data_set(tmp_path):
    config = TrainConfig(out=tmp_path, model=MODEL, data=DigitsSettings(story=0.2), optim=OPTIM, device="cpu",
                         stop_after=1)
    train(config)
    path = tmp_path / "resume" / "run.json"
    run = json.loads(path.read_text())
    run["config"]["data"] = {
        "name": "digits", "latents": None, "caption_first": 0.8, "caption_dropout": 0.1, "story": 0.2,
        "noise_limit": 0.5, "context": "noised", "jitter": 0.0}
    going_on = dataclasses.replace(config, resume=True, stop_after=2)
    for name, data in (("emoji-lively", EmojiSettings(lively=True)), ("emoji", EmojiSettings()),
                       ("emoji-64", EmojiSettings(size=64))):
        assert data.name == name
    other = run["config"] | {"data": run["config"]["data"] | {"name": "emoji"}}
    path.write_text(json.dumps(run | {"config": other}))
    with pytest.raises(ValueError, match="data.name is .* and was .* in the run saved"):
        train(going_on)
    path.write_text(json.dumps(run))
    train(going_on)
    assert json.loads(path.read_text())["step"] == 2


def test_pairs_are_arranged_by_two_random_numbers():
    caption, image = Text("a"), Image(torch.zeros(1, 2, 2))
    arrangement = Arrangement(caption_first=0.75, caption_dropout=0.25)
    assert arrangement.pair(caption, image, order=0.75, drop=0.0) == [image, caption]
    assert arrangement.is_image_first(0.75)
    assert arrangement.pair(caption, image, order=0.74, drop=0.25) == [caption, image]
    assert arrangement.pair(caption, image, order=0.74, drop=0.24) == [image] and not arrangement.is_image_first(0.74)


def test_captioned_pictures_keep_each_caption_beside_its_picture():
    dataset, generator = StripeSettings().open(), torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(100):
        parts = dataset.document(generator, Arrangement(caption_first=0.5, caption_dropout=0.3))
        orders.add(tuple(type(part) for part in parts))
        line = next(part.latent for part in parts if isinstance(part, Image))[0, :, 0].argmax().item()
        assert [part.text for part in parts if isinstance(part, Text)] in ([], [f"line {line}"])
    assert orders == {(Text, Image), (Image, Text), (Image,)}
    assert dataset.texts() == [f"line {line}" for line in range(8)]
    with pytest.raises(ValueError, match="pictures are 2 and captions 1; as many fit"):
        CaptionedPictures(torch.zeros(2, 1, 8, 8), ["a"])


def test_a_run_without_captions_or_without_a_data_set_is_refused_in_plain_words(tmp_path):
    @dataclass(frozen=True)
    class Bare(DatasetSettings):
        name = "bare"

        def open(self, split="train"):
            return PictureDataset(torch.zeros(4, 1, 8, 8))

    config = TrainConfig(out=tmp_path / "run", model=MODEL, data=Bare(), optim=OPTIM, device="cpu")
    with pytest.raises(ValueError, match="pictures and no captions, so that only an autoencoder can be trained on it"):
        train(config)
    with pytest.raises(ValueError, match="names no data set; settings of one fit; on the command line add, for"):
        train(dataclasses.replace(config, data=DatasetSettings()))
