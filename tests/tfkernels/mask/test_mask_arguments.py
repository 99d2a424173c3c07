"""What callers give `TransfusionMask`: refused by name where it does not fit, clipped where looking would wait."""
import pytest
import torch

from tests.conftest import DEVICE, traced
from tests.tfkernels.mask.test_mask import build, dense, dense_by_definition
from tfkernels import TransfusionMask

LO, KEYS = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 6, dtype=torch.int32)
BAD_SPANS = {
    r"spans\[0\] holds \(1099511627776, 1099511627778\); 0 <= start <= end <= 8": {
        "spans": torch.tensor([[[2**40, 2**40 + 2]]])
    },
    r"spans\[0\] holds \(2, 6\), which an end of a document in documents\[0\] cuts": {
        "spans": [[(2, 6)]],
        "documents": [[0] * 4 + [1] * 4],
    },
    r"spans\[1\] holds \(0, 3\), which an end of a document in documents\[0\] cuts": {
        "spans": [[(3, 5)], [(0, 3)]],
        "documents": [[-1] + [0] * 7],
    },
    r"hidden\[0\] holds \(2, 6\), which an end of a document in documents\[1\] cuts": {
        "spans": [[]],
        "hidden": [[(2, 6)]],
        "documents": [[0] * 8, [0] * 4 + [1] * 4],
    },
    r"spans is an empty list; one list per batch row fits": {"spans": []},
    r"spans is torch.bool": {"spans": torch.ones(1, 1, 2, dtype=torch.bool)},
    r"spans is torch.complex64": {"spans": torch.ones(1, 1, 2, dtype=torch.complex64)},
    r"spans is \[\[\('a', 'b'\)\]\]": {"spans": [[("a", "b")]]},
    r"spans is 5": {"spans": 5},
    r"documents is torch.bool": {"spans": [[]], "documents": torch.zeros(1, 8, dtype=torch.bool)},
    r"documents is torch.int64 of shape \(8,\)": {"spans": [[]], "documents": [0] * 8},
    r"documents is \[\[0\], \[0, 1\]\]; an integer tensor": {"spans": [[]], "documents": [[0], [0, 1]]},
    r"documents is 'none'": {"spans": [[]], "documents": "none"},
    r"window is nan; a window of at least 1 key": {"spans": [[]], "window": float("nan")},
    r"window is 2.5": {"spans": [[]], "window": 2.5},
    r"window is True": {"spans": [[]], "window": True},
    r"window is '3'": {"spans": [[]], "window": "3"},
    r"spans\[0\] holds \(3, 9\); 0 <= start <= end <= 8": {"spans": [[(3, 9)]]},
    r"spans\[1\] holds \(-1, 2\)": {"spans": [[], [(-1, 2)]]},
    r"spans\[0\] holds \(5, 3\)": {"spans": [[(5, 3)]]},
    r"spans\[0\] holds \(4, 6\), which overlaps the span before it, ending at 5": {"spans": [[(4, 6), (1, 5)]]},
    r"hidden\[0\] holds \(0, 10\)": {"spans": [[]], "hidden": [[(0, 10)]]},
    r"spans is torch.int64 of shape \(1, 2\)": {"spans": torch.tensor([[1, 2]])},
    r"spans is torch.int64 of shape \(1, 1, 3\)": {"spans": [[(1, 2, 3)]]},
    r"spans is torch.float32": {"spans": [[(1.5, 3)]]},
    r"spans is \[\(1, 3\)\]; a list of \(start, end\) per batch row": {"spans": [(1, 3)]},
    r"spans is None": {"spans": None},
    r"documents decreases along a row": {"spans": [[]], "documents": torch.tensor([[0, 0, 1, 1, -1, 0, 0, 0]])},
    r"documents is torch.int64 of shape \(1, 7\); an integer tensor \(B, 8\)": {
        "spans": [[]],
        "documents": torch.zeros(1, 7, dtype=torch.int64),
    },
    r"documents is torch.float32": {"spans": [[]], "documents": torch.zeros(1, 8)},
    r"spans has 2 batch rows where another argument has 3": {
        "spans": [[], []],
        "documents": torch.zeros(3, 8, dtype=torch.int64),
    },
    r"hidden has 2 batch rows where another argument has 3": {"spans": [[]] * 3, "hidden": [[], []]},
    r"window is 0; a window of at least 1 key": {"spans": [[]], "window": 0},
}
BAD_INTERVALS = {
    r"lo holds 1099511627776; -2147483648 to 2147483647 fits, which int32 holds": (LO.long() + 2**40, LO),
    r"hi holds -1099511627776": (LO, LO.long() - 2**40),
    r"since holds 2147483648": (LO, LO, KEYS.long() + 2**31, KEYS),
    r"until holds 2147483648": (LO, LO, KEYS, KEYS.long() + 2**31),
    r"lo is torch.bool": (LO.bool(), LO),
    r"hi is torch.complex64": (LO, LO.to(torch.complex64)),
    r"hi is None; an integer tensor \(B, Sq\) fits": (LO, None),
    r"lo is \[\[0, 0\], \[1\]\]": ([[0, 0], [1]], LO),
    r"lo is torch.int64 of shape \(2,\) and hi is torch.int64 of shape \(2,\)": ([0, 0], [1, 2]),
    r"since is torch.int64 of shape \(\)": (LO, LO, 3, 4),
    r"key_len is -1; an int from 0": (LO, LO, None, None, -1),
    r"key_len is 6.0": (LO, LO, None, None, 6.0),
    r"offset is -1; an int from 0": (LO, LO, None, None, 6, -1),
    r"offset is 4294967296": (LO, LO, None, None, 6, 2**32),
    r"lo is torch.int32 of shape \(2, 4\) and hi is torch.int32 of shape \(2, 6\)": (LO, KEYS),
    r"lo is torch.float32": (LO.float(), LO.float()),
    r"since and until come together": (LO, LO, KEYS),
    r"since is torch.int32 of shape \(3, 6\); an integer tensor \(2, 6\)": (LO, LO, KEYS[[0, 0, 0]], KEYS),
    r"until is torch.int32 of shape \(2, 4\); an integer tensor \(2, 6\)": (LO, LO, KEYS, LO),
    r"since is torch.float32": (LO, LO, KEYS.float(), KEYS),
    r"until is torch.int32 of shape \(2, 6\); an integer tensor \(2, 5\)": (LO, LO, KEYS[:, :5], KEYS, 5),
}


