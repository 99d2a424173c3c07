"""Held-out losses during training: what they are means over, that they compare, and that looking changes nothing."""
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file

from tests.gloo_processes import needs_gloo, run_together
from tests.transfusion.conftest import tiny_model
from tests.transfusion.train import watched
from tests.transfusion.train.own_data import paint, tiny, write_folder, write_mixture
from tests.transfusion.train.test_transfusion import losses, small
from transfusion import Transfusion
from transfusion.data.dataset import CaptionedPictures, DatasetSettings
from transfusion.data.training_data import open_data
from transfusion.recipes.digits import Digits
from transfusion.settings import Seed, check_value
from transfusion.train.average import Average
from transfusion.train.optimizer import Player
from transfusion.train.samples import SamplesSettings
from transfusion.train.transfusion import train
from transfusion.train.validation import NOISE_SEED, Validation, ValidationSettings, bin_name
from transfusion.train.watching import averaged_weights, is_due


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def pictures_of(rows, config):
    """Each picture that rows hold."""
    patches = torch.cat([rows[number].sequence.patches for number in range(len(rows))])
    pictures = patches.view(-1, 4, 4, config.image_channels, config.patch_size, config.patch_size)
    return pictures.permute(0, 3, 1, 4, 2, 5).reshape(-1, config.image_channels, 8, 8)


def untouched(model):
    """A player that keeps no average: what is measured is the model as it is."""
    return Player(model, torch.optim.SGD(model.parameters()))


def contains(pictures, one):
    return bool((pictures == one).flatten(1).all(1).any())


