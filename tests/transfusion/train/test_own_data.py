"""Training on files of one's own: equal losses from every format, exact resumes, latents on the way, clear errors."""

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.transfusion.data.memory import MemorySource, kind_of, tokenizer_of_words
from tests.transfusion.model.test_vae import autoencoder
from tests.transfusion.train.own_data import (
    losses,
    paint,
    png,
    tiny,
    write_folder,
    write_interleaved,
    write_lines,
    write_llava,
    write_metadata,
    write_mixture,
    write_parquet,
    write_tar,
)
from transfusion import Transfusion
from transfusion.cli import main
from transfusion.command import saved_step
from transfusion.data.grids import GridSettings
from transfusion.data.mixture import MixtureSettings, SourceSettings, open_mixture, read_mixture
from transfusion.data.mixture_data import MixtureFileSettings, Posterior
from transfusion.data.model_images import save_image
from transfusion.data.sources import PictureRef, Record
from transfusion.data.training_data import open_data
from transfusion.model.from_language_model import InitSettings, init
from transfusion.model.lora import TuneSettings
from transfusion.model.vae import VAE
from transfusion.recipes.emoji import Emoji
from transfusion.sequence import Image
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.train.transfusion import saved_tokenizer, train


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A mixture of 60 painted pictures in a folder."""
    where = tmp_path_factory.mktemp("shapes")
    write_folder(where / "pictures", paint(60))
    return write_mixture(where / "mix.yaml", {"format": "imagefolder", "path": "pictures"})


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Captions and pictures of the package's emoji, through PNG, which loses nothing."""
    dataset, where, pairs = Emoji(), tmp_path_factory.mktemp("emoji"), []
    from PIL import Image as Picture

    for i in range(0, 480, 12):
        save_image(Image(dataset.pictures[i]), where / "one.png")
        with Picture.open(where / "one.png") as picture:
            pairs.append((dataset.caption_of(i), picture.copy()))
    return pairs


class MemorySettings(MixtureFileSettings):
    """Pairs in memory in place of a file's sources."""

    pairs, shown = (), {}

    @property
    def mixture(self):
        records = [
            Record(f"memory, row {i}", captions=(caption,), picture=PictureRef(png(picture), True, str(i)))
            for i, (caption, picture) in enumerate(self.pairs)
        ]
        source = SourceSettings(type("Opens", (), {"open": lambda _: MemorySource("own", records)})(), name="own")
        return MixtureSettings(sources=(source,), pictures=GridSettings(side=32), held_out=0.0, **self.shown)


