"""What is trained and what is not: full training, images alone, LoRA; adapters that come back as they were."""
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.transfusion.model.test_from_language_model import language_model
from tests.transfusion.train.test_transfusion import losses, small
from transfusion import Text, Transfusion, TransfusionConfig
from transfusion.model.config import BACKBONES
from transfusion.model.from_language_model import InitSettings, init
from transfusion.model.lora import TuneSettings, find_base, load_adapter, prepare, trained_table
from transfusion.train.average import Average, trained_parameters
from transfusion.train.transfusion import start_model, train


@pytest.fixture(
    scope="module", params=["llama, untied", "qwen2, tied", "llama, adaln", "qwen3, mixture_of_transformers"]
)
def start(request, tmp_path_factory):
    path, (family, kind) = tmp_path_factory.mktemp("start"), request.param.split(", ")
    llm = language_model(path / "llm", family, tied=kind == "tied")
    return init(
        InitSettings(
            llm=llm,
            out=path / "model",
            image_channels=1,
            image_size=(8, 8),
            backbone=kind if kind in BACKBONES else "decoder",
        )
    )


def run(out, start, trained, **changes):
    config = small(out, tune=TuneSettings(start=start, trained=trained, lora_rank=4, lora_alpha=8), **changes)
    train(config)
    return config


def text_logits(model):
    tokens = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().text_logits(tokens)


@pytest.mark.parametrize("trained", ["images", "lora"])
def test_an_adapter_holds_what_was_trained_and_comes_back_to_equal_logits(tmp_path, start, trained):
    config = run(tmp_path, start, trained, optim=dataclasses.replace(small(tmp_path).optim, ema=0.0))
    base, again = Transfusion.from_pretrained(start), Transfusion.from_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not (tmp_path / "model.safetensors").exists()
    assert {p.suffix for p in tmp_path.iterdir() if p.is_file()} <= {".json", ".jsonl", ".md", ".safetensors", ".jinja"}
    assert any("image_head" in name for name in names) and any("patch_embedding" in name for name in names)
    assert any("lora_A" in name for name in names) == (trained == "lora")
    assert (
        sum(
            x.numel() for name, x in load_file(tmp_path / "adapter_model.safetensors").items() if "embed_tokens" in name
        )
        == 2 * 32
    )

    trained_model = prepare(Transfusion.from_pretrained(start), config.tune)
    state = load_file(tmp_path / "resume" / "state.safetensors")
    with torch.no_grad():
        for name, p in trained_model.named_parameters():
            if p.requires_grad:
                p.copy_(state[f"model.{name}"])
    torch.testing.assert_close(text_logits(again), text_logits(trained_model.get_base_model()), rtol=1e-5, atol=1e-5)
    assert again.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    boi, eoi = base.config.boi_token_id, base.config.eoi_token_id
    ours, theirs = (m.backbone.decoder.get_input_embeddings().weight for m in (again, base))
    moved = (ours != theirs).any(-1).nonzero()[:, 0].tolist()
    assert boi in moved and set(moved) <= {boi, eoi}
    assert not torch.equal(again.image_head.linear.weight, base.image_head.linear.weight)
    ours, theirs = (text_logits(m)[..., :min(boi, eoi)] for m in (again, base))
    assert torch.equal(ours, theirs) == (trained == "images")
    assert all(isinstance(part, Text) for part in again.generate([Text("a")], max_new_tokens=2, max_images=0))


def test_full_training_changes_everything_and_saves_a_whole_model(tmp_path, start):
    run(tmp_path, start, "all")
    base, again = (Transfusion.from_pretrained(path).state_dict() for path in (start, tmp_path))
    changed = {name for name in base if not torch.equal(base[name], again[name])}
    assert changed == set(base)