@pytest.mark.parametrize("message", BAD_SPANS)
def test_spans_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        TransfusionMask.from_spans(seq_len=8, **BAD_SPANS[message])


@pytest.mark.parametrize("message", BAD_INTERVALS)
def test_intervals_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        TransfusionMask.from_intervals(*BAD_INTERVALS[message])


@pytest.mark.parametrize(
    "types",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 4),
        torch.zeros(1, 4, dtype=torch.complex64),
        None,
        "text",
        [[0], [1, 2]],
    ],
)
def test_token_types_that_do_not_fit_are_refused_by_name(types):
    with pytest.raises(ValueError, match="TransfusionMask.from_token_types: token_types is"):
        TransfusionMask.from_token_types(types)


@pytest.mark.parametrize("seq_len", [-1, 8.0, None, "8", True, 2**31, torch.tensor(8)])
def test_lengths_that_are_none_are_refused_by_name(seq_len):
    for call in (lambda: TransfusionMask.from_spans([[]], seq_len), lambda: TransfusionMask.causal(seq_len)):
        with pytest.raises(ValueError, match="seq_len is .*; an int from 0 to 2147483647 fits"):
            call()


def test_negative_token_types_are_refused_where_looking_costs_nothing():
    with pytest.raises(ValueError, match="from_token_types: token_types holds -1; 0 to 9223372036854775807 fits, 0 "
                                         "for text and k > 0 for image k"):
        TransfusionMask.from_token_types([[-1, 0]])


@pytest.mark.parametrize(
    "visible",
    [torch.ones(1, 1, 2, 2), torch.ones(2, dtype=torch.bool), torch.ones(1, 2, 2, 2, dtype=torch.bool), None, "dense",
     [[[[True], [True, False]]]]],
)
def test_dense_masks_that_do_not_fit_are_refused_by_name(visible):
    with pytest.raises(ValueError, match=r"TransfusionMask.from_dense: visible is .*; a bool tensor \(B, 1, Sq, Sk\), "
                                         r"\(B, Sq, Sk\) or \(Sq, Sk\), one mask for all heads, fits"):
        TransfusionMask.from_dense(visible)


def test_arrays_and_nested_lists_mean_what_tensors_mean():
    numpy = pytest.importorskip("numpy")
    spans, documents, types = [[(1, 3), (4, 6)]], [[0, 0, 0, 1, 1, 1]], [[0, 1, 1, 0, 2, 2]]
    expected = dense_by_definition(spans, 6, documents)
    for convert in (list, torch.tensor, numpy.array):
        assert torch.equal(
            dense(TransfusionMask.from_spans(convert(spans), numpy.int64(6), documents=convert(documents))), expected
        )
        assert torch.equal(dense(TransfusionMask.from_token_types(convert(types), convert(documents))), expected)
        rows = TransfusionMask.from_intervals(
            convert([[0, 0]]), convert([[1, 2]]), convert([[0, 1]]), convert([[2, 2]])
        )
        assert torch.equal(dense(rows)[0], torch.ones(2, 2).tril().bool())
        assert torch.equal(dense(TransfusionMask.from_dense(convert([[[[True, False], [True, True]]]])))[0],
                           torch.ones(2, 2).tril().bool())
        assert dense(TransfusionMask.from_cache(convert([1]), 1, 2)).sum() == 2
    windowed = dense(TransfusionMask.causal(6, window=2))
    assert torch.equal(dense(TransfusionMask.causal(6, window=numpy.int64(2))), windowed)
    cached = dense(TransfusionMask.from_cache([4], 2, 6, window=2))
    assert torch.equal(dense(TransfusionMask.from_cache([4], 2, 6, window=numpy.int32(2))), cached)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_integers_mean_what_signed_ones_mean(dtype):
    spans, documents, types = [[(1, 3), (4, 6)]], [[0, 0, 0, 1, 1, 1]], [[0, 1, 1, 0, 2, 2]]
    spans, documents, types, cached = (torch.tensor(x, dtype=dtype) for x in (spans, documents, types, [4]))
    expected = dense_by_definition(spans.tolist(), 6, documents.tolist())
    assert torch.equal(dense(TransfusionMask.from_spans(spans, 6, documents=documents)), expected)
    assert torch.equal(dense(TransfusionMask.from_token_types(types, documents)), expected)
    rows = TransfusionMask.from_intervals(documents, types, documents, types)
    signed = TransfusionMask.from_intervals(*(x.long() for x in (documents, types, documents, types)))
    assert torch.equal(dense(rows), dense(signed))
    assert torch.equal(dense(TransfusionMask.from_cache(cached, 2, 6)), dense(TransfusionMask.from_cache([4], 2, 6)))


