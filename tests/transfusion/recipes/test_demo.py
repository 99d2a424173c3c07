"""The demo's measurements, on inputs whose right answer is known, and what the whole of it leaves."""
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion.recipes.demo import demo, report
from transfusion.recipes.digits import Digits, DigitsSettings
from transfusion.recipes.digits_judge import (
    draw_digits,
    evaluate,
    fit_judge,
    nearest_distance,
    read,
    tell_story,
    within_class_spread,
)
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig


def captioner(rule):
    """Stands for a model whose caption of a held-out digit is rule(label)."""
    held_out = Digits("held-out")
    return SimpleNamespace(caption=lambda images, **_: [rule(int(label)) for label in held_out.labels[:len(images)]])


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"not installed .*pip install 'tfkernels\[demo\]'"):
        Digits()


def test_the_judge_reads_real_digits_it_has_not_seen():
    held_out = Digits("held-out")
    assert (read(fit_judge(Digits("train")), held_out.pictures) == held_out.labels).float().mean() >= 0.985


def test_copies_of_the_training_set_are_told_from_new_digits():
    train, held_out = Digits("train"), Digits("held-out")
    copies = evaluate(captioner(Digits.caption), train.pictures[:300], train.labels[:300])
    assert (copies["nearest_train_distance_ratio"] == 0 and copies["text_to_image_accuracy"] > 0.99
            and copies["caption_accuracy"] == 1)
    fresh = evaluate(captioner(lambda label: Digits.caption((label + 1) % 10)), held_out.pictures, held_out.labels)
    assert (fresh["nearest_train_distance_ratio"] == 1 and 0.9 < fresh["within_class_spread_ratio"] < 1.1
            and fresh["caption_accuracy"] == 0)
    noise = evaluate(captioner(Digits.caption), torch.rand(200, 1, 8, 8) * 2 - 1, torch.arange(200) % 10)
    assert noise["text_to_image_accuracy"] < 0.3


def test_distance_and_spread_by_hand():
    a, b = torch.tensor([[[[0.0]]], [[[3.0]]]]), torch.tensor([[[[1.0]]], [[[10.0]]]])
    assert nearest_distance(a, b) == (1 + 2) / 2
    assert within_class_spread(
        torch.tensor([[[[0.0]]], [[[2.0]]], [[[5.0]]], [[[9.0]]]]), torch.tensor([0, 0, 1, 1])
    ) == (1 + 2) / 2


def test_drawn_digits_have_the_shape_and_range_of_real_ones():
    drawn = draw_digits(tiny_model(), torch.tensor([3, 1]), steps=2)
    assert drawn.shape == (2, 1, 8, 8) and drawn.abs().max() <= 1


def test_a_story_has_parts():
    assert tell_story(tiny_model(), "a handwritten seven", tries=1) is not None


def test_the_demo_leaves_everything_it_promises(tmp_path, capsys):
    config = TrainConfig(out=tmp_path, model=ModelSettings(hidden=16, layers=1, heads=2, kv_heads=2, mlp=32),
                         data=DigitsSettings(), optim=OptimSettings(steps=3, rows=1, seq_len=64), device="cpu")
    metrics = demo(config)
    report(metrics, tmp_path)
    keys = {"text_to_image_accuracy", "caption_accuracy", "classifier_accuracy", "nearest_train_distance_ratio",
            "within_class_spread_ratio", "train_seconds", "total_seconds"}
    assert keys <= set(json.loads((tmp_path / "metrics.json").read_text()))
    assert {"model.safetensors", "config.json", "tokenizer.json", "samples.png", "loss.png", "metrics.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    printed = capsys.readouterr().out
    assert "text_to_image_accuracy" in printed
    line = shlex.split(next(line for line in printed.splitlines() if line.startswith("try")).removeprefix("try"))
    assert line[1:4] == ["-m", "transfusion.cli", "sample"] and line[line.index("--model") + 1] == str(tmp_path)
    subprocess.run([*line[:-1], tmp_path / line[-1], "--steps", "1"], check=True)
    assert (tmp_path / "five.png").is_file()
