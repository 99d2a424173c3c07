"""GenEval: its rules on objects made by hand, and the whole command with a tiny random Mask2Former and CLIP."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from tests.transfusion.eval.test_clip import save_tiny_clip
from transfusion.cli import main
from transfusion.eval.clip import Clip
from transfusion.eval.detector import NAMES, Detection, Detector, box_of
from transfusion.eval.geneval import COLOURS, TEMPLATES, ColourJudge, cut_out, faults, kept, relations
from transfusion.eval.results import read_results


def at(x, y, side=20.0, score=0.8):
    """An object whose box of `side` is centred at (x, y)."""
    return Detection(score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def all_red(found, name):
    """Colours of objects all of which are red."""
    return ["red"] * len(found)


def wants(*include, exclude=()):
    """A prompt of objects as (class, count, further wishes)."""
    return {"include": [{"class": name, "count": count, **more} for name, count, more in include],
            "exclude": [{"class": name, "count": count} for name, count in exclude]}


def test_objects_above_the_threshold_are_kept_sixteen_of_a_class_at_most():
    objects = {"dog": [at(0, 0, score=score) for score in (0.2, 0.95, 0.3, 0.31)], "cat": [at(0, 0, score=0.1)],
               "cup": [at(0, 0, score=0.5 + i / 100) for i in range(20)]}
    found = kept(objects, "two_object")
    assert [one.score for one in found["dog"]] == [0.95, 0.31] and "cat" not in found
    assert len(found["cup"]) == 16 and found["cup"][0].score == pytest.approx(0.69)
    assert [one.score for one in kept(objects, "counting")["dog"]] == [0.95]


def test_counts_are_right_where_enough_and_not_too_many_are_found():
    two = wants(("dog", 2, {}), exclude=[("dog", 3)])
    dogs = [at(10, 10), at(50, 10), at(90, 10)]
    assert faults({"dog": dogs[:2]}, two, all_red) == []
    assert faults({"dog": dogs[:1]}, two, all_red) == ["expected dog>=2, found 1"]
    assert faults({"dog": dogs}, two, all_red) == ["expected dog<3, found 3"]
    assert faults({}, two, all_red) == ["expected dog>=2, found 0"]


def test_colours_are_those_of_the_likeliest_objects_alone():
    seen = []

    def colours(found, name):
        seen.append((name, len(found)))
        return ["red", "blue"][:len(found)]

    objects = {"cup": [at(0, 0), at(50, 0)]}
    assert faults(objects, wants(("cup", 1, {"color": "red"})), colours) == [] and seen == [("cup", 1)]
    assert faults(objects, wants(("cup", 2, {"color": "red"})), colours) == [
        "expected red cup>=2, found 1 red; and 1 red, 1 blue"]


@pytest.mark.parametrize("x, y, expected", [
    (100, 0, {"right of"}), (-100, 0, {"left of"}), (0, 100, {"below"}), (0, -100, {"above"}),
    (100, 100, {"right of", "below"}), (3, 0, set()), (0, 0, set()),
    (100, 55, {"right of"}),  # 55 - 4 of 114: 0.45
    (100, 70, {"right of", "below"}),  # 70 - 4 of 122: 0.54
])
def test_positions_take_a_tenth_of_both_sizes_off_and_more_than_half_of_the_distance(x, y, expected):
    share = [math.copysign(max(abs(side) - 0.1 * 40, 0), side) / math.hypot(x, y) if x or y else 0 for side in (x, y)]
    by_hand = {name for name, value in zip(("right of", "left of", "below", "above"),
                                           (share[0], -share[0], share[1], -share[1])) if value > 0.5}
    assert relations(at(x, y), at(0, 0)) == expected == by_hand


def test_positions_hold_for_every_pair_of_objects_and_need_the_other_one():
    prompt = wants(("cat", 1, {}), ("dog", 1, {"position": ["left of", 0]}))
    assert faults({"cat": [at(100, 0)], "dog": [at(0, 0)]}, prompt, all_red) == []
    assert faults({"cat": [at(0, 0)], "dog": [at(100, 0)]}, prompt, all_red) == [
        "expected dog left of target, found right of target"]
    assert faults({"dog": [at(100, 0)]}, prompt, all_red) == [
        "expected cat>=1, found 0", "no target for dog to be left of"]


def test_an_object_is_cut_out_of_its_picture_and_the_rest_is_grey():
    picture, mask = Picture.new("RGB", (8, 6), "blue"), np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    mask[1, 2] = False
    box = box_of(torch.from_numpy(mask))
    assert box == (2, 1, 5, 4) and box_of(torch.zeros(3, 3, dtype=torch.bool)) == (0, 0, 0, 0)
    cut = np.asarray(cut_out(picture, Detection(0.9, box, mask)))
    assert cut.shape == (3, 3, 3)
    assert cut[0, 0].tolist() == [0x99] * 3 and cut[2, 2].tolist() == [0, 0, 255]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random Mask2Former of three classes, a random CLIPModel, and pictures in GenEval's layout."""
    where = tmp_path_factory.mktemp("geneval")
    save_tiny_clip(where / "clip")
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label={0: "dog", 1: "cat", 2: "cup"}, label2id={"dog": 0, "cat": 1, "cup": 2})
    model = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(model.class_predictor.weight, std=2)  # scores that differ
    model.save_pretrained(where / "detector")
    (where / "detector" / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 384,
                                                                                      "longest_edge": 384}}))
    prompts = [wants(("dog", 1, {"color": "red"})) | {"tag": "colors", "prompt": "a red dog"},
               wants(("cat", 1, {}), exclude=[("cup", 1)]) | {"tag": "counting", "prompt": "a cat"}]
    random = np.random.default_rng(0)
    for number, prompt in enumerate(prompts):
        (where / "drawn" / f"{number:05}" / "samples").mkdir(parents=True)
        (where / "drawn" / f"{number:05}" / "metadata.jsonl").write_text(json.dumps(prompt))
        for sample in range(2):
            small = Picture.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            small.resize((96, 96)).save(where / "drawn" / f"{number:05}" / "samples" / f"{sample:04}.png")
    return where


