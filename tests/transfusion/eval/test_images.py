"""Drawn pictures against real ones: the numbers are those of the features, the names those that these deserve."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as Picture

import transfusion.eval.inception as inception
import transfusion.eval.picture_features as picture_features
from tests.transfusion.eval.test_features import resnet
from tests.transfusion.eval.test_inception import weights  # noqa: F401
from tests.transfusion.eval.test_metrics import scipy_frechet
from transfusion.cli import main
from transfusion.eval.features import Features
from transfusion.eval.metrics import kernel_distance, precision_recall
from transfusion.eval.picture_features import Network, drawn_files, features_of, read_square
from transfusion.eval.results import read_results, weights_hash


def save_pictures(folder, count, seed, side=40):
    """Random blurred pictures, some of them not square."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(count):
        small = Picture.fromarray(random.integers(0, 256, (4, 4 + i % 2, 3), dtype=np.uint8))
        small.resize((side + side // 4 * (i % 2), side), Picture.Resampling.BICUBIC).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders of pictures and a random ResNet that takes 32x32."""
    where = tmp_path_factory.mktemp("images")
    save_pictures(where / "real", 30, 0)
    save_pictures(where / "drawn", 24, 1)
    resnet().save_pretrained(where / "resnet")
    (where / "resnet" / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}))
    return where


def command(where, out, *more):
    """Measure, and return the results by their metrics."""
    main(["eval", "images", "--drawn", str(where / "drawn"), "--real", str(where / "real"), "--out", str(out),
          "--features", str(where / "resnet"), "--subsets", "5", "--subset-size", "10", *more])
    return {result.metric: result for result in read_results(out).values()}


def features(where, folder):
    """Features of a folder, one picture at a time."""
    network = Features.from_pretrained(where / "resnet")
    with torch.inference_mode():
        return torch.cat([network.pooled(read_square(path, 32)[None]) for path in sorted((where / folder).iterdir())])


def test_the_numbers_are_those_of_the_features(made, tmp_path):
    found, real, drawn = command(made, tmp_path), features(made, "real"), features(made, "drawn")
    assert sorted(found) == ["Fréchet distance (resnet features)", "kernel distance (resnet features)",
                             "precision (resnet features)", "recall (resnet features)"]
    frechet, kernel, precision, recall = (found[name] for name in sorted(found))
    assert frechet.value == pytest.approx(scipy_frechet(real.double(), drawn.double()), rel=1e-3)
    direct = kernel_distance(real, drawn, 5, 10)
    assert kernel.value == pytest.approx(direct.distance, rel=1e-3)
    assert kernel.standard_error == pytest.approx(direct.standard_error, rel=1e-3)
    assert (kernel.details["subset_seed"], kernel.seed) == (0, None), "nobody says what these were drawn with"
    assert (precision.value, recall.value) == tuple(precision_recall(real, drawn))
    assert frechet.n == 24 and frechet.details["real_pictures"] == 30
    assert frechet.details["features_weights_hash"] == weights_hash(made / "resnet")
    assert frechet.resize == "central square to 32x32, bicubic with antialias (Pillow, float32)"


def test_precision_and_recall_of_a_part_take_pictures_from_the_whole_folder(made, tmp_path):
    found, real, drawn = (command(made, tmp_path, "--neighbour-pictures", "12", "--seed", "3"),
                          features(made, "real"), features(made, "drawn"))
    theirs, ours = (torch.randperm(count, generator=torch.Generator().manual_seed(3))[:12] for count in (30, 24))
    assert max(theirs) > 11 and max(ours) > 11, "these would be the first by name"
    expected = precision_recall(real[theirs], drawn[ours])
    assert expected != precision_recall(real[:12], drawn[:12])
    for name, value in expected._asdict().items():
        result = found[f"{name} (resnet features)"]
        assert (result.value, result.n) == (value, 12)
        assert [result.details[key] for key in ("real_compared", "drawn_compared", "subset_seed")] == [12, 12, 3]


def test_results_name_the_seed_and_the_sampling_of_the_drawing(made, tmp_path):
    shutil.copytree(made / "drawn", tmp_path / "drawn")
    (tmp_path / "drawn" / "drawing.json").write_text(json.dumps({
        "model": "runs/a", "sampling": {"seed": 7, "steps": 25, "sampler": "heun", "guidance": {"scale": 3.0},
                                        "top_p": 1.0}}))
    for result in command(made, tmp_path / "out", "--drawn", str(tmp_path / "drawn"), "--seed", "1").values():
        assert (result.model, result.seed) == ("runs/a", 7)
        assert result.details["sampling"] == {"steps": 25, "sampler": "heun", "guidance": {"scale": 3.0}}


def test_real_pictures_that_eval_draw_wrote_are_counted_without_its_contact_sheet(made, tmp_path):
    shutil.copytree(made / "real", tmp_path / "real" / "pictures")
    lines = [json.dumps({"file": f"pictures/{path.name}", "prompt": "a"}) for path in (made / "real").iterdir()]
    (tmp_path / "real" / "prompts.jsonl").write_text("\n".join(lines))
    Picture.new("RGB", (50, 50), "red").save(tmp_path / "real" / "contact_sheet.png")
    found = command(made, tmp_path / "out", "--real", str(tmp_path / "real"))
    assert found["precision (resnet features)"].details["real_pictures"] == 30


