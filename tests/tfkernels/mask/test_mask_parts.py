"""Parts of a mask: fewer queries, fewer keys, several runs of either, against the dense mask's rows and columns; and
attention under such masks."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DEVICE
from tests.tfkernels.attention.test_attention import check as compare
from tests.tfkernels.attention.test_attention import random_inputs, run
from tests.tfkernels.mask.test_mask import arguments, build, dense, dense_by_columns, dense_by_definition, intervals
from tfkernels import TransfusionMask, attention_with_lse
from tfkernels.mask import recipes

KINDS = {example.title: example.mask for example in recipes.examples()}


def draw_range(data, size):
    start = data.draw(st.integers(0, size))
    return start, data.draw(st.integers(start, size))


def draw_numbers(data, size):
    numbers = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
    return torch.tensor(sorted(numbers), dtype=torch.int64, device=DEVICE)


def check(part, expected):
    """The part is `expected` by its rows, by its columns where they say it, and by its counts."""
    assert torch.equal(dense(part), expected)
    assert torch.equal(part.visible_keys().cpu(), expected.sum(-1)) and part.area().item() == expected.sum().item()
    if part.columns_exact:
        assert torch.equal(dense_by_columns(part), expected)


@given(arguments(), st.data())
def test_a_slice_of_the_keys_is_those_columns_of_the_definition(given_arguments, data):
    expected = dense_by_definition(**given_arguments)
    start, stop = draw_range(data, given_arguments["seq_len"])
    part = build(**given_arguments).keys(start, stop)
    assert (part.key_len, part.offset) == (stop - start, 0) and part.rows_exact == (given_arguments["hidden"] is None)
    check(part, expected[:, :, start:stop])


@given(arguments(), st.data())
def test_slices_of_queries_and_of_keys_compose_in_either_order(given_arguments, data):
    expected, mask = dense_by_definition(**given_arguments), build(**given_arguments)
    rows, columns = (draw_range(data, given_arguments["seq_len"]) for _ in range(2))
    inner = draw_range(data, columns[1] - columns[0])
    expected = expected[:, slice(*rows), slice(*columns)]
    check(mask.queries(*rows).keys(*columns), expected)
    check(mask.keys(*columns).queries(*rows), expected)
    check(mask.keys(*columns).queries(*rows).keys(*inner), expected[:, :, slice(*inner)])


@given(arguments(), st.data())
def test_several_runs_of_queries_and_keys_are_those_rows_and_columns_of_the_definition(given_arguments, data):
    expected, mask = dense_by_definition(**given_arguments), build(**given_arguments)
    first, stop = draw_range(data, given_arguments["seq_len"])
    columns = draw_numbers(data, given_arguments["seq_len"])
    check(mask.select_keys(columns), expected[:, :, columns.cpu()])
    if first < stop:
        rows = draw_numbers(data, stop - first)
        expected = expected[:, first:stop][:, rows.cpu()]
        check(mask.queries(first, stop).select_queries(rows), expected)
        check(mask.queries(first, stop).select_queries(rows).select_keys(columns), expected[:, :, columns.cpu()])


@given(st.integers(0, 500), st.data())
def test_parts_of_any_intervals_are_parts_of_their_dense_mask(seed, data):
    mask = TransfusionMask.from_intervals(*intervals(seed), key_len=31, offset=data.draw(st.integers(0, 9)))
    expected, rows, columns = dense(mask), draw_numbers(data, 23), draw_numbers(data, 31)
    start, stop = draw_range(data, 31)
    check(mask, expected)
    check(mask.keys(start, stop), expected[:, :, start:stop])
    check(mask.select_queries(rows), expected[:, rows.cpu()])
    check(mask.select_keys(columns), expected[:, :, columns.cpu()])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_every_kind_of_mask_are_parts_of_its_dense_form(kind):
    mask = KINDS[kind].to(DEVICE)
    expected, (rows, columns) = dense(mask), mask.shape[2:]
    for start in range(0, columns, 5):
        check(mask.keys(start, min(start + 9, columns)), expected[:, :, start:start + 9])
    some_rows, some_columns = (torch.arange(size)[torch.arange(size) % 5 < 3] for size in (rows, columns))
    check(mask.select_queries(some_rows).select_keys(some_columns), expected[:, some_rows][:, :, some_columns])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["packed documents", "BAGEL: noised copies", "Show-o mmu_vit", "BD3-LM, halves"])
def test_attention_to_a_part_of_the_keys_is_the_references_and_rows_without_keys_are_0(kind, softcap):
    mask = KINDS[kind].to(DEVICE).select_queries(torch.arange(2, 24)[torch.arange(22) % 4 > 0]).keys(14, 22)
    inputs = random_inputs(1, 4, 2, mask.query_len, 8, 16)
    compare(inputs, mask, torch.float32, softcap=softcap)
    out, lse, dq, *_ = run(attention_with_lse, inputs, mask, torch.float32, DEVICE, softcap=softcap)
    empty = ~dense(mask)[0].any(-1)
    assert 0 < empty.sum() < mask.query_len
    assert (lse[:, :, empty] == -torch.inf).all() and lse[:, :, ~empty].isfinite().all()
    assert (out[:, :, empty] == 0).all() and (dq[:, :, empty] == 0).all()


@pytest.mark.parametrize("start,stop", [(-1, 3), (5, 4), (0, 13), (2.0, 3)])
def test_a_range_of_keys_that_does_not_fit_is_refused_by_name(start, stop):
    with pytest.raises(ValueError, match=r"TransfusionMask.keys: .* fits"):
        TransfusionMask.causal(12).keys(start, stop)


@pytest.mark.parametrize("numbers", [[3, 1], [1, 1], [0, 12], [-1, 2], [0.5], [[0], [1]], "first"])
@pytest.mark.parametrize("method,name", [("select_queries", "rows"), ("select_keys", "columns")])
def test_numbers_that_do_not_ascend_within_the_mask_are_refused_by_name(method, name, numbers):
    with pytest.raises(ValueError, match=f"TransfusionMask.{method}: {name} .* fits"):
        getattr(TransfusionMask.causal(12), method)(numbers)
