"""Calls of the public operators that together launch every kernel and every row of the launch tables.

Each call is held to the accuracy rule by the check of its operator's own tests. The sizes are small, cross several
tiles and leave a ragged end. A family is called with the dtype that its operators compute in.
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.compare import assert_as_accurate
from tests.tfkernels.attention.test_attention import RECIPES, absolute_terms, random_inputs
from tests.tfkernels.attention.test_attention import check as check_attention
from tests.tfkernels.attention.test_attention_decode import pages
from tests.tfkernels.attention.test_attention_parts import check_forward
from tests.tfkernels.attention.test_attention_rows import filled, run
from tests.tfkernels.losses import test_cross_entropy, test_cross_entropy_options, test_diffusion_loss, test_head_loss
from tests.tfkernels.mask import test_mask_build
from tests.tfkernels.norm import test_norm, test_norm_rows
from tests.tfkernels.patches import test_embed, test_patchify
from tests.tfkernels.patches.latents import CASES, rows_of_tokens, uniform
from tests.tfkernels.rotary import test_rotary
from tfkernels import TransfusionMask, attention_reference, attention_with_lse, paged_attention
from tfkernels.attention import paged_attention_reference
from tfkernels.attention.triton import backward
from tfkernels.mask.intervals import intervals
from tfkernels.mask.reference import intervals_reference
from tfkernels.norm import triton as norm
from tfkernels.patches.triton import embed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
LARGE = 99  # multiprocessors
TRAINING = ("_attention_fwd", "_attention_bwd_dq", "_attention_bwd_dkv")


class Family(NamedTuple):
    """Calls, the kernels that they launch, which rows of the tables (what `holds` says of kernel and key), and dtypes
    that fit."""

    calls: Callable[[torch.dtype], None]
    kernels: set[str]
    holds: Callable[[str, object], bool] = lambda kernel, key: False
    dtypes: tuple[torch.dtype, ...] = DTYPES


def packed_mask(tokens: int, batch: int = 1) -> TransfusionMask:
    """Images, two documents and padding: for later queries the first document is keys without a comparison."""
    documents = torch.zeros(batch, tokens, dtype=torch.int64)
    documents[:, tokens - 20:], documents[:, tokens - 9:] = 1, -1
    middle = tokens // 2
    return TransfusionMask.from_spans([[(3, 30), (middle - 7, middle + 25)]] * batch, tokens, documents=documents)


def mask_of_two_sides(tokens: int) -> TransfusionMask:
    """A hidden image, whose tiles are dead for later queries, between tiles that are full and tiles that are neither.

    Its columns are compared as well, although its rows would tell them.
    """
    third = tokens // 3
    spans = [[(10, third), (third + 5, tokens // 2 + 5), (tokens - 40, tokens - 5)]]
    return replace(TransfusionMask.from_spans(spans, tokens, hidden=[[(10, third)]]), columns_exact=False)


@contextmanager
def device_of(multiprocessors: int):
    """A device with as many multiprocessors. On a LARGE one the programs of whole groups of heads leave some idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "multiprocessors", lambda device: multiprocessors)
        yield


def training(dim: int, tokens: int, dtype: torch.dtype):
    """Attention forward and backward, with masks of one side and of two.

    With the first a program takes both query heads of a key head, as where the device is full; with the second one.
    """
    most = 2 if dim == 32 else 1
    for count, batch, mask in ((1, most, packed_mask(tokens, most)), (LARGE, 1, mask_of_two_sides(tokens))):
        with device_of(count):
            check_attention(random_inputs(batch, 2, 1, tokens, tokens, dim), mask, dtype)


@device_of(LARGE)
def attention_options(dtype: torch.dtype):
    """A head dim between two rows, a soft cap, and both together with a mask of two sides."""
    check_attention(random_inputs(1, 2, 1, 100, 100, 80), packed_mask(100), dtype)
    check_attention(random_inputs(1, 2, 1, 100, 100, 64), packed_mask(100), dtype, softcap=1.5)
    check_attention(random_inputs(1, 2, 2, 100, 100, 48), mask_of_two_sides(100), dtype, softcap=1.5)


@device_of(LARGE)
def values_and_sinks(dtype: torch.dtype):
    """Values narrower and wider than keys, and a sink for each head: whole, with few queries, and in parts."""
    sinks = torch.tensor([1.5, -0.5], dtype=torch.float64)
    for mask in (packed_mask(130), mask_of_two_sides(130)):
        check_attention(random_inputs(1, 2, 1, 130, 130, 48, 24), mask, dtype, sinks)
    check_attention(random_inputs(1, 2, 1, 130, 130, 16, 64), packed_mask(130), dtype)
    for cached in (40, 590):
        mask = TransfusionMask.from_cache(torch.tensor([cached]), 3, cached + 3)
        check_attention(random_inputs(1, 2, 1, 3, cached + 3, 48, 24), mask, dtype, sinks)


