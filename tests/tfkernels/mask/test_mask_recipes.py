"""Every mask of the field against its own model's dense formula, written as that model's code writes it: (query, key)
-> visible."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DEVICE
from tests.tfkernels.mask.test_mask import build, dense, disjoint_spans
from tfkernels import TransfusionMask
from tfkernels.mask import recipes

SIZES = st.integers(1, 6)


def table(formula, size):
    """The dense mask (size, size) of a formula over index tensors."""
    return formula(torch.arange(size)[:, None], torch.arange(size)).expand(size, size)


def check(mask, formula):
    """A square mask, by its rows and by its dense form, equals the formula."""
    expected = table(formula, mask.query_len)
    assert torch.equal(dense(mask), expected.expand(mask.batch_size, -1, -1))
    assert mask.area().item() == mask.batch_size * expected.sum().item()
    if mask.columns_exact:
        rows = torch.arange(mask.query_len)[:, None]
        assert torch.equal(
            (mask.key_since.cpu()[:, None] <= rows) & (rows < mask.key_until.cpu()[:, None]), dense(mask)
        )


@given(disjoint_spans(30))
def test_transfusion_and_show_o2_see_each_modality_whole(spans):
    """transfusion-pytorch's `modality` and Show-o2's `omni_attn_mask`: q >= k, or q >= offset and k < offset +
    length."""

    def formula(q, k):
        seen = q >= k
        for offset, length in ((a, b - a) for a, b in spans if a < b):
            seen = seen | (q >= offset) & (k < offset + length)
        return seen

    check(build([spans], 30), formula)


@given(disjoint_spans(30), st.integers(0, 12))
def test_show_o_draws_behind_padding_on_the_left(spans, padding):
    """Show-o's `t2i_mask`: causal or image, the padding's columns hidden; its padding rows, which exist to avoid NaN,
    are empty here."""
    spans = [(a, b) for a, b in spans if a >= padding]
    documents = [[-1] * padding + [0] * (30 - padding)]

    def formula(q, k):
        square = sum(((q >= a) & (q < b) & (k >= a) & (k < b) for a, b in spans), torch.zeros(30, 30, dtype=torch.bool))
        return ((q >= k) | square) & (k >= padding) & (q >= padding)

    check(build([spans], 30, documents), formula)


@given(disjoint_spans(30), st.integers(0, 12))
def test_padding_on_the_right_is_seen_by_nobody_and_sees_nothing(spans, padding):
    length = 30 - padding
    spans = [(a, b) for a, b in spans if b <= length]
    documents = [[0] * length + [-1] * padding]
    short, long = dense(build([spans], length))[0], dense(build([spans], 30, documents))[0]
    assert torch.equal(long[:length, :length], short) and not long[length:].any() and not long[:, length:].any()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_prefix_lm_and_show_o_mmu(prefixes):
    """Show-o's `mmu_mask`: q >= k or k < the prefix's end."""
    mask = recipes.prefix_lm(torch.tensor(prefixes, device=DEVICE), 20)
    for row, prefix in enumerate(prefixes):
        assert torch.equal(dense(mask)[row], table(lambda q, k, prefix=prefix: (q >= k) | (k < prefix), 20))


@given(st.integers(0, 20), st.integers(0, 20))
def test_show_o_mmu_vit_sees_the_image_ahead_but_not_the_text_between(a, b):
    """Show-o's `create_attention_mask_for_mmu_vit`: q >= k or k inside the image's range."""
    start, end = sorted((a, b))
    check(recipes.image_before_prompt(torch.tensor([[start, end]], device=DEVICE), 20),
          lambda q, k: (q >= k) | (k >= start) & (k < end))


@given(disjoint_spans(30), st.data())
def test_bagel_hides_noised_images_from_all_but_themselves(spans, data):
    """BAGEL's `create_sparse_mask`: causal or same full/noise split, and no noised key for another split's query,
    within a sample."""
    cut = data.draw(st.integers(0, 30))
    spans = [(a, b) for a, b in sorted(spans) if a < b and not a < cut < b]
    noised = [span for span in spans if data.draw(st.booleans())]
    full_and_noise, noise = torch.full((30,), -1), torch.full((30,), -1)
    for number, (a, b) in enumerate(spans):
        full_and_noise[a:b] = number
        if (a, b) in noised:
            noise[a:b] = number
    sample = (torch.arange(30) >= cut).long()

    def formula(q, k):
        same = (full_and_noise[q] == full_and_noise[k]) & (full_and_noise[q] >= 0)
        hidden = (noise[k] >= 0) & (noise[q] != noise[k])
        return ((q >= k) | same) & ~hidden & (sample[q] == sample[k])

    check(build([spans], 30, [sample.tolist()], [noised]), formula)


def image_of(spans):
    ids = torch.full((30,), -1)
    for number, (a, b) in enumerate(sorted(spans)):
        ids[a:b] = number
    return ids


@given(disjoint_spans(30), st.integers(1, 40))
def test_gemma_3_cuts_the_beginning_of_an_image_longer_than_its_window(spans, window):
    """transformers' `create_masks_for_vision_model`: sliding layers are AND(sliding_window_overlay(w), OR(causal,
    blockwise_overlay(ids)))."""
    ids = image_of(spans)
    check(build([spans], 30, window=window),
          lambda q, k: (k > q - window) & ((k <= q) | (ids[q] == ids[k]) & (ids[q] >= 0)))


@given(disjoint_spans(30), st.integers(1, 8))
def test_gemma_3s_own_code_makes_the_same_mask(spans, window):
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    config = gemma3.Gemma3TextConfig(sliding_window=window, num_hidden_layers=2,
                                     layer_types=["sliding_attention", "full_attention"])
    config._attn_implementation = "eager"
    theirs = gemma3.create_masks_for_vision_model(config, torch.zeros(1, 30, 8), None, None, torch.arange(30)[None],
                                                  image_of(spans)[None])
    for kind, ours in (
        ("sliding_attention", build([spans], 30, window=window)), ("full_attention", build([spans], 30))
    ):
        assert torch.equal(dense(ours)[0], theirs[kind][0, 0] == 0)


@given(disjoint_spans(30), st.integers(1, 40), st.integers(0, 30))
def test_a_window_around_whole_images(spans, window, cut):
    """transformers' `or_masks(sliding_window_causal_mask_function(w), blockwise_overlay(ids))`, within a document."""
    spans = [(a, b) for a, b in spans if not a < cut < b]
    ids, document = image_of(spans), (torch.arange(30) >= cut).long()

    def formula(q, k):
        return ((k <= q) & (k > q - window) | (ids[q] == ids[k]) & (ids[q] >= 0)) & (document[q] == document[k])

    check(recipes.window_around_whole_images([spans], 30, window, documents=document[None].to(DEVICE), device=DEVICE),
          formula)


