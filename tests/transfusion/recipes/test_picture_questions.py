"""Questions about emoji: their answers are right, none is favoured, and held-out pictures stay unseen in training."""
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from transfusion.data.mixture import open_sources, read_mixture
from transfusion.eval.questions import read_known
from transfusion.recipes.emoji import LIVELY, SHIPPED, STYLES, Emoji
from transfusion.recipes.picture_questions import (
    COUNTS,
    KINDS,
    PLACES,
    PictureQuestionSettings,
    Questions,
    changed_twice,
    half_changed,
    shipped_drawings,
    write,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("questions") / "out"
    return write(PictureQuestionSettings(out=out, scenes=400, pairs=400, held_out=40))


@pytest.fixture(scope="module")
def emoji():
    return Emoji("all", SHIPPED, LIVELY)


def rows(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def asked(folder, split, kind):
    """(pictures' names, question, answer) of a kind."""
    for row in rows(folder, split):
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        question, answer = row["conversations"]
        if row["kinds"] == [kind]:
            yield names, question["value"].removesuffix("\n<image>" * len(names)), answer["value"]


def pixels(folder, name):
    with Picture.open(folder / "pictures" / name) as picture:
        return np.asarray(picture.convert("RGB"))


def single(emoji, name):
    """(label, style) of a picture of one emoji, from its name."""
    style, label = name.removesuffix(".png").split("-")
    return int(label), style


def tiles(folder, name):
    picture = pixels(folder, name)
    return [picture[y:y + 32, x:x + 32] for y in (0, 32) for x in (0, 32)]


def test_no_picture_of_a_held_out_question_alone_is_trained_on(folder):
    seen = {split: {name for kind in KINDS for names, _, _ in asked(folder, split, kind) for name in names}
            for split in ("train", "held-out")}
    held = {name for kind in ("name", "presence") for names, _, _ in asked(folder, "held-out", kind) for name in names}
    assert held and not held & seen["train"]
    for names, _, _ in asked(folder, "held-out", "same"):
        assert not set(names) <= seen["train"], "one picture of each pair is new"
    shown = {tile.tobytes() for name in seen["train"] if "scene" in name for tile in tiles(folder, name)}
    white = np.full((32, 32, 3), 255, np.uint8).tobytes()
    for name in (name for name in held if "scene" in name):
        assert not shown & {tile.tobytes() for tile in tiles(folder, name)} - {white}


@pytest.mark.parametrize("kind,answers", [("style", STYLES), ("presence", ("yes", "no")), ("count", COUNTS),
                                          ("same", ("yes", "no")), ("alike", ("yes", "no"))])
def test_no_answer_is_much_more_frequent_than_another(folder, kind, answers):
    counts = Counter(answer for _, _, answer in asked(folder, "train", kind))
    assert set(counts) == set(answers)
    share = max(counts.values()) / sum(counts.values())
    assert share < 1 / len(answers) + 0.08


def test_a_third_of_what_is_looked_for_in_a_scene_is_not_there(folder):
    counts = Counter(answer for _, _, answer in asked(folder, "train", "place"))
    assert set(counts) == {*PLACES, "there is none"}
    assert 0.25 < counts["there is none"] / sum(counts.values()) < 0.42


def test_a_question_says_nothing_of_whether_its_thing_is_there(folder):
    """The words that are asked for are as often there as not, whichever they are, over all kinds of things."""
    said = defaultdict(Counter)
    for _, question, answer in asked(folder, "train", "presence"):
        said[question][answer] += 1
    both = [counts for counts in said.values() if sum(counts.values()) >= 3]
    assert both and sum(counts["yes"] for counts in both) / sum(sum(c.values()) for c in both) == \
        pytest.approx(0.5, abs=0.1)


def test_names_categories_and_styles_are_the_published_ones(folder, emoji):
    for kind, known in (("name", lambda label, style: Emoji.caption(emoji.names[label], style).rpartition(",")[0]),
                        ("style", lambda label, style: style)):
        for (name,), _, answer in asked(folder, "train", kind):
            assert answer == known(*single(emoji, name))


def test_training_asks_no_style_of_names_that_are_held_out_in_one(folder, emoji):
    told = {single(emoji, name)[0] for (name,), _, _ in asked(folder, "train", "style")}
    held = {single(emoji, name)[0] for (name,), _, _ in asked(folder, "held-out", "style")}
    named = {single(emoji, name)[0] for (name,), _, _ in asked(folder, "train", "name")}
    assert held and not told & held and told == named - held


def test_counts_and_places_are_those_of_the_tiles(folder, emoji):
    pictures = {(int(label), STYLES[style]): (picture + 1) * 127.5 for label, style, picture in
                zip(emoji.labels, emoji.styles, emoji.pictures)}
    named = {Emoji.caption(name, "").rpartition(",")[0]: label for label, name in enumerate(emoji.names)}

    def places(names, question, before, behind=""):
        label = named[question.removeprefix(before).removesuffix("?").removesuffix(behind)]
        drawn = [pictures[label, style].permute(1, 2, 0).round().numpy() for style in STYLES if
                 (label, style) in pictures]
        return [i for i, tile in enumerate(tiles(folder, names[0])) if any(np.abs(tile - x).max() <= 1 for x in drawn)]

    for names, question, answer in asked(folder, "train", "count"):
        assert COUNTS[len(places(names, question, "How many times is there ")) - 1] == answer
    for names, question, answer in asked(folder, "train", "place"):
        found = places(names, question, "Where is ")
        assert [PLACES[i] for i in found] == ([] if answer == "there is none" else [answer])


def test_the_same_seed_writes_the_same(folder, tmp_path):
    again = write(PictureQuestionSettings(out=tmp_path / "again", scenes=400, pairs=400, held_out=40))
    for split in ("train", "held-out"):
        assert rows(again, split) == rows(folder, split)


def test_held_out_questions_stay_what_they_are_however_many_are_to_train_on(folder, tmp_path):
    other = write(PictureQuestionSettings(out=tmp_path / "other", scenes=8, pairs=200, held_out=40))
    assert len(rows(other, "train")) < len(rows(folder, "train"))
    assert rows(other, "held-out") == rows(folder, "held-out")
    for row in rows(other, "held-out"):
        for name in row["image"] if isinstance(row["image"], list) else [row["image"]]:
            assert (pixels(other, name) == pixels(folder, name)).all()


def test_half_of_the_pictures_to_compare_are_shown_as_they_are():
    pictures = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    views = half_changed(pictures, torch.Generator().manual_seed(1))
    same = (views == pictures).flatten(1).all(1)
    assert 0.4 < same.float().mean() < 0.6
    assert not (changed_twice(pictures, torch.Generator().manual_seed(1)) == pictures).flatten(1).all(1).any()


def test_the_mixture_reads_every_row(folder):
    (source,), _ = open_sources(read_mixture(folder / "mix.yaml"))
    assert len(source) == len(rows(folder, "train"))
    assert {turn.role for turn in source[len(source) - 1].turns} == {"user", "assistant"}
    assert {one.kind for one in read_known(folder / "held-out.json", folder / "pictures")} == set(KINDS)


def test_styles_are_asked_of_two_views_and_compared_twice_as_often_in_views_of_their_own(tmp_path):
    drawings, calls = shipped_drawings(lively=True), []

    def change(name):
        return lambda pictures, _: calls.append(name) or pictures

    shown = torch.arange(30)
    questions = Questions(drawings, shown, tmp_path, "train", torch.Generator().manual_seed(0), change("alone"),
                          change("pair"))
    alone = Counter(one.asked.kind for one in questions.about_one())
    assert alone == {"name": 30, "category": 30, "kind": 30, "presence": 60, "style": 60}
    assert calls == ["alone"] * 210  # a view for each question
    calls.clear()
    questions.shown = every = torch.arange(len(drawings.labels))
    assert Counter(one.asked.kind for one in questions.about_pairs(120, every)) == {"same": 40, "alike": 80}
    assert calls == ["pair"] * 240
