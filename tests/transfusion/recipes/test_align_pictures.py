"""Image layers learn to write captions as token embeddings, of pictures that they were never shown, too."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.transfusion.conftest import tiny_model
from transfusion.model.transfusion import Transfusion
from transfusion.recipes import align_pictures
from transfusion.recipes.align_pictures import (
    PLACES,
    SLOTS,
    AlignOptimSettings,
    AlignSettings,
    AlignTask,
    Captions,
    ShownPairs,
    align,
    changed,
    learning_rate,
)
from transfusion.recipes.emoji_styles import Drawings

COLORS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "grey": (0, 0, 0)}


def drawings():
    """Squares of four colours, each large, small and framed; the same a little lower and darker are held out."""
    pictures, places = [], []
    for label, color in enumerate(COLORS.values()):
        for style in range(3):
            for held in (False, True):
                rows, columns = (slice(4 + 6 * (style == 1) + more, 28 - 6 * (style == 1) + more) for more in (held, 0))
                picture = torch.ones(3, 32, 32)
                picture[:, rows, columns] = torch.tensor(color).float().view(3, 1, 1) * (0.9 if held else 1.0)
                if style == 2:
                    picture[:, 12:20, 12:20] = 1.0
                pictures.append(picture)
                places.append((label, style, held))
    labels, styles, held = torch.tensor(places).unbind(1)
    return Drawings(torch.stack(pictures), labels, styles, labels // 2, torch.zeros_like(labels), held.bool(),
                    list(COLORS), ("large", "small", "framed"), ["warm", "cold"], ["Food & Drink"])


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(align_pictures, "read_drawings", lambda folder: drawings())
    channels = {"unet_channels": (16, 16, 32, 32), "image_channels": 3}
    model = tiny_model(image_layers="unet", unet_blocks=1, patch_size=8, **channels)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # as long as what the image layers write
    for layer in (one for one in model.patch_embedding.modules() if hasattr(one, "reset_parameters")):
        layer.reset_parameters()
    model.save_pretrained(tmp_path / "init")
    return tmp_path / "init"


def settings(start, out, **more):
    optim = AlignOptimSettings(**dict(steps=120, batch=16, lr=3e-3) | more.pop("optim", {}))
    return AlignSettings(model=start, drawings=Path("unused"), out=out, optim=optim, save_every=60, device="cpu",
                         **more)


def test_pictures_that_were_never_shown_are_named_and_the_language_model_stays(start, tmp_path):
    found = align(settings(start, tmp_path / "out"))
    assert min(found.values()) > 0.8, "twelve pictures; four names, two kinds, three styles"
    assert json.loads((tmp_path / "out" / "align.json").read_text()) == found
    model = Transfusion.from_pretrained(tmp_path / "out")
    before, after = (dict(one.named_parameters()) for one in (Transfusion.from_pretrained(start), model))
    moved = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("patch_embedding.") for name in moved)
    captions, output = Captions(drawings(), model.tokenizer), model.patch_embedding.output
    assert torch.equal(output.words, model.get_input_embeddings().weight[captions.words])
    losses = [json.loads(line)["captions"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_each_thing_of_a_scene_is_to_say_where_it_is_and_a_white_tile_is_nothing(start, tmp_path):
    config = settings(start, tmp_path / "out", optim={"batch": 160})
    task = AlignTask(config, Transfusion.from_pretrained(start), drawings())
    alone, scenes, targets = task.batches(0)[0].inputs
    of_alone, of_scenes = targets[:, list(SLOTS).index("place")].split([len(alone), len(PLACES) * len(scenes)])
    assert (of_alone == len(PLACES)).all() and len(scenes) == 20
    for i, name in enumerate(PLACES):
        rows, columns = (slice(0, 32) if word in ("top", "left") else slice(32, 64) for word in name.split())
        white = (scenes[:, :, rows, columns] == 1).flatten(1).all(1)
        assert torch.equal(of_scenes.view(-1, len(PLACES))[:, i], torch.where(white, len(PLACES) + 1, i))
        words = task.captions.words[task.captions.spelled["place"][i]].tolist()
        assert words == task.model.tokenizer(f" {name}", add_special_tokens=False).input_ids[:SLOTS["place"]]
    assert (of_scenes == len(PLACES) + 1).any()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(start, tmp_path):
    short = {"steps": 6, "accumulate": 2}
    whole = align(settings(start, tmp_path / "whole", optim=short))
    with pytest.raises(KeyboardInterrupt, match="2 of 6 steps are done"):
        align(settings(start, tmp_path / "parts", optim=short, stop_after=2))
    assert not (tmp_path / "parts" / "align.json").exists()  # by which `seeing` takes it for done
    assert align(settings(start, tmp_path / "parts", optim=short, resume=True)) == whole
    first, second = (Transfusion.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_has_saved_is_not_begun_anew_unasked(start, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="2 of 120 steps are done; add --resume"):
        align(settings(start, out, stop_after=2))
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run of 2 steps; --resume goes on"):
        align(settings(start, out))
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_captions_are_the_tokens_of_name_kind_and_style_and_the_likeliest_is_read(start):
    tokenizer = Transfusion.from_pretrained(start).tokenizer
    captions = Captions(drawings(), tokenizer)
    for part, names in (("name", list(COLORS)), ("style", ["large", "small", "framed"])):
        for label, name in enumerate(names):
            ids = captions.words[captions.spelled[part][label]].tolist()
            own = tokenizer(f" {name}", add_special_tokens=False).input_ids[:SLOTS[part]]
            assert ids[:len(own)] == own and set(ids[len(own):]) <= {tokenizer(".").input_ids[0]}
            scores = torch.zeros(1, SLOTS[part], len(captions.words))
            scores[0, torch.arange(SLOTS[part]), captions.spelled[part][label]] = 5.0
            assert captions.read(part, scores).argmax() == label


def test_a_pair_that_is_never_shown_counts_neither_for_nor_against(start):
    pictures = drawings()
    missing = (pictures.labels == 3) & (pictures.styles == 2)                                             # grey, framed
    captions = Captions(pictures, Transfusion.from_pretrained(start).tokenizer)
    pairs = ShownPairs(pictures.of(~missing), captions)
    cases = ("name", {"style": torch.tensor([2, 1])}, 3), ("style", {"name": torch.tensor([3, 1])}, 2)
    for part, given, absent in cases:
        spelled = captions.spelled[part]
        scores = torch.randn(2, SLOTS[part], len(captions.words), requires_grad=True)
        read = torch.randn(2, len(spelled), requires_grad=True)
        words, answers = pairs.only(part, scores, read, given)
        loss = cross_entropy(words.flatten(0, 1), spelled[[0, 0]].flatten())  # red, or large, twice
        (loss + cross_entropy(answers, torch.tensor([0, 0]))).backward()
        others = [spelled[i] for i in range(len(spelled)) if i != absent]
        own = [j for j in range(spelled.shape[1]) if all(spelled[absent, j] != other[j] for other in others)]
        missed, learned = scores.grad[:, own, spelled[absent, own]]
        assert own and (missed == 0).all() and (learned > 0).all()
        nowhere = torch.ones(SLOTS[part], len(captions.words), dtype=torch.bool)
        nowhere[torch.arange(SLOTS[part]), spelled] = False  # words that no answer has in that place
        assert nowhere.any() and (scores.grad[:, nowhere] > 0).all()
        assert read.grad[0, absent] == 0 < read.grad[1, absent] and read.grad[0, 0] < 0 and (read.grad[0, -1] > 0).all()
        assert ((read.grad[0] != 0).sum(), (read.grad[1] != 0).sum()) == (len(spelled) - 1, len(spelled))


def test_nothing_is_learned_from_what_is_held_out(start, tmp_path, monkeypatch):
    """Without them, and with others in their place, training is the same to the bit."""
    whole, found = drawings(), []
    others = whole._replace(pictures=torch.where(whole.held.view(-1, 1, 1, 1), -whole.pictures, whole.pictures),
                            labels=torch.where(whole.held, 3 - whole.labels, whole.labels),
                            styles=torch.where(whole.held, 2 - whole.styles, whole.styles))
    for number, given in enumerate((whole, others, whole.of(~whole.held | (torch.arange(len(whole.held)) == 1)))):
        monkeypatch.setattr(align_pictures, "read_drawings", lambda folder, given=given: given)
        align(settings(start, tmp_path / str(number), optim={"steps": 3}))
        found.append(Transfusion.from_pretrained(tmp_path / str(number)).state_dict())
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_views_are_changed_by_the_generator_alone_and_some_are_left_as_they_are():
    pictures = drawings().pictures.repeat(10, 1, 1, 1)
    one, same, other = (changed(pictures, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.abs().max() <= 1
    left = (one == pictures).flatten(1).all(1).double().mean()
    assert 0.08 < left < 0.35


def test_settings_and_models_that_do_not_fit_are_refused(start, tmp_path):
    with pytest.raises(ValueError, match="batch is 12; a multiple of 8"):
        align(settings(start, tmp_path / "out", optim={"batch": 12}))
    tiny_model(image_channels=3, patch_size=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="image layers 'dit' and 64 tokens a picture; U-Net layers that make 16"):
        align(settings(tmp_path / "other", tmp_path / "out"))
    with pytest.raises(ValueError, match="autocast is True; False fits"):
        align(settings(start, tmp_path / "out", autocast=True))
    with pytest.raises(ValueError, match="what is read would be written over"):
        align(dataclasses.replace(settings(start, tmp_path / "styles"), drawings=tmp_path / "styles"))
    rates = [learning_rate(step, AlignOptimSettings(steps=80, lr=1.0)) for step in range(80)]
    assert rates[0] == pytest.approx(0.5) and max(rates) > 0.99 and rates[-1] < 0.01
