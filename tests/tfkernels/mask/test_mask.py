"""TransfusionMask against its stated semantics written out pair by pair, FlexAttention's block masks and transformers'
masks."""
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import DEVICE
from tfkernels import TransfusionMask, attention
from tfkernels._library import INTERPRET


def span_of(position, spans):
    return next((span for span in spans if span[0] <= position < span[1]), None)


def visible(i, j, *, spans, documents, hidden, window):
    """Whether query i sees key j, from the definition: documents, padding, hidden spans, images, window, causality."""
    between = documents[min(i, j):max(i, j) + 1]
    if documents[i] != documents[j] or min(between) < 0:
        return False
    secret = span_of(j, hidden)
    if secret is not None and span_of(i, [secret]) is None:
        return False
    image = span_of(i, spans)
    return (j <= i or image is not None and image[0] <= j < image[1]) and (window is None or i - j < window)


def dense_by_definition(spans, seq_len, documents=None, hidden=None, window=None):
    """(B, S, S) bool from per-row lists."""
    rows = []
    for b in range(len(spans)):
        facts = {"spans": spans[b], "documents": documents[b] if documents else [0] * seq_len,
                 "hidden": hidden[b] if hidden else [], "window": window}
        rows.append([[visible(i, j, **facts) for j in range(seq_len)] for i in range(seq_len)])
    return torch.tensor(rows, dtype=torch.bool).view(len(spans), seq_len, seq_len)


def dense(mask):
    return mask.dense()[:, 0].cpu()


def dense_by_columns(mask):
    """What key_since and key_until alone say: (B, Sq, Sk)."""
    rows = torch.arange(mask.offset, mask.offset + mask.query_len)[:, None]
    return (mask.key_since.cpu()[:, None] <= rows) & (rows < mask.key_until.cpu()[:, None])


@st.composite
def disjoint_spans(draw, seq_len):
    cuts = sorted(draw(st.lists(st.integers(0, seq_len), max_size=8)))
    return draw(st.permutations([(a, b) for a, b in zip(cuts[::2], cuts[1::2])]))


def uncut(spans, document):
    """The spans that no document's end and no padding cuts."""
    return [(a, b) for a, b in spans if len(set(document[a:b])) <= 1]


@st.composite
def arguments(draw, max_len=36, cut=False):
    """Arguments of from_spans as plain lists: batch 1 or 2, padding anywhere, hidden spans that need not be images;
    `cut`: ends of documents within spans."""
    seq_len, batch = draw(st.integers(1, max_len)), draw(st.integers(1, 2))
    rows = range(batch)
    documents = hidden = None
    if draw(st.booleans()):
        documents = [sorted(draw(st.lists(st.integers(0, 3), min_size=seq_len, max_size=seq_len))) for _ in rows]
        for row in documents:
            for start, stop in draw(disjoint_spans(seq_len)):
                row[start:stop] = [-1] * (stop - start)
    spans = [draw(disjoint_spans(seq_len)) for _ in rows]
    if draw(st.booleans()):
        hidden = [draw(st.one_of(st.just(row[::2]), disjoint_spans(seq_len))) for row in spans]
    if documents and not cut:
        spans, hidden = ([uncut(*pair) for pair in zip(rows, documents)] if rows else rows for rows in (spans, hidden))
    return {"spans": spans, "seq_len": seq_len, "documents": documents, "hidden": hidden,
            "window": draw(st.one_of(st.none(), st.integers(1, seq_len)))}


def build(spans, seq_len, documents=None, hidden=None, window=None):
    documents = None if documents is None else torch.tensor(documents, device=DEVICE)
    return TransfusionMask.from_spans(spans, seq_len, documents=documents, hidden=hidden, window=window, device=DEVICE)


def intervals(seed, sq=23, sk=31, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-4, limit + 5, (batch, size), generator=generator).to(DEVICE)
            for size, limit in ((sq, sk), (sq, sk), (sk, sq), (sk, sq))]


