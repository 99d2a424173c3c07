"""Attention over parts of the keys, merged, against attention over all of them: what the ring adds up."""
import pytest
import torch

from tests.conftest import DEVICE, DTYPES
from tests.tfkernels.attention.test_attention import check, random_inputs, transfusion_mask
from tfkernels import TransfusionMask, attention_with_lse
from tfkernels.parallel import cut_by_area
from tfkernels.parallel.ring import merged

HIDDEN = TransfusionMask.from_spans([[(5, 25), (30, 60)]], 100, hidden=[[(5, 25)]], device=DEVICE)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_merged_parts_are_the_whole_and_rows_that_see_nothing_stay_empty(softcap):
    mask = transfusion_mask()
    q, k, v, *_ = (x.float().to(DEVICE) for x in random_inputs(2, 4, 2, 100, 100, 32))
    whole, out, lse = attention_with_lse(q, k, v, mask, softcap=softcap), torch.zeros_like(q), q.new_full(
        q.shape[:3], -torch.inf)
    for columns in cut_by_area(mask, 3, 16).tokens:
        part = attention_with_lse(q, k[:, :, columns], v[:, :, columns], mask.select_keys(columns), softcap=softcap)
        out, lse = merged(out, lse, *part)
    empty = whole.lse == -torch.inf
    assert empty.any() and torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    torch.testing.assert_close((out, lse), tuple(whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [transfusion_mask(), HIDDEN], ids=["packed documents", "hidden images"])
def test_a_rank_s_queries_against_another_s_keys_err_at_most_twice_as_much_as_pytorch(mask, dtype):
    mine, theirs = cut_by_area(mask, 2, 16).tokens
    part = mask.select_queries(mine).select_keys(theirs)
    check(random_inputs(2, 2, 1, len(mine), len(theirs), 32), part, dtype)
