"""What attention's CPU path makes of a mask, whatever the tests' device runs."""
import pytest
import torch

from tfkernels import TransfusionMask
from tfkernels.attention import cpu

DOCUMENTS, IMAGES = torch.arange(512)[None] // 128, [[(160, 200), (300, 380)]]


def blocks(mask, dtype=torch.float32):
    """The blocks of the mask's queries."""
    return cpu._blocks(torch.empty(1, 1, mask.query_len, 4, dtype=dtype), mask.lo, mask.hi, mask.key_since,
                       mask.key_until, mask.rows_exact, mask.offset)


def test_blocks_are_made_once_for_a_mask_and_dtype_and_again_when_the_mask_is_written_to():
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