@given(SIZES, st.integers(1, 30), st.one_of(st.none(), SIZES))
def test_chunk_causal_video_sees_whole_chunks(chunk_len, size, window):
    """MAGI-1's ranges: chunk c of queries sees the keys of chunks (c - window, c]."""

    def formula(q, k):
        q, k = q // chunk_len, k // chunk_len
        return (k <= q) & ((k > q - window) if window else True)

    check(recipes.chunk_causal(chunk_len, size, window, device=DEVICE), formula)


@given(disjoint_spans(14), disjoint_spans(14))
def test_shared_prefixes_keep_continuations_apart(first, second):
    """attention-gym's shared_prefix: same group, causal, and the key is prompt or of the query's own continuation; two
    groups packed."""
    continuations = [span for span in first if span[0] < span[1]] + [(a + 14, b + 14) for a, b in second if a < b]
    group, owner = (torch.arange(28) >= 14).long(), torch.full((28,), -1)
    for number, (a, b) in enumerate(continuations):
        owner[a:b] = number
    mask = recipes.shared_prefix([continuations], 28, documents=group[None].to(DEVICE), device=DEVICE)
    check(mask, lambda q, k: (group[q] == group[k]) & (q >= k) & ((owner[k] == -1) | (owner[q] == owner[k])))


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 24))
def test_attention_sinks_stay_in_sight_of_a_window(sinks, window, size):
    check(recipes.attention_sinks(sinks, window, size, device=DEVICE),
          lambda q, k: (q >= k) & ((k < sinks) | (q - k < window)))


def block_diffusion_formula(half, block_len):
    """BD3-LM's `block_diff_mask`: block diagonal, offset block causal and block causal, over [noised, clean]."""

    def formula(q, k):
        clean_q, clean_k = q >= half, k >= half
        block_q, block_k = q % half // block_len, k % half // block_len
        diagonal = (block_q == block_k) & (clean_q == clean_k)
        offset_causal = (block_q > block_k) & clean_k & ~clean_q
        causal = (block_q >= block_k) & clean_k & clean_q
        return diagonal | offset_causal | causal

    return formula


@given(SIZES, SIZES)
def test_block_diffusion_in_halves_and_interleaved(block_len, blocks):
    half = block_len * blocks
    formula = block_diffusion_formula(half, block_len)
    check(recipes.block_diffusion_halves(block_len, blocks, device=DEVICE), formula)
    # interleaved place -> place in halves
    order = torch.arange(2 * half).view(2, blocks, block_len).transpose(0, 1).flatten()
    check(recipes.block_diffusion(block_len, blocks, device=DEVICE), lambda q, k: formula(order[q], order[k]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 6), st.integers(0, 4), st.booleans(),
       st.one_of(st.none(), st.integers(1, 20)))
