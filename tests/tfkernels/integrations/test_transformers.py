"""`attn_implementation="tfkernels"` in models we did not write: logits and generated tokens equal those of SDPA, or of
eager where SDPA falls short."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
    ViTModel,
)
from transformers import masking_utils as masking

from tests.conftest import DEVICE, adapts
from tfkernels import TransfusionMask
from tfkernels.integrations import transformers as integration

pytestmark = adapts

WINDOW = 9
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, initializer_range=0.15)
CONFIGS = {"llama": lambda: LlamaConfig(**SIZES), "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
           "qwen2": lambda: Qwen2Config(**SIZES), "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
           "gemma2": lambda **more: Gemma2Config(**SIZES,
                                                 **{"head_dim": 16, "query_pre_attn_scalar": 16,
                                                    "sliding_window": WINDOW, "attn_logit_softcapping": 0.5, **more})}
REFERENCE = {"gemma2": "eager"}  # SDPA has no soft cap
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
SPANS = [[(3, 9), (9, 15)], [(10, 22)]]


def build(family, implementation, **more):
    integration.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIGS[family](**more), attn_implementation=implementation
    ).to(DEVICE).eval()


def pair(family):
    """The same random model twice: (ours, transformers')."""
    return build(family, "tfkernels"), build(family, REFERENCE.get(family, "sdpa"))


def tokens(batch=2, length=24):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def block_ids():
    """SPANS as transformers' block_sequence_ids: -1 is text."""
    ids = torch.full((2, 24), -1, device=DEVICE)
    for row, pairs in enumerate(SPANS):
        for number, (start, stop) in enumerate(pairs):
            ids[row, start:stop] = number
    return ids


def additive(visible):
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, torch.finfo(torch.float32).min)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def differ(a, b):
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_theirs(family):
    ours, theirs = pair(family)
    with torch.no_grad():
        close(ours(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
# 5: shorter than the window, then past it
@pytest.mark.parametrize("family,length", [*((family, 24) for family in CONFIGS), ("mistral", 5), ("gemma2", 5)])
def test_left_padded_generation_equals_theirs_with_either_cache(family, length, cache):
    ours, theirs = pair(family)
    x, attention_mask = tokens(length=length), torch.ones(2, length, dtype=torch.int64, device=DEVICE)
    x[0, :3], attention_mask[0, :3] = 0, 0
    options = dict(attention_mask=attention_mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                   output_logits=True, disable_compile=True)  # on a GPU generate would compile a static cache's steps
    got, expected = ours.generate(x, cache_implementation=cache, **options), theirs.generate(x, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert type(got.past_key_values).__name__ == {"dynamic": "DynamicCache", "static": "StaticCache"}[cache]
    assert any(got.past_key_values.is_sliding) == (family in ("mistral", "gemma2"))
    close(torch.stack(got.logits), torch.stack(expected.logits))


def test_gemma2s_softcap_and_window_matter_where_they_are_compared():
    with torch.no_grad():
        capped = build("gemma2", "tfkernels")(tokens()).logits
        differ(capped, build("gemma2", "tfkernels", attn_logit_softcapping=None)(tokens()).logits)
        differ(capped, build("gemma2", "tfkernels", sliding_window=4)(tokens()).logits)
        differ(capped, build("gemma2", "eager", attn_logit_softcapping=None)(tokens()).logits)
    assert build("gemma2", "eager").config.layer_types == ["sliding_attention", "full_attention"]


def test_gradients_equal_theirs_through_window_and_softcap():
    ours, theirs = pair("gemma2")
    for model in (ours, theirs):
        model(tokens(), labels=tokens()).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert b.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_in_the_middle_is_honoured():
    ours, theirs = pair("llama")
    attention_mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    attention_mask[0, 8:12] = 0
    with torch.no_grad():
        kept = attention_mask.bool()
        close(ours(tokens(), attention_mask=attention_mask).logits[kept],
              theirs(tokens(), attention_mask=attention_mask).logits[kept])
        assert not torch.allclose(ours(tokens(), attention_mask=attention_mask).logits[kept],
                                  ours(tokens()).logits[kept])


def test_bidirectional_images_equal_transformers_own_mask():
    ours, theirs = pair("llama")
    x = theirs.get_input_embeddings()(tokens())
    dense = masking.create_causal_mask(config=theirs.config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                                       block_sequence_ids=block_ids())
    mask = TransfusionMask.from_spans(SPANS, 24, device=DEVICE)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x, attention_mask=dense).logits
        close(ours(inputs_embeds=x, transfusion_mask=mask).logits, expected)
        close(ours(inputs_embeds=x, attention_mask=dense).logits, expected)
        close(ours(inputs_embeds=x, attention_mask=additive(dense)).logits, expected)
        differ(ours(inputs_embeds=x).logits, expected)


def test_each_layer_takes_the_mask_of_its_kind():
    ours, theirs = pair("gemma2")
    masks = {"full_attention": TransfusionMask.from_spans(SPANS, 24, device=DEVICE),
             "sliding_attention": TransfusionMask.from_spans(SPANS, 24, window=WINDOW, device=DEVICE)}
    with torch.no_grad():
        expected = theirs(
            tokens(), attention_mask={kind: additive(mask.dense()) for kind, mask in masks.items()}
        ).logits
        close(ours(tokens(), transfusion_mask=masks).logits, expected)
        differ(ours(tokens(), transfusion_mask=dict(zip(masks, reversed(masks.values())))).logits, expected)
        differ(ours(tokens()).logits, expected)


def test_a_model_whose_layers_all_slide_takes_a_mapping_of_one():
    ours, theirs = pair("mistral")
    mask = TransfusionMask.from_spans(SPANS, 24, window=WINDOW, device=DEVICE)
    with torch.no_grad():
        expected = theirs(tokens(), attention_mask=mask.dense()).logits
        close(ours(tokens(), transfusion_mask={"sliding_attention": mask}).logits, expected)
        differ(ours(tokens()).logits, expected)


def test_packed_position_ids_mean_what_they_mean_to_sdpa():
    ours, theirs = pair("llama")
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1).to(DEVICE)
    with torch.no_grad():
        close(ours(tokens(), position_ids=positions, use_cache=False).logits,
              theirs(tokens(), position_ids=positions, use_cache=False).logits)


def test_repeated_positions_do_not_cut_our_own_mask():
    """An image whose patches share one position is taken for packing by transformers; the given mask must win."""
    ours, theirs = pair("llama")
    positions = torch.tensor([*range(8), *[8] * 8, *range(9, 17)], device=DEVICE)[None].expand(2, -1)
    mask = TransfusionMask.from_spans([[(8, 16)]], 24, device=DEVICE)
    dense = mask.dense().expand(2, -1, -1, -1)
    with torch.no_grad():
        close(ours(tokens(), position_ids=positions, transfusion_mask=mask, use_cache=False).logits,
              theirs(tokens(), position_ids=positions, attention_mask=dense, use_cache=False).logits)


ENCODERS = {
    "bert": lambda: BertModel._from_config(BertConfig(**ENCODER, vocab_size=97, intermediate_size=64)),
    "vit": lambda: ViTModel._from_config(ViTConfig(**ENCODER, image_size=16, patch_size=4, intermediate_size=64)),
    "bart": lambda: BartModel._from_config(BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, init_std=0.3,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)),
}


