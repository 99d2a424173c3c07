"""A tiny study from the command to its files, its cache, and sentences from numbers that are known beforehand.

Both kinds of pictures, patches and codes, are trained at equal cost.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import transfusion.recipes.studies.run as runs
import transfusion.train.transfusion as trainer
from transfusion import Image, Text
from transfusion.data.batches import draw_batch, step_generator
from transfusion.data.dataset import Arrangement, DatasetSettings
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.digits import Digits
from transfusion.recipes.emoji import STYLES, Emoji
from transfusion.recipes.studies.arms import DATA, METRICS, Study, studies
from transfusion.recipes.studies.command import fast, main
from transfusion.recipes.studies.emoji_kinds import KINDS, EmojiKinds
from transfusion.recipes.studies.measure import Yardstick, caption_accuracy, flops, text_loss
from transfusion.recipes.studies.report import Difference, by_class, cell, comparisons, difference, mosaic, sentence
from transfusion.recipes.studies.representations import Codes, Patches
from transfusion.recipes.studies.vq import VQSettings, from_codes, load_autoencoder, to_codes, train_autoencoder
from transfusion.sequence import encode, pack
from transfusion.train.resuming import found_resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A fast study of tokens: its directory and what it printed."""
    out, printed = tmp_path_factory.mktemp("studies"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["tokens", "--fast", "--seeds", "0", "1", "--out", str(out)])
    return out / "fast", printed.getvalue()


@pytest.fixture(scope="module")
def bench(finished):
    return runs.Bench(fast(DATA["digits"]()), finished[0])


def model_of(bench, arm):
    return Transfusion.from_pretrained(bench.out / f"{arm}-0").eval()


def test_a_study_leaves_its_table_its_numbers_a_plot_and_samples(finished):
    out, printed = finished
    table = (out / "digits-tokens.md").read_text()
    assert (table in printed and "7.72 / 27.2 / 16.8 / 25.5 |" in table and "| *real, as codes* |" in table
            and "±" in table)
    assert re.search(r"about \d+ minutes in all", printed).start() < printed.index("# Continuous patches")
    numbers = json.loads((out / "digits-tokens.json").read_text())
    assert sorted((run["arm"], run["seed"]) for run in numbers["runs"]) == [("codes", 0), ("codes", 1), ("linear", 0),
                                                                            ("linear", 1)]
    assert all(math.isfinite(run["metrics"][name]) for run in numbers["runs"] for name in METRICS)
    mean = sum(run["metrics"]["text_loss"] for run in numbers["runs"] if run["arm"] == "codes") / 2
    line = next(line for line in table.splitlines() if line.startswith("| Chameleon"))
    assert line.split(" | ")[8].startswith(f"{mean:.3g} ±")
    for name in ("digits-tokens.png", "digits-tokens-samples.png"):
        with Picture.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 10


def test_finished_runs_are_read_and_only_changed_ones_run_again(finished, bench, monkeypatch):
    done = []
    monkeypatch.setattr(runs, "run", lambda bench, arm, seed: done.append((arm.name, seed)) or {})
    monkeypatch.setattr(runs, "cost", lambda *_: 0.0)
    arms = bench.data.arms()
    pair = [arms["linear"], arms["codes"]]
    assert ([(r["arm"], r["seed"]) for r in runs.run_all(bench, pair, (0, 1))]
            == [("linear", 0), ("linear", 1), ("codes", 0), ("codes", 1)] and not done)
    runs.run_all(bench, pair, (0, 1, 2))
    assert done == [("linear", 2), ("codes", 2)]
    done.clear()
    other = dataclasses.replace(bench.data, autoencoder=dataclasses.replace(bench.data.autoencoder, codes=9))
    runs.run_all(SimpleNamespace(data=other, out=bench.out), pair, (0,))
    assert done == [("codes", 0)]
    done.clear()
    other = dataclasses.replace(bench.data, measuring=dataclasses.replace(bench.data.measuring, guidance=2.0))
    runs.run_all(SimpleNamespace(data=other, out=bench.out), pair, (0,))
    assert done == [("linear", 0), ("codes", 0)]


