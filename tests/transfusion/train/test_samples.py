"""Pictures drawn during training: always the same prompts and noise, one picture that grows, and no run that fails."""
import dataclasses
import errno
import json
import os

import pytest
import torch
from PIL import Image as Picture
from PIL import ImageChops

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_vae import autoencoder
from tests.transfusion.train import watched
from tests.transfusion.train.own_data import paint, tiny, write_folder, write_mixture
from tests.transfusion.train.test_transfusion import losses, small
from transfusion import Image, Text, Transfusion
from transfusion.data.batches import Drawn
from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.data.model_images import save_image
from transfusion.recipes.digits import DIGIT_NAMES, Digits
from transfusion.sequence import encode, lay_out
from transfusion.train import samples as module
from transfusion.train.samples import (
    Samples,
    SamplesSettings,
    captions,
    draw_table,
    held_out_prompts,
    kept,
    read_prompts,
)
from transfusion.train.transfusion import train

DRAWS = SamplesSettings(every=4, steps=2, count=3)


def names(out):
    return sorted(path.name for path in (out / "samples").iterdir())


def test_a_stopped_run_goes_on_with_the_picture_of_one_that_never_stopped(tmp_path):
    train(small(tmp_path / "whole", samples=DRAWS))
    assert names(tmp_path / "whole") == [f"{step:07d}-{number:02d}.png" for step in (4, 8, 12) for number in range(3)]
    train(small(tmp_path / "parts", samples=DRAWS, stop_after=8, save_every=5))
    for step, number in ((9, 0), (12, 1)):  # what a killed run had drawn after its save
        Picture.new("L", (8, 8)).save(tmp_path / "parts" / "samples" / f"{step:07d}-{number:02d}.png")
    train(small(tmp_path / "parts", samples=DRAWS, resume=True))
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    for name in ("samples.png", *(f"samples/{name}" for name in names(tmp_path / "whole"))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_picture_is_what_the_saved_model_draws_and_says_its_prompt(tmp_path):
    prompts = ("a handwritten two", "a handwritten nine")
    train(small(tmp_path, samples=dataclasses.replace(DRAWS, prompts=prompts, seed=5, guidance=2.0)))
    model = Transfusion.from_pretrained(tmp_path).eval()
    for number, (prompt, image) in enumerate(zip(prompts, model.draw(list(prompts), steps=2, guidance=2.0, seed=5))):
        save_image(image, tmp_path / "again.png")
        with (Picture.open(tmp_path / "again.png") as again,
              Picture.open(tmp_path / "samples" / f"0000012-{number:02d}.png") as ours):
            assert again.tobytes() == ours.tobytes()
            assert ours.text == {"prompt": prompt, "step": "12", "seed": str(5 + number)}


def test_without_prompts_captions_of_held_out_documents_are_drawn():
    model = tiny_model()
    prompts = held_out_prompts(watched.held_out(model, 20), model.tokenizer, 6)
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == 6 and set(texts) <= {f"a handwritten {name}" for name in DIGIT_NAMES}
    assert [p.text for p in held_out_prompts(watched.held_out(model, 20), model.tokenizer, 99)][:6] == texts


def test_a_caption_is_what_stands_before_the_first_image_of_a_document_that_begins_with_text():
    model = tiny_model()
    tokenizer, config = model.tokenizer, model.config
    image = Image(torch.zeros(1, 8, 8))
    documents = [[image, Text("read")], [Text("a handwritten two"), image, Text(" and a four"), image],
                 [Text("text alone")], [image], [Text("a </s> of five"), image]]
    rows = [[encode(parts, tokenizer, config) for parts in documents[:2]],
            [encode(parts, tokenizer, config) for parts in documents[2:]]]
    found = captions(lay_out(rows, 160, config.patch_dim), tokenizer)
    assert [prompt.text for prompt in found] == ["a handwritten two", "a </s> of five"]
    for prompt, parts in zip(found, (documents[1], documents[4])):
        assert prompt.token_ids(tokenizer, config) == parts[0].token_ids(tokenizer, config)
    with pytest.raises(ValueError, match="no held-out document has a text before its first image"):
        held_out_prompts([Drawn(lay_out([rows[1][:2]], 160, config.patch_dim), torch.ones(1), {})], tokenizer, 3)


def test_prompts_are_texts_or_the_lines_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n\n  ein grüner Apfel \n")
    given = ("a pear", str(tmp_path / "prompts.txt"), "two\nlines")
    assert [p.text for p in read_prompts(given)] == ["a pear", "a red apple", "ein grüner Apfel", "two\nlines"]
    (tmp_path / "mark.txt").write_text("a red bus\n", encoding="utf-8-sig")
    given = ("a long prompt " * 30, str(tmp_path / "mark.txt"))
    assert [p.text for p in read_prompts(given)] == [given[0].strip(), "a red bus"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="samples.prompts names .*latin.txt', which is no text in UTF-8"):
        read_prompts((str(tmp_path / "latin.txt"),))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="samples.prompts is .*, which holds no text"):
        read_prompts((str(tmp_path / "empty.txt"),))