def test_emoji_in_four_formats_train_to_the_losses_that_they_have_from_memory(tmp_path, emoji, monkeypatch):
    shown = {"caption_first": 0.6, "flip": 0.3}
    write_metadata(tmp_path / "folder", emoji)
    write_tar(tmp_path / "own.tar", emoji)
    write_parquet(tmp_path / "own.parquet", emoji)
    write_lines(tmp_path / "own.jsonl", emoji)
    monkeypatch.setattr(MemorySettings, "pairs", emoji)
    monkeypatch.setattr(MemorySettings, "shown", shown)
    train(tiny(tmp_path / "memory", None, MemorySettings(file=tmp_path / "memory.yaml", workers=0)))
    expected = losses(tmp_path / "memory")
    assert len(expected) == 6 and all(record["diffusion_loss"] > 0 and record["text_loss"] > 0 for record in expected)
    for kind, path in (
        ("imagefolder", "folder"),
        ("webdataset", "own.tar"),
        ("pairs", "own.parquet"),
        ("pairs", "own.jsonl"),
    ):
        file = write_mixture(
            tmp_path / f"{path}.yaml", {"format": kind, "path": path, "name": "own"}, pictures={"side": 32}, **shown
        )
        train(tiny(tmp_path / f"run-{path}", file))
        assert losses(tmp_path / f"run-{path}") == expected, path
        ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in (f"run-{path}", "memory"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_documents_of_parts_train_as_pairs_whose_captions_all_stand_first(tmp_path, emoji):
    write_lines(tmp_path / "own.jsonl", emoji)
    write_interleaved(tmp_path / "parts.jsonl", emoji)
    for kind, path in (("pairs", "own.jsonl"), ("interleaved", "parts.jsonl")):
        file = write_mixture(
            tmp_path / f"{path}.yaml",
            {"format": kind, "path": path, "name": "own"},
            pictures={"side": 32},
            caption_first=1.0,
            caption_dropout=0.0,
        )
        train(tiny(tmp_path / f"run-{kind}", file))
    assert losses(tmp_path / "run-pairs") == losses(tmp_path / "run-interleaved")


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped_with_any_number_of_workers(tmp_path, shapes):
    train(tiny(tmp_path / "whole", shapes))
    for workers in (2, 0):
        out, data = tmp_path / f"parts-{workers}", MixtureFileSettings(file=shapes, workers=workers)
        train(tiny(out, shapes, data, stop_after=3))
        assert len(losses(out)) == 3
        train(tiny(out, shapes, dataclasses.replace(data, workers=2 - workers, prefetch=1), resume=True))
        assert losses(out) == losses(tmp_path / "whole")
        ours, theirs = (load_file(run / "model.safetensors") for run in (out, tmp_path / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_says_what_an_epoch_is_before_it_trains(tmp_path, shapes, capsys):
    train(tiny(tmp_path / "run", shapes))
    printed = capsys.readouterr().out
    documents, tokens, rows, fill, steps = re.search(
        r"an epoch has (\d+) documents of ([\d,]+) tokens in (\d+) rows of 96, ([\d.]+) % full: ([\d.]+) steps", printed
    ).groups()
    assert documents == "60" and abs(int(tokens.replace(",", "")) / (int(rows) * 96) - float(fill) / 100) < 0.05
    assert abs(float(steps) - int(rows) / 2) <= 0.5
    assert re.search(r"6 steps of 192 tokens at .* min, [\d.]+ epochs of [\d.]+ steps and [\d.]+ min each", printed)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(record["waited"] >= 0 for record in records if "waited" in record) and any(
        "waited" in record for record in records
    )


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"caption_first": 0.1}, "data.mixture.caption_first"),
        ({"pictures": {"side": 8}}, "data.mixture.pictures.side"),
        ({"seed": 3}, "data.mixture.seed"),
        ({"sources": [{"format": "imagefolder", "path": "pictures", "epochs": 2}]}, "data.mixture.sources"),
    ],
)
def test_a_run_does_not_go_on_with_another_mixture(tmp_path, shapes, changes, name):
    mixture = json.loads(shapes.read_text())
    shutil.copytree(shapes.parent / "pictures", tmp_path / "pictures")
    (tmp_path / "mix.yaml").write_text(json.dumps(mixture))
    train(tiny(tmp_path / "run", tmp_path / "mix.yaml", stop_after=1))
    (tmp_path / "mix.yaml").write_text(json.dumps(mixture | changes))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is .* and was .* in the run saved"):
        train(tiny(tmp_path / "run", tmp_path / "mix.yaml", resume=True))


def test_a_data_set_that_moved_with_its_mixture_goes_on(tmp_path, shapes):
    train(tiny(tmp_path / "whole", shapes))
    train(tiny(tmp_path / "run", shapes, stop_after=3))
    shutil.copytree(shapes.parent, tmp_path / "moved")
    train(tiny(tmp_path / "run", tmp_path / "moved" / shapes.name, resume=True))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_that_goes_on_says_that_its_files_changed(tmp_path, capsys):
    write_folder(tmp_path / "pictures", paint(24))
    file = write_mixture(tmp_path / "mix.yaml", {"format": "imagefolder", "path": "pictures"})
    train(tiny(tmp_path / "run", file, stop_after=1))
    write_folder(tmp_path / "pictures", paint(25))
    capsys.readouterr()
    train(tiny(tmp_path / "run", file, resume=True))
    said = r"going on with .*data.files \['pictures: 25 records, \w+'\] \(was \['pictures: 24 records, "
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("again", [{"resume": True}, {"auto_resume": True}], ids=lambda again: next(iter(again)))
def test_a_run_that_goes_on_keeps_the_tokenizer_that_it_began_with(tmp_path, again):
    write_folder(tmp_path / "pictures", paint(24))
    file = write_mixture(tmp_path / "mix.yaml", {"format": "imagefolder", "path": "pictures"})
    train(tiny(tmp_path / "run", file, stop_after=1))
    before = Transfusion.from_pretrained(tmp_path / "run").tokenizer
    painted = [(f"zebras in zinc zone {i}", picture) for i, (_, picture) in enumerate(paint(40))]
    write_folder(tmp_path / "pictures", painted)
    train(tiny(tmp_path / "run", file, **again))
    after = Transfusion.from_pretrained(tmp_path / "run").tokenizer
    assert after.get_vocab() == before.get_vocab()
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    train(tiny(tmp_path / "new", file, stop_after=1, auto_resume=True))  # where nothing is saved it begins
    assert Transfusion.from_pretrained(tmp_path / "new").tokenizer.get_vocab() != before.get_vocab()