def test_a_clip_that_does_not_fit_is_named_before_anything_is_measured(made, tmp_path):
    (tmp_path / "drawn").mkdir()
    shutil.copy(made / "drawn" / "000.png", tmp_path / "drawn")
    (tmp_path / "drawn" / "prompts.jsonl").write_text('{"file": "000.png", "prompt": "a"}\n')
    with pytest.raises(SystemExit, match="Clip.from_pretrained: name is"):
        command(made, tmp_path / "out", "--drawn", str(tmp_path / "drawn"), "--clip", str(tmp_path))
    assert not (tmp_path / "out" / "features").exists()


def test_features_are_computed_once_for_each_state_of_a_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_features, "SHARD", 10)
    read = []
    real_read = picture_features.read_square
    monkeypatch.setattr(picture_features, "read_square", lambda path, *more: read.append(path.name)
                        or real_read(path, *more))
    before = command(made, tmp_path)
    assert len(read) == 54
    read.clear()
    assert [result.value for result in command(made, tmp_path).values()] == [
        result.value for result in before.values()] and not read
    files = sorted((made / "drawn").iterdir())
    content = files[12].read_bytes()
    Picture.new("RGB", (50, 50), "red").save(files[12])
    assert command(made, tmp_path)["precision (resnet features)"].n == 24
    assert sorted(read) == [path.name for path in files[10:20]]
    files[12].write_bytes(content)


def test_features_of_another_preprocessing_are_computed_anew(made, tmp_path):
    shutil.copytree(made / "resnet", tmp_path / "resnet")
    files, found = sorted((made / "real").iterdir())[:3], []
    for mean in ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]):
        (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(
            {"size": {"height": 32, "width": 32}, "image_mean": mean, "image_std": [0.2, 0.3, 0.4]}))
        found.append(features_of(files, Network.open(tmp_path / "resnet", torch.device("cpu")), tmp_path / "features"))
    assert not torch.equal(*found)


def test_real_pictures_may_be_those_of_the_prompts_alone(made, tmp_path):
    """As of COCO's 30,000 captions, whose folder holds 40,504 pictures."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(12):
        shutil.copy(made / "drawn" / f"{number:03}.png", tmp_path / "pictures")
        rows.append({"file": f"pictures/{number:03}.png", "prompt": "a", "image_file": f"{2 * number:03}.png"})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--drawn", str(tmp_path), "--prompted"]
    found = command(made, tmp_path, *arguments)["Fréchet distance (resnet features)"]
    real, drawn = features(made, "real")[:24:2], features(made, "drawn")[:12]
    assert found.value == pytest.approx(scipy_frechet(real.double(), drawn.double()), rel=1e-3)
    assert (found.n, found.details["real_pictures"]) == (12, 12)
    rows[0]["image_file"] = "elsewhere.png"
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="which holds 11 of the 12 pictures that prompts.jsonl of drawn names"):
        command(made, tmp_path, *arguments)


def test_batches_change_nothing(made, tmp_path):
    network = Network.open(made / "resnet", torch.device("cpu"))
    files = sorted((made / "real").iterdir())
    one, many = (features_of(files, network, tmp_path / str(batch), batch) for batch in (1, 64))
    torch.testing.assert_close(one, many)


def test_fid_is_said_of_fids_own_weights_alone(made, tmp_path, weights, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inception, "SIDE", 75)
    monkeypatch.setattr(picture_features, "SIDE", 75)
    names = command(made, tmp_path / "a", "--features", str(weights))
    assert "Fréchet distance (Inception of other weights features)" in names and "FID" not in names
    monkeypatch.setattr(inception, "FID_HASH", weights_hash(weights)[:8])
    named = command(made, tmp_path / "b", "--features", str(weights))
    assert {"FID", "KID"} < set(named)
    assert named["FID"].value == names["Fréchet distance (Inception of other weights features)"].value


def test_the_central_square_is_resized_without_aliasing(tmp_path):
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[:, :16] = stripes[:, -16:] = 77  # outside the square
    Picture.fromarray(stripes).save(tmp_path / "a.png")
    seen = read_square(tmp_path / "a.png", 16)
    assert seen.shape == (3, 16, 16) and seen.abs()[:, :, 1:-1].max() < 0.02, "the stripes became others"
    grey = read_square(tmp_path / "a.png", 64, 1)
    assert grey.shape == (1, 64, 64) and grey.unique().tolist() == [-1.0, 1.0]


def test_what_does_not_fit_is_named(made, tmp_path):
    (tmp_path / "empty").mkdir()
    base = ["eval", "images", "--drawn", str(made / "drawn"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="real and clip are None"):
        main(base)
    with pytest.raises(SystemExit, match="out is None and drawn is .*; a directory for the results fits for --out"):
        main([*base[:4], "--real", str(made / "real"), "--features", str(made / "resnet")])
    with pytest.raises(SystemExit, match="holds no pictures"):
        main([*base, "--real", str(tmp_path / "empty"), "--features", str(made / "resnet")])
    (tmp_path / "empty" / "prompts.jsonl").write_text('{"file": "pictures/0.png", "prompt": "a"}\n')
    with pytest.raises(ValueError, match="lacks 1 of its 1 pictures"):
        drawn_files(tmp_path / "empty")