@given(arguments())
def test_from_spans_equals_its_definition_pair_by_pair(given_arguments):
    mask, expected = build(**given_arguments), dense_by_definition(**given_arguments)
    assert torch.equal(dense(mask), expected)
    assert mask.area().item() == expected.sum().item() and mask.area().dtype == torch.int64
    assert (mask.since is None) == (mask.until is None) == mask.rows_exact == (given_arguments["hidden"] is None)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (mask.lo, mask.hi, mask.key_since, mask.key_until))


@given(arguments())
def test_the_columns_alone_tell_a_from_spans_mask(given_arguments):
    mask = build(**given_arguments)
    assert mask.columns_exact
    assert torch.equal(dense_by_columns(mask), dense(mask))


@given(arguments())
def test_from_dense_reads_back_what_dense_wrote(given_arguments):
    mask = build(**given_arguments)
    again = TransfusionMask.from_dense(mask.dense())
    assert torch.equal(again.dense(), mask.dense()) and again.area() == mask.area()


def test_from_intervals_promised_exact_by_columns_is():
    hi = torch.arange(1, 13)[None] + 5
    mask = TransfusionMask.from_intervals((hi - 9).clamp(min=0), hi, key_len=20, columns_exact=True)
    assert torch.equal(dense_by_columns(mask), dense(mask))


@given(arguments(), st.data())
def test_a_slice_of_the_queries_is_those_rows_of_the_whole(given_arguments, data):
    seq_len, expected = given_arguments["seq_len"], dense_by_definition(**given_arguments)
    start = data.draw(st.integers(0, seq_len))
    stop = data.draw(st.integers(start, seq_len))
    part = build(**given_arguments).queries(start, stop)
    assert (part.query_len, part.key_len, part.offset) == (stop - start, seq_len, start)
    assert torch.equal(dense(part), expected[:, start:stop])
    assert torch.equal(dense_by_columns(part), expected[:, start:stop])
    assert part.area().item() == expected[:, start:stop].sum().item()
    again = part.queries((stop - start) // 2, stop - start)
    assert torch.equal(dense(again), expected[:, start + (stop - start) // 2:stop])


@given(arguments())
def test_a_padded_tensor_of_spans_equals_the_lists(given_arguments):
    tensors = dict(given_arguments)
    for name in ("spans", "hidden"):
        rows = given_arguments[name]
        if rows is not None:
            width = max(map(len, rows)) + 1
            tensors[name] = torch.tensor([[*row, *[(0, 0)] * (width - len(row))] for row in rows], device=DEVICE)
    assert torch.equal(dense(build(**tensors)), dense(build(**given_arguments)))


@given(st.data())
def test_from_token_types_makes_each_run_of_one_value_an_image(data):
    seq_len = data.draw(st.integers(1, 36))
    types = data.draw(st.lists(st.integers(0, 2), min_size=seq_len, max_size=seq_len))
    documents = sorted(data.draw(st.lists(st.integers(0, 2), min_size=seq_len, max_size=seq_len)))
    mask = TransfusionMask.from_token_types(torch.tensor([types], device=DEVICE),
                                            torch.tensor([documents], device=DEVICE))

    def expected(i, j):
        image = types[i] > 0 and len(set(types[min(i, j):max(i, j) + 1])) == 1
        return documents[i] == documents[j] and (image or j <= i)

    assert dense(mask)[0].tolist() == [[expected(i, j) for j in range(seq_len)] for i in range(seq_len)]


def test_causal_is_the_lower_triangle_for_any_batch():
    mask = TransfusionMask.causal(9, device=DEVICE)
    assert mask.batch_size == 1 and torch.equal(dense(mask)[0], torch.ones(9, 9, dtype=torch.bool).tril())
    assert torch.equal(dense(TransfusionMask.causal(9, window=3, device=DEVICE))[0],
                       torch.ones(9, 9, dtype=torch.bool).tril().triu(-2))


def test_adjacent_images_stay_apart():
    mask = build([[(2, 5), (5, 9)]], 12)
    assert dense(mask)[0, 2:5, 2:5].all() and dense(mask)[0, 5:9, 2:9].all() and not dense(mask)[0, 2:5, 5:].any()
    types = TransfusionMask.from_token_types(torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], device=DEVICE))
    assert torch.equal(dense(types), dense(mask))


def test_a_hidden_span_inside_an_image_is_hidden_from_the_image_too():
    assert torch.equal(dense(build([[(0, 6)]], 8, hidden=[[(2, 4)]])),
                       dense_by_definition([[(0, 6)]], 8, hidden=[[(2, 4)]]))


def test_one_batch_row_of_documents_or_hidden_spans_serves_all():
    spans, documents, hidden = [[(1, 4)], [(5, 9)]], [[0] * 5 + [1] * 5], [[(2, 3)]]
    expected = dense_by_definition(spans, 10, documents * 2, hidden * 2)
    assert torch.equal(dense(build(spans, 10, documents, hidden)), expected)
    assert torch.equal(dense(build(spans[:1], 10, documents * 2, hidden)), expected[:1].expand(2, -1, -1))
    assert build(spans[:1], 10, documents, hidden * 2).batch_size == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0, 7])
