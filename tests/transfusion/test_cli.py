"""The `transfusion` command: draws a file, reads a file, and answers what does not fit in one line."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_from_language_model import language_model
from transfusion import Transfusion, __version__
from transfusion.cli import main
from transfusion.data.model_images import load_image, save_image
from transfusion.data.picture_files import read_picture
from transfusion.diffusion.guidance import Guidance
from transfusion.generate.sampling import Sampling, TextSampling
from transfusion.model import loading
from transfusion.model.loading import load_model
from transfusion.sequence import Image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    return path


def test_sample_writes_a_picture(checkpoint, tmp_path, capsys):
    main(
        [
            "sample",
            "--model",
            str(checkpoint),
            "--prompt",
            "a handwritten one",
            "--out",
            str(tmp_path / "new" / "one.png"),
            "--steps",
            "2",
        ]
    )
    with Picture.open(tmp_path / "new" / "one.png") as picture:
        assert picture.size == (8, 8) and picture.mode == "L"
    assert "one.png" in capsys.readouterr().out


def test_caption_reads_pictures(checkpoint, tmp_path, capsys):
    Picture.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    main(["caption", "--model", str(checkpoint), "--images", str(tmp_path / "red.png"), "--max-new-tokens", "2"])
    assert "red.png:" in capsys.readouterr().out


def test_caption_in_batches_writes_what_it_writes_at_once(checkpoint, tmp_path, capsys):
    pictures = [str(tmp_path / f"{name}.png") for name in ("red", "green", "blue")]
    for path in pictures:
        Picture.new("RGB", (8, 8), Path(path).stem).save(path)
    command = ["caption", "--model", str(checkpoint), "--images", *pictures, "--max-new-tokens", "6", "--seed", "3"]
    main(command)
    at_once = capsys.readouterr().out
    main([*command, "--batch", "2"])
    assert capsys.readouterr().out == at_once and at_once.count(".png: ") == 3


def test_the_version_is_said(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"transfusion {__version__}\n"


def test_every_option_of_sampling_is_a_flag_with_the_default_of_python(checkpoint, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("transfusion.sample.sample", made.append)
    monkeypatch.setattr("transfusion.sample.caption", made.append)
    main(["sample", "--model", "m", "--prompt", "a"])
    assert made.pop().sampling == Sampling()
    main(
        [
            "sample",
            "--model",
            "m",
            "--prompt",
            "a",
            "--steps",
            "2",
            "--sampler",
            "heun",
            "--guidance",
            "2",
            "--image-guidance",
            "1.5",
            "--guidance-interval",
            "0.1",
            "0.9",
            "--guidance-rescale",
            "0.5",
            "--size",
            "8",
            "4",
            "--max-new-tokens",
            "3",
            "--max-images",
            "4",
            "--temperature",
            "0.5",
            "--top-p",
            "0.9",
            "--min-p",
            "0.1",
            "--seed",
            "7",
            "--cuda-graph",
        ]
    )
    assert made.pop().sampling == Sampling(
        max_new_tokens=3,
        temperature=0.5,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        max_images=4,
        image_size=(8, 4),
        steps=2,
        sampler="heun",
        guidance=Guidance(2.0, 1.5, (0.1, 0.9), 0.5),
        cuda_graph=True,
    )
    main(["caption", "--model", "m", "--images", "x.png", "--max-new-tokens", "3", "--seed", "7"])
    assert made.pop().sampling == TextSampling(max_new_tokens=3, seed=7)


def test_a_device_that_is_not_there_ends_a_command_in_one_line(checkpoint, tmp_path):
    Picture.new("L", (8, 8)).save(tmp_path / "grey.png")
    for command in (
        ["sample", "--prompt", "a", "--out", str(tmp_path / "a.png")],
        ["caption", "--images", str(tmp_path / "grey.png")],
    ):
        with pytest.raises(
            SystemExit, match="^error: device is 'cudo', which this machine does not have; auto, cpu.* fit$"
        ):
            main([command[0], "--model", str(checkpoint), *command[1:], "--device", "cudo"])
    assert load_model(checkpoint, "cpu").device.type == "cpu"


def test_the_gpu_that_a_command_is_told_to_take_becomes_the_current_one(monkeypatch, checkpoint):
    taken = []
    monkeypatch.setattr(loading, "choose_device", torch.device)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    for name in ("cuda:1", "cuda", "cpu", "cpu:0"):
        load_model(checkpoint, name)
    assert taken == [1]


def test_a_picture_is_edited_and_asked_about(checkpoint, tmp_path, capsys):
    Picture.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    main(
        [
            "sample",
            "--model",
            str(checkpoint),
            "--image",
            str(tmp_path / "grey.png"),
            "--prompt",
            "bolder",
            "--out",
            str(tmp_path / "edit.png"),
            "--steps",
            "2",
            "--image-guidance",
            "1.5",
            "--sampler",
            "heun",
            "--guidance-interval",
            "0.1",
            "0.9",
        ]
    )
    assert (tmp_path / "edit.png").is_file() and "edit.png" in capsys.readouterr().out
    main(
        [
            "caption",
            "--model",
            str(checkpoint),
            "--images",
            str(tmp_path / "edit.png"),
            "--question",
            "which?",
            "--max-new-tokens",
            "2",
        ]
    )
    assert "edit.png:" in capsys.readouterr().out


def test_init_makes_a_checkpoint_that_draws(tmp_path, capsys):
    llm = language_model(tmp_path / "llm", "llama")
    main(
        ["init", "--llm", str(llm), "--out", str(tmp_path / "model"), "--image-channels", "1", "--image-size", "8", "8"]
    )
    assert "parameters of LlamaForCausalLM" in capsys.readouterr().out
    main(
        [
            "sample",
            "--model",
            str(tmp_path / "model"),
            "--prompt",
            "a",
            "--out",
            str(tmp_path / "a.png"),
            "--steps",
            "1",
        ]
    )
    assert (tmp_path / "a.png").is_file()


def test_a_saved_picture_reads_back_equal(tmp_path):
    config = tiny_model().config
    image = Image(torch.linspace(-1, 1, 64).view(1, 8, 8))
    save_image(image, tmp_path / "x.png")
    assert (load_image(tmp_path / "x.png", config).latent - image.latent).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    "out,message",
    [
        ("five", "whose suffix '' names no kind of picture"),
        ("five.doc", "suffix '.doc' names no kind"),
        ("five.mpo.hdf", "suffix '.hdf'"),
        ("folder.png", "which is a directory; a file such as"),
        ("file/five.png", "cannot be written into"),
        (f"{'a' * 246}.png", "File name too long"),  # as it is, but not written aside
    ],
)
def test_a_picture_that_could_not_be_written_is_refused_before_it_is_drawn(
    checkpoint, tmp_path, monkeypatch, out, message
):
    monkeypatch.setattr("transfusion.generate.generation.draw", lambda *_, **__: pytest.fail("drawn"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match=message) as stop:
        main(["sample", "--model", str(checkpoint), "--prompt", "a", "--out", str(tmp_path / out)])
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)


def test_images_that_cannot_be_picture_files_are_refused_before_they_are_drawn(tmp_path, monkeypatch):
    tiny_model(image_channels=8).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Transfusion, "draw", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(SystemExit, match="sample: the model's images have 8 channels and no VAE"):
        main(["sample", "--model", str(tmp_path / "model"), "--prompt", "a", "--out", str(tmp_path / "drawn.png")])


def test_init_writes_over_no_checkpoint_and_no_model_that_it_reads(tmp_path, checkpoint):
    llm = language_model(tmp_path / "llm", "llama")
    kept = {path: path.read_bytes() for place in (llm, checkpoint) for path in place.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("")
    for out, message in (
        (llm, "what is read would be written over"),
        (llm / "in", "what is read would be written over"),
        (checkpoint, "holds config.json of something else"),
        (tmp_path / "file", "which is a file; a directory fits"),
    ):
        with pytest.raises(SystemExit, match=f"error: init: out is .*{message}"):
            main(["init", "--llm", str(llm), "--out", str(out), "--image-channels", "1", "--image-size", "8", "8"])
    assert kept == {
        path: path.read_bytes() for place in (llm, checkpoint) for path in place.rglob("*") if path.is_file()
    }


def test_a_damaged_checkpoint_ends_a_command_in_one_line(checkpoint, tmp_path):
    Picture.new("L", (8, 8)).save(tmp_path / "grey.png")
    for command in (
        ["sample", "--prompt", "a", "--out", str(tmp_path / "a.png")],
        ["caption", "--images", str(tmp_path / "grey.png")],
    ):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            copy = shutil.copytree(checkpoint, tmp_path / "copy")
            (copy / name).write_bytes((copy / name).read_bytes()[:200])
            with pytest.raises(SystemExit, match=f"^error: {copy / name} is damaged") as stop:
                main([command[0], "--model", str(copy), *command[1:]])
            assert "\n" not in str(stop.value)
            shutil.rmtree(copy)


def hostile_pictures(folder):
    """Files that readers take differently: turned, transparent, deep, wide, in a palette, for print, moving."""
    bars = Picture.new("RGB", (40, 20), "red")
    bars.paste("blue", (30, 0, 40, 20))
    exif = Picture.Exif()
    exif[0x0112] = 6
    bars.save(folder / "turned.png", exif=exif)
    bars.convert("CMYK").save(folder / "print.jpg", quality=95)
    bars.save(folder / "wide.png")
    bars.quantize(4).save(folder / "palette.png", transparency=0)
    bars.save(folder / "moving.gif", save_all=True, append_images=[Picture.new("RGB", (40, 20), "green")])
    clear = bars.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    clear.save(folder / "clear.png")
    Picture.fromarray(np.linspace(0, 65_535, 800).reshape(20, 40).astype(np.uint16)).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_in_sampling_as_in_training(tmp_path, channels):
    config = SimpleNamespace(image_channels=channels, image_size=[8, 8])
    for path in hostile_pictures(tmp_path):
        assert torch.equal(load_image(path, config).latent, read_picture(path, 8, channels)), path.name
    deep = load_image(tmp_path / "deep.png", config).latent
    assert deep.amin() < -0.5 < 0.5 < deep.amax()
    config.image_channels = 3
    turned, clear = (load_image(tmp_path / name, config).latent for name in ("turned.png", "clear.png"))
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(turned, red, rtol=0, atol=0.2)                               # its middle
    assert (clear[:, :, 0] == 1).all() and (clear[1:, :, -1] < -0.8).all()                   # white where it is clear


def test_a_picture_keeps_its_aspect_and_loses_its_rims(tmp_path):
    picture = Picture.new("L", (60, 20), 0)
    picture.paste(255, (10, 0, 50, 20))
    picture.save(tmp_path / "wide.png")
    assert (read_picture(tmp_path / "wide.png", (4, 8), 1) > 0.8).all()                     # its central 40 x 20
    assert (read_picture(tmp_path / "wide.png", (8, 4), 1) == 1).all()                      # its central 10 x 20
    assert (read_picture(tmp_path / "wide.png", (4, 16), 1)[0, :, [0, -1]] < -0.9).all()    # its central 60 x 15


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "bomb"])
def test_damaged_pictures_are_answered_in_one_line_with_their_name(checkpoint, tmp_path, monkeypatch, kind):
    Picture.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    contents = {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"no picture", "bomb": whole}
    (tmp_path / "bad.png").write_bytes(contents[kind])
    if kind == "bomb":
        monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 1000)
    for args in (["caption", "--images"], ["sample", "--prompt", "a", "--image"]):
        with pytest.raises(SystemExit) as stop:
            main([args[0], "--model", str(checkpoint), *args[1:], str(tmp_path / "bad.png")])
        line = str(stop.value)
        assert line.startswith("error: ") and "bad.png is not a picture that can be read (" in line and "\n" not in line


@pytest.mark.parametrize(
    "args,message",
    [
        (["sample", "--model", "nowhere", "--prompt", "a"], "holds no config.json"),
        (["sample", "--model", "CHECKPOINT", "--prompt", " "], "prompt is empty"),
        (["sample", "--model", "CHECKPOINT", "--prompt", "a", "--size", "7", "8"], "multiples of the patch size"),
        (
            ["sample", "--model", "CHECKPOINT", "--prompt", "a", "--sampler", "dpm"],
            "generate: sampler is 'dpm'; one of 'ddim'",
        ),
        (["init", "--llm", "nowhere", "--out", "model"], "which is no checkpoint"),
        (
            ["caption", "--model", "CHECKPOINT", "--images", "missing.png"],
            "missing.png is not a picture that can be read",
        ),
    ],
)
def test_requests_that_do_not_fit_get_one_line(checkpoint, args, message):
    with pytest.raises(SystemExit, match=message) as stop:
        main([str(checkpoint) if arg == "CHECKPOINT" else arg for arg in args])
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)


def test_what_an_encoding_cannot_write_is_spelled_out_and_files_are_utf8_in_every_locale(tmp_path):
    code = ("import pathlib; from transfusion.command import plain_errors; from transfusion.files import write_text\n"
            "said = '\\u00fc\\udce9'\nwith plain_errors():\n    print(said)\n"
            "    write_text(pathlib.Path('said.txt'), said)")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **plain, "PYTHONPATH": os.getcwd()},
                          capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("\\xfc\\udce9\n", 0), done.stderr
    assert (tmp_path / "said.txt").read_text(encoding="utf-8") == "\u00fc\\udce9"


@pytest.mark.parametrize("flags,words", [
    ("--samples 4", "samples is 4 without prompts"), ("--batch 2", "batch is 2 without prompts"),
    ("--max-images 3", "max_images is 3, and one image is drawn"),
    ("--max-new-tokens 5", "max_new_tokens is 5, and one image is drawn and nothing written; add --no-draw"),
    ("--temperature 0.8", "temperature is 0.8, and one image is drawn"), ("--top-p 0.9", "top_p is 0.9, and one image"),
    ("--min-p 0.1", "min_p is 0.1, and one image"), ("--stop end", r"stop is \('end',\), and one image is drawn")])
def test_flags_without_effect_on_one_prompt_are_refused(flags, words):
    with pytest.raises(SystemExit, match=words):
        main(["sample", "--model", "m", "--prompt", "a", *flags.split()])
