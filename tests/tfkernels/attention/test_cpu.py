"""What attention's CPU path makes of a mask, whatever the tests' device runs."""
import math

import pytest
import torch

from tests.compare import assert_as_accurate
from tests.tfkernels.attention.test_attention import absolute_terms
from tfkernels import TransfusionMask, _library, paged_attention, paged_attention_reference
from tfkernels.attention import cpu
from tfkernels.attention.reference import attention_reference

DOCUMENTS, IMAGES = torch.arange(512)[None] // 128, [[(160, 200), (300, 380)]]


def blocks(mask, dtype=torch.float32):
    """The blocks of the mask's queries."""
    return cpu._blocks(torch.empty(1, 1, mask.query_len, 4, dtype=dtype), mask.lo, mask.hi, mask.key_since,
                       mask.key_until, mask.rows_exact, mask.offset)


def test_blocks_are_made_once_for_a_mask_and_dtype_and_again_when_the_mask_is_written_to(monkeypatch):
    monkeypatch.setattr(_library._calls, "are_eager", True)  # as inside of an operator
    mask = TransfusionMask.from_spans(IMAGES, 512, DOCUMENTS)
    assert blocks(mask) is blocks(mask)
    assert blocks(mask, torch.float64) is not blocks(mask)
    before = blocks(mask)
    mask.lo.add_(0)
    assert blocks(mask) is not before


@pytest.mark.parametrize("options", [{}, {"hidden": [[(160, 200)]]}, {"window": 50}])
def test_blocks_show_exactly_the_pairs_of_the_mask_whether_kept_or_not(monkeypatch, options):
    mask = TransfusionMask.from_spans(IMAGES, 512, DOCUMENTS, **options)
    kept = list(blocks(mask))
    monkeypatch.setattr(cpu, "KEPT", 0)
    mask.lo.add_(0)
    for found in (kept, blocks(mask)):
        seen = torch.zeros(512, 512, dtype=torch.bool)
        for block in found:
            seen[block.rows, block.keys] = block.visible()[0, 0, 0]
        assert (seen == mask.dense()[0, 0]).all()


def test_blocks_are_wider_where_documents_are_long_and_not_where_that_costs_pairs():
    def longest(length):
        mask = TransfusionMask.from_spans([[]], 1024, torch.arange(1024)[None] // length)
        return max(block.rows.stop - block.rows.start for block in blocks(mask))

    assert longest(256) == 2 * cpu.BLOCK
    assert longest(cpu.BLOCK) == cpu.BLOCK


def test_a_plainly_causal_mask_is_one_block_without_a_bias():
    (block,) = blocks(TransfusionMask.from_spans([[]], 64))
    assert block.bias is None and (block.rows, block.keys) == (slice(0, 64), slice(0, 64))


def few_forward(q, k, v, mask, sinks=None):
    """What `attention` computes for few queries, None where it leaves them to the blocks."""
    return cpu._few_forward(q, k, v, mask.lo, mask.hi, mask.key_since, mask.key_until, mask.rows_exact, mask.offset,
                            1 / math.sqrt(q.shape[-1]), sinks)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -2.0, 5.0, 1.0])])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_queries_by_plain_products_follow_the_reference(sinks, transposed):
    lo, hi = torch.tensor([[0, 5, 40], [3, 3, 0]]), torch.tensor([[30, 5, 64], [64, 9, 1]])  # one row sees nothing
    mask = TransfusionMask.from_intervals(lo, hi, key_len=64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, size, 16, generator=generator) for heads, size in ((4, 3), (2, 64), (2, 64)))
    q = q.mT.contiguous().mT if transposed else q
    found = few_forward(q, k, v, mask, sinks)
    expected = attention_reference(q.double(), k.double(), v.double(), mask, sinks=sinks)
    rounded = attention_reference(q, k, v, mask, sinks=sinks)
    arriving = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
    terms = absolute_terms(q.double(), k.double(), v.double(), *arriving, mask, sinks=sinks)
    for name, *values in zip(("out", "lse"), found, rounded, expected, terms):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("seen", [True, False])
def test_few_queries_of_what_is_not_finite_take_the_written_out_form_and_follow_the_reference(name, value, seen):
    mask = TransfusionMask.from_intervals(torch.tensor([[0]]), torch.tensor([[20]]), key_len=64)
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, 2, size, 16, generator=generator)
              for name, size in (("q", 1), ("k", 64), ("v", 64))}
    inputs[name][:, :, (0 if name == "q" else 7 if seen else 50), 3] = value
    out, lse = cpu.attention_forward(*inputs.values(), mask.lo, mask.hi, mask.key_since, mask.key_until,
                                     mask.rows_exact, mask.columns_exact, mask.offset, 0.25, 0.0)
    expected, expected_lse = attention_reference(*inputs.values(), mask, scale=0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("query_len", [1, 24])
def test_autocast_does_not_round_what_a_paged_cache_gives(query_len, softcap):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, query_len, 16, generator=generator)
    pages, table = torch.randn(4, 16, 2, 16, generator=generator), torch.arange(4, dtype=torch.int32)[None]
    mask = TransfusionMask.from_cache(torch.tensor([30]), query_len, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = paged_attention(q, pages, pages, table, mask, softcap=softcap)
    expected = paged_attention_reference(q, pages, pages, table, mask, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