def test_a_tokenizer_that_was_saved_is_the_one_that_was_trained(tmp_path):
    trained = train_tokenizer(["a red circle", "a blue square", "green"] * 3, 300)
    trained.save_pretrained(tmp_path)
    assert saved_tokenizer(tmp_path).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    where = tmp_path_factory.mktemp("vae") / "vae"
    autoencoder(latent_channels=4).save_pretrained(where)
    return where


def with_latents(config, vae):
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, vae=vae), model=dataclasses.replace(config.model, patch_size=1)
    )


def test_latents_are_made_on_the_way_and_the_checkpoint_carries_their_autoencoder(tmp_path, shapes, vae):
    train(with_latents(tiny(tmp_path / "whole", shapes), vae))
    train(with_latents(tiny(tmp_path / "parts", shapes, stop_after=2), vae))
    train(with_latents(tiny(tmp_path / "parts", shapes, resume=True), vae))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    model = Transfusion.from_pretrained(tmp_path / "whole")
    assert model.vae.fingerprint() == VAE.from_pretrained(vae).fingerprint()
    assert (model.config.image_channels, model.config.image_size) == (4, [4, 4])


def test_a_start_model_brings_its_own_autoencoder_and_another_is_refused(tmp_path, shapes, vae):
    train(with_latents(tiny(tmp_path / "start", shapes, stop_after=1), vae))
    config = tiny(tmp_path / "run", shapes, tune=TuneSettings(start=tmp_path / "start"))
    train(config)
    assert Transfusion.from_pretrained(tmp_path / "run").vae is not None
    autoencoder(latent_channels=4, scaling_factor=0.3).save_pretrained(tmp_path / "other")
    other = dataclasses.replace(config.data, vae=tmp_path / "other")
    with pytest.raises(ValueError, match="data.vae is .* and tune.start a model of another autoencoder's latents"):
        train(dataclasses.replace(config, out=tmp_path / "again", data=other))


