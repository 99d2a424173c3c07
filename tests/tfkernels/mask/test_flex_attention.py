"""`TransfusionMask.block_mask` against FlexAttention's create_block_mask and against every visible pair."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DEVICE
from tests.tfkernels.mask.test_mask import arguments, build, dense, intervals
from tfkernels import TransfusionMask


def listed_tiles(block_mask, shape):
    """(B, 1, row tiles, key tiles): the partial and the full tiles that a BlockMask lists."""
    tiles = []
    for counts, indices in ((block_mask.kv_num_blocks, block_mask.kv_indices),
                            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)):
        chosen = torch.zeros(shape, dtype=torch.bool)
        for at in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
            chosen[tuple(at)][indices[tuple(at)][:counts[tuple(at)]].long().cpu()] = True
        tiles.append(chosen)
    return tiles


def tile(x, size, fill):
    rows, keys = -x.shape[1] % size, -x.shape[2] % size
    return torch.nn.functional.pad(
        x, (0, keys, 0, rows), value=fill
    ).unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)


def check_block_mask(mask, size, tight):
    from torch.nn.attention.flex_attention import create_block_mask

    ours, seen = mask.block_mask(size), dense(mask)
    theirs = create_block_mask(ours.mask_mod, mask.batch_size, None, mask.query_len, mask.key_len, device=DEVICE,
                               BLOCK_SIZE=size)
    partial, full = listed_tiles(ours, tuple(theirs.to_dense().shape))
    needed = tile(seen, size, False).any(-1)[:, None]
    assert torch.equal(needed, theirs.to_dense().bool().cpu())
    assert not (partial & full).any() and not (needed & ~partial & ~full).any()
    assert tile(seen, size, True).all(-1)[:, None][full].all()
    assert not tight or torch.equal(ours.to_dense().bool().cpu(), needed)
    b, rows, keys = (torch.arange(n, device=DEVICE) for n in seen.shape)
    assert torch.equal(ours.mask_mod(b[:, None, None], 0, rows[:, None], keys).cpu(), seen)


@given(arguments(), st.sampled_from([4, 8, 16]))
def test_block_mask_lists_the_tiles_that_create_block_mask_finds(given_arguments, size):
    check_block_mask(build(**given_arguments), size, tight=given_arguments["hidden"] is None)


@given(arguments(), st.data())
def test_block_mask_of_a_slice_of_the_queries_counts_from_its_first(given_arguments, data):
    start = data.draw(st.integers(0, given_arguments["seq_len"] - 1))
    check_block_mask(build(**given_arguments).queries(start, given_arguments["seq_len"]), 8,
                     tight=given_arguments["hidden"] is None)


@pytest.mark.parametrize("seed", range(3))
def test_block_mask_of_general_intervals_misses_no_visible_pair(seed):
    lo, hi, since, until = intervals(seed)
    check_block_mask(TransfusionMask.from_intervals(lo, hi, key_len=31), 4, tight=False)
    check_block_mask(TransfusionMask.from_intervals(lo, hi, since, until), 4, tight=False)


def test_block_mask_marks_the_core_full_at_flex_attentions_tile_size():
    ours = build([[(100, 356)]], 640, documents=[[0] * 600 + [-1] * 40]).block_mask()
    assert ours.BLOCK_SIZE == (128, 128) and ours.seq_lengths == (640, 640)
    assert (ours.full_kv_num_blocks.tolist() == [[[0, 2, 2, 3, 0]]]
            and ours.kv_num_blocks.tolist() == [[[3, 1, 1, 1, 5]]])
