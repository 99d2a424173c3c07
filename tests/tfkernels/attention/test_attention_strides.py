"""Masks and sinks in any layout mean what they hold."""
from dataclasses import replace

import pytest
import torch

from tests.conftest import DEVICE
from tests.tfkernels.attention.test_attention import random_inputs, run
from tfkernels import TransfusionMask, attention_with_lse


def two_sided_mask(tokens):
    """A hidden image between others: neither side alone says it."""
    return TransfusionMask.from_spans([[(2, 9), (12, 30)], [(1, 6)]], tokens, hidden=[[(2, 9)], []], device=DEVICE)


def dense(x):
    return x.contiguous()


LAYOUTS = {
    "transposed columns": {"key_since": lambda x: x.mT.contiguous().mT, "key_until": lambda x: x.mT.contiguous().mT},
    "transposed since alone": {"key_since": lambda x: x.mT.contiguous().mT, "key_until": dense},
    "wide until": {"key_since": dense, "key_until": lambda x: torch.cat([x, x], 1)[:, :x.shape[1]]},
    "wide hi": {"lo": dense, "hi": lambda x: torch.cat([x, x], 1)[:, :x.shape[1]]},
    "expanded lo": {"lo": lambda x: x[:1].expand(x.shape), "hi": dense},
}


def same(mask, other, queries, **options):
    inputs = random_inputs(2, 4, 2, queries, mask.key_len, 32)
    return all(torch.equal(a, b) for a, b in zip(
        *(run(attention_with_lse, inputs, one, torch.float32, DEVICE, **options) for one in (mask, other))))


@pytest.mark.parametrize("queries", [4, 40])  # decoded, and in tiles
@pytest.mark.parametrize("laid", LAYOUTS)
def test_the_strides_of_a_masks_integers_change_nothing(laid, queries):
    mask = two_sided_mask(40)
    mask = mask if queries == 40 else mask.queries(20, 24)
    changed = {name: lay(getattr(mask, name)) for name, lay in LAYOUTS[laid].items()}
    assert all(torch.equal(x, getattr(mask, name)) for name, x in changed.items()), "the same numbers"
    plain = {name: x.contiguous() for name, x in changed.items()}
    assert same(replace(mask, **plain), replace(mask, **changed), queries)


@pytest.mark.parametrize("queries", [4, 40])
@pytest.mark.parametrize("lay", [lambda x: torch.stack([x, x + 1], 1)[:, 0], lambda x: x[:1].expand(4)],
                         ids=["a column", "expanded"])
def test_the_strides_of_sinks_change_nothing(lay, queries):
    mask = two_sided_mask(40)
    mask = mask if queries == 40 else mask.queries(20, 24)
    inputs = random_inputs(2, 4, 2, queries, 40, 32)
    sinks = lay(torch.tensor([1.5, -0.5, 0.3, 2.0], device=DEVICE))
    tensors = [x.to(DEVICE, torch.float32) for x in inputs[:3]]
    found = [attention_with_lse(*tensors, mask, sinks=one) for one in (sinks, sinks.contiguous())]
    torch.testing.assert_close(found[0].out, found[1].out)
    torch.testing.assert_close(found[0].lse, found[1].lse)


def test_the_smallest_integer_hides_a_key_from_later_queries_too():
    """An offset is taken from it, which must not wrap around."""
    lo, hi = torch.zeros(1, 40, dtype=torch.int64), torch.full((1, 40), 40)
    since, until = torch.zeros(1, 40, dtype=torch.int64), torch.full((1, 40), 40)
    masks = []
    for least in (-2**31, 0):
        until[0, 3] = least
        masks.append(TransfusionMask.from_intervals(*(x.to(DEVICE) for x in (lo, hi, since, until))).queries(20, 40))
    inputs = random_inputs(1, 2, 2, 20, 40, 32)
    found = [run(attention_with_lse, inputs, mask, torch.float32, DEVICE) for mask in masks]
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not found[0][4][:, :, 3].any()