def test_objects_have_the_scores_of_transformers_own_instance_segmentation(made):
    """At 384x384 both take the masks at one size; of all pairs of query and class it keeps as many as queries."""
    detector = Detector.from_pretrained(str(made / "detector"), torch.device("cpu"))
    picture = Picture.open(made / "drawn" / "00000" / "samples" / "0000.png").resize((384, 384))
    ours = [(one.score, name, one.mask) for name, ones in detector(picture).items() for one in ones]
    assert len(ours) == 36
    with torch.inference_mode():
        out = detector.model(pixel_values=detector._input(picture)[0])
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        out, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True)[0]
    assert len(theirs["segments_info"]) > 5
    for segment, mask in zip(theirs["segments_info"], theirs["segmentation"]):
        near = min(ours, key=lambda one: abs(one[0] - segment["score"]))
        assert near[0] == pytest.approx(segment["score"], abs=2e-6)
        assert near[1] == detector.names[segment["label_id"]]
        assert (near[2] != mask.bool().numpy()).mean() < 1e-3


def test_boxes_hold_their_masks_in_the_pictures_own_pixels(made):
    detector = Detector.from_pretrained(str(made / "detector"), torch.device("cpu"))
    picture = Picture.open(made / "drawn" / "00000" / "samples" / "0000.png").resize((100, 60))
    for one in (one for ones in detector(picture).values() for one in ones):
        assert one.mask.shape == (60, 100)
        left, top, right, bottom = map(int, one.box)
        assert one.mask.sum() == one.mask[top:bottom, left:right].sum()
        assert right <= 100 and bottom <= 60