def test_a_full_disk_or_a_failing_draw_is_said_once_and_counted_and_training_goes_on(tmp_path, monkeypatch, capsys):
    train(small(tmp_path / "plain"))
    settings = SamplesSettings(every=3, steps=2, count=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples.png")

    monkeypatch.setattr(module, "draw_table", full)
    train(small(tmp_path / "full", samples=settings))
    assert losses(tmp_path / "full") == losses(tmp_path / "plain")
    failed = [json.loads(line).get("samples_failed") for line in (tmp_path / "full" / "log.jsonl").open()]
    assert [count for count in failed if count] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert said.count("samples after step 3 failed, and training goes on") == 1 and said.count("failed, and") == 1
    assert "No space left on device" in said

    def broken(self, *_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Transfusion, "draw", broken)
    train(small(tmp_path / "broken", samples=settings))
    assert losses(tmp_path / "broken") == losses(tmp_path / "plain")
    assert not (tmp_path / "broken" / "samples").exists() and "out of memory" in capsys.readouterr().out


def test_of_several_processes_a_failing_draw_ends_the_run_for_the_others_wait_in_it(tmp_path, monkeypatch):
    model = tiny_model()
    watcher = Samples(DRAWS, [Text("one")], watched.player_of(model), model, tmp_path, steps=9)
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "draw_table", lambda *_: 1 / 0)
    assert watcher.after(4)["samples_failed"] == 1
    monkeypatch.setattr(Transfusion, "draw", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watcher.after(8)


def test_latents_are_drawn_as_what_their_autoencoder_makes_of_them(tmp_path):
    write_folder(tmp_path / "pictures", paint(40))
    autoencoder(latent_channels=4).save_pretrained(tmp_path / "vae")
    source = {"format": "imagefolder", "path": "pictures"}
    file = write_mixture(tmp_path / "mix.yaml", source, held_out=0.3)
    config = tiny(tmp_path / "run", file, MixtureFileSettings(file=file, workers=0, vae=tmp_path / "vae"),
                  samples=SamplesSettings(every=6, steps=2, count=2))
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, patch_size=1)))
    model = Transfusion.from_pretrained(tmp_path / "run").eval()
    with Picture.open(tmp_path / "run" / "samples" / "0000006-00.png") as ours:
        assert ours.mode == "RGB" and ours.size == (16, 16)
        image, = model.draw([ours.text["prompt"]], steps=2, guidance=3.0, seed=0)
        save_image(image, tmp_path / "again.png", model.vae)
        with Picture.open(tmp_path / "again.png") as again:
            difference = torch.tensor(list(again.tobytes())) - torch.tensor(list(ours.tobytes()))
            assert difference.abs().max() <= 1  # two rows of a batch there, one here


