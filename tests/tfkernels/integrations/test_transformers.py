"""`attn_implementation="tfkernels"` in models we did not write: logits and generated tokens equal those of SDPA, or of
eager where SDPA falls short."""
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PaliGemmaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    ViTConfig,
    ViTModel,
)
from transformers import masking_utils as masking
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.conftest import DEVICE
from tfkernels import TransfusionMask
from tfkernels._library import INTERPRET
from tfkernels.integrations import transformers as integration

pytestmark = pytest.mark.skipif(
    INTERPRET, reason="an adapter does not see which implementation runs; once, without the interpreter, is enough"
)

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
                   output_logits=True)
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


def test_a_decoder_asked_to_see_both_ways_does():
    ours, theirs = pair("llama")
    with torch.no_grad():
        close(ours(tokens(), is_causal=False).logits, theirs(tokens(), is_causal=False).logits)
        differ(ours(tokens(), is_causal=False).logits, ours(tokens()).logits)


@pytest.mark.parametrize("query_len,key_len,module_is_causal,is_causal",
                         [(6, 6, True, None), (6, 6, False, None), (6, 9, False, None), (1, 9, True, None),
                          (6, 6, True, False), (6, 9, True, False), (6, 6, False, True)])
def test_a_call_without_a_mask_means_what_it_means_to_sdpa(query_len, key_len, module_is_causal, is_causal):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator).to(DEVICE) for n in (query_len, key_len, key_len))
    module = SimpleNamespace(is_causal=module_is_causal)
    close(integration.attend(module, q, k, v, None, is_causal=is_causal)[0],
          sdpa_attention_forward(module, q, k, v, None, is_causal=is_causal)[0])


def test_a_causal_call_without_a_mask_and_with_more_keys_is_refused():
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="attention_mask is None in a causal layer with 3 queries and 5 keys"):
        integration.attend(SimpleNamespace(is_causal=True), q, k, k, None)
    with pytest.raises(ValueError, match="attention_mask is None in a layer with sliding_window 4 and 5 keys"):
        integration.attend(SimpleNamespace(is_causal=False), q, k, k, None, sliding_window=4)


def packed():
    return torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1).to(DEVICE)


def padded():
    mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    mask[0, :5], mask[1, 11:14] = 0, 0
    return mask


RULES = {"window": lambda: ("create_sliding_window_causal_mask", {}),
         "window with padding": lambda: ("create_sliding_window_causal_mask", {"attention_mask": padded()}),
         "window both ways": lambda: ("create_bidirectional_sliding_window_mask", {}),
         "packing": lambda: ("create_causal_mask", {"position_ids": packed()}),
         "packing in a window": lambda: ("create_sliding_window_causal_mask", {"position_ids": packed()}),
         "images": lambda: ("create_causal_mask", {"block_sequence_ids": block_ids()}),
         "images with padding": lambda: ("create_causal_mask",
                                         {"block_sequence_ids": block_ids(), "attention_mask": padded()}),
         "a rule of the caller": lambda: ("create_causal_mask",
                                          {"or_mask_function": lambda b, h, i, j: (i < 7) & (j < 7)}),}


def both_masks(rule, compiled=False):
    """A rule's mask as ours and as SDPA's, both dense, and the tensor ours travels in."""
    integration.register()
    config, (name, arguments) = CONFIGS["mistral"](), RULES[rule]()
    arguments = {"inputs_embeds": torch.zeros(2, 24, 4, device=DEVICE), "attention_mask": None, "past_key_values": None,
                 **arguments}
    create = getattr(masking, name)
    config._attn_implementation = "sdpa"
    theirs = create(config=config, **arguments)
    config._attn_implementation = "tfkernels"
    create = torch.compile(create, backend="eager", fullgraph=True) if compiled else create
    ours = create(config=config, **arguments)
    return integration._from_tensor(ours, 24, 24).mask.dense().expand_as(theirs), theirs, ours


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_read_off_exactly_in_blocks_of_rows(rule, monkeypatch):
    rows, theirs = [], masking.sdpa_mask
    monkeypatch.setattr(integration, "_BLOCK", 2 * 24 * 5)
    monkeypatch.setattr(masking, "sdpa_mask", lambda **options: rows.append(options["q_length"]) or theirs(**options))
    got, expected, _ = both_masks(rule)
    assert rows == [5, 5, 5, 5, 4]
    assert torch.equal(got, expected)
    assert not torch.equal(expected[0, 0], torch.ones(24, 24, dtype=torch.bool, device=DEVICE).tril())


@pytest.mark.parametrize("rule", ["window", "packing", "images"])
def test_a_rule_of_plain_runs_travels_as_rows_and_columns_exact_alone(rule, monkeypatch):
    monkeypatch.setattr(integration, "_BLOCK", 2 * 24 * 5)
    assert both_masks(rule)[2].shape == (2, 2, 1, 96)