def test_colours_are_the_likeliest_texts_of_clip(made):
    clip = Clip.from_pretrained(str(made / "clip"), torch.device("cpu"))
    picture = Picture.open(made / "drawn" / "00000" / "samples" / "0000.png").convert("RGB")
    found = [Detection(0.9, (8.0, 8.0, 56.0, 40.0)), Detection(0.8, (0.0, 0.0, 96.0, 96.0))]
    scores = []
    for colour in COLOURS:
        texts = [clip.texts([template.format(colour=colour, name="dog")])[0] for template in TEMPLATES]
        mean = sum(texts) / 3
        crops = [picture.crop(tuple(map(int, one.box))) for one in found]
        scores.append([float(clip.pictures([crop])[0] @ mean / mean.norm()) for crop in crops])
    expected = [COLOURS[i] for i in np.array(scores).argmax(0)]
    assert ColourJudge(clip).of(picture)(found, "dog") == expected


def test_the_command_scores_each_task_and_their_mean_and_writes_genevals_own_file(made, tmp_path):
    main(["eval", "geneval", "--drawn", str(made / "drawn"), "--detector", str(made / "detector"),
          "--clip", str(made / "clip"), "--out", str(tmp_path)])
    found = {result.metric: result for result in read_results(tmp_path).values()}
    lines = [json.loads(line) for line in (tmp_path / "geneval.jsonl").read_text().splitlines()]
    names = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert len(lines) == 4 and set(lines[0]) == names
    assert set(found) == {"colors", "counting", "overall"}
    for task in ("colors", "counting"):
        assert found[task].value == np.mean([line["correct"] for line in lines if line["tag"] == task])
    assert found["overall"].value == (found["colors"].value + found["counting"].value) / 2
    assert found["overall"].n == 4 and "without single_object, two_object, position" in found["overall"].note
    assert found["overall"].judge.startswith("Mask2Former ") and "mmdet" in found["overall"].note


def test_only_counted_objects_must_be_as_sure_as_counting_asks(made, tmp_path, monkeypatch):
    found = [Detection(score, (8.0, 8.0, 56.0, 40.0)) for score in (0.5, 0.95)]
    monkeypatch.setattr(Detector, "__call__", lambda *_: {"dog": found})
    main(["eval", "geneval", "--drawn", str(made / "drawn"), "--detector", str(made / "detector"),
          "--clip", str(made / "clip"), "--out", str(tmp_path)])
    for line in map(json.loads, (tmp_path / "geneval.jsonl").read_text().splitlines()):
        scores = [box[-1] for box in json.loads(line["details"])["dog"]]
        assert scores == ([0.95] if line["tag"] == "counting" else [0.95, 0.5])


def test_a_drawing_that_is_not_finished_is_refused(made, tmp_path):
    shutil.copytree(made / "drawn", tmp_path / "pictures")
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    rows = [json.dumps({"file": str(path.relative_to(tmp_path)), "prompt": "a"}) for path in files]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    files[-1].unlink()
    with pytest.raises(SystemExit, match="lacks 1 of its 4 pictures"):
        main(["eval", "geneval", "--drawn", str(tmp_path), "--detector", str(made / "detector"),
              "--clip", str(made / "clip")])


def test_what_does_not_fit_is_named(made, tmp_path):
    base = ["--detector", str(made / "detector"), "--clip", str(made / "clip"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="holds no 00000/metadata.jsonl"):
        main(["eval", "geneval", "--drawn", str(tmp_path), *base])
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    Picture.new("RGB", (8, 8)).save(tmp_path / "00000" / "samples" / "0000.png")
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps({"tag": "counting", **wants(("tiger", 1, {}))}))
    with pytest.raises(SystemExit, match="wants 'tiger', a class that .* does not know"):
        main(["eval", "geneval", "--drawn", str(tmp_path), *base])
    with pytest.raises(ValueError, match="Detector.from_pretrained: name is"):
        Detector.from_pretrained(str(tmp_path), torch.device("cpu"))


def test_there_are_eighty_names_of_coco():
    assert len(set(NAMES)) == 80 and (NAMES[0], NAMES[64], NAMES[79]) == ("person", "computer mouse", "toothbrush")
