"""What command lines mean: presets, data:NAME, flags, and answers to what does not fit."""
import dataclasses
import shlex
import sys
from pathlib import Path

import pytest
import torch

from transfusion.data.latents import EncodeSettings
from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.data.picture_files import PictureFolderSettings
from transfusion.recipes.command_line import (
    AUTOENCODER_PRESETS,
    PRESETS,
    read_preset,
    read_settings,
    shell_line,
    train_main,
)
from transfusion.recipes.digits import DigitsSettings, digits
from transfusion.recipes.emoji import EmojiSettings
from transfusion.recipes.own import own
from transfusion.recipes.paper import PAPER, Size, paper, paper_model
from transfusion.train import build_model


def read(*args, presets=PRESETS):
    return read_preset("transfusion train", "Train.", presets, list(args))


def test_a_preset_alone_is_what_its_function_returns():
    for name, preset in PRESETS.items():
        assert read(name) == preset()


def test_digits_by_the_papers_recipe_have_its_objective_captions_and_noise_limit():
    config = read("digits-paper")
    assert (config.model.objective, config.data.caption_first, config.data.noise_limit) == ("eps", 0.8, 0.5)


def test_flags_change_the_presets_own_data_set():
    config = read("digits", "--data.noise-limit", "0.2", "--data.story", "0.5", "--optim.steps", "7")
    base = digits()
    assert config.data == dataclasses.replace(base.data, noise_limit=0.2, story=0.5) and config.optim.steps == 7


@pytest.mark.parametrize("args", [("digits", "data:emoji", "--data.lively", "--optim.steps", "7"),
                                  ("digits", "--optim.steps", "7", "--data.lively", "data:emoji"),
                                  ("data:emoji", "digits", "--data.lively", "--optim.steps", "7")])
def test_another_data_set_is_named_anywhere_and_what_every_data_set_has_stays_the_presets(args):
    config = read(*args)
    assert config.data == EmojiSettings(lively=True, caption_first=0.4, noise_limit=0.3)
    assert config.data.name == "emoji-lively"
    assert config.optim.steps == 7 and config.model == digits().model


def test_to_name_the_data_set_that_a_preset_has_anyway_changes_nothing():
    assert read("digits", "data:digits") == read("digits")


@pytest.mark.parametrize("words", [
    "paper --data mix.yaml --data.workers 4", "paper --data=mix.yaml --data.workers 4",
    "paper data:mixture --data.workers 4 --data.file mix.yaml",
    "data:mixture paper --data.file mix.yaml --data.workers 4",
    "--data mix.yaml paper --data.workers 4", "--data.workers 4 --data mix.yaml paper data:mixture"])
def test_a_mixture_is_named_by_its_file_or_as_a_data_set(words, monkeypatch):
    run = []
    monkeypatch.setattr("transfusion.train.transfusion.train", run.append)
    train_main(shlex.split(words))
    assert run == [dataclasses.replace(paper(), data=MixtureFileSettings(file=Path("mix.yaml"), workers=4))]


def test_a_mixture_alone_trains_the_preset_own(monkeypatch):
    run = []
    monkeypatch.setattr("transfusion.train.transfusion.train", run.append)
    for words in (["--data", "mix.yaml"], ["own", "--data", "mix.yaml"], ["data:mixture", "--data.file", "mix.yaml"]):
        train_main(words)
    assert run == [dataclasses.replace(own(), data=MixtureFileSettings(file=Path("mix.yaml")))] * 3
    train_main(["own", "data:digits"])
    assert run[-1] == dataclasses.replace(own(), data=DigitsSettings())


def test_a_flags_value_is_neither_a_preset_nor_a_data_set(monkeypatch):
    run = []
    monkeypatch.setattr("transfusion.train.transfusion.train", run.append)
    train_main(["--data", "mix.yaml", "--out", "emoji", "--samples.prompts", "digits", "data: a chart", "--autocast"])
    config = run[0]
    assert (config.out, config.data.file, config.model) == (Path("emoji"), Path("mix.yaml"), own().model)
    assert list(config.samples.prompts) == ["digits", "data: a chart"] and config.autocast
    train_main(["--data", "mix.yaml", "--autocast", "digits"])
    assert run[1].model == digits().model and run[1].autocast


