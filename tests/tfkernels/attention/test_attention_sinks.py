"""A learned sink per head: accuracy and gradients in every path, rows that see nothing, and what is refused."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, cpu_only, traced
from tests.tfkernels.attention.test_attention import check, random_inputs, run, transfusion_mask
from tests.tfkernels.attention.test_attention_decode import pages
from tests.tfkernels.attention.test_attention_rows import masks
from tfkernels import (
    TransfusionMask,
    attention,
    attention_reference,
    attention_with_lse,
    paged_attention,
    paged_attention_reference,
)


def random_sinks(heads, seed=0, around=2.0):
    return torch.randn(heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + around


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_errs_at_most_twice_as_much_as_pytorch(softcap, dtype):
    check(random_inputs(2, 4, 2, 70, 70, 32, 24), transfusion_mask(2, 70), dtype, random_sinks(4), softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [[200, 3], [30, 9]])  # a split cache, and one in whole
def test_decoding_errs_at_most_twice_as_much_as_pytorch(cached, dtype):
    mask = TransfusionMask.from_cache(torch.tensor(cached, device=DEVICE), 3, max(cached) + 3)
    check(random_inputs(2, 4, 2, 3, max(cached) + 3, 32), mask, dtype, random_sinks(4, seed=1))


@given(masks(), st.integers(0, 99), st.sampled_from([-40.0, 0.0, 4.0, 40.0]))
def test_any_mask_and_a_sink_of_any_size_follow_the_reference(mask, seed, around):
    inputs = random_inputs(2, 2, 1, mask.query_len, mask.key_len, 16, seed=seed)
    check(inputs, mask, torch.float32, random_sinks(2, seed, around))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len,page_size", [(1, 16), (5, 7)])
def test_a_paged_cache_follows_the_reference(query_len, page_size, dtype):
    key_len = 77 + query_len
    q, k, v = (x.to(DEVICE, dtype) for x in random_inputs(2, 4, 2, query_len, key_len, 32)[:3])
    (k_pages, table), (v_pages, _) = (pages(x, page_size, 3, seed=1) for x in (k, v))
    mask = TransfusionMask.from_cache(torch.tensor([77, 30], device=DEVICE), query_len, table.shape[1] * page_size)
    sinks = random_sinks(4).to(DEVICE, dtype)
    actual, rounded = (f(q, k_pages, v_pages, table, mask, sinks=sinks)
                       for f in (paged_attention, paged_attention_reference))
    exact = paged_attention_reference(q.double(), k_pages.double(), v_pages.double(), table, mask, sinks=sinks.double())
    assert_as_accurate("out", actual, rounded, exact, exact.abs())


def test_the_lse_counts_the_sink_and_the_output_is_what_it_leaves():
    mask = transfusion_mask(1)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(1, 2, 1, 100, 100, 16)[:3])
    sinks = random_sinks(2).float().to(DEVICE)
    plain, found = attention_with_lse(q, k, v, mask), attention_with_lse(q, k, v, mask, sinks=sinks)
    seen = plain.lse > -math.inf
    torch.testing.assert_close(found.lse[seen], torch.logaddexp(plain.lse, sinks[:, None])[seen])
    left = torch.exp(plain.lse - found.lse)[..., None]
    torch.testing.assert_close(found.out[seen], (plain.out * left)[seen], rtol=1e-4, atol=1e-6)


def test_a_sink_of_minus_infinity_is_none():
    mask = transfusion_mask(1)
    inputs = random_inputs(1, 2, 1, 100, 100, 16)
    none = run(attention_with_lse, inputs, mask, torch.float32, DEVICE)
    found = run(attention_with_lse, inputs, mask, torch.float32, DEVICE, sinks=torch.full((2,), -math.inf))
    for ours, theirs in zip(found, none):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[-1], torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("sq,sk", [(40, 40), (3, 40), (1, 200)])
def test_rows_that_see_nothing_stay_zero_and_give_the_sink_no_gradient(sq, sk):
    none = torch.zeros(1, sq, dtype=torch.int32, device=DEVICE)
    mask = TransfusionMask.from_intervals(none, none, key_len=sk)
    out, lse, *grads = run(attention_with_lse, random_inputs(1, 2, 1, sq, sk, 16), mask, torch.float32, DEVICE,
                           sinks=random_sinks(2))
    assert (out == 0).all() and (lse == -math.inf).all() and len(grads) == 4
    assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("sq,sk", [(40, 40), (1, 200)])
def test_where_every_score_is_minus_infinity_the_sink_takes_all_weight(sq, sk):
    mask = TransfusionMask.from_cache(torch.tensor([sk - sq]), sq, sk).to(DEVICE)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(1, 2, 1, sq, sk, 16)[:3])
    q[..., 2], k[..., 2] = 1, -math.inf
    sinks = random_sinks(2).float().to(DEVICE)
    found = attention_with_lse(q, k, v, mask, sinks=sinks)
    assert (found.out == 0).all()
    torch.testing.assert_close(found.lse, sinks[:, None].expand(1, 2, sq))


@cpu_only
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(softcap):
    mask = TransfusionMask.from_spans([[(2, 7)]], 10, documents=torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0, 1, 1]]))
    tensors = [x.requires_grad_() for x in (*random_inputs(1, 2, 1, 10, 10, 4)[:3], random_sinks(2))]

    def seen(q, k, v, sinks):
        out, lse = attention_with_lse(q, k, v, mask, softcap=softcap, sinks=sinks)
        return out, lse[:, :, 1:]

    assert torch.autograd.gradcheck(seen, tensors)


def test_opcheck_passes_forward_and_backward():
    mask = TransfusionMask.from_spans([[(2, 15)]], 20, device=DEVICE)
    q, k, v, dout, dlse = (x.float().to(DEVICE) for x in random_inputs(1, 2, 1, 20, 20, 16))
    sinks = random_sinks(2).float().to(DEVICE)
    rest = (mask.lo, mask.hi, mask.key_since, mask.key_until, mask.rows_exact, mask.columns_exact, 0, 0.2, 0.0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    torch.library.opcheck(torch.ops.tfkernels.attention_forward.default, (*inputs[:3], *rest, inputs[3]))
    out, lse = attention_with_lse(q, k, v, mask, scale=0.2, sinks=sinks)
    torch.library.opcheck(torch.ops.tfkernels.attention_backward.default,
                          (dout, dlse, q, k, v, out, lse, *rest, sinks))


@traced
def test_compiles_whole():
    mask = TransfusionMask.from_spans([[(3, 19)]], 96, device=DEVICE)
    inputs = [x.float().to(DEVICE).requires_grad_() for x in (*random_inputs(1, 4, 2, 96, 96, 32)[:3], random_sinks(4))]

    def step(q, k, v, sinks):
        return attention(q * 2, k, v, mask, sinks=sinks * 2).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))):
        torch.testing.assert_close(ours, theirs)


def test_sinks_may_have_a_dtype_of_their_own():
    mask = transfusion_mask(1)
    q, k, v = (x.half().to(DEVICE) for x in random_inputs(1, 2, 1, 100, 100, 16)[:3])
    sinks = random_sinks(2).float().to(DEVICE).requires_grad_()
    out = attention(q, k, v, mask, sinks=sinks)
    torch.testing.assert_close(out, attention_reference(q, k, v, mask, sinks=sinks).out, rtol=0, atol=4e-3)
    out.float().square().sum().backward()
    assert out.dtype == torch.float16 and sinks.grad.dtype == torch.float32 and (sinks.grad != 0).all()


@pytest.mark.parametrize("wrong", [[0.0, 0.0], torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)],
                         ids=["list", "3 heads", "2 dimensions", "int32"])
def test_sinks_that_do_not_fit_are_refused_by_name(wrong):
    q, mask = torch.zeros(1, 2, 8, 16), TransfusionMask.causal(8)
    for function in (attention, attention_with_lse):
        with pytest.raises(ValueError, match="attention: sinks is .* fits"):
            function(q, q, q, mask, sinks=wrong)
    store, table = torch.zeros(1, 8, 2, 16), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="paged_attention: sinks is .* fits"):
        paged_attention(q, store, store, table, mask, sinks=wrong)
