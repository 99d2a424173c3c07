"""What the integration of transformers refuses: masks in the wrong place, and models that would drop ours."""
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    FalconConfig,
    GPTJConfig,
    MptConfig,
    PaliGemmaConfig,
    StableLmConfig,
)

from tests.conftest import DEVICE, adapts
from tests.tfkernels.integrations.test_transformers import CONFIGS, SPANS, additive, build, close, encode, tokens
from tfkernels import TransfusionMask
from tfkernels.integrations import transformers as integration

pytestmark = adapts


def test_a_decoder_s_mask_is_refused_by_layers_that_are_no_decoder_s():
    ours = TransfusionMask.causal(24, device=DEVICE)
    close(encode("bert", "tfkernels", input_ids=tokens(), transfusion_mask=TransfusionMask.from_intervals(
        torch.zeros(1, 24, dtype=torch.int64, device=DEVICE), torch.full((1, 24), 24, device=DEVICE))),
        encode("bert", "sdpa", input_ids=tokens()))
    for family, length, more, fits in (("bart", 24, {"decoder_input_ids": tokens()}, "decoder fit"),
                                       ("bert", 12, {}, "decoder or a mask of these sizes fit")):
        with pytest.raises(ValueError, match="transfusion_mask reaches .*Attention, which is not causal and has "
                                             f"{length} queries and {length} keys; layers of a {fits}"):
            encode(family, "tfkernels", input_ids=tokens(length=length), transfusion_mask=ours, **more)
    module = torch.nn.Module()
    module.is_causal, module.config = False, CLIPVisionConfig()
    x = torch.zeros(1, 2, 24, 16, device=DEVICE)
    with pytest.raises(ValueError, match="reaches Module, which is not causal and has 24 queries"):
        integration.attend(module, x, x, x, None, transfusion_mask=ours)


def test_a_ready_mask_beside_ours_is_refused_unless_it_is_a_stand_in():
    model, x, mask = build("llama", "tfkernels"), tokens(), TransfusionMask.from_spans(SPANS, 24, device=DEVICE)
    for ready in (mask.dense(), additive(mask.dense()), torch.ones(2, 1, 1, 24, dtype=torch.bool, device=DEVICE)):
        with pytest.raises(ValueError, match=r"attention_mask is torch.*beside transfusion_mask; \(B, Sk\).* or None "
                                             r"fits"):
            model(x, attention_mask=ready, transfusion_mask=mask)
    with torch.no_grad():
        for stand_in in (x.new_empty(1, 1, 1, 1), x.new_empty(0, 0, 0, 0)):
            assert torch.equal(model(x, attention_mask=stand_in, transfusion_mask=mask).logits,
                               model(x, transfusion_mask=mask).logits)


def test_a_mask_in_the_wrong_place_or_of_the_wrong_kind_is_refused_by_name():
    model, mask = build("llama", "tfkernels"), TransfusionMask.causal(24, device=DEVICE)
    with pytest.raises(ValueError, match="attention_mask is a TransfusionMask; .*; a TransfusionMask is given as "
                                         "transfusion_mask"):
        model(tokens(), attention_mask=mask)
    for other in (mask.dense(), [mask], "mask", {"full_attention": mask.dense()}):
        with pytest.raises(ValueError, match="transfusion_mask is .*; a tfkernels.TransfusionMask, or a mapping of "
                                             "them"):
            model(tokens(), transfusion_mask=other)
    with pytest.raises(ValueError, match="mask is 20 queries by 20 keys, q has 24 tokens"):
        model(tokens(), attention_mask=tokens().new_empty(1, 1, 1, 1),
              transfusion_mask=TransfusionMask.causal(20, device=DEVICE))


@pytest.mark.parametrize("length", [24, 20])
def test_a_mask_of_other_rows_or_on_another_device_is_refused_by_name_also_beside_padding(length):
    model, attention_mask = build("llama", "tfkernels"), torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    attention_mask[0, :5] = 0
    for mask, message in (
            (TransfusionMask.from_spans([[]] * 3, length, device=DEVICE), "mask has 3 batch rows and q has 2"),
            (TransfusionMask.causal(length).to("meta"), f"mask is on meta and q on {DEVICE}.*; one device fits")):
        with pytest.raises(ValueError, match=f"attention: {message}"):
            model(tokens(), attention_mask=attention_mask, transfusion_mask=mask)


@torch.no_grad()
def test_other_implementations_refuse_our_mask_and_do_the_same_as_ever_without_it():
    mask, x = TransfusionMask.causal(24, device=DEVICE), tokens()
    model = build("llama", "sdpa")
    with pytest.raises(ValueError, match="transfusion_mask is given to a model with attn_implementation 'sdpa', "
                                         "which drops it; 'tfkernels' fits"):
        model(x, transfusion_mask=mask)
    with pytest.raises(ValueError, match="transfusion_mask is given to a model with attn_implementation 'sdpa'"):
        model.generate(x, transfusion_mask=mask, max_new_tokens=2)
    close(model(x).logits, build("llama", "eager")(x).logits)
    from transformers import AttentionInterface
    once = dict(AttentionInterface().items())
    integration.register()
    assert dict(AttentionInterface().items()) == once
    assert all(f is integration.attend or f.refuses_transfusion_mask for f in once.values())


def test_a_model_that_would_drop_our_mask_is_refused_when_asked():
    integration.require(build("llama", "tfkernels"))
    integration.require(torch.nn.ModuleList([build("llama", "tfkernels")]))  # as peft's and compiled ones hold it
    with pytest.raises(ValueError, match="model.0 has attn_implementation 'sdpa'"):
        integration.require(torch.nn.ModuleList([build("llama", "sdpa")]))
    for config in (CONFIGS["llama"](), PaliGemmaConfig()):
        integration.require(config)
    for implementation in ("sdpa", "eager"):
        with pytest.raises(ValueError, match=f"model has attn_implementation '{implementation}', which drops "
                                             "transfusion_mask; 'tfkernels' fits"):
            integration.require(build("llama", implementation))
    for config in (FalconConfig(), BloomConfig(), GPTJConfig(), MptConfig()):
        with pytest.raises(ValueError, match=f"model_type is '{config.model_type}', whose attention is its own and "
                                             "asks no registry"):
            integration.require(config)
    with pytest.raises(ValueError, match="model_type is 'stablelm', whose layers do not hand transfusion_mask on"):
        integration.require(StableLmConfig())
    for other in (None, "model", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="model is .*; a transformers.PreTrainedModel or PreTrainedConfig fits"):
            integration.require(other)


@torch.no_grad()
def test_families_with_an_attention_of_their_own_are_refused_by_name():
    integration.register()
    for config in (BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4),
                   MptConfig(vocab_size=97, d_model=64, n_layers=1, n_heads=4)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="tfkernels").to(DEVICE).eval()
        with pytest.raises(ValueError, match=f"model_type is '{config.model_type}', whose attention is its own"):
            model(tokens())
