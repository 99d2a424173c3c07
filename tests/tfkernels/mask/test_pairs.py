"""Masks read off pair by pair: dense ones, and FlexAttention's block masks by their tiles and their rule."""
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.conftest import DEVICE
from tests.tfkernels.mask.test_mask import LargestTensor, arguments, build, dense, dense_by_columns, dense_by_definition
from tfkernels import TransfusionMask
from tfkernels.mask import pairs

from_dense, from_block_mask = TransfusionMask.from_dense, TransfusionMask.from_block_mask


def said_by_intervals(visible):
    """Whether a mask (Sq, Sk) has no hidden pair between visible ones of its row and of its column, pair by pair."""
    def between(line, at):
        return any(line[:at]) and any(line[at + 1:])

    rows, columns = visible.tolist(), visible.mT.tolist()
    return [(i, j) for i, row in enumerate(rows) for j, seen in enumerate(row)
            if not seen and between(row, j) and between(columns[j], i)]


def test_a_dense_mask_of_two_three_and_four_dimensions_is_the_same_mask():
    mask = build([[(2, 6)]], 9, hidden=[[(2, 4)]])
    for visible in (mask.dense(), mask.dense()[:, 0], mask.dense()[0, 0]):
        assert torch.equal(from_dense(visible).dense(), mask.dense())
    two = torch.cat([mask.dense()[:, 0], TransfusionMask.causal(9, device=DEVICE).dense()[:, 0]])
    assert torch.equal(dense(from_dense(two)), two.cpu())
    assert from_dense(two[:, :, ::2]).shape == (2, 1, 9, 5)


@given(st.data())
def test_any_dense_mask_is_read_exactly_or_refused_with_its_first_pair_in_the_way(data):
    batch, sq, sk = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * sq * sk, max_size=batch * sq * sk))
    visible = torch.tensor(bits, dtype=torch.bool, device=DEVICE).view(batch, sq, sk)
    wrong = [(b, *pair) for b in range(batch) for pair in said_by_intervals(visible[b].cpu())]
    if wrong:
        with pytest.raises(ValueError, match="TransfusionMask.from_dense: " + re.escape(f"visible{list(wrong[0])} ")):
            from_dense(visible)
        return
    mask = from_dense(visible)
    assert torch.equal(dense(mask), visible.cpu()) and mask.area().item() == sum(bits)
    assert not (visible.cpu() & ~dense_by_columns(mask)).any()
    assert not mask.columns_exact or torch.equal(dense_by_columns(mask), visible.cpu())


@pytest.mark.parametrize("shape, name", [((5, 5), "visible[2, 1]"), ((1, 5, 5), "visible[0, 2, 1]"),
                                         ((1, 1, 5, 5), "visible[0, 0, 2, 1]")])
def test_the_pair_in_the_way_is_named_as_the_caller_wrote_it(shape, name):
    visible = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    visible[..., 2, 1] = visible[..., 3, 3] = False
    with pytest.raises(ValueError, match=re.escape(f"{name} is hidden between pairs of its row and between pairs of "
                                                   "its column that are visible")):
        from_dense(visible)


@given(arguments(), st.sampled_from([4, 8, 16]))
def test_a_block_mask_of_ours_is_read_back(given_arguments, size):
    mask = build(**given_arguments)
    again = from_block_mask(mask.block_mask(size))
    assert torch.equal(dense(again), dense_by_definition(**given_arguments)) and again.area() == mask.area()


def document_causal_with_images(documents, images):
    """A rule as FlexAttention's users write it, with tensors of their own."""
    def rule(b, h, i, j):
        return (documents[b, i] == documents[b, j]) & ((j <= i) | (images[b, i] == images[b, j]) & (images[b, i] > 0))

    return rule


def test_a_block_mask_of_flex_attentions_own_is_read_off():
    documents = torch.tensor([[0] * 20 + [1] * 17, [0] * 30 + [1] * 7], device=DEVICE)
    images = torch.zeros(2, 37, dtype=torch.int64, device=DEVICE)
    images[0, 4:11], images[0, 24:30], images[1, 9:28] = 1, 2, 1
    theirs = create_block_mask(document_causal_with_images(documents, images), 2, None, 37, 37, device=DEVICE,
                               BLOCK_SIZE=8)
    expected = dense_by_definition([[(4, 11), (24, 30)], [(9, 28)]], 37, documents.tolist())
    assert torch.equal(dense(from_block_mask(theirs)), expected)