def test_a_stopped_adapter_run_goes_on_as_if_it_had_not_stopped(tmp_path, start):
    run(tmp_path / "whole", start, "lora")
    run(tmp_path / "parts", start, "lora", stop_after=5)
    run(tmp_path / "parts", start, "lora", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    state = load_file(tmp_path / "whole" / "resume" / "state.safetensors")
    kept = sum(x.numel() for name, x in state.items() if name.startswith("model."))
    assert kept < 0.7 * sum(p.numel() for p in Transfusion.from_pretrained(start).parameters())


@pytest.mark.parametrize("trained", ["images", "lora"])
def test_a_model_with_its_adapter_put_in_is_trained_as_its_model_is(tmp_path, start, trained):
    prepare(Transfusion.from_pretrained(start), TuneSettings(start=start, trained=trained)).save_pretrained(tmp_path)
    again = Transfusion.from_pretrained(tmp_path, base=start)
    assert prepare(again, TuneSettings(start=tmp_path)) is again and all(p.requires_grad for p in again.parameters())
    base = Transfusion.from_pretrained(start)
    base.timestep.requires_grad_(False)
    frozen = [name for name, p in load_adapter(base, tmp_path).named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("timestep.") for name in frozen)


def test_the_average_holds_what_is_trained_alone(start):
    model = prepare(Transfusion.from_pretrained(start), TuneSettings(start=start, trained="lora"))
    averaged, trained = Average(model, 0.5), trained_parameters(model)
    with torch.no_grad():
        for _ in range(3):
            for p in trained.values():
                p.add_(1)
            averaged.update(model)
    assert averaged.tensors.keys() == trained.keys() and len(trained) < len(list(model.parameters()))
    for name, x in averaged.tensors.items():
        torch.testing.assert_close(trained[name] - x, torch.full_like(x, 13 / 44))  # 1, 2, 3 and 1, 20/11, 119/44


def test_the_table_counts_every_parameter_and_those_that_change(start, capsys, tmp_path):
    base = Transfusion.from_pretrained(start)
    total, images = (
        sum(p.numel() for name, p in base.named_parameters() if inside or "decoder" not in name)
        for inside in (True, False)
    )
    table = trained_table(prepare(base, TuneSettings(start=start, trained="images")))
    last = table.splitlines()[-1].replace(",", "").split()
    rows = 2 * 32 * (1 if base.config.text_config.tie_word_embeddings else 2)
    assert (
        [int(x) for x in last[1:3]] == [total + rows, images + rows]
        and "decoder: blocks" in table
        and "images: image_head" in table
    )
    run(tmp_path, start, "all")
    assert f"{total:,}" in capsys.readouterr().out


@pytest.mark.parametrize("trained", ["all", "images", "lora"])
def test_what_is_frozen_stays_and_what_is_left_learns(tmp_path, start, trained):
    tune = TuneSettings(start=start, trained=trained, lora_rank=4, frozen=("patch_embedding", "timestep"))
    train(small(tmp_path, tune=tune))
    before, after = (dict(Transfusion.from_pretrained(path).named_parameters()) for path in (start, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith(("patch_embedding.", "timestep."))]
    assert any(name.startswith("image_head.") for name in moved)
    if trained != "all":
        kept = load_file(tmp_path / "adapter_model.safetensors")
        assert kept and not [name for name in kept if "patch_embedding" in name or "timestep" in name]


@pytest.mark.parametrize("settings,message", [
    (TuneSettings(trained="LoRA"), "tune.trained is 'LoRA'; one of 'all', 'images', 'lora' fits"),
    (TuneSettings(trained="lora"), "tune.trained is 'lora' and tune.start None; a checkpoint"),
    (TuneSettings(frozen=("patch_embeding",)), "tune.frozen has 'patch_embeding', a.*did you mean patch_embedding"),
])
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path, tune=settings))


