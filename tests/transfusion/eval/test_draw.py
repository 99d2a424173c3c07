"""Many pictures: the same in any batch and process count, none drawn twice, in folders that other tools read."""
import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch.multiprocessing.spawn import ProcessExitedException

import transfusion.eval.draw
from tests.transfusion.conftest import tiny_model
from tests.transfusion.eval.test_prompts import GENEVAL
from transfusion import Text, Transfusion
from transfusion.cli import main
from transfusion.data.model_images import load_image
from transfusion.data.picture_files import to_picture
from transfusion.eval.draw import _line
from transfusion.eval.prompts import Entry, read_drawn
from transfusion.model.lora import TuneSettings, prepare

PROMPTS = [f"a handwritten {digit}" for digit in ("one", "two", "three", "four", "five", "six", "seven")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a model, seven prompts, and their pictures drawn in batches of four."""
    where = tmp_path_factory.mktemp("draw")
    tiny_model().save_pretrained(where / "model")
    (where / "prompts.txt").write_text("\n".join(PROMPTS))
    command(where, "drawn", "--batch", "4")
    return where


def arguments(where, out, *more):
    """The command line that draws the seven prompts into `out`."""
    return ["eval", "draw", "--model", str(where / "model"), "--prompts", str(where / "prompts.txt"),
            "--out", str(where / out), "--steps", "2", "--seed", "5", *more]


def command(where, out, *more):
    """Draw, and return the pictures by their files' names."""
    main(arguments(where, out, *more))
    return pixels(where / out)


def pixels(out):
    """The pictures of a folder by their files' names."""
    return {path.name: np.asarray(Picture.open(path)).astype(int) for path in sorted((out / "pictures").glob("*.png"))}


def assert_same(a, b):
    """Rounding of sums of another order may move a pixel by one of its 255 steps."""
    assert a.keys() == b.keys() and len(a) == len(PROMPTS)
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= 1, name


def test_prompts_that_drawing_would_write_over_are_refused(made, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    before = (tmp_path / "prompts.jsonl").read_text()
    with pytest.raises(SystemExit, match="prompts is .*prompts.jsonl', which the command would write over"):
        main(["eval", "draw", "--model", str(made / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), "--out",
              str(tmp_path), "--count", "2"])
    assert (tmp_path / "prompts.jsonl").read_text() == before
    with pytest.raises(ValueError, match="prompts.jsonl, line 1: file is None; what `transfusion eval draw` wrote"):
        read_drawn(tmp_path)


def test_every_prompt_has_a_picture_of_one_size_and_a_line(made):
    drawn, rows = pixels(made / "drawn"), read_drawn(made / "drawn")
    assert list(drawn) == [f"{number:06}.png" for number in range(7)]
    assert {picture.shape for picture in drawn.values()} == {(8, 8)}
    assert [row["prompt"] for row in rows] == PROMPTS and [row["seed"] for row in rows] == list(range(5, 12))
    assert [row["file"] for row in rows] == [f"pictures/{number:06}.png" for number in range(7)]
    assert len({picture.tobytes() for picture in drawn.values()}) == 7, "two prompts have one picture"
    with Picture.open(made / "drawn" / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 8 * 100


def test_the_batch_changes_no_picture(made):
    assert_same(pixels(made / "drawn"), command(made, "ones", "--batch", "1"))


def test_a_picture_is_the_one_that_sample_draws_with_its_seed(made, tmp_path):
    main(["sample", "--model", str(made / "model"), "--prompt", PROMPTS[3], "--out", str(tmp_path / "a.png"),
          "--steps", "2", "--seed", "8"])
    alone = np.asarray(Picture.open(tmp_path / "a.png")).astype(int)
    assert np.abs(alone - pixels(made / "drawn")["000003.png"]).max() <= 1


def test_processes_under_a_launcher_share_the_pictures_and_change_none(made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    main(arguments(made, "two", "--batch", "2", "--device", "cpu"))
    assert list(pixels(made / "two")) == ["000002.png", "000003.png", "000006.png"]
    assert not (made / "two" / "contact_sheet.png").exists()
    monkeypatch.setenv("RANK", "0")
    main(arguments(made, "two", "--batch", "2", "--device", "cpu"))
    assert_same(pixels(made / "drawn"), pixels(made / "two"))
    assert (made / "two" / "contact_sheet.png").exists()
    with pytest.raises(SystemExit, match="processes is 2 under a launcher of 2; 1 fits there"):
        main(arguments(made, "two", "--processes", "2"))


def test_a_command_starts_several_processes_itself(made):
    assert_same(pixels(made / "drawn"), command(made, "own", "--processes", "2", "--batch", "2", "--device", "cpu"))


def test_a_process_that_ends_says_why_in_a_line_and_so_does_the_command(made, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def spawn(function, given, count, daemon):
        with pytest.raises(SystemExit, match="error: .*000001.png: No space left on device; what was saved before"):
            function(1, *given)
        raise ProcessExitedException("process 1 terminated with exit code 1", 1, 0, 1)

    monkeypatch.setattr(Picture.Image, "save", full)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    with pytest.raises(SystemExit, match="error: eval draw: of 2 processes one ended .process 1 terminated"):
        command(made, "full", "--processes", "2", "--batch", "1", "--device", "cpu")


def test_what_is_missing_after_a_kill_is_drawn_and_nothing_twice(made, monkeypatch):
    command(made, "killed", "--batch", "4")
    before = pixels(made / "killed")
    for number in (1, 4, 6):
        (made / "killed" / "pictures" / f"{number:06}.png").unlink()
    (made / "killed" / ".new-drawing-0").mkdir()
    (made / "killed" / ".new-drawing-0" / "1.png").write_bytes(b"half a pict")
    drawn = []
    real = transfusion.eval.draw._draw_batch
    monkeypatch.setattr(transfusion.eval.draw, "_draw_batch",
                        lambda model, batch, settings: drawn.append([entry.number for entry in batch])
                        or real(model, batch, settings))
    assert_same(before, command(made, "killed", "--batch", "4"))
    assert drawn == [[1, 4, 6]]
    assert sorted(path.name for path in (made / "killed").iterdir()) == [
        "contact_sheet.png", "drawing.json", "pictures", "prompts.jsonl"]
    monkeypatch.setattr(transfusion.eval.draw, "load_model", lambda *_: pytest.fail("there is nothing to draw"))
    command(made, "killed", "--batch", "4")


def test_pictures_of_other_settings_are_refused_by_the_name_of_the_setting(made, tmp_path):
    for options, said in ((("--steps", "3"), "steps 2, and now it is 3"), (("--seed", "1"), "seed 5, and now it is 1"),
                          (("--samples", "2"), "samples 1, and now it is 2"), (("--count", "3"), "rule")):
        with pytest.raises(SystemExit, match=f"whose pictures were drawn with {said}"):
            command(made, "drawn", *options)


def test_a_line_may_set_the_options_of_its_picture_and_pictures_of_the_same_options_run_as_one_batch(
        made, monkeypatch):
    Picture.new("L", (8, 8), 200).save(made / "grey.png")
    lines = [{"prompt": "a handwritten one", "seed": 90}, {"prompt": "a handwritten two", "steps": 1, "note": "kept"},
             {"prompt": "a handwritten six", "image_size": [4, 12], "guidance": 1.5, "sampler": "heun"},
             {"prompt": " and a two", "image": "grey.png"}, {"prompt": "a handwritten two", "steps": 1, "seed": 7}]
    (made / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn, real = [], transfusion.eval.draw._draw_batch
    monkeypatch.setattr(transfusion.eval.draw, "_draw_batch",
                        lambda model, batch, settings: drawn.append([entry.number for entry in batch])
                        or real(model, batch, settings))
    main(["sample", "--model", str(made / "model"), "--prompts", str(made / "lines.jsonl"), "--out",
          str(made / "lines"), "--steps", "2", "--seed", "5", "--samples", "2"])
    assert drawn == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]
    rows = read_drawn(made / "lines")
    assert [row["seed"] for row in rows] == [90, 91, 7, 8, 9, 10, 11, 12, 7, 8] and rows[2]["note"] == "kept"
    model, found = Transfusion.from_pretrained(made / "model"), pixels(made / "lines")
    image = load_image(made / "grey.png", model.config)
    expected = {0: model.draw([lines[0]["prompt"]], steps=2, seed=90),
                3: model.draw([lines[1]["prompt"]], steps=1, seed=8),
                4: model.draw([lines[2]["prompt"]], steps=2, seed=9, image_size=(4, 12), guidance=1.5, sampler="heun"),
                6: model.draw([[image, Text(" and a two")]], steps=2, seed=11)}
    for number, (one,) in expected.items():
        shown = np.asarray(to_picture(one.latent)).astype(int)
        assert np.abs(shown - found[f"{number:06}.png"]).max() <= 1, number
    with Picture.open(made / "lines" / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 8 * 100


def test_an_adapters_pictures_are_those_of_its_model_with_the_adapter(made, tmp_path):
    adapted = prepare(Transfusion.from_pretrained(made / "model"), TuneSettings(start=made / "model", trained="images"))
    torch.nn.init.normal_(adapted.get_base_model().image_head.modules_to_save["default"].linear.weight)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    main(["sample", "--model", str(tmp_path / "adapter"), "--prompts", str(tmp_path / "one.txt"),
          "--out", str(tmp_path / "drawn"), "--steps", "2", "--seed", "5"])
    one, = Transfusion.from_pretrained(tmp_path / "adapter").eval().draw([PROMPTS[0]], steps=2, seed=5)
    found = pixels(tmp_path / "drawn")["000000.png"]
    assert np.abs(np.asarray(to_picture(one.latent)).astype(int) - found).max() <= 1
    assert np.abs(found - pixels(made / "drawn")["000000.png"]).max() > 1


@pytest.mark.parametrize("more, says", [
    (["--prompt", "a"], "prompt and prompts are given; one of them fits, or lines of the file"),
    (["--image", "a.png"], "image and prompts are given"), (["--no-draw"], "draw is False and prompts is given"),
    (["--batch", "0"], "sample: batch is 0"),
    (["--temperature", "0.8"], "temperature is 0.8, and one image is drawn and nothing written; leave it out"),
    (["--top-p", "0.9"], "top_p is 0.9, and"), (["--min-p", "0.1"], "min_p is 0.1, and"),
    (["--stop", "end"], r"stop is \('end',\), and"), (["--max-images", "2"], "sample: max_images is 2, and"),
    (["--max-new-tokens", "5"], "max_new_tokens is 5, and"),
    (["--model", "nowhere"], "model is 'nowhere', which holds no config.json"),
])
def test_options_of_sample_that_do_not_go_with_a_file_of_prompts_are_named(made, tmp_path, more, says):
    with pytest.raises(SystemExit, match=says):
        main(["sample", "--model", str(made / "model"), "--prompts", str(made / "prompts.txt"),
              "--out", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out" / "pictures").exists()


def test_genevals_layout_holds_a_prompt_and_its_samples_in_a_folder(made):
    (made / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    main(["eval", "draw", "--model", str(made / "model"), "--prompts", str(made / "evaluation_metadata.jsonl"),
          "--out", str(made / "geneval"), "--steps", "1"])
    found = sorted(str(path.relative_to(made / "geneval" / "pictures"))
                   for path in (made / "geneval" / "pictures").rglob("*") if path.is_file())
    assert found == [f"0000{prompt}/{name}" for prompt in (0, 1)
                     for name in ("metadata.jsonl", *(f"samples/000{sample}.png" for sample in range(4)))]
    assert json.loads((made / "geneval" / "pictures" / "00000" / "metadata.jsonl").read_text()) == GENEVAL[0]
    assert read_drawn(made / "geneval")[1]["include"] == GENEVAL[0]["include"]


def test_a_lines_own_number_and_file_give_way_to_ours_in_what_is_written_of_a_picture():
    entry = Entry(3, "a", "000003.png", 5, {}, None, {"number": 0, "file": "old.png", "source": "mine"})
    assert _line(entry) == {"number": 3, "file": "pictures/000003.png", "prompt": "a", "seed": 5, "source": "mine"}


@pytest.mark.parametrize("line, says", [
    ({"image_size": [7, 7]}, r"line 3: image_size is \(7, 7\) and the patch size 2"),
    ({"image": "no.png"}, "line 3: .*no.png is not a picture that can be read"),
    ({"seed": 2**64 - 1}, "line 3: seed is 18446744073709551616"),
    ({"sampler": "dpm++", "steps": 1000}, "line 3: steps is 1000 and the sampler 'dpm.*', which takes at most 999"),
    ({"sampler": "unipc", "steps": 10**6}, "line 3: steps is 1000000 and the sampler 'unipc', which takes at most"),
    ({"steps": 2**62}, "line 3: steps is 4611686018427387904; at most 1000000 fit"),
    ({"steps": 2**70}, "line 3: steps is 1180591620717411303424; at most 1000000 fit"),
])
def test_a_line_that_cannot_be_drawn_is_named_before_the_first_picture_is_drawn(made, tmp_path, line, says):
    (tmp_path / "no.png").write_bytes(b"no picture")
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", **line}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match=says):
        main(["eval", "draw", "--model", str(made / "model"), "--prompts", str(tmp_path / "lines.jsonl"), "--samples",
              "2", "--batch", "2", "--steps", "2", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("000*.png"))


def test_a_solver_that_does_not_fit_is_found_before_the_model_is_loaded_and_each_is_looked_at_once(
        made, tmp_path, monkeypatch):
    asked, real = [], transfusion.eval.draw.make_solver
    monkeypatch.setattr(transfusion.eval.draw, "make_solver", lambda *given: asked.append(given[0]) or real(*given))
    monkeypatch.setattr(transfusion.eval.draw, "load_model", lambda *_: pytest.fail("the model was loaded"))
    lines = [{"prompt": "a"}, {"prompt": "b", "sampler": "heun"}] * 20 + [{"prompt": "c", "sampler": "unipc"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit, match="lines.jsonl, line 41: steps is 1000 and the sampler 'unipc', which takes at"):
        main(["sample", "--model", str(made / "model"), "--prompts", str(tmp_path / "lines.jsonl"), "--steps", "1000",
              "--out", str(tmp_path / "out")])
    assert asked == ["ddim", "heun", "unipc"] and not (tmp_path / "out" / "pictures").exists()
    with pytest.raises(SystemExit, match="error: sample: steps is 1000 and the sampler 'dpm.*', which takes at"):
        main(["sample", "--model", str(made / "model"), "--prompts", str(made / "prompts.txt"), "--steps", "1000",
              "--sampler", "dpm++", "--out", str(tmp_path / "out")])


def test_what_utf8_cannot_write_of_a_line_is_kept_beside_its_picture(made, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "file_name": "caf\\udce9"}')
    main(["eval", "draw", "--model", str(made / "model"), "--prompts", str(tmp_path / "lines.jsonl"), "--steps", "1",
          "--out", str(tmp_path / "out")])
    row, = read_drawn(tmp_path / "out")
    assert row["file_name"] == "caf\udce9"
