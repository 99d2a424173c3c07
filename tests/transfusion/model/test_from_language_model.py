"""Language models of several families, saved in their own format, become Transfusions that say what they said."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    Gemma3Config,
    PreTrainedTokenizerFast,
)

from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.model.config import BACKBONES, TransfusionSettings
from transfusion.model.from_language_model import InitSettings, from_language_model, init
from transfusion.sequence import encode, pack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def language_model(path, family, *, tied=False, padded=0, bos=True):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        ["a handwritten seven"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>" if bos else None)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + padded,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def same_text(path, out):
    """Compare the logits over the old tokens, of the language model and of the Transfusion made from it."""
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    # a vocabulary may be padded; a tokenizer may add its own
    known = min(theirs.config.get_text_config().vocab_size, len(AutoTokenizer.from_pretrained(path)))
    ours = Transfusion.from_pretrained(out).eval()
    tokens = torch.randint(5, 200, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.text_logits(tokens)[..., :known], theirs(tokens).logits[..., :known], rtol=1e-5, atol=1e-6
        )
    return ours


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_text_and_learns_images(tmp_path, family, backbone):
    path = language_model(tmp_path / "llm", family)
    out = init(InitSettings(llm=path, out=tmp_path / "model", image_channels=1, image_size=(8, 8), backbone=backbone))
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert str(path) not in (out / "config.json").read_text()
    model = same_text(path, out)
    assert type(model.backbone.decoder) is type(AutoModelForCausalLM.from_pretrained(path))
    sequence = pack([encode([Text("a"), Image(torch.rand(1, 8, 8))], model.tokenizer, model.config)], 32, 4)
    output = model.train()(sequence, torch.tensor([0.5]), 0)
    output.loss.backward()
    assert torch.isfinite(output.loss) and model.image_head.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_that_sees_the_language_model_alone_is_taken(tmp_path, tied):
    """Gemma 3 from 4B on: transformers loads it with its vision tower."""
    path = language_model(tmp_path / "llm", "gemma3_text")
    text = AutoConfig.from_pretrained(path)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    seeing = AutoModelForCausalLM.from_config(config)
    seeing.save_pretrained(path)
    out = init(InitSettings(llm=path, out=tmp_path / "model", image_channels=1, image_size=(8, 8)))
    model = same_text(path, out)
    assert type(seeing).__name__ == "Gemma3ForConditionalGeneration"
    assert type(model.backbone.decoder).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name for name in model.state_dict()) and model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("case", [{"tied": True}, {"padded": 64}, {"bos": False}], ids=str)
def test_tied_embeddings_padded_vocabularies_and_tokenizers_without_bos_fit(tmp_path, case):
    path = language_model(tmp_path / "llm", "qwen2", **case)
    model = same_text(path, init(InitSettings(llm=path, out=tmp_path / "model", image_channels=1, image_size=(8, 8))))
    decoder, config = model.backbone.decoder, model.config
    embedding, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    assert (embedding is head) == bool(case.get("tied"))
    torch.testing.assert_close(
        embedding[config.boi_token_id], embedding[: min(config.boi_token_id, config.eoi_token_id)].mean(0)
    )
    assert model.tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"]) == [config.boi_token_id, config.eoi_token_id]
    assert model.tokenizer.bos_token_id is not None and model.tokenizer.pad_token_id is not None
    parts = model.generate([Text("a")], max_new_tokens=3, max_images=0)
    assert all(isinstance(part, Text) for part in parts)


def test_a_vocabulary_with_gaps_keeps_all_its_rows(tmp_path):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 9}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))
    before = decoder.get_input_embeddings().weight.detach().clone()
    model = from_language_model(decoder, tokenizer, image_channels=1, image_size=(8, 8))
    after, words = model.get_input_embeddings().weight, [0, 1, 2, 3, 9]
    assert torch.equal(after[words], before[words])
    for added in (model.config.boi_token_id, model.config.eoi_token_id):
        assert added not in words and added < len(after)
        torch.testing.assert_close(after[added], before[words].mean(0))


def test_a_language_model_of_half_precision_becomes_one_model_of_float32(tmp_path):
    path = language_model(tmp_path / "llm", "llama")
    decoder = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = from_language_model(decoder, AutoTokenizer.from_pretrained(path), image_channels=1, image_size=(8, 8))
    model.save_pretrained(tmp_path / "model")
    for one in (model, Transfusion.from_pretrained(tmp_path / "model")):
        assert {p.dtype for p in one.parameters()} == {torch.float32}


def test_weights_that_no_file_has_are_named_and_never_made_up(tmp_path):
    path = language_model(tmp_path / "llm", "llama")
    out = init(InitSettings(llm=path, out=tmp_path / "model", image_channels=1, image_size=(8, 8)))
    for place, load in ((path, lambda: init(InitSettings(llm=path, out=tmp_path / "other"))),
                        (out, lambda: Transfusion.from_pretrained(out))):
        weights = load_file(place / "model.safetensors")
        gone = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
        save_file({name: one for name, one in weights.items() if name != gone}, place / "model.safetensors",
                  metadata={"format": "pt"})
        (place / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"whose files lack 1 of the model's weights, {gone} for one"):
            load()
    assert not (tmp_path / "other").exists()


def test_what_is_no_checkpoint_and_what_is_pickled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no checkpoint; a directory with config.json"):
        init(InitSettings(llm=tmp_path / "nowhere", out=tmp_path / "model"))
    path = language_model(tmp_path / "llm", "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="which cannot be loaded .*; safetensors fit"):
        init(InitSettings(llm=path, out=tmp_path / "model"))
    assert AutoTokenizer.from_pretrained(path) is not None and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"objectve": "v"}, "objectve is no setting; .*did you mean objective"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"seed": 1.5}, "init: seed is 1.5"),
        ({"seed": -1}, "init: seed is -1"),
        ({"diffusion_weight": float("nan")}, "diffusion_weight is nan"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_before_the_language_model_is_touched(
    tmp_path, monkeypatch, options, message
):
    path = language_model(tmp_path / "llm", "llama")
    tokenizer, decoder = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    known = len(tokenizer)
    with pytest.raises(ValueError, match=message):
        from_language_model(decoder, tokenizer, **options)
    assert len(tokenizer) == known and decoder.get_input_embeddings().weight.shape[0] == known
    if "objectve" not in options:
        monkeypatch.setattr(
            "transfusion.model.from_language_model.load_language_model", lambda *_: pytest.fail("loaded")
        )
        with pytest.raises(ValueError, match=message):
            init(InitSettings(llm=path, out=tmp_path / "model", **options))


def test_init_sets_every_option_that_a_run_sets(tmp_path):
    shared = dict(patch_size=4, backbone="adaln", positions="2d", image_layers="unet", unet_channels=(8, 16, 32),
                  unet_blocks=1, unet_words=6, image_attention="causal", objective="x0", time_shift_tokens=8,
                  diffusion_weight=2.0)
    assert shared.keys() == TransfusionSettings().shared().keys()
    out = init(InitSettings(llm=language_model(tmp_path / "llm", "llama"), out=tmp_path / "model", **shared))
    config = TransfusionConfig.from_pretrained(out)
    assert {name: getattr(config, name) for name in shared} == shared | {"unet_channels": [8, 16, 32]}


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    path = language_model(tmp_path / "llm", "llama")
    tokenizer, decoder = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS"):
        from_language_model(decoder, tokenizer)


def test_a_tokenizer_of_any_kind_comes_back(tmp_path):
    decoder = AutoModelForCausalLM.from_pretrained(language_model(tmp_path / "llm", "llama", padded=200))
    model = from_language_model(decoder, ByT5Tokenizer(), image_channels=1, image_size=(8, 8))
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    again = Transfusion.from_pretrained(tmp_path / "model")
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert torch.equal(*(m.eval().draw(["a"], steps=1)[0].latent for m in (model, again)))


def test_the_bias_of_new_tokens_is_the_mean_as_well(tmp_path):
    decoder = AutoModelForCausalLM.from_pretrained(language_model(tmp_path / "llm", "phi"))
    torch.nn.init.constant_(decoder.lm_head.bias, -5.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    model = from_language_model(decoder, tokenizer, image_channels=1, image_size=(8, 8))
    assert (model.get_output_embeddings().bias == -5.0).all()
