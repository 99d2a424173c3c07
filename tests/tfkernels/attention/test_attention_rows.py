"""What a mask hides has no say, whatever it holds, and what it shows never vanishes: NaN and infinities in every input
and every path."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES
from tests.tfkernels.attention.test_attention import within_documents
from tests.tfkernels.attention.test_attention_decode import pages
from tfkernels import (
    TransfusionMask,
    attention_reference,
    attention_with_lse,
    paged_attention,
    paged_attention_reference,
)
from tfkernels._library import INTERPRET

JUNK = torch.tensor([math.nan, math.inf, -math.inf])
few = settings(max_examples=5 if INTERPRET else 40)
CLOSE = dict(rtol=1e-4, atol=1e-4)


def inputs(batch, heads, kv_heads, sq, sk, dim, seed, value_dim=None):
    """q, k, v, dout, dlse."""
    generator, value_dim = torch.Generator().manual_seed(seed), value_dim or dim
    sizes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, value_dim),
             (batch, heads, sq, value_dim), (batch, heads, sq))
    return [torch.randn(size, generator=generator).to(DEVICE) for size in sizes]


def run(function, q, k, v, dout, dlse, mask, **options):
    """out, lse, dq, dk, dv."""
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*given, mask, **options)
    return out, lse, *torch.autograd.grad((out, lse), given, (dout.to(out.dtype), dlse.to(lse.dtype)))


def filled(x, where, junk):
    """x with zeros, or with NaN and infinities in turn, in the tokens (dimension 2) that `where` (B, tokens) names."""
    where = where[:, None] if x.ndim == 3 else where[:, None, :, None]
    values = JUNK.to(x).repeat(-(-x.numel() // 3))[:x.numel()].view(x.shape) if junk else torch.zeros_like(x)
    return torch.where(where, values, x)


@st.composite
def masks(draw, longest=40):
    """A mask of 2 batch rows: images, documents, padding, windows, hidden copies, caches of two lengths, runs of keys
    and of queries at random."""
    size = draw(st.integers(2, longest))
    kind = draw(st.sampled_from(["spans", "hidden", "cache", "image in a cache", "rows", "rows and columns"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    start = draw(st.sampled_from([0, 0, size // 2, size - 1]))
    if kind in ("spans", "hidden"):
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
        documents = torch.randint(0, 3, (2, size), generator=generator).sort(1).values - draw(st.integers(0, 1))
        documents[:, size - draw(st.integers(0, 5)) % size:] = -1
        spans = [within_documents(zip(cuts[skip::2], cuts[skip + 1::2]), row) for skip, row in zip((0, 2), documents)]
        window = draw(st.sampled_from([None, 1, 7]))
        hidden = [spans[0][::2], []] if kind == "hidden" else None
        mask = TransfusionMask.from_spans(spans, size, documents=documents, window=window, hidden=hidden)
        return mask.queries(start, size).to(DEVICE)
    if kind in ("cache", "image in a cache"):
        queries = draw(st.integers(1, size))
        cached = torch.randint(0, size - queries + 1, (2,), generator=generator)
        return TransfusionMask.from_cache(cached, queries, size + 9, image=kind != "cache").to(DEVICE)
    lo, hi = (torch.randint(0, size + 1, (2, size), generator=generator) for _ in range(2))
    since, until = ((torch.randint(0, size + 1, (2, size), generator=generator) for _ in range(2))
                    if kind == "rows and columns" else (None, None))
    return TransfusionMask.from_intervals(lo, hi, since, until).queries(start, size).to(DEVICE)


def with_zeros_and_with_junk(function, tensors, queries, keys, mask, softcap):
    """Results where the tokens `queries` of q, dout and dlse, and `keys` of k and v, hold zeros, and where they hold
    junk."""
    return [run(function, *(filled(x, keys if i in (1, 2) else queries, junk) for i, x in enumerate(tensors)), mask,
                softcap=softcap) for junk in (False, True)]


@few
@given(masks(), st.integers(0, 999), st.sampled_from([16, 8, 40]), st.sampled_from([None, 1.3]))
def test_a_row_is_what_zeros_in_all_that_it_does_not_see_would_give(mask, seed, value_dim, softcap):
    """For one query: every key that it does not see and every other query hold junk."""
    row = seed % mask.query_len
    hidden, others = ~mask.dense()[:, 0, row], torch.arange(mask.query_len, device=DEVICE).expand(2, -1) != row
    tensors = inputs(2, 2, 1, mask.query_len, mask.key_len, 16, seed, value_dim)
    for function in (attention_with_lse, attention_reference):
        wanted, gotten = with_zeros_and_with_junk(function, tensors, others, hidden, mask, softcap)
        for got, want in zip(gotten[:3], wanted[:3]):                                      # out, lse, dq
            torch.testing.assert_close(got[:, :, row], want[:, :, row], **CLOSE)


@few
@given(masks(), st.integers(0, 999), st.sampled_from([16, 8, 40]), st.sampled_from([None, 1.3]))
def test_a_keys_gradients_are_what_zeros_in_the_queries_that_do_not_see_it_would_give(mask, seed, value_dim, softcap):
    """For one key: every query that does not see it holds junk, and so does every key that none of its queries sees."""
    key, dense = seed % mask.key_len, mask.dense()[:, 0]
    others = ~dense[:, :, key]
    unrelated = ~(dense & ~others[..., None]).any(1)
    unrelated[:, key] = False
    tensors = inputs(2, 2, 1, mask.query_len, mask.key_len, 16, seed, value_dim)
    for function in (attention_with_lse, attention_reference):
        wanted, gotten = with_zeros_and_with_junk(function, tensors, others, unrelated, mask, softcap)
        for got, want in zip(gotten[3:], wanted[3:]):                                      # dk, dv
            torch.testing.assert_close(got[:, :, key], want[:, :, key], **CLOSE)


@few
@given(masks(), st.integers(0, 999), st.sampled_from([16, 8, 40]), st.sampled_from(["q", "k", "v", "dout", "dlse"]),
       st.sampled_from(JUNK.tolist()), st.sampled_from([None, 1.3]))
def test_what_is_seen_shows_where_the_reference_shows_it(mask, seed, value_dim, name, value, softcap):
    """One value that is not finite, in a place that somebody sees: the same results are not finite as in the reference,
    in float64."""
    pairs = mask.dense()[0, 0].nonzero()
    if len(pairs) == 0:
        return
    row, key = pairs[seed % len(pairs)].tolist()
    made = inputs(2, 2, 1, mask.query_len, mask.key_len, 16, seed, value_dim)
    tensors = dict(zip(("q", "k", "v", "dout", "dlse"), made))
    place = (0, 0, key if name in ("k", "v") else row) + (() if name == "dlse" else (3,))
    tensors[name][place] = value
    got = run(attention_with_lse, *tensors.values(), mask, softcap=softcap)
    want = run(attention_reference, *(x.double() for x in tensors.values()), mask, softcap=softcap)
    # a soft cap makes an infinite score finite
    assert softcap or any(not torch.isfinite(x).all() for x in (want[0], *want[2:]))
    for kind, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        assert torch.equal(
            torch.isfinite(ours), torch.isfinite(theirs)
        ), f"{name} = {value} at {place}: {kind} is finite in other places"
        finite = torch.isfinite(theirs)
        torch.testing.assert_close(ours[finite].double(), theirs[finite], **CLOSE)
    torch.testing.assert_close(got[1].double(), want[1], equal_nan=True, **CLOSE)


# the forward kernel; decoding in parts; one part for several queries
@pytest.mark.parametrize("sq,sk", [(40, 40), (1, 200), (5, 90)])
@pytest.mark.parametrize("columns", [False, True])
def test_scores_of_minus_infinity_alone_are_no_empty_row(sq, sk, columns):
    """A softmax over nothing but -inf is NaN, and so are the gradients; the LSE is -inf, as that of an empty row, whose
    output is 0."""
    mask = TransfusionMask.from_cache(torch.tensor([sk - sq]), sq, sk).to(DEVICE)
    since, until = (mask.key_since, mask.key_until) if columns else (None, None)
    lo, hi = mask.lo.repeat(2, 1), mask.hi.repeat(2, 1)
    hi[1, 0] = 0  # batch row 1: its first query sees nothing
    mask = TransfusionMask.from_intervals(lo, hi, since, until, key_len=sk)
    q, k, v, dout, dlse = inputs(2, 2, 1, sq, sk, 16, seed=sq)
    q[..., 2], k[..., 2] = 1, -math.inf
    out, lse, dq, dk, dv = run(attention_with_lse, q, k, v, dout, dlse, mask)
    want = run(attention_reference, q.double(), k.double(), v.double(), dout, dlse, mask)
    assert ((lse == -math.inf).all() and out[0].isnan().all() and (out[1, :, 0] == 0).all() and (dq[1, :, 0] == 0).all()
            and out[1, :, 1:].isnan().all())
    for ours, theirs in zip((out, lse, dq, dk, dv), want):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True)


def test_a_part_with_scores_of_minus_infinity_alone_leaves_the_others_as_they_are():
    mask = TransfusionMask.from_cache(torch.tensor([199]), 1, 200).to(DEVICE)
    q, k, v, dout, dlse = inputs(1, 2, 1, 1, 200, 16, seed=1)
    q[..., 2], k[:, :, :120, 2] = 1, -math.inf
    got = run(attention_with_lse, q, k, v, dout, dlse, mask)[:2]
    short = TransfusionMask.from_cache(torch.tensor([79]), 1, 80).to(DEVICE)
    for ours, theirs in zip(got, attention_reference(q, k[:, :, 120:], v[:, :, 120:], short)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", JUNK.tolist())
def test_a_page_shows_what_it_holds_up_to_the_last_key_and_nothing_behind(name, value):
    mask = TransfusionMask.from_cache(torch.tensor([70, 20]), 3, 96).to(DEVICE)
    q, k, v = inputs(2, 4, 2, 3, 96, 16, seed=5)[:3]
    clean = paged_attention_reference(q, *(pages(x, 8, 0, seed=2)[0] for x in (k, v)), pages(k, 8, 0, seed=2)[1], mask)
    for x in (k, v):
        x[0, :, 73:], x[1, :, 23:] = value, math.nan
    for seen in (False, True):
        if seen:
            (k if name == "k" else v)[0, 0, 50, 4] = value
        (k_pages, table), (v_pages, _) = (pages(x, 8, 0, seed=2) for x in (k, v))
        got, want = (f(q, k_pages, v_pages, table, mask) for f in (paged_attention, paged_attention_reference))
        torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)
        torch.testing.assert_close(got[1], clean[1], **CLOSE)
        assert bool(torch.isfinite(got[0]).all()) is not seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_junk_in_one_document_leaves_the_others_as_accurate_as_ever(dtype):
    documents = torch.arange(100)[None] // 34
    mask = TransfusionMask.from_spans([[(5, 20), (40, 60)]], 100, documents=documents, device=DEVICE)
    tensors = [x.to(dtype) for x in inputs(1, 2, 1, 100, 100, 32, seed=4)]
    second = (documents == 1).to(DEVICE)
    zeros, junk = ([filled(x, second, junk) for x in tensors] for junk in (False, True))
    exact, rounded = (run(attention_reference, *(x.double() for x in zeros), mask),
                      run(attention_reference, *zeros, mask))
    for name, ours, theirs, wanted in zip(("out", "lse", "dq", "dk", "dv"), run(attention_with_lse, *junk, mask),
                                          rounded, exact):
        kept = [x[:, :, ~second[0]] for x in (ours, theirs, wanted)]
        assert_as_accurate(name, *kept, kept[2].abs())
        assert not torch.isfinite(ours[:, :, second[0]]).all()


def test_results_with_junk_are_the_same_to_the_bit_every_time():
    mask = TransfusionMask.from_spans([[(3, 19)]], 40, device=DEVICE)
    tensors = inputs(1, 2, 1, 40, 40, 16, seed=6)
    for x in tensors:
        x[:, :, 30] = math.nan
    first = run(attention_with_lse, *tensors, mask)
    for ours, again in zip(first, run(attention_with_lse, *tensors, mask)):
        assert torch.equal(ours.nan_to_num(nan=7.0), again.nan_to_num(nan=7.0))
