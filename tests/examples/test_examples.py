"""Every program in examples/ runs, learns and does what its docstring says."""
import ast
import re
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from examples import attention_block, dit_block, emulate_kernel, finetune_own_pictures, own_dataset, sample
from tests.transfusion.conftest import tiny_model
from transfusion import Transfusion

PROGRAMS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_shows_and_how_to_run_it(path):
    text = path.read_text()
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))
    assert 30 <= len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_an_example_is_run_by_a_test(path):
    assert f"{path.stem}.main(" in Path(__file__).read_text()


def test_attention_in_a_gpt_finds_the_token_before_last():
    losses = attention_block.main(steps=40)
    assert losses[0] > 4 and losses[-1] < 0.5


def test_dit_blocks_learn_to_denoise():
    losses = dit_block.main(steps=60)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_compiled_kernel_runs_on_the_cpu_and_one_without_its_bound_is_found():
    error, said = emulate_kernel.main()
    assert error < 2**-9  # half a unit in the last place of a bfloat16 below 1
    assert "ending 56 bytes behind x, which has 1200" in said
    assert re.search(r"emulate_kernel\.py:2[56]", said)  # of a load's two lines Triton 3.6 names the other


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of grey 8x8 images, as `make demo` leaves one."""
    where = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(where)
    return where


def test_sampling_draws_a_picture_for_each_prompt_and_captions_it(checkpoint, tmp_path, capsys):
    captions = sample.main(checkpoint, tmp_path / "samples", steps=2)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"a handwritten {digit}.png" for digit in ("nine", "seven", "three")]
    assert len(captions) == 3
    assert capsys.readouterr().out.count("asked for") == 3


def test_a_model_is_fine_tuned_on_a_folder_of_pictures_with_captions(checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        Picture.new("RGB", (30, 20), (25 * number, 0, 0)).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"red of {number} tenths\n")
    settings = finetune_own_pictures.CaptionedFolderSettings(folder=folder, size=(8, 8), channels=1)
    train, held_out = settings.open(), settings.open("held-out")
    assert train.pictures.shape == (9, 1, 8, 8) and held_out.captions == ["red of 9 tenths"]
    assert train.captions[3] == "red of 3 tenths"

    out = finetune_own_pictures.main(checkpoint, folder, tmp_path / "tuned", steps=2)
    before, after = (Transfusion.from_pretrained(path).state_dict() for path in (checkpoint, out))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert finetune_own_pictures.main(checkpoint, folder, out, steps=3) == out  # goes on


def test_a_model_is_trained_on_a_data_set_of_ones_own_and_draws(tmp_path):
    dataset = own_dataset.ShapesSettings(count=12).open()
    assert list(dataset.captions[:4]) == ["a red disc", "a green disc", "a blue disc", "a red square"]
    assert dataset.pictures.shape == (12, 3, 16, 16) and dataset.pictures.min() == -1 and dataset.pictures.max() == 1

    out = own_dataset.main(tmp_path / "shapes", steps=2)
    assert len(list(out.glob("a * *.png"))) == 6
