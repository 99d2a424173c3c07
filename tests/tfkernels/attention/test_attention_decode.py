"""Cached attention: a few queries against split caches, images denoised against their prefix, ragged batches, paged
caches."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES
from tests.tfkernels.attention.test_attention import LAYOUTS, absolute_terms, check, random_inputs
from tfkernels import (
    TransfusionMask,
    attention,
    attention_reference,
    attention_with_lse,
    paged_attention,
    paged_attention_reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("query_len", [1, 4, 16])
def test_decoding_errs_at_most_twice_as_much_as_pytorch(query_len, dim, dtype):
    mask = TransfusionMask.from_cache(torch.tensor([200, 3], device=DEVICE), query_len, 220)
    check(random_inputs(2, 4, 2, query_len, 220, dim), mask, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,value_dim", [(24, 16), (16, 40)])
def test_decoding_with_values_narrower_or_wider_than_keys(dim, value_dim, dtype):
    mask = TransfusionMask.from_cache(torch.tensor([200, 3], device=DEVICE), 3, 220)
    check(random_inputs(2, 4, 2, 3, 220, dim, value_dim), mask, dtype)


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (3, 3), (8, 1), (12, 4)])
def test_query_heads_that_share_a_key_head_read_it_together(heads, kv_heads):
    mask = TransfusionMask.from_cache(torch.tensor([150], device=DEVICE), 3, 153)
    check(random_inputs(1, heads, kv_heads, 3, 153, 32), mask, torch.float32)


@given(st.data())
def test_any_few_queries_of_any_mask_follow_the_reference(data):
    key_len, query_len = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    lo, hi = (torch.randint(0, key_len, (2, query_len), generator=generator),
              torch.randint(0, key_len + 5, (2, query_len), generator=generator))
    since = until = None
    if data.draw(st.booleans()):
        since, until = (torch.randint(0, 8, (2, key_len), generator=generator),
                        torch.randint(0, 20, (2, key_len), generator=generator))
        since, until = since.to(DEVICE), until.to(DEVICE)
    mask = TransfusionMask.from_intervals(lo.to(DEVICE), hi.to(DEVICE), since, until, key_len=key_len)
    value_dim = data.draw(st.sampled_from([16, 8, 40]))
    check(random_inputs(2, 2, 1, query_len, key_len, 16, value_dim, seed=key_len), mask, torch.float32)


def test_a_long_cache_in_parts_equals_one_in_whole():
    """More keys than one part takes, so that several programs share a row, some of whose parts hold nothing."""
    cached = torch.tensor([2100, 5, 0], device=DEVICE)
    mask = TransfusionMask.from_cache(cached, 1, 2101)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(3, 2, 1, 1, 2101, 16)[:3])
    out, lse = attention_with_lse(q, k, v, mask)
    expected, expected_lse = attention_reference(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_softcap_and_scale_reach_the_parts():
    mask = TransfusionMask.from_cache(torch.tensor([120], device=DEVICE), 2, 130)
    check(random_inputs(1, 4, 2, 2, 130, 32), mask, torch.float32, scale=0.7, softcap=1.3)


def test_queries_that_see_nothing_are_zero_in_every_part():
    none = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    q, k = (torch.randn(1, 2, size, 16, device=DEVICE) for size in (3, 200))
    out, lse = attention_with_lse(q, k, k, TransfusionMask.from_intervals(none, none, key_len=200))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_an_image_is_denoised_against_prefixes_of_different_lengths():
    cached, patches, key_len = torch.tensor([90, 37], device=DEVICE), 40, 140
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(2, 4, 2, patches, key_len, 32)[:3])
    out = attention(q, k, v, TransfusionMask.from_cache(cached, patches, key_len, image=True))
    for row, length in enumerate(cached.tolist()):
        mask = TransfusionMask.from_spans(
            [[(length, length + patches)]], length + patches, device=DEVICE
        ).queries(length, length + patches)
        alone = attention_reference(*(x[row:row + 1].double()
                                      for x in (q, k[:, :, :length + patches], v[:, :, :length + patches])), mask).out
        torch.testing.assert_close(out[row:row + 1].double(), alone, rtol=1e-5, atol=1e-5)


def pages(k, page_size, spare, seed):
    """Cut (B, K, Sk, D) into pages in random order, NaN in `spare` of them and behind the last key: pages (P,
    page_size, K, D), table (B, T)."""
    batch, kv_heads, key_len, dim = k.shape
    count = -(-key_len // page_size)
    filled = torch.full((batch, kv_heads, count * page_size, dim), torch.nan, dtype=k.dtype, device=k.device)
    filled[:, :, :key_len] = k
    order = torch.randperm(
        batch * count + spare, generator=torch.Generator().manual_seed(seed)
    ).to(k.device)[:batch * count]
    store = torch.full((batch * count + spare, page_size, kv_heads, dim), torch.nan, dtype=k.dtype, device=k.device)
    store[order] = filled.transpose(1, 2).unflatten(1, (count, page_size)).flatten(0, 1)
    return store, order.view(batch, count).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("query_len,value_dim,image", [(1, 32, False), (5, 24, False), (40, 40, True)])
def test_a_paged_cache_errs_at_most_twice_as_much_as_pytorch(query_len, value_dim, image, page_size, dtype):
    key_len = 77 + query_len
    inputs = random_inputs(2, 4, 2, query_len, key_len, 32, value_dim)
    q, k, v, dout, dlse = inputs
    tables = [pages(x.to(DEVICE, dtype), page_size, 3, seed=1) for x in (k, v)]
    (k_pages, table), (v_pages, _) = tables
    table[1, -(-(30 + query_len) // page_size):] = 10**6  # behind the row's last key: never read
    mask = TransfusionMask.from_cache(torch.tensor([77, 30], device=DEVICE), query_len, table.shape[1] * page_size,
                                      image=image)
    arguments = [x.to(DEVICE, dtype) for x in (q,)], (k_pages, v_pages, table, mask)
    actual = paged_attention(*arguments[0], *arguments[1])
    rounded = paged_attention_reference(*arguments[0], *arguments[1])
    exact = paged_attention_reference(arguments[0][0].double(), k_pages.double(), v_pages.double(), table, mask)
    plain = TransfusionMask.from_cache(torch.tensor([77, 30]), query_len, key_len, image=image)
    terms = absolute_terms(*(x.to(dtype).double() for x in (q, k, v)), dout, dlse, plain)[0]
    assert_as_accurate("out", actual, rounded, exact, terms.to(DEVICE))
    direct = attention_reference(*(x.to(DEVICE, dtype).double() for x in (q, k, v)), plain.to(DEVICE)).out
    torch.testing.assert_close(exact, direct)


def test_pages_of_any_layout_fit():
    """Pages stored head by head, (P, K, page_size, D), are handed over as a transposed view."""
    q, k = torch.randn(1, 2, 1, 16, device=DEVICE), torch.randn(1, 2, 32, 16, device=DEVICE)
    store, table = pages(k, 8, 1, seed=2)
    mask = TransfusionMask.from_cache(torch.tensor([20], device=DEVICE), 1, 32)
    by_head = store.transpose(1, 2).contiguous().transpose(1, 2)
    assert not by_head.is_contiguous()
    assert torch.equal(paged_attention(q, by_head, by_head, table, mask), paged_attention(q, store, store, table, mask))


def test_no_query_asks_nothing_of_the_pages():
    pages = torch.randn(4, 4, 2, 16, device=DEVICE)
    table, mask = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE), TransfusionMask.from_cache([3, 9], 0, 16)
    out = paged_attention(torch.randn(2, 4, 0, 16, device=DEVICE), pages, pages, table, mask.to(DEVICE))
    assert out.shape == (2, 4, 0, 16)


def test_opcheck_passes_for_pages():
    q, k = torch.randn(2, 2, 3, 16, device=DEVICE), torch.randn(2, 1, 32, 16, device=DEVICE)
    store, table = pages(k, 8, 0, seed=3)
    mask = TransfusionMask.from_cache(torch.tensor([20, 2], device=DEVICE), 3, 32)
    sides = mask.lo, mask.hi, mask.key_since, mask.key_until
    torch.library.opcheck(torch.ops.tfkernels.paged_attention.default,
                          (q, store, store, table, *sides, mask.rows_exact, 0, 0.25, 0.0))


@pytest.mark.parametrize("layout", ["tokens side by side", "(B, S, H, D)", "expanded", "sliced"])
def test_the_fake_of_paged_attention_has_the_strides_of_its_result(layout):
    q, k = torch.randn(2, 4, 3, 16, device=DEVICE), torch.randn(2, 2, 32, 16, device=DEVICE)
    store, table = pages(k, 8, 0, seed=3)
    mask = TransfusionMask.from_cache(torch.tensor([20, 2], device=DEVICE), 3, 32)
    sides = mask.lo, mask.hi, mask.key_since, mask.key_until
    torch.library.opcheck(torch.ops.tfkernels.paged_attention.default,
                          (LAYOUTS[layout](q), store, store, table, *sides, mask.rows_exact, 0, 0.25, 0.0),
                          test_utils=("test_faketensor",))


def test_a_page_table_that_does_not_fit_is_refused_by_name():
    q, store, mask = torch.zeros(2, 2, 1, 16), torch.zeros(4, 8, 2, 16), TransfusionMask.causal(16).queries(15, 16)
    table = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="paged_attention: block_table is torch.int64"):
        paged_attention(q, store, store, table.long(), mask)
    with pytest.raises(ValueError,
                       match=r"paged_attention: block_table is torch.int32 of shape \(1, 2\) and q has 2 rows"):
        paged_attention(q, store, store, table[:1], mask)
    with pytest.raises(ValueError, match=r"paged_attention: k_pages has shape \(8, 2, 16\)"):
        paged_attention(q, store[0], store, table, mask)
    with pytest.raises(ValueError, match="paged_attention: mask is 1 queries by 16 keys, q has 1 tokens and k 24"):
        paged_attention(q, store, store, torch.zeros(2, 3, dtype=torch.int32), mask)
    with pytest.raises(ValueError, match="paged_attention: q has 2 heads and k has 3"):
        paged_attention(q, store[:, :, [0, 0, 0]], store[:, :, [0, 0, 0]], table, mask)


@pytest.mark.parametrize("name", ["q", "k_pages", "v_pages", "block_table", "mask"])
def test_what_is_no_tensor_or_mask_is_refused_by_the_arguments_name(name):
    arguments = {"q": torch.zeros(1, 2, 1, 16), "k_pages": torch.zeros(4, 8, 2, 16),
                 "v_pages": torch.zeros(4, 8, 2, 16), "block_table": torch.zeros(1, 2, dtype=torch.int32),
                 "mask": TransfusionMask.causal(16).queries(15, 16)}
    for wrong in (None, [[0, 1]], "pages", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"paged_attention: {name} is a {type(wrong).__name__}"):
            paged_attention(**arguments | {name: wrong})
    with pytest.raises(ValueError, match="paged_attention: k_pages is torch.float16"):
        paged_attention(**arguments | {"k_pages": arguments["k_pages"].half()})
    with pytest.raises(ValueError, match="paged_attention: scale is nan"):
        paged_attention(**arguments, scale=float("nan"))


def test_a_page_that_is_not_there_is_refused_where_a_row_reads_it():
    q, store, mask = (torch.randn(2, 2, 1, 16), torch.randn(4, 8, 2, 16),
                      TransfusionMask.from_cache(torch.tensor([3, 9]), 1, 16))
    good = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="paged_attention: block_table holds 4; 0 to 3 fits"):
        paged_attention(q, store, store, good + 1, mask)
    with pytest.raises(ValueError, match="paged_attention: block_table holds -1; 0 to 3 fits"):
        paged_attention(q, store, store, torch.tensor([[0, 1], [2, -1]], dtype=torch.int32), mask)
    behind = torch.tensor([[0, 9999], [2, 3]], dtype=torch.int32)  # row 0 has 4 keys, all in its first page
    assert torch.equal(paged_attention(q, store, store, behind, mask), paged_attention(q, store, store, good, mask))
    with pytest.raises(ValueError, match="paged_attention: k_pages has shape"):
        paged_attention(q, store[:0], store[:0], good, mask)