def test_from_intervals_follows_its_equation_and_its_columns_cover_it(seed, offset):
    lo, hi, since, until = intervals(seed)
    since, until = since + offset, until + offset
    rows, keys = torch.arange(offset, offset + 23, device=DEVICE)[:, None], torch.arange(31, device=DEVICE)
    seen = (lo[..., None] <= keys) & (keys < hi[..., None])
    mask = TransfusionMask.from_intervals(lo, hi, key_len=31, offset=offset)
    assert (torch.equal(mask.dense()[:, 0], seen) and mask.area() == seen.sum() and mask.since is None
            and mask.until is None)
    assert not (dense(mask) & ~dense_by_columns(mask)).any()
    seen = seen & (since[:, None] <= rows) & (rows < until[:, None])
    mask = TransfusionMask.from_intervals(lo, hi, since, until, offset=offset)
    assert (torch.equal(mask.dense()[:, 0], seen) and mask.area() == seen.sum() and mask.since is not None
            and mask.until is not None)
    assert not (dense(mask) & ~dense_by_columns(mask)).any()


def test_one_row_of_since_and_until_serves_every_batch_row():
    lo, hi, since, until = intervals(0)
    one = TransfusionMask.from_intervals(lo, hi, since[:1], until[:1])
    assert torch.equal(dense(one),
                       dense(TransfusionMask.from_intervals(lo, hi, since[:1].expand(2, -1), until[:1].expand(2, -1))))


@pytest.mark.parametrize("hidden", [None, [[(0, 2)]]])
def test_no_queries_and_no_tokens_have_area_zero(hidden):
    assert build([[(0, 2)]], 4, hidden=hidden).queries(2, 2).area().item() == 0
    assert build([[]], 0).area().item() == 0 and build([[]], 0).dense().shape == (1, 1, 0, 0)


def test_an_empty_list_of_columns_is_of_integers():
    assert TransfusionMask.causal(6).select_keys([]).key_len == 0


def test_to_moves_every_tensor_and_keeps_the_rest():
    mask = build([[(1, 4)]], 8, hidden=[[(1, 4)]]).queries(2, 6)
    moved = mask.to("meta")
    assert {x.device.type for x in (moved.lo, moved.hi, moved.key_since, moved.key_until)} == {"meta"}
    assert (moved.rows_exact, moved.columns_exact, moved.offset) == (mask.rows_exact, mask.columns_exact, mask.offset)
    assert torch.equal(mask.to("cpu", non_blocking=True).dense(), mask.dense().cpu()) and moved.device.type == "meta"


def test_the_mask_lives_where_its_arguments_do():
    documents = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    assert TransfusionMask.from_spans([[(1, 4)]], 8, documents=documents).lo.device.type == DEVICE
    assert TransfusionMask.from_spans(torch.tensor([[[1, 4]]], device=DEVICE), 8).hi.device.type == DEVICE
    assert TransfusionMask.from_token_types(documents).key_since.device.type == DEVICE
    assert TransfusionMask.from_spans([[(1, 4)]], 8).lo.device.type == "cpu"