def test_a_latent_is_a_sample_of_the_posterior_that_its_seed_alone_decides(vae):
    latents = Posterior(VAE.from_pretrained(vae))
    pictures = [
        torch.rand(3, 8 * height, 16, generator=torch.Generator().manual_seed(height)) * 2 - 1
        for height in (1, 2, 1, 2)
    ]
    draw = lambda seed: latents(pictures, range(4 * seed, 4 * seed + 4))  # noqa: E731
    first, again, other = draw(1), draw(1), draw(2)
    assert [tuple(x.shape) for x in first] == [(4, 2, 4), (4, 4, 4)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not any(
        torch.equal(a, b) for a, b in zip(first, other)
    )
    many = torch.stack([torch.cat([x.flatten() for x in draw(seed)]) for seed in range(200)])
    mean, deviation = (
        torch.cat([x.flatten() for x in xs])
        for xs in zip(*((m[0], s[0]) for m, s in (latents.vae.posterior(picture[None]) for picture in pictures)))
    )
    assert ((many.mean(0) - mean) / deviation).abs().max() < 0.4 and (many.std(0) / deviation - 1).abs().max() < 0.3
    assert torch.equal(latents.vae.encode(pictures[0][None]), latents.vae.posterior(pictures[0][None])[0])


def test_pictures_that_vanish_are_left_out_counted_and_named_and_many_of_them_stop_the_run(tmp_path, capsys):
    write_metadata(tmp_path / "pictures", paint(120))
    file = write_mixture(tmp_path / "mix.yaml", {"format": "imagefolder", "path": "pictures"})
    optim = dataclasses.replace(tiny(tmp_path, file).optim, steps=80)
    train(tiny(tmp_path / "run", file, optim=optim, stop_after=2))
    gone = tmp_path / "pictures" / "007.png"
    gone.rename(tmp_path / "kept.png")
    train(tiny(tmp_path / "run", file, optim=optim, resume=True, stop_after=30))
    failed = [record["failed"] for record in losses(tmp_path / "run") if "failed" in record]
    assert failed and set(failed) == {1}
    said = rf"left out, and counted in the log \(failed\): .*the picture '{gone}' cannot be opened"
    assert re.search(said, capsys.readouterr().out)
    for path in (tmp_path / "pictures").glob("*[02468].png"):
        path.unlink()
    said = r"data: .* of the last .* documents could not be read, .* missing picture .* put the files back"
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match=said) as kept:
        train(tiny(tmp_path / "run", file, MixtureFileSettings(file=file, workers=1), optim=optim, resume=True))
    assert kept.tb and set(multiprocessing.active_children()) <= before, "an error that is kept keeps the readers"
    assert saved_step(tmp_path / "run") == len(losses(tmp_path / "run")) > 30  # what was trained until then is saved


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_to_all_processes_of_a_run_saves_and_stops(tmp_path, shapes, signum):
    flags = """--device cpu --model.hidden 32 --model.layers 1 --model.heads 2 --model.kv-heads 2 --model.mlp 64
               --optim.rows 2 --optim.seq-len 96 --optim.steps 100000"""
    command = [sys.executable, "-m", "transfusion.cli", "train", "--data", str(shapes), "--out", str(tmp_path / "run")]
    command += shlex.split(flags)
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(0.5)
    os.killpg(process.pid, signum)  # as a terminal, or a scheduler, sends it
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "add --resume to the same command to go on" in printed and "Traceback" not in printed
    assert json.loads((tmp_path / "run" / "resume" / "run.json").read_text())["step"] > 0


def refused(*words):
    with pytest.raises(SystemExit) as stop:
        main(["train", "own", "--device", "cpu", *map(str, words)])
    said = str(stop.value)
    assert said.startswith("error: ") and "\n" not in said
    return said


def test_a_mixture_that_does_not_fit_is_refused_in_one_line_with_file_and_line(tmp_path, shapes):
    where = shapes.parent
    source = {"format": "imagefolder", "path": str(where / "pictures")}
    out = ("--out", tmp_path / "run")
    assert "data.file names no mixture; add, for example, --data mix.yaml" in refused(*out)
    assert "--data has no value" in refused(*out, "--data")
    assert "nowhere.yaml' cannot be read (No such file" in refused(*out, "--data", tmp_path / "nowhere.yaml")
    file = tmp_path / "mix.yaml"
    for sources, settings, said in (
        ([source], {"caption_frist": 0.5}, "line 6: caption_frist is no setting; .*did you mean caption_first"),
        ([source | {"weight": 0}], {}, "line 6: sources have weights that are all 0; one above 0 fits"),
        ([source | {"path": "nowhere"}], {}, r"sources\[0\] cannot be opened: imagefolder: path is '.*nowhere', which"),
        ([source | {"format": "imagefodler"}], {}, "format is 'imagefodler'; .*did you mean imagefolder"),
        (
            [source],
            {"pictures": {"side": 20}},
            "grids: side has 20x20 pixels and a patch .* 16 pixels wide; multiples of 16",
        ),
    ):
        write_mixture(file, *sources, **settings)
        assert re.search(said, refused(*out, "--data", file)), said
    assert not (tmp_path / "run" / "config.json").exists()


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named_by_file_and_row(tmp_path, capsys):
    rows = [
        {"image": "0.png", "caption": "a dog"},
        {"image": "0.png", "caption": 7},
        {"image": "0.png", "title": "a cat"},
        {"image": "gone.png", "caption": "a bus"},
    ]
    (tmp_path / "0.png").write_bytes(png(paint(1)[0][1]))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def talk(question, **more):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}], **more}

    (tmp_path / "talk.json").write_text(
        json.dumps([talk("Is it?"), talk("<image> Is it?"), talk("Is it?", image="0.png")])
    )
    file = write_mixture(
        tmp_path / "mix.yaml", {"format": "pairs", "path": "own.jsonl"}, {"format": "llava", "path": "talk.json"}
    )
    train(tiny(tmp_path / "run", file, optim=dataclasses.replace(tiny(tmp_path, file).optim, steps=1, seq_len=256)))
    printed = capsys.readouterr().out
    for said in (
        r"own: 1 of 4 records cannot be used: .*own.jsonl, line 2",
        r"own: 1 of 4 records cannot be used: missing c.*own.jsonl, line 3",
        r"own: 1 of 4 records cannot be used: missing picture .*gone.png",
        r"talk: \d of 3 records cannot be used: .*talk.json, row [12]",
    ):
        assert re.search(said, printed), (said, printed)