def test_latents_without_an_autoencoder_are_refused(tmp_path):
    model = tiny_model()
    model.config.image_channels = 4
    with pytest.raises(ValueError, match="samples.every is 4 and the model's images have 4 channels and no autoenc"):
        Samples(DRAWS, [Text("one")], watched.player_of(model), model, tmp_path, steps=9)


def write_picture(out, step, number, prompt, shade, side=8):
    about = module.PngInfo()
    about.add_itxt("prompt", prompt)
    file = out / "samples" / f"{step:07d}-{number:02d}.png"
    file.parent.mkdir(exist_ok=True)
    Picture.new("RGB", (side, side), (shade, 0, 0)).save(file, pnginfo=about)


def test_the_table_has_a_row_for_each_time_and_a_column_for_each_prompt_as_it_is_now(tmp_path):
    for row, step in enumerate((5, 10)):
        for number, prompt in enumerate(("one", "two")):
            write_picture(tmp_path, step, number, prompt, 100 + 20 * row + 40 * number)
    write_picture(tmp_path, 7, 1, "another prompt", 77)  # of a run with other prompts, before it was gone on with
    draw_table(tmp_path / "samples.png", tmp_path, ["one", "two"])
    with Picture.open(tmp_path / "samples.png") as table:
        red, green, _ = table.split()
        boxes, drawn = {}, ImageChops.subtract(red, green)
        for level in (100, 120, 140, 160):
            boxes[level] = drawn.point(lambda value, level=level: 255 * (value == level)).getbbox()
            left, top, right, bottom = boxes[level]
            assert (right - left, bottom - top) == (64, 64)
            assert drawn.crop(boxes[level]).getcolors() == [(64 * 64, level)]
        assert boxes[100][0] == boxes[120][0] < boxes[140][0] == boxes[160][0]
        assert boxes[100][1] == boxes[140][1] < boxes[120][1] == boxes[160][1]
        assert {level for _, level in drawn.getcolors()} == {0, 100, 120, 140, 160}


def test_of_many_times_the_table_shows_some_evenly_apart_with_the_first_and_the_last(tmp_path):
    for step in range(1, 151):
        write_picture(tmp_path, step, 0, "one", step)
    draw_table(tmp_path / "samples.png", tmp_path, ["one"])
    assert len(kept(tmp_path)) == 150
    with Picture.open(tmp_path / "samples.png") as table:
        column = [table.getpixel((table.width - 70, y)) for y in range(table.height)]
    found = sorted({red for red, green, _ in column if green == 0 and red})
    assert len(found) == module.ROWS and found[0] == 1 and found[-1] == 150
    assert {after - before for before, after in zip(found, found[1:])} <= {2, 3}


def test_long_prompts_are_wrapped_and_cut(tmp_path):
    write_picture(tmp_path, 1, 0, "word " * 80, 100)
    draw_table(tmp_path / "samples.png", tmp_path, ["word " * 80])
    with Picture.open(tmp_path / "samples.png") as table:
        assert table.width < 250 and table.height < 64 + 15 * (module.LINES + 2)


def test_digits_are_drawn_by_the_captions_of_their_held_out_pictures(tmp_path):
    train(small(tmp_path, samples=SamplesSettings(every=12, steps=1, count=10)))
    drawn = []
    for path, step, _ in kept(tmp_path):
        with Picture.open(path) as picture:
            drawn.append(picture.text["prompt"])
        assert step == 12
    assert 5 <= len(drawn) == len(set(drawn)) <= 10
    assert set(drawn) <= {Digits.caption(label) for label in range(10)}


def test_a_resume_that_is_refused_removes_no_picture_and_failures_are_counted_on(tmp_path):
    train(small(tmp_path, samples=DRAWS, save_every=4, stop_after=8))
    late = tmp_path / "samples" / "0000012-00.png"
    Picture.new("L", (8, 8)).save(late)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    records[3]["samples_failed"] = 2
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model = tiny_model()
    watcher = Samples(DRAWS, [Text("a")], None, model, tmp_path, steps=12, start=8)
    assert late.exists() and watcher.failed == 2
    watcher.after(9)
    assert not late.exists()
