"""Plain checkpoints of adapters, and decoders that transformers loads by itself: equal answers within rounding."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.transfusion.conftest import tiny_model
from transfusion import Transfusion
from transfusion.cli import main
from transfusion.model.config import BACKBONES
from transfusion.model.hub import source as hub_source
from transfusion.model.lora import TuneSettings, prepare

TOKENS = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=BACKBONES)
def adapter(request, tmp_path):
    """A model with random adapters around it, saved in the directory adapter; the model itself lies in start."""
    tiny_model(backbone=request.param).save_pretrained(tmp_path / "start")
    adapted = prepare(Transfusion.from_pretrained(tmp_path / "start"),
                      TuneSettings(start=tmp_path / "start", trained="lora", lora_rank=4))
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted.get_base_model().eval()


def export(where, *more):
    main(["export", "--model", str(where / "adapter"), "--out", str(where / "out"), *more])
    return where / "out"


@torch.no_grad()
def test_a_merged_adapter_answers_as_the_adapter_around_its_model(adapter, tmp_path, capsys):
    out = export(tmp_path)
    assert "out: Transfusion of " in capsys.readouterr().out and not list(out.glob("adapter*"))
    (tmp_path / "start").rename(tmp_path / "gone")
    merged = Transfusion.from_pretrained(out)
    torch.testing.assert_close(merged.text_logits(TOKENS), adapter.text_logits(TOKENS), rtol=1e-4, atol=1e-5)
    ours, theirs = (m.draw(["a handwritten seven"], steps=4)[0].latent for m in (merged, adapter))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert hub_source(Transfusion.from_pretrained(tmp_path / "adapter", base=tmp_path / "gone")) == tmp_path / "adapter"
    before = Transfusion.from_pretrained(tmp_path / "gone").text_logits(TOKENS)
    assert (before - merged.text_logits(TOKENS)).abs().max() > 0.01


@torch.no_grad()
def test_the_decoder_alone_is_a_language_model_of_transformers(adapter, tmp_path):
    out = export(tmp_path, "--decoder")
    decoder = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(decoder) is LlamaForCausalLM and decoder.config._attn_implementation == "sdpa"
    torch.testing.assert_close(decoder(TOKENS).logits, adapter.text_logits(TOKENS), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == adapter.tokenizer.get_vocab()
    asked = tokenizer("a handwritten", return_tensors="pt")["input_ids"]
    written = decoder.generate(asked, max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, :asked.shape[1]], asked)


def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "adapter")
    decoder = AutoModelForCausalLM.from_pretrained(export(tmp_path, "--decoder", "--dtype", "bfloat16"))
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight


def test_an_export_writes_over_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="export: out is .* what is read would be written over"):
        main(["export", "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "adapter")])
    export(tmp_path)
    with pytest.raises(SystemExit, match="export: out is .*holds config.json of something else"):
        export(tmp_path)