def test_data_of_which_nothing_can_be_used_are_refused(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"image": "gone.png", "caption": "a bus"}\n')
    file = write_mixture(tmp_path / "mix.yaml", {"format": "pairs", "path": "own.jsonl"})
    assert "none of 1 sources has a record that can be used" in refused("--out", tmp_path / "run", "--data", file)


def test_a_mixture_is_no_data_set_for_an_autoencoder():
    with pytest.raises(SystemExit, match="--data names a mixture, which `transfusion train` reads; here data:folder"):
        main(["vae", "train", "small", "--data", "mix.yaml"])


def test_conversations_train_a_model_made_from_a_language_model(tmp_path):
    from tests.transfusion.model.test_from_language_model import language_model

    write_llava(tmp_path / "talk.json", paint(12))
    start = init(
        InitSettings(
            llm=language_model(tmp_path / "llm", "llama"), out=tmp_path / "start", patch_size=4, image_size=(16, 16)
        )
    )
    file = write_mixture(
        tmp_path / "mix.yaml", {"format": "llava", "path": "talk.json", "images": "images"}, chat={"system": ""}
    )
    train(tiny(tmp_path / "run", file, tune=TuneSettings(start=start, trained="lora", lora_rank=2)))
    records = losses(tmp_path / "run")
    assert len(records) == 6 and all(record["text_loss"] > 0 and record["diffusion_loss"] == 0 for record in records)


def test_a_new_model_s_tokenizer_is_made_of_the_sources_texts(shapes):
    texts = open_data(MixtureFileSettings(file=shapes)).texts()
    assert len(texts) == 60 and set(texts) == {
        f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")
    }


@pytest.mark.parametrize("by", ["name", "content"])
def test_a_new_model_s_tokenizer_sees_no_text_of_a_held_out_record(tmp_path, by):
    write_folder(tmp_path / "pictures", [(f"number {i}", picture) for i, (_, picture) in enumerate(paint(40))])
    (tmp_path / "lines.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    file = write_mixture(
        tmp_path / "mix.yaml",
        {"format": "imagefolder", "path": "pictures"},
        {"format": "text", "path": "lines.txt", "documents": "line"},
        held_out=0.4,
        held_out_by=by,
    )
    tokenizer = tokenizer_of_words()
    mixture = open_mixture(read_mixture(file), tokenizer, kind_of(tokenizer), folder=tmp_path, workers=0)
    pictures, lines = (stream.records.tolist() for stream in mixture.streams())
    assert 10 < len(pictures) < 35 and 10 < len(lines) < 35
    texts = open_data(MixtureFileSettings(file=file)).texts()
    assert texts == [f"number {i}" for i in pictures] + [f"line {i}" for i in lines]