def encode(family, implementation, **inputs):
    integration.register()
    torch.manual_seed(0)
    model = ENCODERS[family]().to(DEVICE).eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def test_an_image_encoder_sees_every_patch():
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    close(encode("vit", "tfkernels", pixel_values=pixels), encode("vit", "sdpa", pixel_values=pixels))


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_encoders_see_both_ways_and_honour_padding(family):
    """BART adds a causal decoder and cross attention with fewer queries than keys."""
    more = {} if family == "bert" else {"decoder_input_ids": tokens(length=7)}
    attention_mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    attention_mask[0, 15:] = 0
    kept = attention_mask.bool() if family == "bert" else torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    plain, padded = (encode(family, "tfkernels", input_ids=tokens(), attention_mask=mask, **more)
                     for mask in (None, attention_mask))
    close(plain, encode(family, "sdpa", input_ids=tokens(), **more))
    close(padded[kept], encode(family, "sdpa", input_ids=tokens(), attention_mask=attention_mask, **more)[kept])
    differ(padded[kept], plain[kept])


def test_a_row_of_keys_is_a_ready_mask_of_all_queries():
    x = torch.randn(2, 4, 24, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kept = padded().bool()[:, None, None]
    module = torch.nn.Module()
    out, _ = integration.attend(module, x, x, x, kept)
    close(out.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=kept))


def test_a_decoder_asked_to_see_both_ways_does():
    ours, theirs = pair("llama")
    with torch.no_grad():
        close(ours(tokens(), is_causal=False).logits, theirs(tokens(), is_causal=False).logits)
        differ(ours(tokens(), is_causal=False).logits, ours(tokens()).logits)


