"""The masks that transformers has us make: its rules read off exactly, and what we refuse."""
from types import SimpleNamespace

import pytest
import torch
from transformers import masking_utils as masking
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.conftest import DEVICE, adapts
from tests.tfkernels.integrations.test_transformers import CONFIGS, block_ids, build, close, padded, pair, tokens
from tfkernels import TransfusionMask
from tfkernels.integrations import transformers as integration

pytestmark = adapts


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
    monkeypatch.setattr(integration, "PAIRS", 2 * 24 * 5)
    monkeypatch.setattr(masking, "sdpa_mask", lambda **options: rows.append(options["q_length"]) or theirs(**options))
    got, expected, _ = both_masks(rule)
    assert rows == [5, 5, 5, 5, 4]
    assert torch.equal(got, expected)
    assert not torch.equal(expected[0, 0], torch.ones(24, 24, dtype=torch.bool, device=DEVICE).tril())


@pytest.mark.parametrize("rule", ["window", "packing", "images"])
def test_a_rule_of_plain_runs_travels_as_rows_and_columns_exact_alone(rule, monkeypatch):
    monkeypatch.setattr(integration, "PAIRS", 2 * 24 * 5)
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


def checker(b, h, i, j):
    return (i + j) % 3 == 0


def test_a_rule_that_is_no_meeting_of_intervals_is_refused(monkeypatch):
    monkeypatch.setattr(integration, "PAIRS", 2 * 8 * 3)
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
    chunked = torch.nn.Module()
    chunked.layer_idx, chunked.config = 0, SimpleNamespace(
        attention_chunk_size=8, layer_types=["chunked_attention"])
    x = torch.zeros(1, 2, 24, 16, device=DEVICE)
    mapping = '{"full_attention": mask, "chunked_attention": chunked mask}'
    with pytest.raises(ValueError, match=f"attention_chunk_size 8 and 24 keys; a mapping {mapping} fits"):
        integration.attend(chunked, x, x, x, None, transfusion_mask=causal)
    integration.attend(chunked, x, x, x, None, transfusion_mask={"chunked_attention": causal})


@pytest.mark.parametrize("name",
                         ["sinks", "position_bias", "head_mask", "indices", "block_indices", "cache",
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


def test_a_mask_that_is_no_meeting_of_intervals_is_refused():
    checker = (torch.arange(8)[:, None] + torch.arange(8)) % 3 == 0
    with pytest.raises(ValueError, match="rows with holes"):
        TransfusionMask.from_dense(checker[None, None])