def test_an_adapter_finds_its_model_when_both_moved_when_it_is_named_and_where_it_was(tmp_path, start):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(start, here / "start")
    run(here / "adapters" / "one", here / "start", "lora", stop_after=1)
    expected = text_logits(Transfusion.from_pretrained(here / "adapters" / "one"))
    here.rename(there)
    assert torch.equal(text_logits(Transfusion.from_pretrained(there / "adapters" / "one")), expected)
    (there / "adapters" / "one").rename(tmp_path / "alone")
    with pytest.raises(
        ValueError, match="the model that it was trained on is not there .tried .*name it with from_pretrained"
    ) as missing:
        Transfusion.from_pretrained(tmp_path / "alone")
    assert "\n" not in str(missing.value)
    with pytest.raises(ValueError, match="nowhere"):
        Transfusion.from_pretrained(tmp_path / "alone", base=tmp_path / "nowhere")
    assert torch.equal(text_logits(Transfusion.from_pretrained(tmp_path / "alone", base=there / "start")), expected)
    there.rename(here)  # where it was when the adapter was trained
    assert torch.equal(text_logits(Transfusion.from_pretrained(tmp_path / "alone")), expected)
    with pytest.raises(ValueError, match="base is .* which holds no adapter"):
        Transfusion.from_pretrained(start, base=start)


def test_a_save_that_stays_finds_its_model_when_both_moved(tmp_path, start, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(start, here / "start")
    run(here / "run", here / "start", "lora", save_every=1, keep_last=2, stop_after=2)
    run(here / "run" / "steps" / "00000001", here / "start", "lora", resume=True, stop_after=3)
    here.rename(there)
    older, newer = (there / "run" / "steps" / f"{step:08d}" for step in (1, 2))
    assert [find_base(place).resolve() for place in (older, newer)] == [there / "start"] * 2
    monkeypatch.chdir(newer)
    expected = text_logits(Transfusion.from_pretrained(there / "run"))
    assert torch.equal(text_logits(Transfusion.from_pretrained(Path())), expected)


def train_and_change_the_start(folder, start, trained):
    """Train an adapter in folder/adapter for two steps, then put other weights into its model, in folder/start."""
    shutil.copytree(start, folder / "start")
    run(folder / "adapter", folder / "start", trained, stop_after=2)
    other = Transfusion.from_pretrained(start)
    torch.nn.init.ones_(other.image_head.linear.weight)
    other.save_pretrained(folder / "start")


def test_an_adapter_does_not_take_a_model_of_other_weights_for_its_own(tmp_path, start):
    train_and_change_the_start(tmp_path, start, "images")
    with pytest.raises(ValueError, match="the model that it was trained on is not there"):
        Transfusion.from_pretrained(tmp_path / "adapter")


def test_an_adapter_does_not_go_on_on_other_weights(tmp_path, start):
    train_and_change_the_start(tmp_path, start, "lora")
    before = (tmp_path / "adapter" / "base.json").read_bytes()
    with pytest.raises(ValueError, match="whose weights are others than those that the adapter in .* was trained on"):
        run(tmp_path / "adapter", tmp_path / "start", "lora", stop_after=4, resume=True)
    assert (tmp_path / "adapter" / "base.json").read_bytes() == before and len(losses(tmp_path / "adapter")) == 2
    run(tmp_path / "adapter", tmp_path / "start", "lora", stop_after=4, resume=True, allow_changed=True)
    assert len(losses(tmp_path / "adapter")) == 4


def test_a_variant_beside_an_adapters_model_changes_nothing_for_it(tmp_path, start):
    shutil.copytree(start, tmp_path / "start")
    run(tmp_path / "adapter", tmp_path / "start", "lora", stop_after=2)
    expected = text_logits(Transfusion.from_pretrained(tmp_path / "adapter"))
    Transfusion.from_pretrained(start).save_pretrained(tmp_path / "start", variant="half")
    assert torch.equal(text_logits(Transfusion.from_pretrained(tmp_path / "adapter")), expected)
    run(tmp_path / "adapter", tmp_path / "start", "lora", stop_after=3, resume=True)
    assert len(losses(tmp_path / "adapter")) == 3
    weights = tmp_path / "start" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Transfusion.from_pretrained(tmp_path / "start")


@pytest.mark.parametrize("trained", ["all", "lora", "images"])
def test_a_checkpoint_of_half_precision_is_trained_in_float32(tmp_path, start, trained):
    Transfusion.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    config = small(tmp_path / "out", tune=TuneSettings(start=tmp_path / "half", trained=trained, lora_rank=4))
    model = start_model(config, SimpleNamespace(check_start=lambda model: None))
    assert {p.dtype for p in prepare(model, config.tune).parameters()} == {torch.float32}


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0)


