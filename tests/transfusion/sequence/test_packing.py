"""Rows of several documents: who sees whom, positions, and what fits."""
import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion import Image, Text
from transfusion.sequence.encoding import encode, with_clean_copies
from transfusion.sequence.packing import IMAGE_ATTENTION, lay_out, pack

MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config
PICTURE = Image(torch.arange(64.0).view(1, 8, 8) / 32 - 1)


def test_packing_keeps_documents_apart_and_restarts_positions():
    documents = [encode(parts, TOKENIZER, CONFIG)
                 for parts in ([Text("a handwritten seven"), PICTURE], [PICTURE, Text("a handwritten two")])]
    sequence = pack(documents, 60, 4)
    lengths = [len(d.tokens) for d in documents]
    assert sequence.documents[0].tolist() == [0] * lengths[0] + [1] * lengths[1] + [-1] * (60 - sum(lengths))
    assert sequence.positions[0, lengths[0]] == 0
    dense = sequence.mask().dense()[0, 0]
    assert not dense[lengths[0]:, :lengths[0]].any() and not dense[sum(lengths):].any()
    start, stop = sequence.spans[0, 1].tolist()
    assert dense[start:stop, start:stop].all() and not dense[start - 1, start:].any()
    assert sequence.patch_places.tolist() == [*range(*sequence.spans[0, 0]), *range(start, stop)]
    assert sequence.layout.image_ids.tolist() == [0] * 16 + [1] * 16 and sequence.layout.offsets.tolist() == [0, 16, 32]
    assert sequence.image_ids[0, sequence.patch_places].tolist() == sequence.layout.image_ids.tolist()
    assert (sequence.image_ids >= 0).sum() == 32


def test_with_causal_attention_every_token_sees_itself_and_what_stands_before_it_in_its_document():
    clean = with_clean_copies(encode([PICTURE, Text("a handwritten two")], TOKENIZER, CONFIG))
    sequence = pack(
        [encode([Text("a handwritten seven"), PICTURE, Text(" and"), PICTURE], TOKENIZER, CONFIG), clean], 120, 4
    )
    dense, document = IMAGE_ATTENTION["causal"].mask(sequence).dense()[0, 0], sequence.documents[0]
    expected = torch.ones(120, 120).tril().bool() & (document[:, None] == document) & (document >= 0)
    start, stop = sequence.hidden[0, 0].tolist()  # the noised patches, which the rest of their document does not see
    expected[stop:, start:stop] = False
    assert torch.equal(dense, expected)
    both_ways = IMAGE_ATTENTION["bidirectional"].mask(sequence).dense()
    assert torch.equal(both_ways, sequence.mask().dense()) and (both_ways[0, 0] & ~dense).any()


def test_first_fit_leaves_out_only_what_fits_in_no_row():
    document = encode([Text("a handwritten seven")], TOKENIZER, CONFIG)
    size = len(document.tokens)
    assert (pack([document] * 5, 2 * size, 4, rows=2).documents >= 0).sum() == 4 * size
    assert pack([document] * 5, 2 * size, 4).tokens.shape == (3, 2 * size)


def test_left_layout_ends_all_rows_in_the_last_column():
    short, long = (encode([Text(t)], TOKENIZER, CONFIG, end=False) for t in ("a", "a handwritten seven"))
    sequence = lay_out([[short], [long]], len(long.tokens), 4, left=True)
    assert (sequence.documents[:, -1] == 0).all()
    assert sequence.positions[:, -1].tolist() == [len(short.tokens) - 1, len(long.tokens) - 1]


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a document has .* tokens and seq_len is 8"):
        pack([encode([PICTURE], TOKENIZER, CONFIG)], 8, 4)
