"""Answers on their way as HTML."""
import re
from types import SimpleNamespace

import pytest
import torch

from transfusion import Image
from transfusion.generate.generation import Drawn, Preview, Written
from transfusion.serve.shown import Answer, figure, figures, is_small, notice

PICTURE = Image(torch.zeros(1, 8, 8))
PICTURES = SimpleNamespace(size=(8, 8), url=lambda image: f"data:image/png;base64,{id(image)}")


def test_texts_join_and_a_picture_ends_its_previews():
    answer = Answer(3)
    for event in (Written(0, "a "), Written(0, "seven"), Preview(0, PICTURE, 1, 2)):
        answer.take(event)
    assert answer.parts == ["a seven"] and answer.preview.step == 1
    for event in (Drawn(0, PICTURE), Written(0, "!"), object()):
        answer.take(event)
    assert answer.parts == ["a seven", PICTURE, "!"] and answer.preview is None


@pytest.mark.parametrize("answer, caption, bar", [
    (Answer(3), "seed 3 · waits", "<progress>"),
    (Answer(3, preview=Preview(0, PICTURE, 4, 20)), "seed 3 · step 4 of 20", '<progress value="4" max="20">'),
    (Answer(3, preview=Preview(0, PICTURE, 4, 20), stopped=True), "seed 3 · stopped · step 4 of 20", None),
    (Answer(3, parts=[PICTURE]), "seed 3", None)])
def test_a_picture_says_its_seed_and_how_far_it_is(answer, caption, bar):
    shown = answer.figure(PICTURES)
    assert re.search(r"<figcaption>(.*)</figcaption>", shown)[1] == caption
    assert (bar in shown) if bar else ("<progress" not in shown)
    assert ("download=" in shown) == bool(answer.parts)


def test_several_pictures_stand_beside_each_other():
    assert 'class="figures several"' in figures([Answer(3), Answer(4)], PICTURES)
    assert 'class="figures"' in figures([Answer(3)], PICTURES)


def test_what_is_shown_cannot_bring_tags_along():
    for shown in (notice("<script>"), figure('"><script>', (8, 8), "<script>", '"<script>')):
        assert "<script>" not in shown
    assert notice("") == ""


def test_pictures_of_a_few_pixels_are_told_from_others():
    assert is_small((8, 127)) and not is_small((128, 8))


def test_a_picture_is_decoded_once_until_something_happens():
    made = []
    pictures = SimpleNamespace(size=(8, 8), url=lambda image: made.append(image) or "data:,")
    answer = Answer(3, preview=Preview(0, PICTURE, 1, 2))
    assert answer.figure(pictures) == answer.figure(pictures) and len(made) == 1
    answer.take(Preview(0, PICTURE, 2, 2))
    assert "step 2 of 2" in answer.figure(pictures) and len(made) == 2
    answer.stopped = True
    assert "stopped" in answer.figure(pictures)