@pytest.mark.parametrize("rule", [masking.causal_mask_function, masking.bidirectional_mask_function])
@pytest.mark.parametrize("attention_mask", [None, padded().bool()], ids=["whole", "padded"])
@pytest.mark.parametrize("q_offset,kv_offset", [(0, 0), (12, 0), (12, 4)])
def test_causal_and_full_masks_are_never_dense(rule, attention_mask, q_offset, kv_offset, monkeypatch):
    sizes = dict(batch_size=2, q_length=9, kv_length=20, q_offset=q_offset, kv_offset=kv_offset, mask_function=rule,
                 attention_mask=attention_mask)
    expected = masking.sdpa_mask(**sizes, allow_is_causal_skip=False, device=DEVICE)
    monkeypatch.setattr(masking, "sdpa_mask", None)
    assert torch.equal(
        integration._from_tensor(integration.make_mask(**sizes, device=DEVICE), 9, 20).mask.dense().expand_as(expected),
        expected
    )


@pytest.mark.parametrize("rule", ["window", "window with padding", "images"])
def test_a_rule_is_read_off_under_compile_without_a_graph_break(rule):
    got, expected, _ = both_masks(rule, compiled=True)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_compiled_model_gives_the_same_logits(family):
    ours, _ = pair(family)
    with torch.no_grad():
        close(torch.compile(ours, backend="eager", fullgraph=True)(tokens(), use_cache=False).logits,
              ours(tokens()).logits)


def checker(b, h, i, j):
    return (i + j) % 3 == 0


def test_a_rule_that_is_no_meeting_of_intervals_is_refused(monkeypatch):
    monkeypatch.setattr(integration, "_BLOCK", 2 * 8 * 3)
    with pytest.raises(ValueError, match="rows with holes that no column explains"):
        integration.make_mask(2, 8, 8, mask_function=checker, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion ends the CUDA context of the tests that follow")
def test_a_rule_that_is_no_meeting_of_intervals_is_refused_under_compile():
    compiled = torch.compile(lambda: integration.make_mask(2, 8, 8, mask_function=checker), backend="eager",
                             fullgraph=True)
    with pytest.raises(RuntimeError, match="rows with holes that no column explains"):
        compiled()


def test_what_we_cannot_honour_is_refused_by_name():
    ours, _ = pair("llama")
    ours.train()
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout is 0.1"):
        ours(tokens())
    ours.eval()
    with pytest.raises(ValueError, match="output_attentions .* is given"):
        ours(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q .* is given"):
        ours(tokens(), cu_seq_lens_q=torch.tensor([0, 10, 24], device=DEVICE))
    mistral, gemma = build("mistral", "tfkernels"), build("gemma2", "tfkernels")
    causal = TransfusionMask.causal(24, device=DEVICE)
    mapping = '{"full_attention": mask, "sliding_attention": windowed mask}'
    with pytest.raises(ValueError, match=f"sliding_window 9 and 24 keys; a mapping {mapping} fits"):
        mistral(tokens(), transfusion_mask=causal)
    with pytest.raises(
        ValueError, match=r"masks for \['full_attention'\] and layer 0 is sliding_attention; .* add 'sliding_attention'"
    ):
        gemma(tokens(), transfusion_mask={"full_attention": causal})


@pytest.mark.parametrize("name",
                         ["s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices", "cache",
                          "cu_seq_lens_q", "cu_seq_lens_k"])
def test_an_argument_that_would_change_the_result_is_refused_by_name(name):
    q = torch.zeros(1, 2, 4, 8)
    integration.attend(SimpleNamespace(), q, q, q, None, **{name: None})
    with pytest.raises(ValueError, match=rf"tfkernels attention: {name} \(.*\) is given"):
        integration.attend(SimpleNamespace(), q, q, q, None, **{name: torch.zeros(2)})


@pytest.mark.parametrize("mask,message",
                         [(torch.full((1, 1, 4, 4), -0.5), "adds numbers other than 0"),
                          (torch.ones(1, 1, 4, 4, dtype=torch.int64), "attention_mask is torch.int64"),
                          (torch.ones(1, 1, 4, 4, dtype=torch.int32), "attention_mask is torch.int32"),
                          (torch.ones(1, 4), r"of shape \(1, 4\) for 4 queries and 4 keys"),
                          (torch.zeros(1, 2, 4, 4), r"of shape \(1, 2, 4, 4\) for 4 queries and 4 keys")])
def test_a_ready_mask_that_does_not_fit_is_refused_by_name(mask, message):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError,
                       match=f"tfkernels attention: attention_mask.*{message}"
                       if "attention_mask" not in message else message):
        integration.attend(SimpleNamespace(), q, q, q, mask)


LEFT = [0, 5]  # padding on the left, row by row
PROMPT = [[(8, 14)], [(6, 9), (9, 20)]]


def padded_prompt(length=22):
    attention_mask = torch.ones(2, length, dtype=torch.int64, device=DEVICE)
    for row, count in enumerate(LEFT):
        attention_mask[row, :count] = 0
    return tokens(length=length), attention_mask


def whole_mask(length, padding=True, **more):
    """The mask of `length` tokens: the prompt's images, and text behind them."""
    documents = (torch.tensor([[-1] * count + [0] * (length - count) for count in LEFT], device=DEVICE)
                 if padding else None)
    return TransfusionMask.from_spans(PROMPT, length, documents=documents, device=DEVICE, **more)


def written_one_by_one(model, x, attention_mask, count, masks):
    """Greedy tokens without a cache, all of them read again for each, under the mask of all of them."""
    for _ in range(count):
        positions = attention_mask.cumsum(-1).sub(1).clamp(min=0)
        logits = model(x, position_ids=positions, transfusion_mask=masks(x.shape[1]), use_cache=False).logits[:, -1]
        x, attention_mask = (torch.cat([x, logits.argmax(-1)[:, None]], 1),
                             torch.nn.functional.pad(attention_mask, (0, 1), value=1))
    return x


@pytest.mark.parametrize("padding", ["attention_mask", "documents"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 1, "num_return_sequences": 1}],
    ids=["dynamic", "static", "no cache", "one beam"],
)
@torch.no_grad()
def test_generate_writes_behind_images_what_the_whole_mask_gives(options, padding):
    model, (x, attention_mask) = build("llama", "tfkernels"), padded_prompt()
    prompt = whole_mask(22, padding == "documents")
    got = model.generate(x, attention_mask=attention_mask, transfusion_mask=prompt, max_new_tokens=7, do_sample=False,
                         **options)
    assert torch.equal(got, written_one_by_one(model, x, attention_mask, 7, whole_mask))
    assert not torch.equal(got, model.generate(x, attention_mask=attention_mask, max_new_tokens=7, do_sample=False))


