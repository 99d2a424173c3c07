"""The showcase: its measurements against plain forms, and the whole road with two steps of everything."""
import dataclasses
import json
import math

import pytest
import torch

from transfusion import Transfusion
from transfusion.recipes.digits import DigitsSettings
from transfusion.recipes.emoji import STYLES, Emoji, emoji
from transfusion.recipes.emoji_judges import Judges, bits_per_byte, draw_emoji, read_captions
from transfusion.recipes.showcase import ShowcaseSettings, read_plain_text, showcase
from transfusion.sequence import Image
from transfusion.train.classifier import ClassifierSettings

FEW = ClassifierSettings(size=16, width=8, depths=(1, 1), steps=4, batch=16, device="cpu")


@pytest.fixture(scope="module")
def real():
    return Emoji("all", categories=("Food & Drink",))


@pytest.fixture(scope="module")
def judges(real, tmp_path_factory):
    return Judges(real, tmp_path_factory.mktemp("judges"), FEW)


def test_real_pictures_are_nearest_to_themselves_and_at_no_distance(real, judges):
    found = judges.read(real.pictures, real.labels, real.styles)
    assert found["nearest"] == 1 and found["frechet"] < 1e-6
    swapped = judges.read(real.pictures, real.labels, 1 - real.styles)
    # the same pictures are asked for, in another order
    assert swapped["nearest"] == 0 and swapped["frechet"] == pytest.approx(found["frechet"], abs=1e-6)
    shown = judges.read(real.pictures[real.styles == 0], real.labels[real.styles == 0],
                        1 - real.styles[real.styles == 0])
    assert shown["nearest"] == 0 and shown["frechet"] > 1e-3
    assert found["style"] + swapped["style"] == pytest.approx(1)
    assert judges.read(torch.ones_like(real.pictures), real.labels, real.styles)["frechet"] > 0.01
    asked = torch.tensor([7, 3, 7])
    pictures = real.pictures[judges.places(asked, torch.tensor([0, 1, 0]))]
    assert (torch.equal(pictures[0], pictures[2])
            and torch.equal(pictures[1], real.pictures[(real.labels == 3) & (real.styles == 1)][0]))


def test_judges_are_trained_once(real, judges, tmp_path, capsys, monkeypatch):
    again = Judges(real, tmp_path, FEW)
    capsys.readouterr()
    monkeypatch.setattr("transfusion.train.classifier.build_network", lambda *_: pytest.fail("trained again"))
    kept = Judges(real, tmp_path, FEW)
    assert (capsys.readouterr().out.count("is this classifier already") == 2
            and torch.equal(kept.features, again.features))


def test_names_are_counted_first_and_among_five(real, judges, monkeypatch):
    logits = torch.zeros(len(real.labels), len(real.names))
    rows = torch.arange(len(real.labels))
    logits[rows, real.labels] = 2.0  # named right,
    logits[rows[::2], (real.labels[::2] + 1) % len(real.names)] = 3.0  # but every second comes second,
    for other in range(2, 7):
        logits[rows[::4], (real.labels[::4] + other) % len(real.names)] = 4.0  # and every fourth seventh
    monkeypatch.setattr("transfusion.recipes.emoji_judges.in_batches",
                        lambda read, pictures: logits if read == judges.names.logits else read(pictures))
    found = judges.read(real.pictures, real.labels, real.styles)
    assert found["name"] == pytest.approx(0.5, abs=0.01) and found["name_in_five"] == pytest.approx(0.75, abs=0.01)


class Parrot:
    """A model that says what it is told."""

    vae = None

    def __init__(self, words):
        self.words = words

    def caption(self, images, **_):
        return self.words

    def draw(self, captions, **_):
        return [Image(torch.full((3, 8, 8), 3.0)) for _ in captions]


def test_captions_are_right_as_a_whole_or_in_their_name(real):
    words = [real.caption_of(i) for i in range(4)]
    words[1] = words[1].replace("noto", "twemoji")
    words[2] = words[2].replace(", noto", "s, noto")
    assert read_captions(Parrot(words), real.pictures[:4], [real.caption_of(i) for i in range(4)]) == {
        "caption": 0.5, "caption_name": 0.75
    }
    assert draw_emoji(Parrot([]), ["a cup"]).max() == 1  # clipped to what a picture can be


def test_bits_per_byte_are_those_of_the_whole_text(model):
    text = "a handwritten seven and a handwritten two " * 30
    tokens = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = tokens[:len(tokens) // 16 * 16][:5 * 16]
    with torch.no_grad():
        nats = 0.0
        for piece in tokens.view(-1, 16):
            logits = model.text_logits(
                torch.cat([torch.tensor([model.tokenizer.bos_token_id]), piece])[None]
            )[0].double()
            nats -= logits[:-1].log_softmax(-1).gather(1, piece[:, None]).sum().item()
    expected = nats / math.log(2) / len(model.tokenizer.decode(tokens).encode())
    assert bits_per_byte(model, text, window=16, windows=5) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="at least 4000 fit"):
        bits_per_byte(model, text, window=4000)


def test_the_whole_road_leaves_pictures_numbers_and_a_model_and_goes_on_where_it_stopped(tmp_path, capsys):
    base = emoji()
    config = dataclasses.replace(
        base, out=tmp_path / "emoji", device="cpu", stop_after=1,
        model=dataclasses.replace(base.model, hidden=32, layers=1, heads=2, kv_heads=2, mlp=32),
        optim=dataclasses.replace(base.optim, steps=2, rows=1, warmup=1)
    )
    settings = ShowcaseSettings(train=config, judge=FEW, each=1, steps=1)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 steps"):
        showcase(settings)
    assert "2 steps of 256 tokens" in capsys.readouterr().out  # the cost, before it starts
    metrics = showcase(dataclasses.replace(settings, train=dataclasses.replace(config, stop_after=None)))
    clock = [json.loads(line)["seconds"] for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert len(clock) == 2 and metrics["train_seconds"] == clock[1] > clock[0]  # the interruption is not in it
    assert json.loads((config.out / "metrics.json").read_text()) == metrics
    assert (config.out / "samples.png").stat().st_size > 50_000 and (config.out / "loss.png").is_file()
    for name in ("held_out", "trained"):
        assert all(0 <= metrics[f"{name}_{key}"] <= 1
                   for key in ("name", "name_in_five", "style", "nearest", "caption", "caption_name"))
    assert metrics["shown_nearest"] == 0 and metrics["shown_frechet"] > 0
    assert metrics["text_bits_per_byte_before"] > 5 and math.isfinite(metrics["text_bits_per_byte_after"])
    image, = Transfusion.from_pretrained(config.out).draw([f"a red apple, {STYLES[0]} style"], steps=1)
    assert image.latent.shape == (3, 32, 32)


def test_other_data_and_texts_that_are_not_there_are_refused(tmp_path):
    base = emoji()
    with pytest.raises(ValueError, match="data.name is 'digits'"):
        digits = dataclasses.replace(base, device="cpu", data=DigitsSettings())
        showcase(ShowcaseSettings(train=digits))
    with pytest.raises(ValueError, match="which is no file"):
        read_plain_text(tmp_path / "none.txt")
