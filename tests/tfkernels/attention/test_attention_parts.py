"""Attention cut into parts where whole tiles would leave multiprocessors idle: keys of many queries, query heads that
share a key head."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, EMULATED, KERNEL_RUNS
from tests.launches import seen
from tests.tfkernels.attention.test_attention import absolute_terms, check, random_inputs, run
from tests.tfkernels.attention.test_attention_rows import filled
from tfkernels import TransfusionMask, attention, attention_reference, attention_with_lse
from tfkernels.attention.triton.forward import SPLIT_KEYS
from tfkernels.attention.triton.parts import head_splits, key_splits

LONG = 2 * SPLIT_KEYS + 100 if EMULATED or DEVICE == "cuda" else 150   # keys enough for two parts, or for four
unseen = pytest.mark.skipif(KERNEL_RUNS, reason="launches are counted without running them, once")
TWO_SIDES = dict(rows_exact=False, columns_exact=False)


def check_forward(inputs, mask, dtype, sinks=None, **options):
    """Hold out and LSE, without a gradient, to the accuracy rule."""
    q, k, v, *arriving = [x.to(dtype).double() for x in inputs[:3]] + inputs[3:]
    options |= {} if sinks is None else {"sinks": sinks.to(dtype).double()}
    exact, rounded, actual = (
        function(*(x.to(DEVICE, kind) for x in (q, k, v)), mask,
                 **{name: x.to(DEVICE, kind) if name == "sinks" else x for name, x in options.items()})
        for function, kind in ((attention_reference, torch.float64), (attention_reference, dtype),
                               (attention_with_lse, dtype)))
    for name, *values, terms in zip(("out", "lse"), actual, rounded, exact,
                                    absolute_terms(q, k, v, *arriving, mask, **options)):
        assert_as_accurate(name, *values, terms.to(DEVICE))


def image_in_a_cache(queries, keys, batch=1):
    return TransfusionMask.from_cache(torch.tensor([keys - queries, 40][:batch], device=DEVICE), queries, keys,
                                      image=True)


@pytest.mark.parametrize("programs,group,splits", [
    (64, 4, 4), (128, 4, 4), (132, 4, 1), (256, 4, 1), (16, 8, 8), (65, 8, 8), (66, 8, 4), (128, 8, 4), (64, 1, 1),
    (44, 12, 6), (131, 7, 7)])
def test_query_heads_are_shared_out_where_whole_groups_leave_multiprocessors_idle(programs, group, splits):
    assert head_splits(programs, group, 132) == splits


@pytest.mark.parametrize("programs,keys,splits", [
    (64, 2304, 2), (64, 1024, 2), (64, 1023, 1), (67, 2304, 1), (32, 8448, 4), (32, 1536, 3), (1, 2**20, 128)])
def test_keys_are_cut_where_there_are_enough_and_multiprocessors_idle(programs, keys, splits):
    assert key_splits(programs, 132, keys, 512) == splits


def grids_of(run_it) -> list[tuple[str, int]]:
    found = []
    with seen(lambda kernel, grid, arguments, named: found.append((kernel.__name__, grid[0]))):
        run_it()
    return found


def on_meta(*shape, **options):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", **options)


def mask_on_meta(queries, keys):
    integers = [torch.empty(1, length, dtype=torch.int32, device="meta") for length in (queries, queries, keys, keys)]
    return TransfusionMask(*integers, rows_exact=True, columns_exact=True)


@unseen
@pytest.mark.parametrize("heads,kv_heads,tokens,programs", [
    (32, 8, 1024, [256, 512]), (32, 8, 4096, [256]), (16, 2, 1024, [128, 128]), (16, 2, 4096, [512, 512]),
    (16, 16, 1024, [128])])
def test_keys_and_values_have_the_programs_that_fill_the_device(heads, kv_heads, tokens, programs):
    """Programs of dK/dV at D 128, and of the sums of its parts where there are parts."""
    def step():
        q, k = (on_meta(1, n, tokens, 128, requires_grad=True) for n in (heads, kv_heads))
        attention(q, k, k, mask_on_meta(tokens, tokens)).sum().backward()

    assert [count for name, count in grids_of(step) if name in ("_attention_bwd_dkv", "_attention_bwd_sum")] == programs


@unseen
@pytest.mark.parametrize("prompt,programs", [(256, [64]), (2048, [128, 32 * 256]), (8192, [128, 32 * 256])])
def test_a_denoising_step_has_the_programs_that_fill_the_device(prompt, programs):
    """256 patches, 32 query heads: programs of the forward, and of the merge where there are parts."""
    q, k = on_meta(1, 32, 256, 128), on_meta(1, 8, prompt + 256, 128)
    mask = mask_on_meta(256, prompt + 256)
    assert [count for _, count in grids_of(lambda: attention(q, k, k, mask))] == programs
    wide = on_meta(1, 32, 256, 512), on_meta(1, 8, prompt + 256, 512)
    assert {name for name, _ in grids_of(lambda: attention(wide[0], wide[1], wide[1], mask))} == {"_attention_fwd"}
    for needs in (q, k):  # in training nothing is cut
        needs.requires_grad_()
        assert [count for _, count in grids_of(lambda: attention(q, k, k, mask))] == [64]
        needs.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,tokens", [(4, 1, 40), (8, 1, 32), (6, 2, 24)])
def test_gradients_of_shared_key_heads_are_summed_from_parts(heads, kv_heads, tokens, dtype):
    mask = TransfusionMask.from_spans([[(3, 19)]], tokens, device=DEVICE)
    check(random_inputs(1, heads, kv_heads, tokens, tokens, 32), mask, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [dict(softcap=1.5), dict(value_dim=24), dict(sinks=True), dict(two_sides=True),
                                  dict(two_sides=True, value_dim=64, softcap=2.0, sinks=True), dict(batch=2)], ids=str)
def test_parts_of_query_heads_take_every_option(case, dtype):
    case = dict(case)
    batch, value_dim, tokens = case.pop("batch", 1), case.pop("value_dim", 48), 30 // case.get("batch", 1)
    mask = TransfusionMask.from_spans([[(3, 9)], [(5, 14)]][:batch], tokens, device=DEVICE)
    mask = replace(mask, **TWO_SIDES) if case.pop("two_sides", False) else mask
    sinks = torch.tensor([1.5, -0.5, 0.3, 2.0], dtype=torch.float64) if case.pop("sinks", False) else None
    check(random_inputs(batch, 4, 1, tokens, tokens, 48, value_dim), mask, dtype, sinks, **case)


@given(st.data())
def test_gradients_from_parts_under_any_mask_follow_the_reference(data):
    tokens = data.draw(st.integers(10, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    lo, hi, since, until = (torch.randint(low, tokens + 5, (1, tokens), generator=generator).to(DEVICE)
                            for low in (0, tokens // 2, 0, tokens // 2))
    sides = (since, until) if data.draw(st.booleans()) else (None, None)
    mask = TransfusionMask.from_intervals(lo // 2, hi, *sides)
    check(random_inputs(1, 4, 1, tokens, tokens, 16, data.draw(st.sampled_from([16, 40])), seed=tokens), mask,
          torch.float32)


def test_gradients_from_parts_are_the_same_to_the_bit_every_time():
    inputs = random_inputs(1, 4, 1, 40, 40, 16)
    mask = TransfusionMask.from_spans([[(3, 19)]], 40, device=DEVICE)
    first = run(attention_with_lse, inputs, mask, torch.float32, DEVICE)
    for _ in range(1 if KERNEL_RUNS and DEVICE == "cpu" else 20):
        assert all(torch.equal(*both)
                   for both in zip(first, run(attention_with_lse, inputs, mask, torch.float32, DEVICE)))


@pytest.mark.parametrize("place,value", [(0, math.nan), (1, -math.inf), (2, math.inf)], ids=["q", "k", "v"])
def test_what_one_query_head_holds_shows_in_the_gradients_that_the_reference_says(place, value):
    """A part that is not finite is done over by itself, and its sum with the others is what the reference's is."""
    mask = TransfusionMask.from_spans([[(3, 9)]], 20, device=DEVICE)
    inputs = random_inputs(1, 4, 1, 20, 20, 16)
    inputs[place][0, -1, 15, 3] = value
    ours, want = (run(f, inputs, mask, t, DEVICE)
                  for f, t in ((attention_with_lse, torch.float32), (attention_reference, torch.float64)))
    for name, x, exact in zip(("out", "lse", "dq", "dk", "dv"), ours, want):
        finite = torch.isfinite(exact)
        assert torch.equal(torch.isfinite(x), finite), name
        torch.testing.assert_close(x[finite].double(), exact[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,queries", [(1, 17), (1, 40), (2, 30)])
def test_many_queries_against_a_long_cache_err_at_most_twice_as_much_as_pytorch(heads, queries, dtype):
    check_forward(random_inputs(1, heads, 1, queries, LONG, 32), image_in_a_cache(queries, LONG), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [dict(softcap=1.5), dict(value_dim=24), dict(sinks=True), dict(two_sides=True),
                                  dict(two_sides=True, value_dim=64, softcap=2.0, sinks=True), dict(batch=2)], ids=str)
def test_parts_of_keys_take_every_option(case, dtype):
    case = dict(case)
    batch, value_dim = case.pop("batch", 1), case.pop("value_dim", 48)
    mask = image_in_a_cache(20, LONG, batch)
    mask = replace(mask, **TWO_SIDES) if case.pop("two_sides", False) else mask
    sinks = torch.tensor([1.5], dtype=torch.float64) if case.pop("sinks", False) else None
    check_forward(random_inputs(batch, 1, 1, 20, LONG, 48, value_dim), mask, dtype, sinks, **case)


@given(st.data())
def test_many_queries_of_any_mask_follow_the_reference_in_parts(data):
    """Intervals of each query at random, so that parts hold nothing for some queries and everything for others."""
    batch, queries = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(17, 32))
    keys = LONG + data.draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    lo, hi = (torch.randint(0, keys + 5, (batch, queries), generator=generator).to(DEVICE) for _ in range(2))
    sides = ()
    if data.draw(st.booleans()):
        sides = [torch.randint(low, 40, (batch, keys), generator=generator).to(DEVICE) for low in (0, 10)]
    mask = TransfusionMask.from_intervals(lo, hi, *sides, key_len=keys)
    check_forward(random_inputs(batch, 1, 1, queries, keys, 16, seed=keys), mask, torch.float32)


@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("name,value", [("k", math.nan), ("v", math.inf), ("k", -math.inf), ("v", math.nan)])
def test_parts_show_what_is_visible_and_nothing_else(name, value, two_sides):
    """One document's keys hold junk, which no query of the other document may see, in whatever part it lies."""
    size = LONG + 20
    documents = (torch.arange(size) >= size - 10).long()[None]
    mask = TransfusionMask.causal(size, documents=documents, device=DEVICE).queries(size - 20, size)
    mask = replace(mask, **TWO_SIDES) if two_sides else mask
    q, k, v, *arriving = (x.float().to(DEVICE) for x in random_inputs(1, 1, 1, 20, size, 16))
    clean = attention_with_lse(q, k, v, mask)
    (k if name == "k" else v)[:, :, 11] = value
    ours, want = attention_with_lse(q, k, v, mask), attention_reference(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(ours.out[:, :, 10:], clean.out[:, :, 10:])
    assert not torch.isfinite(ours.out[:, :, :10]).all()
    for x, exact in zip(ours, want):
        torch.testing.assert_close(x.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("two_sides", [False, True])
def test_a_part_with_scores_of_minus_infinity_alone_leaves_the_others_as_they_are(two_sides):
    mask = image_in_a_cache(20, LONG)
    mask = replace(mask, **TWO_SIDES) if two_sides else mask
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(1, 1, 1, 20, LONG, 16)[:3])
    q[..., 2] = 1
    for lowest in (LONG - 30, LONG):
        k[:, :, :lowest, 2] = -math.inf
        for ours, want in zip(attention_with_lse(q, k, v, mask),
                              attention_reference(q.double(), k.double(), v.double(), mask)):
            torch.testing.assert_close(ours.double(), want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_queries_that_see_nothing_are_zero_in_every_part():
    none = torch.zeros(1, 20, dtype=torch.int32, device=DEVICE)
    hi = none.clone()
    hi[:, 7] = LONG
    q, k = (torch.randn(1, 1, size, 16, device=DEVICE) for size in (20, LONG))
    for sinks in (None, torch.ones(1, device=DEVICE)):
        out, lse = attention_with_lse(q, k, k, TransfusionMask.from_intervals(none, hi, key_len=LONG), sinks=sinks)
        empty = torch.arange(20, device=DEVICE) != 7
        assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
        assert torch.isfinite(lse[:, :, 7]).all() and (out[:, :, 7] != 0).any()


def test_results_in_parts_have_the_layout_of_the_queries_and_the_same_bits_each_time():
    mask = image_in_a_cache(20, LONG)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(1, 1, 1, 20, LONG, 16)[:3])
    first, again = attention(q, k, v, mask), attention(q, k, v, mask)
    side_by_side = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(first, again)
    out = attention(side_by_side, k, v, mask)
    assert torch.equal(out, first) and out.stride() == side_by_side.stride()


def test_junk_that_nobody_sees_leaves_gradients_from_parts_as_they_were():
    documents = torch.tensor([[0] * 30 + [-1] * 10])
    mask = TransfusionMask.from_spans([[(3, 19)]], 40, documents=documents, device=DEVICE)
    inputs = [x.to(DEVICE) for x in random_inputs(1, 4, 1, 40, 40, 16)]
    hidden = (documents == -1).to(DEVICE)
    zeros, junk = (run(attention_with_lse, [filled(x, hidden, with_junk) for x in inputs], mask, torch.float32, DEVICE)
                   for with_junk in (False, True))
    for ours, theirs in zip(junk, zeros):
        torch.testing.assert_close(ours, theirs)
