"""The operator that builds a mask's integers: the same numbers as its reference, whatever crosses a block's edge."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DEVICE
from tests.tfkernels.mask.test_mask import arguments, disjoint_spans
from tfkernels import TransfusionMask
from tfkernels.mask.intervals import intervals
from tfkernels.mask.reference import intervals_reference


def tensors(spans, seq_len, documents=None, hidden=None, window=None):
    """The operator's arguments from from_spans' lists."""
    def pad(rows):
        return torch.tensor([[*map(list, row), *[[0, 0]] * (9 - len(row))] for row in rows], device=DEVICE)

    documents = None if documents is None else torch.tensor(documents, device=DEVICE)
    return pad(spans), None, documents, None if hidden is None else pad(hidden), len(spans), seq_len, window or 0


@given(arguments(max_len=80, cut=True))
def test_equals_its_reference_number_for_number(given_arguments):
    given_arguments = tensors(**given_arguments)
    assert torch.equal(intervals(*given_arguments), intervals_reference(*given_arguments))


@given(st.data())
def test_token_types_equal_their_reference_and_the_spans_they_number(data):
    seq_len = data.draw(st.integers(1, 80))
    spans = data.draw(disjoint_spans(seq_len))
    types = torch.zeros(1, seq_len, dtype=torch.int32, device=DEVICE)
    for number, (start, end) in enumerate(sorted(spans)):
        types[0, start:end] = 1 + number % 2
    adjacent = any(a[1] == b[0] for a, b in zip(sorted(spans), sorted(spans)[1:]) if a[0] < a[1] and b[0] < b[1])
    given_arguments = (None, types, None, None, 1, seq_len, 0)
    assert torch.equal(intervals(*given_arguments), intervals_reference(*given_arguments))
    if not adjacent:
        assert torch.equal(intervals(*given_arguments), intervals(*tensors([spans], seq_len)))


@pytest.mark.parametrize("seq_len", [1, 16, 17, 300])
def test_runs_that_cross_many_blocks_are_followed_to_their_ends(seq_len):
    documents = torch.zeros(2, seq_len, dtype=torch.int64, device=DEVICE)
    documents[1, seq_len // 2:] = 2**40  # wider than int32, and not padding
    documents[1, :seq_len // 7] = -1
    mask = TransfusionMask.from_spans([[(seq_len // 5, seq_len)], []], seq_len, documents=documents)
    assert mask.lo[0].tolist() == [0] * seq_len and mask.key_until[0].tolist() == [seq_len] * seq_len
    cut, start = seq_len // 2, seq_len // 7
    assert mask.lo[1].tolist() == [*range(start), *[start] * (cut - start), *[cut] * (seq_len - cut)]
    assert mask.key_until[1].tolist() == [*range(start), *[cut] * (cut - start), *[seq_len] * (seq_len - cut)]


def test_one_row_serves_a_batch_and_an_empty_sequence_has_no_integers():
    documents = torch.tensor([[0, 1, 1, 1], [0, 1, 1, -1]], device=DEVICE)
    both = TransfusionMask.from_spans([[(1, 3)]], 4, documents=documents)
    for row in range(2):
        one = TransfusionMask.from_spans([[(1, 3)]], 4, documents=documents[row:row + 1])
        assert torch.equal(both.dense()[row:row + 1], one.dense())
    assert TransfusionMask.from_spans([[], []], 0, device=DEVICE).lo.shape == (2, 0)


def test_any_integer_dtype_and_any_strides_fit():
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]], device=DEVICE)
    spans = torch.tensor([[[0, 2], [2, 4]]], device=DEVICE)
    expected = TransfusionMask.from_spans(spans, 6, documents=documents).dense()
    for dtype in (torch.int32, torch.int16, torch.int8):
        strided = torch.stack([documents, documents], -1).to(dtype)[..., 0]
        assert torch.equal(TransfusionMask.from_spans(spans.to(dtype), 6, documents=strided).dense(), expected)
    types = torch.tensor([[False, True, True, False]], device=DEVICE)
    assert torch.equal(TransfusionMask.from_token_types(types).dense(),
                       TransfusionMask.from_spans([[(1, 3)]], 4, device=DEVICE).dense())


def test_spans_that_int32_does_not_hold_are_clipped_to_the_sequence():
    spans = torch.tensor([[[2, 2**32 + 1], [-2**40, 1], [2**33, 2**34]]], device=DEVICE)
    given_arguments = spans, None, None, None, 1, 6, 0
    assert torch.equal(intervals(*given_arguments), intervals_reference(*given_arguments))
    assert intervals(*given_arguments)[1].tolist() == [[1, 2, 6, 6, 6, 6]]


def test_opcheck_passes():
    for given_arguments in (tensors([[(1, 4)], [(0, 2), (2, 9)]], 12, [[0] * 8 + [1] * 4, [-1] * 3 + [0] * 9],
                                    [[], [(0, 2)]], 5),
                            (None, torch.tensor([[0, 1, 1, 0]], device=DEVICE), None, None, 1, 4, 0)):
        torch.library.opcheck(torch.ops.tfkernels.mask_intervals.default, given_arguments)