def test_an_autoencoder_trains_on_a_folder():
    config = read("small", "data:folder", "--data.folder", "pictures", "--data.size", "64", presets=AUTOENCODER_PRESETS)
    assert config.data == PictureFolderSettings(folder=Path("pictures"), size=64)
    assert read("small", presets=AUTOENCODER_PRESETS).data == EmojiSettings()


def test_a_command_without_presets_takes_a_data_set_and_flags():
    settings = read_settings("transfusion vae encode", EncodeSettings, ["data:digits", "--vae", "a", "--out", "b"])
    assert settings == EncodeSettings(vae=Path("a"), out=Path("b"), data=DigitsSettings())


@pytest.mark.parametrize("args,said", [
    (("digit",), "'digit' is no preset; digits, digits-paper, emoji, paper, own fit; did you mean digits"),
    (("--optim.lr", "1e-3", "digits"), "--optim.lr stands where the preset's name fits: `transfusion train PRESET "
                                       "--optim.lr ...`, of presets digits, digits-paper"),
    (("digits", "data:emojy"),
     "data:emojy names no data set; data:digits, data:emoji, data:folder fit; did you mean data:emoji"),
    (("digits", "data:emoji", "data:digits"), "data:emoji and data:digits name several data sets; one fits"),
    (("paper", "--size", "0.67B"), "paper: size is '0.67B'; 0.16B, 0.37B, 0.76B, 1.4B, 7B fit; did you mean 0.76B")])
def test_names_that_do_not_exist_are_answered_in_one_line_with_the_nearest(args, said):
    with pytest.raises(SystemExit, match=f"^error: {said}") as stop:
        read(*args)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("args,near", [(("digits", "--data.nois-limit", "1"), "--data.noise-limit"),
                                       (("digits", "data:emoji", "--data.livly"), "--data.lively")])
def test_a_misspelt_flag_is_answered_with_the_nearest(args, near, capsys):
    with pytest.raises(SystemExit):
        read(*args)
    printed = capsys.readouterr()
    assert near in printed.out + printed.err


def test_help_names_presets_data_sets_and_the_flags_of_the_named_one(capsys):
    for args, words in (((), ("digits-paper", "emoji", "paper", "data:folder", "PRESET --help")),
                        (("digits", "--help"), ("data:emoji", "--data.story")),
                        (("digits", "data:emoji", "--help"), ("--data.lively", "data:digits"))):
        with pytest.raises(SystemExit):
            read(*args)
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)
    assert "--data.story" not in printed


def test_the_papers_models_are_trained_by_name_and_their_data_set_must_be_named(tmp_path, monkeypatch):
    config = read("paper", "--size", "0.76B", "--image-layers", "unet", "--optim.steps", "3", "data:digits")
    assert config == dataclasses.replace(paper("0.76B", "unet"), optim=config.optim, data=DigitsSettings())
    assert config.optim == dataclasses.replace(paper().optim, steps=3)
    with pytest.raises(SystemExit, match="^error: .*names no data set"):
        train_main(["paper", "--out", str(tmp_path / "run")])
    monkeypatch.setitem(PAPER, "tiny", Size(2, 48, 4, (8, 16)))
    for image_layers in ("linear", "unet"):
        built = build_model(paper("tiny", image_layers), LatentsOfThePaper()).config.to_dict()
        named = paper_model("tiny", image_layers).to_dict()
        own = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "boi_token_id", "eoi_token_id")
        for part in (built, named, built["text_config"], named["text_config"]):
            for name in own:
                part.pop(name, None)
        assert built == named


class LatentsOfThePaper:
    """As much of a data set as a model is built for."""

    image_shape = (8, 32, 32)
    pictures = torch.zeros(1, 8, 32, 32)

    def texts(self):
        return ["a picture"]


def test_the_printed_line_runs_here_whether_or_not_the_command_is_on_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["sample", "--prompt", "a handwritten five", "--out", Path("five.png")]
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    expected = "/usr/bin/python3 -m transfusion.cli sample --prompt 'a handwritten five' --out five.png"
    assert shell_line(*line) == expected
    for inside, shown in ((".venv/bin/python", "./.venv/bin/python"), ("python", "./python")):
        monkeypatch.setattr(sys, "executable", str(tmp_path / inside))
        assert shlex.split(shell_line(*line))[:3] == [shown, "-m", "transfusion.cli"]
