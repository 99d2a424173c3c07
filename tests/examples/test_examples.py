"""Every program in examples/ runs, learns and does what its docstring says."""
import ast
from pathlib import Path

import pytest

from examples import attention_block, dit_block, sample
from tests.transfusion.conftest import tiny_model

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