@device_of(LARGE)
def rows_done_over(dtype: torch.dtype):
    """NaN and infinities in what nobody sees: results are those of zeros there, a row at a time."""
    for mask in (packed_mask(100), replace(packed_mask(100), rows_exact=False, columns_exact=False)):
        inputs = [x.to(dtype).double() for x in random_inputs(1, 2, 1, 100, 100, 32)]
        hidden = (~mask.dense()[:, 0]).all(1)
        zeros, junk = ([filled(x, hidden, with_junk) for x in inputs] for with_junk in (False, True))
        exact = run(attention_reference, *zeros, mask)
        rounded = run(attention_reference, *(x.to(dtype) for x in zeros), mask)
        actual = run(attention_with_lse, *(x.to(dtype) for x in junk), mask)
        for name, *values, terms in zip(("out", "lse", "dq", "dk", "dv"), actual, rounded, exact,
                                        absolute_terms(*zeros, mask)):
            assert_as_accurate(name, *values, terms)


def decoding(dim: int, dtype: torch.dtype):
    """Few queries against a long cache in two parts, one tile of 16 rows and one of 64, the last with a mask of two
    sides."""
    for queries, two_sides in ((3, False), (13, True)):
        mask = TransfusionMask.from_cache(torch.tensor([590]), queries, 620)
        mask = replace(mask, rows_exact=False) if two_sides else mask
        inputs = [x.to(dtype).double() for x in random_inputs(1, 4, 1, queries, 620, dim)]
        with torch.no_grad():
            actual = attention_with_lse(*(x.to(dtype) for x in inputs[:3]), mask)
            rounded, exact = (attention_reference(*(x.to(t) for x in inputs[:3]), mask)
                              for t in (dtype, torch.float64))
        for name, *values, terms in zip(("out", "lse"), actual, rounded, exact, absolute_terms(*inputs, mask)):
            assert_as_accurate(name, *values, terms)


def many_queries_in_parts(dtype: torch.dtype):
    """More queries than a tile has against keys enough for two parts, plain and with sinks and a
    soft cap; and keys that some queries must not see hold NaN, so that rows of one part are done over."""
    for keys, dim, options in ((1100, 32, {}), (1030, 64, {"softcap": 1.5, "sinks": True})):
        mask = TransfusionMask.from_cache(torch.tensor([keys - 140]), 140, keys, image=True)
        sinks = torch.tensor([1.5], dtype=torch.float64) if options.pop("sinks", False) else None
        check_forward(random_inputs(1, 1, 1, 140, keys, dim), mask, dtype, sinks, **options)
    mask = TransfusionMask.from_cache(torch.tensor([1030]), 20, 1060)
    q, k, v = (x.to(dtype) for x in random_inputs(1, 1, 1, 20, 1060, 32)[:3])
    zeros = attention_with_lse(q, *(x.index_fill(2, torch.arange(1050, 1060), 0) for x in (k, v)), mask)
    junk = attention_with_lse(q, *(x.index_fill(2, torch.arange(1050, 1060), torch.nan) for x in (k, v)), mask)
    for ours, theirs in zip(junk, zeros):
        torch.testing.assert_close(ours, theirs)