def padded():
    mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    mask[0, :5], mask[1, 11:14] = 0, 0
    return mask


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_compiled_model_gives_the_same_logits(family):
    ours, _ = pair(family)
    with torch.no_grad():
        close(torch.compile(ours, backend="eager", fullgraph=True)(tokens(), use_cache=False).logits,
              ours(tokens()).logits)


@torch.no_grad()
def test_keys_that_attention_mask_hides_stay_hidden_beside_our_mask():
    model, x = build("llama", "tfkernels"), tokens()
    for attention_mask in (padded(), 1 - torch.eye(24, dtype=torch.int64, device=DEVICE)[[6, 20]]):
        expected = TransfusionMask.from_spans(SPANS, 24, device=DEVICE).dense() & attention_mask.bool()[:, None, None]
        some = expected[:, 0].any(-1)
        got = model(x, attention_mask=attention_mask,
                    transfusion_mask=TransfusionMask.from_spans(SPANS, 24, device=DEVICE)).logits
        plain = build("llama", "sdpa")(x, attention_mask=expected).logits
        close(got[some], plain[some])
        differ(got[some], model(x, transfusion_mask=TransfusionMask.from_spans(SPANS, 24, device=DEVICE)).logits[some])
    one = TransfusionMask.from_spans([[(8, 16)]], 24, device=DEVICE)
    two = TransfusionMask.from_spans([[(8, 16)]] * 2, 24, device=DEVICE)
    close(*(model(x, attention_mask=padded(), transfusion_mask=mask).logits for mask in (one, two)))


def test_gradients_reach_only_the_keys_that_attention_mask_keeps():
    model = build("llama", "tfkernels")
    x = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    spans = [[(8, 14)], [(10, 22)]]
    mask = TransfusionMask.from_spans(spans, 24, device=DEVICE)
    model(inputs_embeds=x, attention_mask=padded(), transfusion_mask=mask).logits[0, 12:].sum().backward()
    assert not x.grad[0, :5].any() and x.grad[0, 5:].any(-1).all()
    documents = torch.where(torch.arange(24, device=DEVICE) < 5, -1, 0)[None]
    alike = TransfusionMask.from_spans(spans, 24, documents=documents, device=DEVICE)
    y = x.detach().clone().requires_grad_()
    model(inputs_embeds=y, transfusion_mask=alike).logits[0, 12:].sum().backward()
    close(x.grad[0, 5:], y.grad[0, 5:])


ONE = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.15)
OTHERS = {
    "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, initializer_range=0.15),
    "gpt_neox": lambda: GPTNeoXConfig(**ONE, intermediate_size=96),
    "opt": lambda: OPTConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        word_embed_proj_dim=64,
        attention_dropout=0.0,
        init_std=0.15,
    ),
    "phi": lambda: PhiConfig(**ONE, intermediate_size=96),
    "gemma3": lambda: Gemma3TextConfig(
        **ONE,
        intermediate_size=96,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **ONE,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=4,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **ONE,
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **ONE,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=16,
    ),
}


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_other_families_give_their_own_logits_and_see_our_mask(family):
    integration.register()
    models = []
    for implementation in ("tfkernels", "eager"):
        torch.manual_seed(0)
        models.append(
            AutoModelForCausalLM.from_config(OTHERS[family](), attn_implementation=implementation).to(DEVICE).eval()
        )
    (ours, theirs), x = models, tokens()
    close(ours(x).logits, theirs(x).logits)
    kept = padded().bool() & (torch.arange(24, device=DEVICE) > 4)
    close(ours(x, attention_mask=padded()).logits[kept], theirs(x, attention_mask=padded()).logits[kept])
    masks = {"full_attention": TransfusionMask.from_spans(SPANS, 24, device=DEVICE),
             "sliding_attention": TransfusionMask.from_spans(SPANS, 24, window=WINDOW, device=DEVICE)}
    ready = {kind: additive(mask.dense()) for kind, mask in masks.items()}
    if family not in ("gemma3", "gpt_oss"):
        ready, masks = ready["full_attention"], masks["full_attention"]
    positions = torch.arange(24, device=DEVICE)[None]  # OPT counts them from attention_mask otherwise
    close(ours(x, transfusion_mask=masks).logits, theirs(x, attention_mask=ready, position_ids=positions).logits)
    differ(ours(x, transfusion_mask=masks).logits, ours(x).logits)