def test_the_row_of_codes_is_there_where_a_study_has_them_whoever_made_them(finished, bench):
    again = runs.Bench(bench.data, finished[0])  # as in another process, which made no codes
    assert "real, as codes" not in again.real(False) and again.real(True) == bench.real(True)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(finished, bench, monkeypatch, tmp_path):
    again, arm = runs.Bench(bench.data, finished[0]), bench.data.arms()["codes"]
    again.out, train = tmp_path, trainer.train
    shutil.copytree(bench.codes().path, tmp_path / bench.codes().path.name)
    monkeypatch.setattr(trainer, "train", lambda config: train(dataclasses.replace(config, stop_after=1)))
    with pytest.raises(KeyboardInterrupt, match="1 of 2 steps are done"):
        runs.run(again, arm, 0)
    assert not (tmp_path / "codes-0" / "metrics.json").exists()
    resumed = []
    monkeypatch.setattr(trainer, "train", lambda config: resumed.append(found_resume(config).resume) or train(config))
    result, whole = runs.run(again, arm, 0), json.loads((bench.out / "codes-0" / "metrics.json").read_text())
    assert resumed == [True] and result["metrics"] == whole["metrics"]
    (tmp_path / "codes-0" / "left over").touch()
    runs.run(again, dataclasses.replace(arm, data={"caption_first": 0.7}), 0)
    assert resumed == [True, False] and not (tmp_path / "codes-0" / "left over").exists()
    # put aside, not thrown away
    assert [path.name for path in tmp_path.glob("codes-0-*/*") if path.name == "left over"] == ["left over"]


def test_how_a_run_is_gone_on_with_is_no_part_of_its_key():
    config = DATA["digits"]().base
    assert runs.key(config) == runs.key(dataclasses.replace(config, auto_resume=True))
    assert runs.key(config) != runs.key(dataclasses.replace(config, seed=config.seed + 1))


def test_arms_change_what_they_are_named_after_and_nothing_else():
    data = DATA["digits"]()
    base = dataclasses.asdict(data.base)
    changed = {
        name: {part: {key
                      for key, value in dataclasses.asdict(arm.config(data.base, data.base.out, 0))[part].items()
                      if value != base[part][key]} for part in ("model", "data", "optim", "tune")}
        for name, arm in data.arms().items()
    }
    found = {name: set().union(*parts.values()) for name, parts in changed.items()}
    unet = {"image_layers", "unet_channels"}
    assert found == {"linear": set(), "linear-causal": {"image_attention"}, "unet": unet,
                     "unet-causal": unet | {"image_attention"}, "unet-no-limit": unet | {"noise_limit"},
                     "linear-patch-1": {"patch_size"}, "linear-patch-4": {"patch_size"},
                     "unet-patch-4": unet | {"patch_size"}, "codes": set()}
    assert all(row.arm in found for study in studies(data).values() for row in study.rows)
    assert all(arm in {row.arm for row in study.rows} for study in studies(data).values() for pair in study.pairs
               for arm in pair)