def test_a_run_that_is_looked_at_has_the_losses_and_weights_of_one_that_is_not(tmp_path):
    train(small(tmp_path / "plain"))
    train(small(tmp_path / "watched", validate=ValidationSettings(every=3, rows=2),
                samples=SamplesSettings(every=5, steps=2, count=2)))
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")
    for name in ("model.safetensors", "resume/state.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("watched", "plain"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    looked = [record["step"] + 1 for record in logged(tmp_path / "watched") if "validation_text_loss" in record]
    drew = [record["step"] + 1 for record in logged(tmp_path / "watched") if "samples_seconds" in record]
    assert looked == [3, 6, 9, 12] and drew == [5, 10, 12]
    assert not any("validation" in key or "samples" in key for record in logged(tmp_path / "plain") for key in record)


def test_a_run_of_a_version_without_these_settings_goes_on_and_may_begin_to_look(tmp_path):
    train(small(tmp_path, stop_after=5))
    file = tmp_path / "resume" / "run.json"
    run = json.loads(file.read_text())
    del run["config"]["validate"], run["config"]["samples"]
    file.write_text(json.dumps(run))
    train(small(tmp_path, resume=True, validate=ValidationSettings(every=6, rows=1)))
    assert [r["step"] + 1 for r in logged(tmp_path) if "validation_text_loss" in r] == [6, 12]


def test_numbers_are_those_of_the_averaged_weights_that_are_saved(tmp_path):
    config = small(tmp_path, validate=ValidationSettings(every=12, rows=3, bins=2))
    train(config)
    model = Transfusion.from_pretrained(tmp_path).train()
    for p in model.parameters():
        p.data = p.data.clone()  # a file's weights lie at any address, and some CPUs add up another way there
    rows = open_data(config.data).rows(model.tokenizer, model.config, None, rows=2, seq_len=64, steps=1).held_out(3)
    player = untouched(model)
    found = Validation(config.validate, rows, player, steps=12).after(12)
    last = logged(tmp_path)[-1]
    names = {"validation_text_loss", "validation_perplexity", "validation_diffusion_loss", bin_name(0, 2),
             bin_name(1, 2), "validation_seconds"}
    assert found.keys() == names == {key for key in last if key.startswith("validation")}
    assert all(found[name] == last[name] for name in names - {"validation_seconds"})
    trained = load_file(tmp_path / "resume" / "state.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(trained[f"model.{name}"])
    assert Validation(config.validate, rows, player, steps=12).measure()["validation_text_loss"] != \
        last["validation_text_loss"]


def test_losses_are_means_over_all_targets_and_all_images_of_every_pass():
    model = tiny_model().train()
    rows = watched.held_out(model, 3)
    validation = Validation(ValidationSettings(every=1, bins=4), rows, untouched(model), steps=1)
    text, targets, images, by_bin = 0.0, 0, [], {}
    for number in range(3):
        for k in range(4):
            sequence, times = rows[number].sequence, validation.times(number, k)
            with torch.no_grad():
                output = model.eval()(sequence, times, torch.tensor([NOISE_SEED, number * 4 + k]))
            text += float(output.text_loss) * len(sequence.text_targets)
            targets += len(sequence.text_targets)
            for t, loss in zip(times.tolist(), output.image_losses.tolist()):
                images.append(loss)
                by_bin.setdefault(int(4 * t), []).append(loss)
    found = validation.measure()
    assert found["validation_text_loss"] == pytest.approx(text / targets, rel=1e-6)
    assert found["validation_perplexity"] == pytest.approx(math.exp(text / targets), rel=1e-5)
    assert found["validation_diffusion_loss"] == pytest.approx(sum(images) / len(images), rel=1e-6)
    for k, values in by_bin.items():
        assert found[bin_name(k, 4)] == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert len(by_bin) == 4 and len(by_bin[0]) > len(by_bin[3])  # images to be read have less noise


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_each_image_meets_every_part_of_its_times_once(bins):
    model = tiny_model()
    rows = watched.held_out(model, 2)
    validation = Validation(ValidationSettings(every=1, bins=bins), rows, untouched(model), steps=1)
    for number in range(2):
        times = torch.stack([validation.times(number, k) for k in range(bins)])              # (bins, N)
        limit = rows[number].limit
        assert set(limit.tolist()) == {0.5, 1.0} and (times < limit).all()
        parts = (times / limit * bins).long().sort(0).values
        assert torch.equal(parts, torch.arange(bins)[:, None].expand_as(parts))
        assert torch.equal(times, torch.stack([validation.times(number, k) for k in range(bins)]))


def test_its_noise_is_that_of_no_run():
    with pytest.raises(ValueError, match="seed is -1; a whole number of at least 0"):
        check_value("train", "seed", NOISE_SEED, Seed)


def test_rows_hold_what_is_held_out_alone_whatever_the_seed_of_the_run():
    model = tiny_model()
    rows = watched.held_out(model, 3)
    trained, held = Digits("train").pictures, Digits("held-out").pictures
    found = pictures_of(rows, model.config)
    own = [one for one in held if not contains(trained, one)]
    assert len(found) > 6 and all(contains(held, one) for one in found)
    assert any(contains(torch.stack(own), one) for one in found)
    again = watched.held_out(model, 4)
    assert all(torch.equal(rows[i].sequence.tokens, again[i].sequence.tokens) for i in range(3))


def test_a_mixture_has_the_rows_that_it_holds_out_and_says_so_where_there_are_none(tmp_path):
    write_folder(tmp_path / "pictures", paint(60))
    source = {"format": "imagefolder", "path": "pictures"}
    config = tiny(tmp_path / "run", write_mixture(tmp_path / "mix.yaml", source, held_out=0.2),
                  validate=ValidationSettings(every=3, rows=100), samples=SamplesSettings(every=6, steps=2, count=3))
    train(config)
    record = logged(tmp_path / "run")[2]
    assert record["validation_text_loss"] > 0 and record["validation_diffusion_loss"] > 0
    with Picture.open(tmp_path / "run" / "samples" / "0000006-00.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB" and picture.text["prompt"].startswith("a ")
    model = Transfusion.from_pretrained(tmp_path / "run")
    planned = open_data(config.data).rows(model.tokenizer, model.config, None, rows=2, seq_len=96, steps=6)
    rows = planned.held_out(100)
    images = sum(int(rows[i].sequence.drawn.sum()) for i in range(len(rows)))
    assert len(planned.held_out(1)) == 1 and len(rows) < 20 and 5 <= images <= 25  # an epoch of a fifth of 60
    alone = write_mixture(tmp_path / "all.yaml", source, held_out=0.0)
    with pytest.raises(ValueError, match="all.yaml holds out no record .*; a larger share fits"):
        train(tiny(tmp_path / "none", alone, validate=ValidationSettings(every=3)))


@dataclasses.dataclass(frozen=True)
class Squares(DatasetSettings):
    """Grey squares, the same ones in both splits, or none held out."""

    held_out: int = 4
    name = "squares"

    def open(self, split="train"):
        """As `DatasetSettings.open`."""
        if split == "held-out" and self.held_out < 0:
            raise ValueError("there is one split")
        count = 4 if split == "train" else self.held_out
        pictures = torch.linspace(-1, 1, 4)[:count, None, None, None].expand(count, 1, 8, 8)
        return CaptionedPictures(pictures, ["a square"] * count)


def test_data_that_hold_out_nothing_or_what_is_trained_on_are_answered_in_words(tmp_path, capsys):
    look = ValidationSettings(every=3, rows=1)
    with pytest.raises(ValueError, match="held-out split of data 'squares' cannot be opened: there is one split"):
        train(small(tmp_path / "one", data=Squares(held_out=-1), validate=look))
    with pytest.raises(ValueError, match="data 'squares' holds out no picture"):
        train(small(tmp_path / "none", data=Squares(held_out=0), validate=look))
    train(small(tmp_path / "same", data=Squares(), validate=look, stop_after=3))
    assert "held-out pictures of data 'squares' are those that are trained on" in capsys.readouterr().out
    assert "validation_text_loss" in logged(tmp_path / "same")[-1]


def test_weights_mode_and_random_numbers_are_put_back_also_after_an_error():
    model = tiny_model().train()
    model.timestep.eval()
    player = Player(model, torch.optim.SGD(model.parameters()), Average(model, 0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before, modes = [p.clone() for p in model.parameters()], [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt), averaged_weights(player):
        assert not any(module.training for module in model.modules())
        assert not any(torch.equal(p, x) for p, x in zip(model.parameters(), before))
        torch.rand(7)
        raise KeyboardInterrupt
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before))
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.rand(1), expected)


def test_a_watcher_looks_every_so_many_steps_and_after_the_last():
    assert [done for done in range(1, 8) if is_due(done, 3, 7)] == [3, 6, 7]
    assert not any(is_due(done, 0, 7) for done in range(1, 8))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two gloo processes found in sharded models, once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    run_together(2, watched.run, folder)
    return folder, torch.load(folder / "found.pt")


@needs_gloo
@pytest.mark.parametrize("name", watched.WATCHED)
def test_two_processes_find_and_draw_what_one_does_and_train_on_as_before(together, name, tmp_path):
    folder, found = together
    numbers, same, trains_on = found[name]
    expected, alone = watched.alone(name, tmp_path)
    assert same and trains_on and alone
    assert numbers.keys() == expected.keys() and "samples_failed" not in numbers
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-6), key
    drawn = sorted((folder / str(watched.WATCHED.index(name)) / "samples").iterdir())
    assert len(drawn) == 2
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "samples" / path.name).read_bytes()


def test_settings_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"validate.every is -1; a whole number of at least 0 fits"):
        train(small(tmp_path / "run", validate=ValidationSettings(every=-1)))
    with pytest.raises(ValueError, match=r"samples.steps is 0"):
        train(small(tmp_path / "run", samples=SamplesSettings(steps=0)))
    assert not (tmp_path / "run").exists()


