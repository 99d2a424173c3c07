"""Accuracy, gradients, edge cases, registration and errors of `tfkernels.attention`, on whichever device runs the
tests."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tfkernels
from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, cpu_only, traced
from tfkernels import TransfusionMask, attention, attention_reference, attention_with_lse
from tfkernels._library import INTERPRET
from tfkernels.attention.triton.forward import dot_precision
from tfkernels.mask import recipes


def random_inputs(batch, heads, kv_heads, sq, sk, dim, value_dim=None, seed=0):
    generator, value_dim = torch.Generator().manual_seed(seed), value_dim or dim
    sizes = [(batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, value_dim),
             (batch, heads, sq, value_dim), (batch, heads, sq)]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def run(function, inputs, mask, dtype, device, sinks=None, **options):
    """Return out, lse, dq, dk, dv of `function` with the inputs rounded to `dtype`; with sinks, dsinks as well."""
    tensors = [x.to(device, dtype).requires_grad_() for x in (*inputs[:3], *([] if sinks is None else [sinks]))]
    out, lse = function(*tensors[:3], mask, **options, **({} if sinks is None else {"sinks": tensors[3]}))
    dout, dlse = inputs[3].to(device, out.dtype), inputs[4].to(device, lse.dtype)
    seen = torch.isfinite(lse)
    grads = torch.autograd.grad((out * dout).sum() + (lse.masked_fill(~seen, 0) * dlse).sum(), tensors)
    return (out, lse, *grads)


def absolute_terms(q, k, v, dout, dlse, mask, scale=None, softcap=None, sinks=None):
    """The sums behind out, lse, dq, dk, dv and dsinks taken over absolute values, in float64: what their rounding
    errors scale with."""
    scale, group = scale or q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores, size = q @ k.mT * scale, q.abs() @ k.abs().mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    visible = mask.dense().cpu()
    sink = torch.full(q.shape[1:2], -torch.inf, dtype=q.dtype) if sinks is None else sinks
    column = sink[:, None, None].expand(*scores.shape[:-1], 1)
    p = torch.cat([scores.masked_fill(~visible, -torch.inf), column], -1).softmax(-1).nan_to_num(0)
    p, p_sink = p[..., :-1], p[..., -1] * visible.any(-1)
    dp = dout.abs() @ v.abs().mT
    dsinks = (p_sink * (1 + sink.abs().nan_to_num(posinf=0)[:, None]) * ((p * dp).sum(-1) + dlse.abs())).sum((0, 2))
    ds = p * (dp + (p * dp).sum(-1, keepdim=True) + dlse.abs()[..., None]) * scale * (1 + size)
    fold = lambda x: x.unflatten(1, (-1, group)).sum(2)  # noqa: E731
    return (p @ v.abs(), (p * size).sum(-1), ds @ k.abs(), fold(ds.mT @ q.abs()),
            fold((p * (1 + size)).mT @ dout.abs()), dsinks)


def check(inputs, mask, dtype, sinks=None, **options):
    """Hold the operator to the accuracy rule in every output and gradient."""
    rounded_inputs = [x.to(dtype).double() for x in inputs[:3]] + inputs[3:]
    options |= {} if sinks is None else {"sinks": sinks.to(dtype).double()}
    exact = run(attention_reference, rounded_inputs, mask, torch.float64, DEVICE, **options)
    rounded = run(attention_reference, rounded_inputs, mask, dtype, DEVICE, **options)
    actual = run(attention_with_lse, rounded_inputs, mask, dtype, DEVICE, **options)
    for name, *values, terms in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), actual, rounded, exact,
                                    absolute_terms(*rounded_inputs, mask, **options)):
        assert_as_accurate(name, *values, terms.to(DEVICE))


def transfusion_mask(batch=2, seq_len=100):
    documents = torch.zeros(batch, seq_len, dtype=torch.int64)
    documents[:, 60:] = 1
    documents[:, -7:] = -1
    spans = [[(min(a, seq_len), min(b, seq_len)) for a, b in row]
             for row in ([(3, 19), (19, 50), (64, 80)], [(70, 90)])]
    return TransfusionMask.from_spans(spans[:batch], seq_len, documents=documents,
                                      device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_errs_at_most_twice_as_much_as_pytorch(dim, dtype):
    check(random_inputs(2, 2, 1, 100, 100, dim), transfusion_mask(), dtype)


@pytest.mark.parametrize("dim", [16, 96, 192, 256])
def test_any_head_dim_up_to_256_fits(dim):
    check(random_inputs(1, 2, 1, 100, 100, dim), transfusion_mask(1), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, DTYPES[-1]])
@pytest.mark.parametrize("dim,value_dim", [(512, 512), (300, 512), (512, 64)])
def test_heads_of_512_fit(dim, value_dim, dtype):
    check(random_inputs(1, 2, 1, 70, 70, dim, value_dim), transfusion_mask(1, 70), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,value_dim", [(192, 128), (24, 16), (32, 80)])
def test_values_may_be_narrower_or_wider_than_keys(dim, value_dim, dtype):
    check(random_inputs(2, 2, 1, 70, 70, dim, value_dim), transfusion_mask(2, 70), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (2, 2), (4, 1), (6, 3)])
def test_shares_key_heads_between_query_heads(heads, kv_heads, dtype):
    check(random_inputs(1, heads, kv_heads, 100, 100, 32), transfusion_mask(1), dtype)


@pytest.mark.parametrize("seq_len", [1, 2, 15, 16, 17, 33, 63, 129])
def test_any_length_fits(seq_len):
    mask = TransfusionMask.from_spans([[(seq_len // 3, seq_len - seq_len // 4)]], seq_len, device=DEVICE)
    check(random_inputs(2, 2, 1, seq_len, seq_len, 32, seed=seq_len), mask, torch.float32)


@pytest.mark.parametrize("options", [{"scale": 0.37}, {"softcap": 1.5}, {"scale": 0.5, "softcap": 20.0}], ids=str)
def test_scale_and_softcap_follow_the_reference(options):
    check(random_inputs(1, 4, 2, 100, 100, 32), transfusion_mask(1), torch.float32, **options)


@pytest.mark.parametrize("window", [1, 7, 40])
def test_a_window_follows_the_reference_in_images_too(window):
    mask = TransfusionMask.from_spans([[(10, 50)], [(90, 100)]], 100, window=window, device=DEVICE)
    check(random_inputs(2, 2, 2, 100, 100, 32), mask, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)  # float32 goes tile by tile, half precision run by run
def test_hidden_spans_are_seen_by_themselves_only(dtype):
    mask = TransfusionMask.from_spans([[(5, 25), (30, 60)], [(0, 40)]], 100, hidden=[[(5, 25)], [(0, 40), (80, 90)]],
                                      device=DEVICE)
    check(random_inputs(2, 2, 1, 100, 100, 32), mask, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_general_intervals_that_neither_side_tells_alone(dtype):
    generator = torch.Generator().manual_seed(3)
    lo, hi = torch.randint(0, 50, (2, 70), generator=generator), torch.randint(0, 70, (2, 70), generator=generator)
    since, until = (torch.randint(0, 50, (2, 70), generator=generator),
                    torch.randint(0, 70, (2, 70), generator=generator))
    mask = TransfusionMask.from_intervals(*(x.to(DEVICE) for x in (lo, hi, since, until)))
    rows, keys = torch.arange(70)[:, None], torch.arange(70)
    dense = (lo[..., None] <= keys) & (keys < hi[..., None]) & (since[:, None] <= rows) & (rows < until[:, None])
    assert torch.equal(mask.dense()[:, 0].cpu(), dense)
    check(random_inputs(2, 2, 1, 70, 70, 32), mask, dtype)


RECIPES = {
    "block diffusion": lambda: recipes.block_diffusion(24, 3, device=DEVICE),
    "block diffusion in halves": lambda: recipes.block_diffusion_halves(24, 3, device=DEVICE),
    "image before its prompt": lambda: recipes.image_before_prompt(torch.tensor([[50, 90]], device=DEVICE), 130),
    "shared prefix": lambda: recipes.shared_prefix([[(40, 70), (70, 105), (105, 130)]], 130, device=DEVICE),
    "attention sinks": lambda: recipes.attention_sinks(3, 40, 130, device=DEVICE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_masks_with_holes_follow_the_reference(name, dtype):
    mask = RECIPES[name]()
    check(random_inputs(1, 2, 1, mask.query_len, mask.key_len, 32), mask, dtype)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET,
                    reason="the CPU implementation visits one run of keys for each block of queries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_that_nobody_sees_are_never_read(dtype):
    """NaN in the keys and values of hidden images, whose tiles are dead to later queries: one that was read would
    show."""
    mask = TransfusionMask.from_spans(
        [[(128, 256), (256, 384)]], 480, hidden=[[(128, 256)]], device=DEVICE
    ).queries(384, 480)
    q, k, v, dout = (x.to(DEVICE, dtype) for x in random_inputs(1, 1, 1, 96, 480, 16)[:4])
    k, v = (x[:, :, :480].clone() for x in (k, v))
    seen = torch.ones(480, dtype=torch.bool, device=DEVICE)
    seen[128:256] = False
    k[:, :, ~seen], v[:, :, ~seen] = torch.nan, torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, mask)
    grads = torch.autograd.grad(out, inputs, dout)
    short = TransfusionMask.causal(352, device=DEVICE).queries(256, 352)
    few = [x.detach().double().requires_grad_() for x in (q, k[:, :, seen], v[:, :, seen])]
    expected = attention_reference(*few, short).out
    wanted = torch.autograd.grad(expected, few, dout.double())
    tolerance = dict(rtol=0, atol=2e-2 if dtype == torch.float16 else 1e-5)
    torch.testing.assert_close(out.double(), expected, **tolerance)
    for ours, theirs in zip(grads, (wanted[0], *wanted[1:])):
        torch.testing.assert_close((ours if ours.shape == theirs.shape else ours[:, :, seen]).double(), theirs,
                                   **tolerance)


def test_more_tiles_than_a_program_looks_at_together():
    """Dead, partial and full tiles in turn over a longer row than one look of `next_run`, queries in its middle and
    behind them."""
    seq_len = 1200 if INTERPRET else 9000
    spans = [[(at, at + 40) for at in range(10, seq_len - 50, 70)]]
    mask = TransfusionMask.from_spans(spans, seq_len, hidden=[spans[0][::2]], device=DEVICE)
    for start, stop in ((seq_len // 2, seq_len // 2 + 40), (seq_len - 60, seq_len)):
        check(random_inputs(1, 1, 1, stop - start, seq_len, 16), mask.queries(start, stop), torch.float16)


def within_documents(spans, documents):
    """Cut spans where the document (S,) changes and leave padding out: what `from_spans` takes."""
    ends = [0, *(1 + (documents[1:] != documents[:-1]).nonzero()[:, 0]).tolist(), len(documents)]
    whole = [(a, b) for a, b in zip(ends, ends[1:]) if a < b and documents[a] >= 0]
    return [(max(a, start), min(b, stop)) for start, stop in spans for a, b in whole if max(a, start) < min(b, stop)]


@given(st.data())
def test_fuzzed_masks_follow_the_reference(data):
    seq_len = data.draw(st.integers(1, 90))
    cuts = sorted(data.draw(st.lists(st.integers(0, seq_len), max_size=8)))
    documents = torch.tensor(sorted(data.draw(st.lists(st.integers(0, 3), min_size=seq_len, max_size=seq_len))))[None]
    padding = data.draw(st.integers(0, seq_len))
    if data.draw(st.booleans()):
        documents[:, :padding] = -1
    spans = [within_documents(zip(cuts[::2], cuts[1::2]), documents[0])]
    hidden = [spans[0][::2]] if data.draw(st.booleans()) else None
    window = data.draw(st.one_of(st.none(), st.integers(1, seq_len)))
    start = data.draw(st.integers(0, seq_len - 1))
    mask = TransfusionMask.from_spans(
        spans, seq_len, documents=documents, hidden=hidden, window=window, device=DEVICE
    ).queries(start, seq_len)
    value_dim = data.draw(st.sampled_from([16, 8, 40]))
    check(random_inputs(1, 2, 1, seq_len - start, seq_len, 16, value_dim, seed=seq_len), mask, torch.float32)


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    documents = torch.full((1, 40), -1)
    documents[:, 30:] = 0
    mask = TransfusionMask.from_spans([[]], 40, documents=documents, device=DEVICE)
    inputs = random_inputs(1, 2, 2, 40, 40, 32)
    out, lse, dq, dk, dv = run(attention_with_lse, inputs, mask, torch.float32, DEVICE)
    for x in (out, dq, dk, dv):
        assert (x[:, :, :30] == 0).all() and torch.isfinite(x).all() and (x[:, :, 31:] != 0).any()
    assert (lse[:, :, :30] == -torch.inf).all()


def test_infinite_gradients_of_an_empty_rows_lse_do_no_harm():
    mask = TransfusionMask.from_intervals(torch.zeros(1, 8, dtype=torch.int32, device=DEVICE),
                                          torch.zeros(1, 8, dtype=torch.int32, device=DEVICE))
    q = torch.randn(1, 1, 8, 16, device=DEVICE, requires_grad=True)
    out, lse = attention_with_lse(q, q, q, mask)
    (out.sum() + lse.exp().sum()).backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_strides_as_they_come_give_equal_results_and_layout():
    mask = transfusion_mask(1)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(1, 2, 1, 100, 100, 32)[:3])
    expected = attention(q, k, v, mask)
    as_bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = attention(*as_bshd, mask)
    assert torch.equal(out, expected) and out.stride() == as_bshd[0].stride()
    apart = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]  # last stride 2
    assert torch.equal(attention(*apart, mask), expected)
    q2, k2, v2 = (x.detach().clone().requires_grad_() for x in (q, k, v))
    attention(*(torch.stack([x, x], -1)[..., 0] for x in (q2, k2, v2)), mask).square().sum().backward()
    q3, k3, v3 = (x.detach().clone().requires_grad_() for x in (q, k, v))
    attention(q3, k3, v3, mask).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in ((q2, q3), (k2, k3), (v2, v3)))


def test_gradients_are_the_same_to_the_bit_every_time():
    inputs, mask = random_inputs(1, 4, 2, 100, 100, 16), transfusion_mask(1)
    first = run(attention_with_lse, inputs, mask, torch.float32, DEVICE)
    for _ in range(2 if INTERPRET else 100):
        assert all(torch.equal(a, b)
                   for a, b in zip(first, run(attention_with_lse, inputs, mask, torch.float32, DEVICE)))


def test_cached_queries_equal_the_rows_of_the_whole():
    mask = TransfusionMask.from_spans([[(10, 30), (50, 70)]], 80, device=DEVICE)
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(2, 4, 2, 80, 80, 32)[:3])
    whole = attention_reference(q, k, v, mask).out
    for start, stop in ((79, 80), (50, 70), (0, 80), (20, 20)):
        part = attention(q[:, :, start:stop], k, v, mask.queries(start, stop))
        torch.testing.assert_close(part, whole[:, :, start:stop], rtol=1e-5, atol=1e-5)


def test_one_mask_row_serves_the_whole_batch():
    q, k, v = (x.float().to(DEVICE) for x in random_inputs(3, 2, 2, 64, 64, 32)[:3])
    one = TransfusionMask.from_spans([[(8, 40)]], 64, device=DEVICE)
    three = TransfusionMask.from_spans([[(8, 40)]] * 3, 64, device=DEVICE)
    assert torch.equal(attention(q, k, v, one), attention(q, k, v, three))


@cpu_only
@pytest.mark.parametrize("value_dim,softcap", [(4, None), (4, 2.0), (2, None), (6, 2.0)])
def test_gradcheck_in_float64(value_dim, softcap):
    mask = TransfusionMask.from_spans([[(2, 7)]], 10, documents=torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0, 1, 1]]))
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 2, 1, 10, 10, 4, value_dim)[:3])

    def seen(q, k, v):
        out, lse = attention_with_lse(q, k, v, mask, softcap=softcap)
        return out, lse[:, :, 1:]

    assert torch.autograd.gradcheck(seen, (q, k, v))


@pytest.mark.parametrize("value_dim", [16, 8])
def test_opcheck_passes_forward_and_backward(value_dim):
    mask = TransfusionMask.from_spans([[(2, 15)]], 20, device=DEVICE)
    q, k, v, dout, dlse = (x.float().to(DEVICE) for x in random_inputs(1, 2, 1, 20, 20, 16, value_dim))
    sides = mask.lo, mask.hi, mask.key_since, mask.key_until
    numbers = mask.rows_exact, mask.columns_exact, 0, 0.2, 0.0
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.tfkernels.attention_forward.default, (*inputs, *sides, *numbers))
    out, lse = attention_with_lse(q, k, v, mask, scale=0.2)
    torch.library.opcheck(torch.ops.tfkernels.attention_backward.default,
                          (dout, dlse, q, k, v, out, lse, *sides, *numbers))


LAYOUTS = {
    "tokens side by side": lambda x: x.mT.contiguous().mT,
    "(B, S, H, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "(S, B, H, D)": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "expanded": lambda x: x[:, :1, :1].expand(x.shape),
    "sliced": lambda x: torch.cat([x, x], 3)[:, :, :, :x.shape[3]],
    "every other": lambda x: torch.stack([x, x], 4)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sq", [20, 3])  # 3: decoding
def test_fakes_have_the_strides_of_the_results_whatever_those_of_the_inputs(layout, sq):
    mask = TransfusionMask.from_spans([[(2, 15)]], 20, device=DEVICE).queries(20 - sq, 20)
    inputs = [x.float().to(DEVICE) for x in random_inputs(2, 4, 2, sq, 20, 16, 24)[:4]]
    q, k, v, dout = (LAYOUTS[layout](x) for x in inputs)
    sides, numbers = (mask.lo, mask.hi, mask.key_since, mask.key_until), (True, True, mask.offset, 0.2, 0.0)
    forward, backward = torch.ops.tfkernels.attention_forward.default, torch.ops.tfkernels.attention_backward.default
    torch.library.opcheck(forward, (q, k, v, *sides, *numbers), test_utils=("test_faketensor",))
    out, lse = forward(q, k, v, *sides, *numbers)
    torch.library.opcheck(backward, (dout, torch.zeros_like(lse), q, k, v, out, lse, *sides, *numbers),
                          test_utils=("test_faketensor",))
    for x in (out, *backward(dout, torch.zeros_like(lse), q, k, v, out, lse, *sides, *numbers)):
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        assert x.stride(3) == 1 and x.numel() == 1 + last, "dense, the last dimension contiguous"
    torch.testing.assert_close(out, attention(*(x.contiguous() for x in (q, k, v)), mask, scale=0.2))


@traced
def test_compiles_whole_and_does_not_recompile_when_images_move():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(q, k, v, mask):
        return attention(q * 2, k, v, mask).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    frames = []
    for seq_len, spans in ((96, [(3, 19)]), (64, [(5, 30)]), (80, [(40, 60)]), (112, [(1, 2)]), (128, [])):
        mask = TransfusionMask.from_spans([spans], seq_len, device=DEVICE)
        q, k, v = (x.float().to(DEVICE).requires_grad_() for x in random_inputs(2, 4, 2, seq_len, seq_len, 32, 24)[:3])
        loss = compiled(q, k, v, mask)
        grads = torch.autograd.grad(loss, (q, k, v))
        expected = torch.autograd.grad(step(q, k, v, mask), (q, k, v))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, expected))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[-1] <= 2, f"graphs compiled after each call: {frames}"  # one static, one with a dynamic length


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter computes bfloat16 wrongly")
def test_the_interpreter_refuses_bfloat16():
    q = torch.randn(1, 1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        attention(q, q, q, TransfusionMask.causal(16))


def test_float32_is_exact_unless_torch_was_allowed_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert (dot_precision(torch.zeros(1)) == expected
                    and dot_precision(torch.zeros(1, dtype=torch.float16)) == "ieee")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


GOOD = torch.zeros(2, 4, 8, 16)
BAD_CALLS = {
    "q has 4 heads and k has 3": (GOOD, GOOD[:, :3], GOOD[:, :3], 8),
    "v has shape": (GOOD, GOOD, GOOD[:, :2], 8),
    "v has shape .* as many heads and tokens": (GOOD, GOOD, GOOD[:, :, :4], 8),
    "v has head dim 0; 1 to": (GOOD, GOOD, GOOD[..., :0], 8),
    "q has shape": (GOOD[0], GOOD, GOOD, 8),
    "k has shape .* head dim": (GOOD, GOOD[..., :8], GOOD[..., :8], 8),
    "k is torch.float16": (GOOD, GOOD.half(), GOOD.half(), 8),
    "q is torch.int64": (GOOD.long(), GOOD.long(), GOOD.long(), 8),
    "q has head dim 513; 1 to 512 fits": (torch.zeros(1, 1, 8, 513),) * 3 + (8,),
    "mask is 9 queries by 9 keys": (GOOD, GOOD, GOOD, 9),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_inputs_that_do_not_fit_are_refused_by_name(message):
    q, k, v, seq_len = BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, TransfusionMask.causal(seq_len))


def test_masks_and_softcaps_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="mask is a Tensor"):
        attention(GOOD, GOOD, GOOD, torch.ones(8, 8))
    with pytest.raises(ValueError, match="mask has 3 batch rows and q has 2"):
        attention(GOOD, GOOD, GOOD, TransfusionMask.from_spans([[]] * 3, 8))
    with pytest.raises(ValueError, match="softcap is -1"):
        attention(GOOD, GOOD, GOOD, TransfusionMask.causal(8), softcap=-1)


@pytest.mark.parametrize("wrong", [None, [[1.0]], "q", torch.nn.Linear(2, 2)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("place", range(4))
def test_what_is_no_tensor_or_mask_is_refused_by_the_arguments_name(place, wrong):
    arguments = [GOOD, GOOD, GOOD, TransfusionMask.causal(8)]
    arguments[place] = wrong
    for function in (attention, attention_with_lse):
        with pytest.raises(
            ValueError, match=f"attention: {('q', 'k', 'v', 'mask')[place]} is a {type(wrong).__name__}"
        ):
            function(*arguments)


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "1", [1.0], torch.ones(())], ids=str)
def test_scales_and_softcaps_that_are_no_finite_number_are_refused(name, value):
    with pytest.raises(ValueError, match=f"attention: {name} is "):
        attention(GOOD, GOOD, GOOD, TransfusionMask.causal(8), **{name: value})


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRET, reason="the sums of the CPU implementation")
@pytest.mark.parametrize("softcap,lse_gradient", [(None, False), (None, True), (30.0, False)])
def test_gradients_summed_over_many_blocks_are_rounded_once(softcap, lse_gradient):
    """A key seen by 60 blocks of queries: sums kept in bfloat16 would err 5 times as much as PyTorch's, which rounds
    once."""
    size = 2000
    mask = TransfusionMask.causal(size, documents=(torch.arange(size) * 3 // size)[None])
    inputs = [x.bfloat16().double() for x in random_inputs(1, 1, 1, size, size, 16)]
    inputs[4] *= lse_gradient
    exact, rounded, actual = (run(function, inputs, mask, dtype, DEVICE, softcap=softcap)
                              for function, dtype in ((attention_reference, torch.float64),
                                                      (attention_reference, torch.bfloat16),
                                                      (attention_with_lse, torch.bfloat16)))
    for name, ours, theirs, want in zip(("dq", "dk", "dv"), actual[2:], rounded[2:], exact[2:]):
        assert (ours - want).norm() <= 2 * (theirs - want).norm(), name
        assert (ours - want).norm() <= 4e-3 * want.norm(), name


def test_tfkernels_imports_neither_models_nor_transformers():
    import subprocess
    import sys
    code = ("import sys, tfkernels; sys.exit(any(m.split('.')[0] in ('transformers', 'diffusers', 'transfusion') for "
            "m in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0 and tfkernels.__version__