@torch.no_grad()
def test_generate_takes_embeddings_and_one_mask_for_all_beams():
    model, x = build("llama", "tfkernels"), tokens(batch=1, length=22)
    prompt, options = TransfusionMask.from_spans(PROMPT[:1], 22, device=DEVICE), dict(max_new_tokens=6, do_sample=False)
    written = model.generate(x, transfusion_mask=prompt, **options)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embeds, transfusion_mask=prompt, **options), written[:, 22:])
    beams = model.generate(x, transfusion_mask=prompt, num_beams=3, num_return_sequences=3,
                           return_dict_in_generate=True, output_scores=True, **options)
    for sequence, score in zip(beams.sequences, beams.sequences_scores):
        masks = TransfusionMask.from_spans(PROMPT[:1], len(sequence), device=DEVICE)
        logits = model(sequence[None], transfusion_mask=masks, use_cache=False).logits[0, 21:-1].log_softmax(-1)
        close(logits.gather(1, sequence[22:, None]).sum() / (len(sequence) - 22), score)
    with pytest.raises(ValueError, match="mask has 2 batch rows and q has 6"):
        model.generate(tokens(length=22), transfusion_mask=TransfusionMask.from_spans(PROMPT, 22, device=DEVICE),
                       num_beams=3, **options)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_in_a_window_goes_on_past_it(family, cache):
    model, (x, attention_mask) = build(family, "tfkernels"), padded_prompt()
    kinds = {"full_attention": {}, "sliding_attention": {"window": WINDOW}}

    def masks(length):
        return {kind: whole_mask(length, **more) for kind, more in kinds.items()}

    got = model.generate(x, attention_mask=attention_mask, transfusion_mask=masks(22), max_new_tokens=12,
                         do_sample=False, cache_implementation=cache)
    assert torch.equal(got, written_one_by_one(model, x, attention_mask, 12, masks))


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


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU looking would wait for the device")
def test_a_prompt_read_in_chunks_that_cut_an_image_is_refused():
    model, options = build("llama", "tfkernels"), dict(max_new_tokens=4, do_sample=False)
    mask, x = TransfusionMask.from_spans([[(8, 14)]], 22), tokens(batch=1, length=22)
    whole = model.generate(x, transfusion_mask=mask, **options)
    assert torch.equal(model.generate(x, transfusion_mask=mask, prefill_chunk_size=14, **options), whole)
    with pytest.raises(ValueError, match="transfusion_mask shows a query keys up to 14 and there are 11 yet; images "
                                         "within one pass fit"):
        model.generate(x, transfusion_mask=mask, prefill_chunk_size=11, **options)


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
    ready, mask = (ready, masks) if family == "gemma3" else (ready["full_attention"], masks["full_attention"])
    positions = torch.arange(24, device=DEVICE)[None]  # OPT counts them from attention_mask otherwise
    close(ours(x, transfusion_mask=mask).logits, theirs(x, attention_mask=ready, position_ids=positions).logits)
    differ(ours(x, transfusion_mask=mask).logits, ours(x).logits)


@torch.no_grad()
def test_families_with_an_attention_of_their_own_are_refused_by_name():
    integration.register()
    for config in (BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4),
                   MptConfig(vocab_size=97, d_model=64, n_layers=1, n_heads=4)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="tfkernels").to(DEVICE).eval()
        with pytest.raises(ValueError, match=f"model_type is '{config.model_type}', whose attention is its own"):
            model(tokens())


def test_a_mask_that_is_no_meeting_of_intervals_is_refused():
    checker = (torch.arange(8)[:, None] + torch.arange(8)) % 3 == 0
    with pytest.raises(ValueError, match="rows with holes"):
        TransfusionMask.from_dense(checker[None, None])