def test_rows_are_read_in_blocks_and_fewer_queries_than_keys_fit(monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", 3 * 40)
    theirs = create_block_mask(lambda b, h, i, j: j <= i + 17, None, 1, 23, 40, device=DEVICE, BLOCK_SIZE=(8, 16))
    expected = torch.ones(23, 40, dtype=torch.bool).tril(17)
    mask = from_block_mask(theirs)
    assert mask.shape == (1, 1, 23, 40) and torch.equal(dense(mask)[0], expected)
    assert torch.equal(dense(from_dense(expected.to(DEVICE)))[0], expected)


def test_tiles_that_are_not_listed_are_hidden_and_full_ones_are_not_asked():
    counts, indices = torch.tensor([[[1, 1]]], device=DEVICE), torch.tensor([[[[0], [1]]]], device=DEVICE)
    parts = {"kv_num_blocks": counts.int(), "kv_indices": indices.int(), "BLOCK_SIZE": 4, "seq_lengths": (8, 8)}
    apart = torch.block_diag(*[torch.ones(4, 4)] * 2).bool()
    assert torch.equal(dense(from_block_mask(BlockMask.from_kv_blocks(**parts)))[0], apart)
    none = torch.zeros_like(counts).int()
    nothing = BlockMask.from_kv_blocks(none, indices.int(), counts.int(), indices.int(), BLOCK_SIZE=4,
                                       mask_mod=lambda b, h, i, j: i < 0, seq_lengths=(8, 8))
    assert torch.equal(dense(from_block_mask(nothing))[0], apart)


def test_block_masks_that_do_not_fit_are_refused_by_name():
    def made(rule, heads=None):
        return create_block_mask(rule, None, heads, 16, 16, device=DEVICE, BLOCK_SIZE=4)

    with pytest.raises(ValueError, match=re.escape("TransfusionMask.from_block_mask: block_mask[0, 0, 1, 3] is hidden "
                                                   "between pairs of its row")):
        from_block_mask(made(lambda b, h, i, j: (i + j) % 4 != 0))
    with pytest.raises(ValueError, match=re.escape("block_mask[0, 1, 3, 3] is False, unlike that of head 0; one mask "
                                                   "for all heads fits")):
        from_block_mask(made(lambda b, h, i, j: (j <= i) & ((h == 0) | (i < 3) | (j < i)), 2))
    assert torch.equal(dense(from_block_mask(made(lambda b, h, i, j: j <= i + 0 * h, 2)))[0],
                       torch.ones(16, 16).tril().bool())
    with pytest.raises(ValueError, match="block_mask lists 2 rows of tiles of 4 for 16 queries; a whole BlockMask "):
        from_block_mask(made(lambda b, h, i, j: j <= i)[:, :, :2])
    for wrong in (None, torch.ones(4, 4, dtype=torch.bool), TransfusionMask.causal(4)):
        with pytest.raises(ValueError, match="from_block_mask: block_mask is .*; a torch.nn.attention.*BlockMask fits"):
            from_block_mask(wrong)


def test_reading_a_block_mask_forms_no_tensor_of_all_pairs(monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", 2**16)
    theirs = TransfusionMask.causal(2048, device=DEVICE).block_mask()
    with LargestTensor() as largest:
        mask = from_block_mask(theirs)
    assert mask.area().item() == 2048 * 2049 // 2
    assert largest.bytes <= 8 * 2**16, largest.bytes


@given(st.data())
def test_sequences_laid_one_after_another_are_documents(data):
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=5))
    first, spare = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    seq_len = first + sum(lengths) + spare
    ends = [first + sum(lengths[:n]) for n in range(len(lengths) + 1)]
    documents = [[-1] * first + [n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * spare]
    spans = [(a + min(1, b - a), b) for a, b in zip(ends, ends[1:])]
    window = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    cu_seqlens = torch.tensor(ends, dtype=dtype, device=DEVICE)
    for given_spans in (None, [spans]):
        mask = TransfusionMask.from_cu_seqlens(cu_seqlens, seq_len, given_spans, window=window)
        assert mask.lo.device.type == DEVICE and mask.shape == (1, 1, seq_len, seq_len)
        assert torch.equal(dense(mask), dense_by_definition(given_spans or [[]], seq_len, documents, window=window))


def test_hidden_spans_and_lists_fit_sequences_too():
    mask = TransfusionMask.from_cu_seqlens([0, 5, 9], 10, [[(1, 3)]], [[(1, 3)]], device=DEVICE)
    assert torch.equal(dense(mask), dense_by_definition([[(1, 3)]], 10, [[0] * 5 + [1] * 4 + [-1]], [[(1, 3)]]))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would wait")
def test_lengths_that_fall_or_leave_the_tokens_are_refused():
    for ends, message in (([0, 5, 3], "cu_seqlens falls from 5 to 3 at sequence 1; offsets that never fall fit; put "
                                      "the sequences in order"),
                          ([0, 9], "cu_seqlens goes from 0 to 9 and there are 8 rows; 0 to 8 fits"),
                          ([-1, 4], "cu_seqlens goes from -1 to 4")):
        with pytest.raises(ValueError, match="TransfusionMask.from_cu_seqlens: " + message):
            TransfusionMask.from_cu_seqlens(ends, 8)
    with pytest.raises(ValueError, match=r"spans\[0\] holds \(3, 6\), which an end of a document .* cuts"):
        TransfusionMask.from_cu_seqlens([0, 5, 8], 8, [[(3, 6)]])


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3), [], None, 5])
def test_what_is_no_vector_of_lengths_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="from_cu_seqlens: cu_seqlens is .*fits"):
        TransfusionMask.from_cu_seqlens(wrong, 8)