def test_both_kinds_of_pictures_cost_the_same_in_the_layers_and_what_transformers_decoder_does(bench):
    found, lengths = {}, {}
    for name, pictures in (("linear", Patches()), ("codes", bench.codes())):
        model = model_of(bench, name)
        document = encode([Text(Digits.caption(3)), *pictures.parts(bench.train.pictures[:1])], model.tokenizer,
                          model.config)
        lengths[name] = len(document.tokens)
        found[name] = flops(model, pack([document], lengths[name], model.config.patch_dim))
        config = model.config.text_config
        plain = LlamaForCausalLM._from_config(type(config)(**config.to_dict()), attn_implementation="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain.model(inputs_embeds=torch.zeros(1, lengths[name], config.hidden_size))
        pairs, heads = lengths[name]**2, config.num_hidden_layers * config.num_attention_heads * config.head_dim
        counted = sum(sum(counter.get_flop_counts()[f"LlamaModel.layers.{i}"].values())
                      for i in range(config.num_hidden_layers))
        assert counted == found[name]["layers"] + 4 * heads * pairs
    assert lengths["linear"] == lengths["codes"] and found["linear"]["layers"] == found["codes"]["layers"]
    # what patches see of later ones
    assert found["linear"]["attention"] - found["codes"]["attention"] == 4 * heads * 16 * 15 // 2


def test_documents_of_codes_hold_the_same_captions_orders_and_pictures(bench):
    pictures, settings = bench.codes(), Arrangement(caption_first=0.6, caption_dropout=0.3)
    model = model_of(bench, "codes")
    config = pictures.prepare(bench.data.arms()["codes"].config(bench.data.base, bench.out / "codes-0", 0))
    plain, coded = Digits(), config.data.open()
    assert config.data.name == "digits-codes"
    first, kinds = model.tokenizer.convert_tokens_to_ids("<code 0>"), set()
    for seed in range(40):
        parts, written = (dataset.document(torch.Generator().manual_seed(seed), settings) for dataset in (plain, coded))
        document = encode(written, model.tokenizer, model.config)
        image = next(part.latent for part in parts if isinstance(part, Image))
        start = document.tokens.index(model.config.boi_token_id) + 1
        assert document.tokens[start + 16] == model.config.eoi_token_id and not document.images
        codes = torch.tensor(document.tokens[start:start + 16]).view(1, 4, 4) - first
        assert torch.equal(codes, to_codes(pictures.autoencoder, image[None]))
        lone, captions = len(parts) == 1, [part for part in parts if isinstance(part, Text)]
        assert captions == [part for part in written if isinstance(part, Text) and "<" not in part.text and part.loss]
        assert (not lone
                or document.tokens[start + 17] != model.tokenizer.eos_token_id and not document.targets[start + 17])
        assert all(document.targets[start - 1:start + 17])
        kinds.add((lone, isinstance(parts[0], Text)))
    assert len(kinds) == 3


def test_codes_are_the_nearest_vectors_and_come_back_as_the_autoencoder_decodes_them(tmp_path):
    images = Digits().pictures[:300]
    settings = VQSettings(channels=(8, 16), codes=16, steps=100, batch=32)
    made = train_autoencoder(images, tmp_path, settings)
    autoencoder = load_autoencoder(tmp_path)
    codes = to_codes(autoencoder, images)
    with torch.no_grad():
        latents = autoencoder.encode(images).latents.movedim(1, -1)
        distance = (latents[..., None, :] - autoencoder.quantize.embedding.weight).square().sum(-1)
        expected = autoencoder(images).sample.clamp(-1, 1)
    assert codes.shape == (300, 4, 4) and torch.equal(codes, distance.argmin(-1)) and len(codes.unique()) > 8
    torch.testing.assert_close(from_codes(autoencoder, codes), expected, rtol=1e-4, atol=1e-4)
    error, spread = (expected - images).square().mean(), (images - images.mean(0)).square().mean()
    assert error < 0.6 * spread and torch.equal(codes, to_codes(made, images))
    latents = torch.randn(2, 8, 4, 4, requires_grad=True)
    nearest = made.quantize.embedding(made.quantize(latents)[2][2]).view(2, 4, 4, 8).movedim(-1, 1)
    gradient, = torch.autograd.grad(made.quantize(latents)[1], latents)
    torch.testing.assert_close(gradient, 0.25 * 2 * (latents - nearest) / latents.numel())  # commitment 0.25


def test_codes_are_drawn_from_the_guided_distribution(bench):
    model, pictures, count = model_of(bench, "codes"), bench.codes(), 3000
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    drawn = []
    spy = Codes(pictures.path)
    original = spy.autoencoder.quantize.embedding.forward
    spy.autoencoder.quantize.embedding.forward = lambda codes: drawn.append(codes) or original(codes)
    caption = Digits.caption(3)
    spy.draw(model, [caption] * count, 0, 2.0, 1)
    tokens = encode([Text(caption)], model.tokenizer, model.config, end=False).tokens
    boi, first = model.config.boi_token_id, model.tokenizer.convert_tokens_to_ids("<code 0>")
    with torch.no_grad():
        whole, nothing = (model.text_logits(torch.tensor([[*prompt, boi]]))[0, -1].log_softmax(-1)
                          for prompt in (tokens, tokens[:1]))
    expected = (nothing + 2.0 * (whole - nothing))[first:first + len(spy.names)].softmax(-1)
    codes = next(codes for codes in drawn if codes.shape == (count, 4, 4))
    found = codes[:, 0, 0].bincount(minlength=len(spy.names)) / count
    assert (((found - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()
            and expected.max() < 0.95)


def test_losses_and_accuracies_are_what_their_definitions_say(bench):
    model, captions = model_of(bench, "codes"), [Digits.caption(i) for i in (3, 7)]
    ids = [model.tokenizer.encode(caption, add_special_tokens=False) for caption in captions]
    parts = bench.codes().parts(bench.train.pictures[:2])
    for prompts in ([[], []], [[part] for part in parts]):
        total = 0.0
        for prompt, own in zip(prompts, ids):
            tokens = [
                model.tokenizer.bos_token_id,
                *(i for part in prompt for i in model.tokenizer.encode(part.text, add_special_tokens=False)), *own
            ]
            with torch.no_grad():
                logits = model.text_logits(torch.tensor([tokens]))[0].log_softmax(-1)
            total -= sum(logits[len(tokens) - len(own) + k - 1, token].item() for k, token in enumerate(own))
        assert text_loss(model, prompts, captions) == pytest.approx(total / sum(map(len, ids)), rel=1e-4)
    writer = SimpleNamespace(tokenizer=model.tokenizer,
                             generate_batch=lambda prompts, **_: [[Text(" a handwritten three")],
                                                                  [Text("a handwritten six")], []])
    assert caption_accuracy(writer, [[]] * 3, [Digits.caption(i) for i in (3, 7, 7)]) == 1 / 3


def test_real_pictures_measured_as_drawn_ones_are_perfect(bench):
    yardstick = Yardstick(bench.train, bench.held_out, bench.yardstick.classifier)
    images, labels = (torch.cat([getattr(split, name) for split in (bench.train, bench.held_out)])
                      for name in ("pictures", "labels"))
    found = yardstick.pictures(images, labels)
    assert found["frechet"] == pytest.approx(0, abs=1e-3) and found["precision"] == found["recall"] == 1
    assert yardstick.floor()["label_accuracy"] == pytest.approx(
        yardstick.pictures(bench.held_out.pictures, bench.held_out.labels)["label_accuracy"]
    )


def test_differences_are_paired_by_seed():
    a, b = {0: 10.0, 1: 20.0, 2: 33.0}, {0: 9.0, 1: 18.0, 2: 30.0, 5: 100.0}
    found = difference(a, b)  # 1, 2, 3: mean 2, standard deviation 1
    # 3.5 standard errors; chance at 95 % gives 4.3
    assert found.mean == 2 and found.error == pytest.approx(1 / math.sqrt(3)) and found.sign == 0
    assert difference(a | {2: 32.0}, b).sign == 1
    assert (difference({0: 1.0}, {0: 2.0}).sign == 0 and Difference(-1.0, 0.24).sign == 0
            and Difference(-1.0, 0.23).sign == -1)
    assert (Difference(-1.0, 0.24, seeds=4).sign == -1 and Difference(1.0, 0.09, seeds=2).sign == 0
            and difference({0: 1.0, 1: 3.0}, {0: 1.0, 1: 1.0}).seeds == 2)


@pytest.mark.parametrize("metric,ours,paper,words",
                         [("frechet", Difference(-4.4, 1.0), (20.3, 61.3),
                           "A is better: agrees with the paper (FID 20.3 and 61.3, A better)"),
                          ("frechet", Difference(4.4, 1.0), (20.3, 61.3), "B is better: differs from the paper"),
                          ("frechet", Difference(-1.0, 1.0), (20.3, 61.3),
                           "no difference seen: does not show the paper's order"),
                          ("label_accuracy", Difference(0.2, 0.01), (24.0, 23.0),
                           "A is better: agrees with the paper (CLIP 24 and 23, A better)"),
                          ("label_accuracy", Difference(0.0, 0.1), (25.4, 25.3),
                           "no difference seen: nor in the paper (CLIP 25.4 and 25.3, no difference)"),
                          ("text_loss", Difference(0.2, 0.01), (10.4, 10.4),
                           "B is better: differs from the paper (C4 ppl 10.4 and 10.4, no difference)"),
                          ("caption_accuracy", Difference(0.2, math.nan), (16.0, 12.7),
                           "one seed, no error (CIDEr 16 and 12.7, A better)"),])
def test_a_sentence_says_whether_the_order_is_the_papers(metric, ours, paper, words):
    assert words in sentence(metric, ("A", "B"), ours, paper)


def test_each_pair_is_compared_in_each_metric_that_the_paper_has():
    study = studies(DATA["digits"]())["attention"]
    assert isinstance(study, Study) and study.table == 5
    results = [{"arm": row.arm, "seed": seed, "metrics": dict.fromkeys(METRICS, seed + (row.arm == "linear"))}
               for row, seed in itertools.product(study.rows, range(3))]
    lines = comparisons(study, results)
    said = "linear, bidirectional minus linear, causal: +1 ± 0, linear, causal is better: differs from the paper (FID"
    assert len(lines) == 8 and said in lines[0]


def test_cells_and_pictures_by_hand():
    assert cell([1.0, 2.0, 3.0]) == "2 ± 1" and cell([0.5]) == "0.5"
    images = torch.tensor([-1.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    chosen = by_class(images, torch.tensor([1, 0, 1]), 2, 2, blank=-1.0)
    assert chosen[:, 0, 0, 0].tolist() == [1, -1, -1, 0]
    picture = mosaic(chosen, 2, line=0.25)
    assert (picture.shape == (6, 6, 1) and picture[[0, 0, 3, 3], [0, 3, 0, 3], 0].tolist() == [1, 0, 0, 0.5]
            and (picture[2] == 0.25).all())
    wide = torch.arange(6.0).view(1, 1, 2, 3) / 5
    torch.testing.assert_close(mosaic(wide, 1, line=0.25)[:2, :3, 0], (wide[0, 0] + 1) / 2)


def test_emoji_have_the_captions_of_their_category_and_style_and_are_as_small_as_said():
    kinds, emoji = EmojiKinds("held-out"), Emoji("held-out")
    assert (kinds.pictures.shape == (len(emoji.pictures), *kinds.image_shape) and kinds.image_shape == (3, 16, 16)
            and set(KINDS) == set(emoji.category_names))
    torch.testing.assert_close(kinds.pictures[5, :, 3, 7], emoji.pictures[5, :, 6:8, 14:16].mean((1, 2)))
    said = [kinds.classes[label] for label in kinds.labels]
    assert said == [f"{KINDS[emoji.category_names[c]]}, {STYLES[s]} style"
                    for c, s in zip(emoji.categories, emoji.styles)]
    documents = [
        kinds.document(torch.Generator().manual_seed(seed), Arrangement(caption_first=0.5, caption_dropout=0.3))
        for seed in range(60)
    ]
    assert {tuple(type(part) for part in parts) for parts in documents} == {(Image,), (Text, Image), (Image, Text)}
    for parts in documents:
        at = next(i
                  for i, image in enumerate(kinds.pictures)
                  if torch.equal(image, next(p.latent for p in parts if isinstance(p, Image))))
        assert [part.text for part in parts if isinstance(part, Text)] in ([], [said[at]])


def test_codes_train_on_what_they_are_and_pictures_are_never_images(bench):
    model = model_of(bench, "codes")
    config = bench.codes().prepare(bench.data.arms()["codes"].config(bench.data.base, bench.out / "codes-0", 0))
    sequence, _ = draw_batch(config.data.open(), DatasetSettings(), model.tokenizer, model.config, 1, 128,
                             step_generator(0, 0))
    assert sequence.image_count == 0 and torch.equal(sequence.mask().dense(), sequence.causal_mask().dense())
    output = model.train()(sequence, torch.zeros(0), 0)
    output.loss.backward()
    assert (output.diffusion_loss == 0
            and all(not p.grad.any() for p in model.image_head.parameters() if p.grad is not None))


def test_a_wrong_name_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["attension", "--out", str(tmp_path)])


def test_an_autoencoder_of_a_step_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    images = Digits().pictures[:64]
    settings = VQSettings(channels=(8, 8), codes=8, steps=6, batch=4)
    with pytest.raises(FloatingPointError, match="train_autoencoder: in step 0 loss is nan.*; nothing was saved"):
        train_autoencoder(images * math.nan, tmp_path / "vq", settings)
    assert not (tmp_path / "vq").exists()
    train_autoencoder(images, tmp_path / "vq", settings)
    (tmp_path / "vq" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="vq/diffusion_pytorch_model.safetensors is damaged"):
        load_autoencoder(tmp_path / "vq")


def test_damaged_metrics_of_a_run_are_refused_by_the_files_name(tmp_path):
    bench = SimpleNamespace(data=fast(DATA["digits"]()), out=tmp_path)
    (tmp_path / "linear-0").mkdir()
    (tmp_path / "linear-0" / "metrics.json").write_text('{"key": ')
    with pytest.raises(ValueError, match="linear-0/metrics.json is damaged .*; delete it, and the same command"):
        runs.finished(bench, bench.data.arms()["linear"], 0)