def paged(dtype: torch.dtype):
    """A cache in pages of 16, NaN in the pages of nobody; one row is short."""
    q, k, v, *arriving = (x.to(dtype) for x in random_inputs(2, 4, 2, 3, 300, 64))
    (k_pages, table), (v_pages, _) = (pages(x, 16, 3, seed=1) for x in (k, v))
    table[1, -(-33 // 16):] = 10**6                                                        # behind the row's last key
    mask = TransfusionMask.from_cache(torch.tensor([290, 30]), 3, table.shape[1] * 16)
    with torch.no_grad():
        actual, rounded = (f(q, k_pages, v_pages, table, mask) for f in (paged_attention, paged_attention_reference))
        exact = paged_attention_reference(q.double(), k_pages.double(), v_pages.double(), table, mask)
    plain = TransfusionMask.from_cache(torch.tensor([290, 30]), 3, 300)
    terms = absolute_terms(*(x.double() for x in (q, k, v, *arriving)), plain)[0]
    assert_as_accurate("out", actual, rounded, exact, terms)


def norms(operator: str, widths, missing: tuple[str, ...], dtype: torch.dtype):
    """An operator on rows of 7/8 of each width, the images' tokens apart, and with an image for each batch row."""
    for width in widths:
        index = test_norm.packed_index(15) if width < 4096 else torch.tensor([-1, 2, 2, 0, -1, 3, 0])
        test_norm.check(operator, test_norm.random_case(index, width * 7 // 8, 4, missing=missing), dtype)
    test_norm_rows.check(operator, test_norm_rows.row_case(2, 11, 150), dtype)


def rows_of_several_blocks(dtype: torch.dtype):
    """Norms of rows that are wider than a block of the forward kernel."""
    index = torch.tensor([-1, 2, 0])
    for operator in ("modulated_layer_norm", "gated_residual_rms_norm"):
        test_norm.check(operator, test_norm.random_case(index, 9000, 3), dtype)


def rotation(dtype: torch.dtype):
    """One warp and several, heads in one tile and in several, a part of the head that does not turn, no norm."""
    for sizes in (test_rotary.Sizes(1, 2, 1, 5, 32, 16), test_rotary.Sizes(2, 40, 8, 3, 128, 64, tables=2),
                  test_rotary.Sizes(1, 12, 4, 3, 96, 24), test_rotary.Sizes(1, 8, 8, 3, 80, 40, (False, True)),
                  test_rotary.Sizes(1, 4, 2, 7, 64, 32, (False, False), 1)):
        test_rotary.check(sizes, dtype)


def embedding(dtype: torch.dtype):
    """Patches of one tile of elements and of two, several tiles of rows a program, images that begin within a tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "PARTS", 2)                                                   # few programs for the sums
        test_embed.check(test_embed.make((260,), 48, 32, [5, 1, 130, 20, 0, 64], before=3, behind=6), dtype)
        test_embed.check(test_embed.make((2, 80), 144, 80, [60, 41], nowhere=9), dtype)


def patches(dtype: torch.dtype):
    """Tokens of latents in every layout and back, with noise and without."""
    for name in ("latents", "packed, patch 3, padding", "tokens, an empty image, padding", "wide patches"):
        test_patchify.check(CASES[name], dtype)
    test_patchify.test_tokens_are_the_patches_in_the_models_order_and_come_back(2, 3, 8, 12, 4, dtype)
    test_patchify.test_packed_images_are_each_patchified_and_come_back()


def diffusion_losses(dtype: torch.dtype):
    """The loss of a prediction in every layout, with more rows than a program adds at a time."""
    for name in ("latents", "packed, patch 3, padding", "tokens, an empty image, padding", "wide patches"):
        test_diffusion_loss.check(CASES[name], dtype)
    test_diffusion_loss.check(rows_of_tokens([1030, 1], 16), dtype, weighted=False)


def head_losses(dtype: torch.dtype):
    """The loss from the hidden states on: one tile of the patch and three, several tiles of columns and of patches.

    Of the widths only 256 is a multiple of 16 elements, so that weights are copied ahead of their products.
    """
    for name in ("modulated_layer_norm", "modulated_rms_norm"):
        for case, width in ((rows_of_tokens([70, 1, 0, 90], 150, before=3, behind=2), 136), (CASES["latents"], 200),
                            (uniform(3, 4, 16, 16, patch=2), 72), (rows_of_tokens([80, 3], 64), 256)):
            test_head_loss.check(name, case, test_head_loss.tensors(case, width), dtype,
                                 weighted=dtype != torch.float16)                          # as in its own tests


def entropies(dtype: torch.dtype):
    """Vocabularies of every block and of several, with the options and without."""
    everything = test_cross_entropy_options.OPTIONS["everything"]
    for vocabulary in (29, 61, 120, 250, 500, 1000, 2001, 4090, 8000, 16_500):
        case = test_cross_entropy.random_case(9, 16, vocabulary, 6, bias=True, row_weight=True)
        test_cross_entropy.check(case, dtype)
    for vocabulary in (1000, 16_500):
        case = test_cross_entropy.random_case(9, 16, vocabulary, 6, bias=True, row_weight=True)
        test_cross_entropy_options.check(case, dtype, everything, ("loss", "losses", "lse"))


@device_of(LARGE)
def kinds_of_masks(dtype: torch.dtype):
    """The masks that no other family has: a window, what keys hide where rows do not tell it, and masks with holes."""
    generator = torch.Generator().manual_seed(3)
    lo, hi, since, until = (torch.randint(0, most, (1, 70), generator=generator) for most in (50, 70, 50, 70))
    for mask in (TransfusionMask.from_spans([[(10, 50), (90, 100)]], 100, window=40),
                 TransfusionMask.from_intervals(lo, hi, since, until), TransfusionMask.causal(100).queries(60, 100),
                 TransfusionMask.from_cache(torch.tensor([90]), 40, 140, image=True), *(f() for f in RECIPES.values())):
        check_attention(random_inputs(mask.lo.shape[0], 2, 1, mask.query_len, mask.key_len, 32), mask, dtype)


def mask_integers(dtype: torch.dtype):
    """Spans, hidden spans, documents, a window and token types, over the edge of a block of tokens."""
    tokens = 1300
    documents = [[0] * 900 + [1] * 380 + [-1] * 20, [-1] * 3 + [0] * 1297]
    spans = [[(1, 40), (700, 1100)], [(1000, 1300)]]
    types = torch.zeros(2, tokens, dtype=torch.int32)
    types[0, 700:1100], types[1, 5:9], types[1, 9:1200] = 1, 2, 1
    for arguments in (test_mask_build.tensors(spans, tokens, documents, [[(700, 1100)], []], 300),
                      test_mask_build.tensors(spans, tokens),
                      (None, types, torch.tensor(documents), None, 2, tokens, 0)):
        assert torch.equal(intervals(*arguments), intervals_reference(*arguments))


def of_head_dim(kernels, dim: int):
    """Which rows of the attention kernels' tables are of a head dim."""
    return lambda kernel, key: kernel in kernels and key[2] == dim


TRAINED = {*TRAINING, "_attention_bwd_delta", "_attention_bwd_sum", "_tile_bounds", "_mask_intervals"}
GATE = {"_norm_fwd", "_norm_bwd", "_norm_bwd_images"}
NORM = GATE | {"_norm_bwd_tables"}
FAMILIES = {f"attention, head dim {dim}": Family(partial(training, dim, tokens), TRAINED, of_head_dim(TRAINING, dim),
                                                 HALVES if dim == 512 else DTYPES)  # float32 goes up to 256
            for dim, tokens in {32: 300, 64: 300, 128: 210, 256: 150, 512: 120}.items()}
FAMILIES |= {f"decoding, head dim {dim}": Family(partial(decoding, dim), {"_attention_decode", "_attention_merge"},
                                                 of_head_dim({"_attention_decode"}, dim),
                                                 HALVES if dim == 512 else DTYPES)
             for dim in (32, 64, 128, 256, 512)}
FAMILIES |= {
    "many queries in parts": Family(many_queries_in_parts, {"_attention_fwd", "_attention_merge"}),
    "attention's options": Family(attention_options, TRAINED),
    "values and sinks": Family(values_and_sinks, TRAINED | {"_attention_decode", "_attention_merge"}),
    "rows of attention done over": Family(rows_done_over, TRAINED),
    "a cache in pages": Family(paged, {"_attention_decode"}),
    "layer norm": Family(partial(norms, "modulated_layer_norm", norm.FORWARD_WARPS, ()), NORM | {"_norm_bwd_means"},
                         lambda kernel, key: kernel in ("_norm_fwd", "_norm_bwd")),
    "rms norm": Family(partial(norms, "modulated_rms_norm", (64, 1024), ("weight", "shift")), NORM),
    "gate and norm": Family(partial(norms, "gated_residual_rms_norm", (64, 1024, 4096), ()), NORM),
    "gate": Family(partial(norms, "gated_residual", (64, 2048), ()), GATE),
    "rows of several blocks": Family(rows_of_several_blocks, NORM | {"_norm_bwd_means"}),
    "rotary": Family(rotation, {"_qk_norm_rotary_fwd", "_qk_norm_rotary_bwd"}),
    "patches into the sequence": Family(
        embedding, {"_embed_index", "_embed_fwd", "_embed_bwd_hidden", "_embed_bwd", "_embed_bwd_images"},
        lambda kernel, key: kernel in ("_embed_fwd", "_embed_bwd")),
    "patches": Family(patches, {"_patchify_fwd", "_patchify_bwd"}),
    "diffusion loss": Family(diffusion_losses,
                             {"_diffusion_loss_rows", "_diffusion_loss_images", "_diffusion_loss_bwd"}),
    "diffusion loss from hidden states": Family(
        head_losses, {"_head_loss_fwd", "_head_loss_factors", "_head_loss_bwd", "_diffusion_loss_images",
                      "_norm_bwd_images"},
        lambda kernel, key: kernel in ("_head_loss_fwd", "_head_loss_bwd")),
    "cross-entropy": Family(entropies, {"_cross_entropy_rows"}, lambda kernel, key: kernel == "_cross_entropy_rows"),
    "mask": Family(mask_integers, {"_mask_intervals"}, dtypes=DTYPES[:1]),  # integers alone
}
# What `make test` leaves to `make emulate`.
MORE_FAMILIES = {"kinds of masks": Family(kinds_of_masks, TRAINED)}
