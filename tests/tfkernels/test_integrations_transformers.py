"""`attn_implementation="tfkernels"` in models we did not write: logits and generated tokens equal those of SDPA."""
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.masking_utils import create_causal_mask

from tests.conftest import DEVICE
from tfkernels import TransfusionMask
from tfkernels.integrations import transformers as integration

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
CONFIGS = {"llama": lambda: LlamaConfig(**SIZES), "mistral": lambda: MistralConfig(**SIZES, sliding_window=9), "qwen2": lambda: Qwen2Config(**SIZES),
           "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16)}


def pair(family):
    """The same random model twice: (ours, SDPA's)."""
    integration.register()
    models = []
    for name in ("tfkernels", "sdpa"):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=name).to(DEVICE).eval())
    return models


def tokens(batch=2, length=24):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_sdpas(family):
    ours, theirs = pair(family)
    with torch.no_grad():
        close(ours(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_left_padded_generation_equals_sdpas(family):
    ours, theirs = pair(family)
    x, attention_mask = tokens(), torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    x[0, :7], attention_mask[0, :7] = 0, 0
    options = dict(attention_mask=attention_mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))


def test_padding_in_the_middle_is_honoured():
    ours, theirs = pair("llama")
    attention_mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    attention_mask[0, 8:12] = 0
    with torch.no_grad():
        kept = attention_mask.bool()
        close(ours(tokens(), attention_mask=attention_mask).logits[kept], theirs(tokens(), attention_mask=attention_mask).logits[kept])
        assert not torch.allclose(ours(tokens(), attention_mask=attention_mask).logits[kept], ours(tokens()).logits[kept])


def test_a_static_cache_gives_the_same_tokens():
    ours, theirs = pair("llama")
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(tokens(), cache_implementation="static", **options), theirs.generate(tokens(), **options))


def test_bidirectional_images_equal_transformers_own_mask():
    ours, theirs = pair("llama")
    spans = [[(3, 9), (9, 15)], [(10, 22)]]
    ids = torch.full((2, 24), -1, device=DEVICE)
    for row, pairs in enumerate(spans):
        for number, (start, stop) in enumerate(pairs):
            ids[row, start:stop] = number
    x = theirs.get_input_embeddings()(tokens())
    dense = create_causal_mask(config=theirs.config, inputs_embeds=x, attention_mask=None, past_key_values=None, block_sequence_ids=ids)
    mask = TransfusionMask.from_spans(spans, 24, device=DEVICE)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x, attention_mask=dense).logits
        close(ours(inputs_embeds=x, transfusion_mask=mask).logits, expected)
        close(ours(inputs_embeds=x, attention_mask=dense).logits, expected)


def test_packed_position_ids_mean_what_they_mean_to_sdpa():
    ours, theirs = pair("llama")
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1).to(DEVICE)
    with torch.no_grad():
        close(ours(tokens(), position_ids=positions, use_cache=False).logits, theirs(tokens(), position_ids=positions, use_cache=False).logits)


def test_repeated_positions_do_not_cut_our_own_mask():
    """An image whose patches share one position is taken for packing by transformers; the given mask must win."""
    ours, theirs = pair("llama")
    positions = torch.tensor([*range(8), *[8] * 8, *range(9, 17)], device=DEVICE)[None].expand(2, -1)
    mask = TransfusionMask.from_spans([[(8, 16)]], 24, device=DEVICE)
    dense = mask.dense().expand(2, -1, -1, -1)
    with torch.no_grad():
        close(ours(tokens(), position_ids=positions, transfusion_mask=mask, use_cache=False).logits,
              theirs(tokens(), position_ids=positions, attention_mask=dense, use_cache=False).logits)


def test_what_we_cannot_honour_is_refused_by_name():
    ours, _ = pair("llama")
    ours.train()
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout is 0.1"):
        ours(tokens())
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention sinks"):
        integration.attend(None, q, q, q, None, s_aux=torch.zeros(2))
    mistral, _ = pair("mistral")
    with pytest.raises(ValueError, match="sliding_window 9"):
        mistral(tokens(), transfusion_mask=TransfusionMask.causal(24, device=DEVICE))


def test_a_mask_that_is_no_meeting_of_intervals_is_refused():
    checker = (torch.arange(8)[:, None] + torch.arange(8)) % 3 == 0
    with pytest.raises(ValueError, match="rows with holes"):
        TransfusionMask.from_dense(checker[None, None])