def test_a_cache_with_prefixes_of_different_lengths_equals_rows_of_each_own_mask(cached, query_len, spare, image,
                                                                                 window):
    key_len = max(cached) + query_len + spare
    mask = TransfusionMask.from_cache(torch.tensor(cached, device=DEVICE), query_len, key_len, image=image,
                                      window=window)
    rows = torch.arange(query_len)[:, None]
    for row, length in enumerate(cached):
        spans = [(length, length + query_len)] if image else []
        whole = dense(build([spans], length + query_len, window=window))[0, length:]
        assert (torch.equal(dense(mask)[row, :, :length + query_len], whole)
                and not dense(mask)[row, :, length + query_len:].any())
        columns = (mask.key_since[row].cpu() <= rows) & (rows < mask.key_until[row].cpu())
        assert torch.equal(columns, dense(mask)[row])


def test_lengths_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError,
                       match=r"from_cache: cached_lens is torch.int64 of shape \(1, 1\); an integer tensor \(B,\)"):
        TransfusionMask.from_cache([[3]], 1, 4)
    with pytest.raises(ValueError, match="from_cache: window is 0; a window of at least 1 key"):
        TransfusionMask.from_cache([0], 1, 4, window=0)
    with pytest.raises(ValueError, match="from_cache: query_len is 5 and key_len 4"):
        TransfusionMask.from_cache([0], 5, 4)
    for lens, message in (
        ([8], "cached_lens holds 8; 0 to 7 fits, for key_len 8 holds the 1 new tokens too"),
        ([2, 2**40], "cached_lens holds 1099511627776"),
        ([-1], "cached_lens holds -1; 0 to 7 fits"),
        ([2.0], "cached_lens is torch.float32"),
        ([True], "cached_lens is torch.bool"),
        (None, "cached_lens is None"),
        ("three", "cached_lens is 'three'"),
        ([[1], 2], "cached_lens is"),
    ):
        with pytest.raises(ValueError, match="TransfusionMask.from_cache: " + message):
            TransfusionMask.from_cache(lens, 1, 8)
    for query_len, key_len in ((-1, 4), (1.0, 4), (True, 4), (1, 2**31), (torch.tensor(1), 4), (1, None)):
        with pytest.raises(ValueError, match="TransfusionMask.from_cache: (query|key)_len is .*; an int from 0 to "
                                             "2147483647 fits"):
            TransfusionMask.from_cache([0], query_len, key_len)


@pytest.mark.skipif(DEVICE == "cpu", reason="CPU lengths are checked, and then refused, instead of clipped")
def test_lengths_on_the_device_are_clipped_to_the_cache_without_waiting():
    mask = TransfusionMask.from_cache(torch.tensor([2**40, -3], device=DEVICE), 1, 8)
    assert dense(mask).sum(-1).flatten().tolist() == [8, 1]


@pytest.mark.parametrize(
    "message, call",
    [
        ("prefix_lm: prefix_lens is None", lambda: recipes.prefix_lm(None, 4)),
        ("prefix_lm: prefix_lens holds 5; 0 to 4 fits", lambda: recipes.prefix_lm([5], 4)),
        ("prefix_lm: prefix_lens is torch.float32", lambda: recipes.prefix_lm(torch.ones(1), 4)),
        ("prefix_lm: seq_len is -1", lambda: recipes.prefix_lm([0], -1)),
        (
            r"image_before_prompt: images is torch.int64 of shape \(3,\); integers \(B, 2\) fit",
            lambda: recipes.image_before_prompt([1, 2, 3], 4),
        ),
        ("image_before_prompt: images holds -1", lambda: recipes.image_before_prompt([[-1, 2]], 4)),
        ("chunk_causal: chunk_len is 0; an int from 1", lambda: recipes.chunk_causal(0, 4)),
        ("chunk_causal: window is nan", lambda: recipes.chunk_causal(2, 4, float("nan"))),
        ("shared_prefix: continuations is a NoneType", lambda: recipes.shared_prefix(None, 4)),
        ("attention_sinks: window is 0", lambda: recipes.attention_sinks(1, 0, 4)),
        ("attention_sinks: sinks is -1", lambda: recipes.attention_sinks(-1, 2, 4)),
        ("block_diffusion: block_len is 0", lambda: recipes.block_diffusion(0, 2)),
        ("block_diffusion_halves: blocks is 1.5", lambda: recipes.block_diffusion_halves(2, 1.5)),
        ("window_around_whole_images: window is 0", lambda: recipes.window_around_whole_images([[]], 4, 0)),
    ],
)
def test_recipes_refuse_what_does_not_fit_by_the_callers_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_example_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "masks.png"
    shown = subprocess.run([sys.executable, "-m", "tfkernels.mask", "--out", str(path)], capture_output=True, text=True,
                           check=True)
    assert path.read_bytes().startswith(b"\x89PNG") and "Warning" not in shown.stderr
    pictures = shown.stdout.split("\n\n")
    for example, drawn in zip(recipes.examples(), pictures, strict=False):
        title, *lines = drawn.strip("\n").split("\n")
        assert title == example.title
        filled = [[line[2 * k] == "█" for k in range(example.mask.key_len)] for line in lines]
        assert torch.equal(torch.tensor(filled), dense(example.mask)[0])
    assert len({example.title for example in recipes.examples()}) == len(recipes.examples()) == len(pictures) - 1
