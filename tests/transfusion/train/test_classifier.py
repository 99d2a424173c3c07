"""The judge: it learns to read digits, is the same for the same seed, and leaves what is not its own alone."""
import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from transfusion.eval.features import Features
from transfusion.recipes.command_line import judge_main as main
from transfusion.recipes.digits import DIGIT_NAMES, Digits
from transfusion.recipes.emoji import EmojiSettings
from transfusion.train.classifier import ClassifierSettings, accuracy, augment, balanced_accuracy, train_classifier

BRIEF = ClassifierSettings(width=16, steps=120, batch=64, device="cpu")
TINY = ClassifierSettings(size=16, width=4, depths=(1,), steps=3, batch=4, device="cpu")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "judge"
    train = Digits("train")
    return train_classifier(train.pictures, train.labels, DIGIT_NAMES, out, BRIEF), out


def test_a_brief_training_reads_95_percent_of_held_out_digits(judge):
    features, held_out = judge[0], Digits("held-out")
    assert accuracy(features, held_out.pictures, held_out.labels) >= 0.95
    assert balanced_accuracy(features, held_out.pictures, held_out.labels) >= 0.95
    assert accuracy(features, held_out.pictures, (held_out.labels + 1) % 10) < 0.05


def test_a_judge_knows_its_labels_its_size_and_how_it_was_trained(judge):
    features, out = judge
    assert features.label_names == list(DIGIT_NAMES) and features.name == f"resnet ({out})"
    assert features.preprocessing == (1, (32, 32), [0.5], [0.5], 1)
    assert ViTImageProcessorPil.from_pretrained(out).size == {"height": 32, "width": 32}
    assert json.loads((out / "classifier.json").read_text())["settings"]["steps"] == BRIEF.steps
    digits = Digits("held-out").pictures
    loaded = Features.from_pretrained(out)
    assert torch.equal(loaded.logits(digits[:5]), features.logits(digits[:5]))
    assert [stage.shape[1:] for stage in features.stages(digits[:5])] == [
        (16, 8, 8), (16, 8, 8), (32, 4, 4), (64, 2, 2)
    ]
    assert features.pooled(digits[:5]).shape == (5, 64)


def test_the_seed_alone_decides_the_weights(tmp_path):
    digits = Digits()
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(len(files))  # what the global generator has drawn does not matter
        state = torch.get_rng_state()
        train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path / name,
                         dataclasses.replace(TINY, seed=seed))
        assert torch.equal(state, torch.get_rng_state())
        files.append(load_file(tmp_path / name / "model.safetensors"))
    same, other = ([torch.equal(files[0][key], x) for key, x in file.items()] for file in files[1:])
    assert all(same) and sum(other) < len(other) / 2


def test_the_same_call_after_an_interruption_ends_with_the_weights_of_one_that_never_stopped(tmp_path, monkeypatch,
                                                                                             capsys):
    digits, settings = Digits(), dataclasses.replace(TINY, steps=8, save_every=3)

    def run(name, settings=settings):
        train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path / name, settings)
        return load_file(tmp_path / name / "model.safetensors")

    def interrupted(pictures, _, generator, left=[7]):  # noqa: B006 (calls left: 2 to say the cost, 5 steps)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return augment(pictures, settings, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transfusion.train.classifier.augment", interrupted)
        run("parts")
    assert not (tmp_path / "parts" / "model.safetensors").exists() and (tmp_path / "parts" / "resume").is_dir()
    capsys.readouterr()
    parts = run("parts")
    assert "going on from step 3" in capsys.readouterr().out and not (tmp_path / "parts" / "resume").exists()
    whole = run("whole")
    assert all(torch.equal(parts[key], x) for key, x in whole.items())
    assert "going on" not in capsys.readouterr().out


def test_a_signal_keeps_the_step_and_an_older_classifier_stands_until_the_new_one_is_whole(tmp_path, monkeypatch,
                                                                                           capsys):
    digits, newer = Digits(), dataclasses.replace(TINY, steps=8, seed=1)
    train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path, TINY)
    older, calls = (tmp_path / "model.safetensors").read_bytes(), []

    def asked_to_stop(*given):
        calls.append(given)
        if len(calls) == 4:  # two calls say the cost
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt,
                                                       match="2 of 8 steps are done; the same command goes on"):
        patch.setattr("transfusion.train.classifier.augment", asked_to_stop)
        train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path, newer)
    assert (tmp_path / "model.safetensors").read_bytes() == older and Features.from_pretrained(tmp_path)
    capsys.readouterr()
    train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path, newer)
    assert "going on from step 2" in capsys.readouterr().out and (tmp_path / "model.safetensors").read_bytes() != older