@pytest.mark.parametrize("family,sizes,expected", [
    ("phi", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
     {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    ("gpt2", GPT2, {"c_attn", "c_proj", "c_fc"}), ("gpt_bigcode", GPT2, {"c_attn", "c_proj", "c_fc"})])
def test_lora_adapts_every_linear_layer_of_a_block_whatever_it_and_the_blocks_are_called(tmp_path, family, sizes,
                                                                                         expected):
    text_config = AutoConfig.for_model(family, vocab_size=300, resid_pdrop=0.0, embd_pdrop=0.0, **sizes)
    model = Transfusion(TransfusionConfig(text_config=text_config, image_channels=1, image_size=[8, 8], boi_token_id=3,
                                          eoi_token_id=4))
    before = text_logits(model.double())
    adapted = prepare(model, TuneSettings(start=tmp_path, trained="lora", lora_rank=2)).double()
    found = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert {name.split(".")[-4] for name in found if re.search(r"\.(layers|h)\.0\.", name)} == expected
    torch.testing.assert_close(text_logits(adapted.get_base_model()), before)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    with_adapters = text_logits(adapted.get_base_model())
    assert not torch.allclose(with_adapters, before, atol=1e-2)
    torch.testing.assert_close(text_logits(adapted.merge_and_unload()), with_adapters)


def test_an_adapter_that_leads_back_to_itself_is_refused(tmp_path, start):
    run(tmp_path / "one", start, "images", stop_after=1)
    run(tmp_path / "two", tmp_path / "one", "images", stop_after=1)
    assert (
        Transfusion.from_pretrained(tmp_path / "two").config.backbone
        == Transfusion.from_pretrained(start).config.backbone
    )
    for name, base in (("one", "one"), ("one", "two")):
        (tmp_path / "one" / "base.json").write_text(json.dumps({"absolute": str(tmp_path / base)}))
        with pytest.raises(ValueError, match="an adapter that leads back to itself"):
            Transfusion.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_refused_by_the_files_name(tmp_path, start, name):
    run(tmp_path, start, "images", stop_after=1)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-20])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Transfusion.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(
        data if name == "adapter_config.json" else (tmp_path / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="an adapter without adapter_model.safetensors"):
        Transfusion.from_pretrained(tmp_path)


def test_an_adapter_that_lacks_weights_is_refused(tmp_path, start):
    run(tmp_path, start, "images", stop_after=1)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    lost = sorted(weights)[0]
    save_file({name: x for name, x in weights.items() if name != lost}, file)
    (tmp_path / "checksums.json").unlink()  # other programs write none
    with pytest.raises(ValueError, match=f"lack 1 of the model's weights, {re.escape(lost)}"):
        Transfusion.from_pretrained(tmp_path)


def test_a_checkpoint_of_other_images_is_refused(tmp_path):
    llm = language_model(tmp_path / "llm", "llama")
    start = init(InitSettings(llm=llm, out=tmp_path / "model", image_channels=3, image_size=(8, 8)))
    with pytest.raises(ValueError, match="whose images are .1, 8, 8., and tune.start a model of 3 channels"):
        run(tmp_path / "out", start, "all")


def test_a_start_says_which_settings_it_keeps(tmp_path, start, capsys):
    run(tmp_path, start, "images", stop_after=1)
    said, config = capsys.readouterr().out, Transfusion.from_pretrained(start).config
    assert ("keeps its own" in said) == (config.backbone != "decoder") == (f"backbone {config.backbone}" in said)