@traced
def test_lists_compile_whole():
    def made(x):
        return (TransfusionMask.causal(x.shape[0]).dense(),
                TransfusionMask.from_spans([[(1, 3), (4, 6)], [(0, 2)]], x.shape[0], documents=[[0] * 3 + [1] * 5],
                                           hidden=[[(1, 3)], []], window=3).dense())

    torch._dynamo.reset()
    x = torch.zeros(8)
    for found, expected in zip(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x)):
        assert torch.equal(found, expected)


def test_lists_of_spans_are_checked_whatever_the_default_device_is():
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"spans\[0\] holds \(5, 3\)"):
            TransfusionMask.from_spans([[(5, 3)]], 8)
        assert TransfusionMask.from_spans([[(3, 5)]], 8).lo.device.type == "meta"
        assert TransfusionMask.from_spans([[(3, 5)]], 8, device="cpu").lo.device.type == "cpu"


def test_masks_are_made_of_a_batch_of_vmaps_as_of_each_of_its_rows():
    spans, lens = torch.tensor([[[[1, 3]]], [[[2, 6]]]], device=DEVICE), torch.tensor([[3], [5]], device=DEVICE)
    ids = torch.tensor([[[0] * 5 + [1] * 3], [[0] * 2 + [1] * 6]], device=DEVICE)
    made = {"from_spans": (lambda x: TransfusionMask.from_spans(x, 8).dense(), spans),
            "documents": (lambda x: TransfusionMask.causal(8, documents=x).dense(), ids),
            "from_token_types": (lambda x: TransfusionMask.from_token_types(x).dense(), ids),
            "from_cache": (lambda x: TransfusionMask.from_cache(x, 2, 8).dense(), lens),
            "from_intervals": (lambda x: TransfusionMask.from_intervals(x, x + 2).dense(), ids)}
    for name, (function, x) in made.items():
        assert torch.equal(torch.func.vmap(function)(x), torch.stack([*map(function, x)])), name


@pytest.mark.parametrize("block_size", [0, -128, 128.0, None, True])
def test_a_block_size_that_is_none_is_refused_by_name(block_size):
    with pytest.raises(ValueError, match="TransfusionMask.block_mask: block_size is .*; an int from 1 to 2147483647 "
                                         "fits"):
        TransfusionMask.causal(8).block_mask(block_size)


def test_a_window_longer_than_int32_is_no_window():
    assert torch.equal(dense(build([[(2, 5)]], 8, window=2**40)), dense(build([[(2, 5)]], 8)))


@pytest.mark.parametrize("start,stop", [(-1, 3), (3, 2), (0, 9)])
def test_query_ranges_outside_the_mask_are_refused_by_name(start, stop):
    with pytest.raises(ValueError, match=rf"queries: \[start, stop\) is \[{start}, {stop}\); a range within \[0, 8\)"):
        TransfusionMask.causal(8).queries(start, stop)


@pytest.mark.skipif(DEVICE == "cpu", reason="CPU spans are checked, and then refused, instead of clipped")
def test_spans_on_the_device_are_clipped_without_waiting():
    for end in (99, 2**32 + 1, 2**40):
        spans = torch.tensor([[[3, end]]], device=DEVICE)
        assert torch.equal(dense(TransfusionMask.from_spans(spans, 8)), dense_by_definition([[(3, 8)]], 8))
    cut = TransfusionMask.from_spans(torch.tensor([[[2, 6]]], device=DEVICE), 8,
                                     documents=torch.tensor([[0] * 4 + [1] * 4], device=DEVICE))
    assert torch.equal(dense(cut), dense_by_definition([[(2, 4), (4, 6)]], 8, [[0] * 4 + [1] * 4]))


@pytest.mark.skipif(DEVICE == "cpu", reason="CPU integers are checked, and then refused, instead of clipped")
def test_integers_on_the_device_are_clipped_to_int32_without_waiting():
    far = torch.full((1, 3), 2**40, device=DEVICE)
    assert (TransfusionMask.from_intervals(-far, far).area().item() == 9
            and TransfusionMask.from_intervals(far, far).area().item() == 0)