def test_a_step_that_is_not_finite_ends_the_training_and_leaves_the_older_classifier(tmp_path, monkeypatch):
    digits = Digits()
    train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path, TINY)
    older = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("transfusion.train.classifier.augment", lambda pictures, *_: pictures * float("nan"))
    with pytest.raises(FloatingPointError, match="train_classifier: in step 0 loss is nan"):
        train_classifier(digits.pictures, digits.labels, DIGIT_NAMES, tmp_path, dataclasses.replace(TINY, seed=1))
    assert (tmp_path / "model.safetensors").read_bytes() == older


def test_pictures_are_moved_scaled_and_brightened_within_their_limits_and_never_mirrored():
    still = ClassifierSettings(move=0, scale=0, brightness=0)
    # brighter to the right, equal in every row
    ramp = torch.linspace(-0.5, 0.5, 16).expand(200, 1, 16, 16).contiguous()
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(augment(ramp, still, generator), ramp, rtol=0, atol=1e-6)
    brightened = augment(ramp, dataclasses.replace(still, brightness=0.2), generator) - ramp
    assert ((brightened - brightened.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-6
            and 0.15 < brightened.abs().max() <= 0.2)
    step = 1 / 15
    moved = (augment(ramp, dataclasses.replace(still, move=0.125), generator) - ramp)[..., 4:12]
    assert 1.8 * step < moved.abs().max() <= 2.001 * step and moved.min() < 0 < moved.max()  # an eighth of 16 pixels
    scaled = augment(ramp, dataclasses.replace(still, scale=0.25), generator)[..., 4:12].diff(dim=-1)
    assert 0.75 * step - 1e-6 <= scaled.min() < 0.8 * step and 1.2 * step < scaled.max() <= 1.25 * step + 1e-6
    assert (augment(ramp, ClassifierSettings(), generator).diff(dim=-1) > -1e-6).all()


def test_rare_labels_count_as_much_as_common_ones_in_the_balanced_accuracy(judge):
    features, digits = judge[0], Digits()
    zeros, ones = digits.pictures[digits.labels == 0][:90], digits.pictures[digits.labels == 1][:10]
    images, labels = torch.cat([zeros, ones]), torch.tensor([0] * 90 + [9] * 10)  # the ones are said to be nines
    assert (accuracy(features, images, labels) > 0.85
            and balanced_accuracy(features, images, labels) == pytest.approx(0.5, abs=0.06))


def test_the_command_says_its_cost_and_how_much_it_reads(tmp_path, capsys):
    command = ["data:digits", "--label", "name", "--out", str(tmp_path / "judge"), "--settings.width", "4",
               "--settings.steps", "3", "--settings.batch", "8", "--settings.device", "cpu"]
    main(command)
    said = capsys.readouterr().out
    assert ("10 labels, 1437 pictures\n3 steps of 8 pictures at " in said
            and "% of 360 held-out pictures are read right" in said)
    main(command)
    assert "is this classifier already" in capsys.readouterr().out
    main([*command, "--settings.seed", "1"])  # other settings: its own directory is written anew
    assert "3 steps of 8 pictures at " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: classifier: label is 'style'; name fits data set 'digits'"):
        main([*command, "--label", "style"])
    with pytest.raises(
        SystemExit, match="error: data:digit names no data set; data:digits, .* did you mean data:digits"
    ):
        main(["data:digit"])


def test_emoji_are_told_apart_by_name_style_category_or_kind(tmp_path, capsys):
    dataset = EmojiSettings(lively=True).open("held-out")
    i = next(i for i in range(len(dataset.labels)) if dataset.caption_of(i) == "a chestnut, twemoji style")
    said = {kind: (labels[i].item(), names) for kind, (labels, names) in dataset.labels_by_name().items()}
    assert {kind: names[label] for kind, (label, names) in said.items()} == {
        "name": "chestnut", "style": "twemoji", "category": "Food & Drink", "kind": "food vegetable"}
    main(["data:emoji", "--data.lively", "--label", "category", "--out", str(tmp_path / "judge"), "--settings.width",
          "4", "--settings.steps", "1", "--settings.batch", "8", "--settings.device", "cpu"])
    assert "3 labels, 865 pictures" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_by_name_before_training(tmp_path):
    (tmp_path / "theirs.txt").write_text("kept")
    images, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match="holds files and no classifier.json; an empty directory or one that this command wrote fits"
    ):
        train_classifier(images, labels, ["a", "b"], tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]
    with pytest.raises(ValueError, match="labels is from 0 to 1; 0 to 0 fit: they have names"):
        train_classifier(images, labels, ["a"], tmp_path / "new", TINY)
    with pytest.raises(ValueError, match=r"images has shape \(2, 1, 8, 8\) and labels \(1,\)"):
        train_classifier(images, labels[:1], ["a", "b"], tmp_path / "new", TINY)
    assert not (tmp_path / "new").exists()
