"""From sheets of drawings to a measured model, and nothing is done twice."""
import dataclasses
import json
import os

import pytest
from PIL import Image as Picture

import transfusion.files as files
from tests.transfusion.model.test_from_language_model import language_model
from transfusion.eval.questions import read_known
from transfusion.files import SAVED, replacing
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.align_pictures import AlignOptimSettings
from transfusion.recipes.emoji import COLUMNS
from transfusion.recipes.emoji_styles import ALL_STYLES, read_drawings
from transfusion.recipes.picture_questions import KINDS
from transfusion.recipes.seeing import PROMPTS, SeeingSettings, keep_settings, seeing, stage
from transfusion.train.transfusion import OptimSettings

NAMES = [("Animals & Nature", "animal mammal"), ("Animals & Nature", "plant flower"), ("Food & Drink", "food fruit")]


def write_sheets(folder):
    """Twelve things in nine styles: squares of a colour each."""
    rows = [(f"thing {i}", *NAMES[i % 3], list(ALL_STYLES)) for i in range(12)]
    folder.mkdir()
    for style in range(len(ALL_STYLES)):
        sheet = Picture.new("RGB", (COLUMNS * 32, 32), "white")
        for i in range(len(rows)):
            sheet.paste((20 * i, 28 * style, 128), (32 * i + 4, 4, 32 * i + 28, 28))
        sheet.save(folder / f"{ALL_STYLES[style]}.webp", lossless=True)
    (folder / "names.json").write_text(json.dumps({"size": 32, "emoji": rows}))
    (folder / "LICENCES.txt").write_text("none")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    where = tmp_path_factory.mktemp("seeing")
    language_model(where / "llm", "llama")
    (where / "text.txt").write_text("A line of words.\n\nAnother one.\n\n" * 14_000)
    (where / "out").mkdir()
    write_sheets(where / "out" / "styles")
    settings = SeeingSettings(
        llm=where / "llm", out=where / "out", align=AlignOptimSettings(steps=2, batch=8), scenes=4, pairs=4,
        held_out=16,  # with fewer some kinds are not asked
        optim=OptimSettings(steps=2, rows=1, seq_len=640, ema=0.0, warmup=1), template="vicuna_v1",
        plain_text=where / "text.txt", save_every=2)
    return settings, seeing(settings)


def test_every_kind_is_asked_of_the_model_and_of_who_does_not_look(run):
    settings, found = run
    assert set(found["questions"]) == set(KINDS)
    assert all({"right", "blind", "majority"} < set(score) for score in found["questions"].values())
    assert json.loads((settings.out / "eval" / "text.json").read_text()) == found["perplexity"]
    lines = (settings.out / "eval" / "prompts.md").read_text().splitlines()
    assert len(lines) == 2 + len(PROMPTS) == 22 and len(set(PROMPTS)) == 20
    assert (settings.out / "eval" / "questions.png").is_file()


def test_without_a_picture_nothing_has_changed(run):
    settings, found = run
    assert found["perplexity"]["after"] == found["perplexity"]["before"]
    rows = [line.split(" | ") for line in (settings.out / "eval" / "prompts.md").read_text().splitlines()[2:]]
    assert all(before == after.removesuffix(" |") for _, before, after in rows)


def test_views_to_train_on_are_changed_and_held_out_pictures_are_not(run):
    settings, _ = run
    drawings = read_drawings(settings.out / "styles")
    known = {tuple(((picture + 1) * 127.5).round().byte().flatten().tolist()) for picture in drawings.pictures}
    seen = {}
    for split in ("train", "held-out"):
        asked = read_known(settings.out / "questions" / f"{split}.json", settings.out / "questions" / "pictures")
        alone = [one.question(True).pictures[0] for one in asked if one.kind == "name"]
        values = [tuple(v for channel in picture.convert("RGB").split() for v in channel.getdata())
                  for picture in alone]
        seen[split] = [value in known for value in values]
        assert {one.answer for one in asked if one.kind == "category"} <= {
            "an animal", "a plant", "something to eat or drink"}
    assert all(seen["held-out"]) and sum(seen["train"]) < 0.5 * len(seen["train"])


def test_the_same_command_goes_on_and_does_nothing_twice(run, monkeypatch):
    settings, found = run
    for name in ("fetch_styles", "init", "align", "write"):
        monkeypatch.setattr(f"transfusion.recipes.seeing.{name}", None)
    logged = (settings.out / "tuned" / "log.jsonl").read_text()
    assert seeing(settings) == found
    assert (settings.out / "tuned" / "log.jsonl").read_text() == logged  # of seconds too: no step was taken again
    assert (settings.out / "tuned" / "adapter_config.json").is_file()
    assert Transfusion.from_pretrained(settings.out / "aligned").config.patch_size == 8


def test_other_settings_are_not_answered_with_what_the_old_ones_made(run, tmp_path):
    settings, _ = run
    language_model(tmp_path / "other", "qwen2")
    for changes, said in (({"scenes": 8}, r"scenes 4 \(now 8\); the same settings, or another --out"),
                          ({"align": AlignOptimSettings(steps=3, batch=8)}, "align .*'steps': 2.* .now .*'steps': 3"),
                          ({"llm": tmp_path / "other"}, "with another llm; the same settings")):
        with pytest.raises(ValueError, match=said):
            seeing(dataclasses.replace(settings, **changes))


def test_settings_may_change_while_no_stage_stands(tmp_path):
    for scenes in (4, 8):
        keep_settings(SeeingSettings(llm=tmp_path / "none", out=tmp_path / "out", scenes=scenes))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["scenes"] == 8


def test_a_stage_that_a_kill_left_in_two_places_is_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_finish", lambda out: os.replace(out / SAVED / "first", out / "first"))  # and a kill
    with replacing(tmp_path / "out", weights=False) as fresh:
        for name in ("first", "last"):
            (fresh / name).write_text(name)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "last").exists()
    stage(tmp_path / "out", "first", lambda: pytest.fail("it is made anew"))
    assert (tmp_path / "out" / "last").read_text() == "last"