@given(st.data())
def test_equals_transformers_causal_mask_with_block_sequence_ids(data):
    masking_utils = pytest.importorskip("transformers.masking_utils")
    from transformers import LlamaConfig
    config = LlamaConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4, vocab_size=4)
    config._attn_implementation = "sdpa"
    seq_len, batch = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 2))
    documents, positions = torch.zeros(batch, seq_len, dtype=torch.int64), torch.arange(seq_len).repeat(batch, 1)
    ids, spans = torch.full((batch, seq_len), -1), []
    for b in range(batch):
        cut = data.draw(st.integers(1, seq_len))
        documents[b, cut:], positions[b, cut:] = 1, torch.arange(seq_len - cut)
        halves = (data.draw(disjoint_spans(cut)),
                  [(a + cut, e + cut) for a, e in data.draw(disjoint_spans(seq_len - cut))])
        spans.append(halves[0] + halves[1])
        for number, (start, end) in enumerate(spans[b]):
            ids[b, start:end] = number
    expected = masking_utils.create_causal_mask(config=config, inputs_embeds=torch.zeros(batch, seq_len, 4),
                                                attention_mask=None, past_key_values=None, position_ids=positions,
                                                block_sequence_ids=ids)
    assert torch.equal(build(spans, seq_len, documents.tolist()).dense().cpu(), expected)


class LargestTensor(TorchDispatchMode):
    """Record the bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.skipif(INTERPRET, reason="the interpreter takes minutes for 32k tokens")
@pytest.mark.parametrize("with_hidden", [False, True])
def test_32k_tokens_cost_16_bytes_each_and_nothing_quadratic(with_hidden):
    seq_len = 2**15
    spans = torch.tensor([[(a, a + 256) for a in range(64, seq_len - 256, 320)]], device=DEVICE)
    documents = (torch.arange(seq_len, device=DEVICE) // 3200)[None]  # where spans end
    hidden = spans[:, ::2] if with_hidden else None
    with LargestTensor() as largest:
        mask = TransfusionMask.from_spans(spans, seq_len, documents=documents, hidden=hidden, window=4096)
    assert sum(x.nbytes for x in (mask.lo, mask.hi, mask.key_since, mask.key_until)) == 16 * seq_len
    each = largest.bytes / seq_len
    assert largest.bytes <= 32 * (seq_len + 1), f"{each} bytes a token in one tensor; the most is four int64"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        TransfusionMask.from_spans(spans, seq_len, documents=documents, hidden=hidden, window=4096).lo[0, 0].item()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, f"building took {seconds} seconds"


def test_a_mask_has_the_shape_of_its_dense_form():
    mask = build([[(1, 3)], []], 6).queries(2, 5)
    assert mask.shape == tuple(mask.dense().shape) and mask.ndim == mask.dense().ndim


@pytest.mark.parametrize("make", [
    lambda: build([[(1, 3)]], 6), lambda: TransfusionMask.from_cache(torch.tensor([3], device=DEVICE), 2, 6),
    lambda: TransfusionMask.from_intervals(*torch.tensor([[[0, 0]], [[1, 2]]], device=DEVICE)),
    lambda: build([[(1, 3)]], 6).queries(2, 5).to("cpu")])
def test_a_mask_that_is_made_in_inference_mode_is_of_plain_tensors_and_shows_the_same(make):
    """Of these attention remembers what all layers read off a mask; it sees where one was written to."""
    with torch.inference_mode():
        mask = make()
    assert not any(x.is_inference() for x in (mask.lo, mask.hi, mask.key_since, mask.key_until))
    assert torch.equal(mask.dense(), make().dense())


def test_a_mask_of_integers_from_inference_mode_trains_outside_of_it():
    whole = build([[(1, 3)]], 6)
    with torch.inference_mode():
        sides = [x.clone() for x in (whole.lo, whole.hi, whole.key_since, whole.key_until)]
    assert all(x.is_inference() for x in sides)
    x = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    found = [torch.autograd.grad(attention(x, x, x, mask).square().sum(), x)[0]
             for mask in (TransfusionMask(*sides), TransfusionMask.from_intervals(*sides[:2]), whole)]
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
