"""Documents, packing and targets, held against the paper's rules."""
import copy

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from tfkernels import patchify
from transfusion import Image, Text
from transfusion.sequence.packing import IMAGE_ATTENTION, encode, lay_out, pack, with_clean_copies

MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config
PICTURE = Image(torch.arange(64.0).view(1, 8, 8) / 32 - 1)


def test_a_document_is_bos_parts_eos_with_each_image_between_boi_and_eoi():
    document = encode([Text("a handwritten seven"), PICTURE], TOKENIZER, CONFIG)
    words = TOKENIZER.encode("a handwritten seven", add_special_tokens=False)
    assert document.tokens == [TOKENIZER.bos_token_id, *words, CONFIG.boi_token_id, *[CONFIG.eoi_token_id] * 17, TOKENIZER.eos_token_id]
    (start, patches, grid, image_first), = document.images
    assert start == len(words) + 2 and grid == (4, 4) and not image_first
    assert torch.equal(patches, patchify(PICTURE.latent[None], 2))
    assert encode([PICTURE, Text("x")], TOKENIZER, CONFIG).images[0][3]


def test_text_that_brings_its_own_bos_gets_no_second_one():
    bos = TOKENIZER.bos_token
    assert encode([Text(f"{bos}a"), Text("b")], TOKENIZER, CONFIG) == encode([Text("a"), Text("b")], TOKENIZER, CONFIG)
    inside = encode([Text("a"), Text(f"{bos}b")], TOKENIZER, CONFIG, end=False).tokens
    assert inside == [t for text in (bos, "a", bos, "b") for t in TOKENIZER.encode(text, add_special_tokens=False)]
    after = encode([PICTURE, Text(f"{bos}b")], TOKENIZER, CONFIG)
    assert after.tokens.count(TOKENIZER.bos_token_id) == 2 and len(after.tokens) == len(after.targets)


CONTROL = ("<boi>", "<eoi>", "<s>", "</s>", "<pad>")


@pytest.mark.parametrize("around", [" {}", "press {} now", "x{0}{0}"])
@pytest.mark.parametrize("word", CONTROL)
def test_names_of_special_tokens_in_a_text_are_characters_and_come_back(word, around):
    words = around.format(word)
    plain = encode([Text("a"), Text(words, loss=False)], TOKENIZER, CONFIG)
    special = {TOKENIZER.convert_tokens_to_ids(word) for word in CONTROL}
    assert not special.intersection(plain.tokens[1:-1])
    assert TOKENIZER.decode(plain.tokens[1:-1]) == "a" + words
    assert len(plain.tokens) == len(plain.targets) and not plain.images


def test_a_text_that_begins_with_bos_has_no_other_special_token_where_there_is_no_chat_template():
    document = encode([Text("<s>9.99</s> now <boi>5<eoi>")], TOKENIZER, CONFIG)
    assert not {0, 1, 2, 3, 4}.intersection(document.tokens[1:-1])
    assert TOKENIZER.decode(document.tokens[1:-1]) == "9.99</s> now <boi>5<eoi>"


@pytest.fixture
def chat_tokenizer():
    """The tokenizer with roles and a chat template that begins with BOS and ends each turn with EOS."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<user>", "<model>"], special_tokens=True)
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
                               "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}")
    return tokenizer


def chat(tokenizer, content):
    turns = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_special_tokens_of_a_chat_template_are_tokens_and_those_of_images_never(chat_tokenizer):
    user, model = chat_tokenizer.convert_tokens_to_ids(["<user>", "<model>"])
    words = chat_tokenizer.encode("what?", add_special_tokens=False)
    asked = encode([Text(chat(chat_tokenizer, "what?"))], chat_tokenizer, CONFIG, end=False)
    assert asked.tokens == [1, user, *words, 2, model]
    hostile = encode([Text(chat(chat_tokenizer, "press <boi> or <eoi>"))], chat_tokenizer, CONFIG, end=False).tokens
    assert hostile[:2] == [1, user] and hostile[-2:] == [2, model] and not {3, 4}.intersection(hostile)
    assert chat_tokenizer.decode(hostile[2:-2]) == "press <boi> or <eoi>"
    pieces = [Text("<s><user>"), PICTURE, Text("what?</s><model>", special=True)]  # without BOS it says what it is
    assert encode(pieces, chat_tokenizer, CONFIG, end=False).tokens == [1, user, 3, *[4] * 17, *words, 2, model]
    plain = encode([Text("what?</s><model>")], chat_tokenizer, CONFIG, end=False).tokens
    assert not {2, model}.intersection(plain) and chat_tokenizer.decode(plain[1:]) == "what?</s><model>"


def test_tokens_that_are_added_later_are_seen(chat_tokenizer):
    text = Text("<s><later>")
    before = encode([text], chat_tokenizer, CONFIG).tokens
    chat_tokenizer.add_tokens(["<later>"], special_tokens=True)
    later = chat_tokenizer.convert_tokens_to_ids("<later>")
    assert len(before) > 3 and encode([text], chat_tokenizer, CONFIG).tokens == [1, later, 2]


def test_a_name_that_the_tokenizer_cannot_spell_is_refused(chat_tokenizer):
    chat_tokenizer.add_tokens(["<end>"])  # no special token to the tokenizer
    config = copy.copy(CONFIG)
    config.boi_token_id = chat_tokenizer.convert_tokens_to_ids("<end>")
    with pytest.raises(ValueError, match="reads '<end>' as a special token even where it is told to spell it"):
        encode([Text("the <end>")], chat_tokenizer, config)


def test_text_loss_stands_where_text_or_boi_or_eos_follows_and_never_where_the_input_is_boi_or_a_patch():
    sequence = pack([encode([Text("a handwritten seven"), PICTURE, Text(" and")], TOKENIZER, CONFIG)], 48, 4)
    tokens = sequence.tokens[0].tolist()
    boi, eoi = tokens.index(CONFIG.boi_token_id), tokens.index(CONFIG.boi_token_id) + 17
    rows = sequence.text_rows.tolist()
    length = int((sequence.documents[0] >= 0).sum())
    assert rows == [*range(boi), *range(eoi, length - 1)]
    assert sequence.text_targets.tolist() == [tokens[i + 1] for i in rows]
    assert tokens[boi] in sequence.text_targets and CONFIG.eoi_token_id not in sequence.text_targets
    assert sequence.text_targets[-1] == TOKENIZER.eos_token_id


def test_an_image_alone_teaches_no_end():
    sequence = pack([encode([PICTURE], TOKENIZER, CONFIG)], 48, 4)
    assert sequence.text_targets.tolist() == [CONFIG.boi_token_id]


def test_text_without_loss_is_read_and_not_written():
    question, answer = Text("what is this?", loss=False), Text(" a handwritten six")
    sequence = pack([encode([PICTURE, question, answer], TOKENIZER, CONFIG)], 64, 4)
    assert TOKENIZER.decode(sequence.text_targets[:-1].tolist()) == "<boi> a handwritten six"


def test_packing_keeps_documents_apart_and_restarts_positions():
    documents = [encode([Text("a handwritten seven"), PICTURE], TOKENIZER, CONFIG), encode([PICTURE, Text("a handwritten two")], TOKENIZER, CONFIG)]
    sequence = pack(documents, 60, 4)
    lengths = [len(d.tokens) for d in documents]
    assert sequence.documents[0].tolist() == [0] * lengths[0] + [1] * lengths[1] + [-1] * (60 - sum(lengths))
    assert sequence.positions[0, lengths[0]] == 0
    dense = sequence.mask().dense()[0, 0]
    assert not dense[lengths[0]:, :lengths[0]].any() and not dense[sum(lengths):].any()
    start, stop = sequence.spans[0, 1].tolist()
    assert dense[start:stop, start:stop].all() and not dense[start - 1, start:].any()
    assert sequence.patch_rows.tolist() == [*range(*sequence.spans[0, 0]), *range(start, stop)]
    assert sequence.layout.image.tolist() == [0] * 16 + [1] * 16 and sequence.layout.offsets.tolist() == [0, 16, 32]
    assert sequence.image[0, sequence.patch_rows].tolist() == sequence.layout.image.tolist() and (sequence.image >= 0).sum() == 32


def test_with_causal_attention_every_token_sees_itself_and_what_stands_before_it_in_its_document():
    clean = with_clean_copies(encode([PICTURE, Text("a handwritten two")], TOKENIZER, CONFIG))
    sequence = pack([encode([Text("a handwritten seven"), PICTURE, Text(" and"), PICTURE], TOKENIZER, CONFIG), clean], 120, 4)
    dense, document = IMAGE_ATTENTION["causal"].mask(sequence).dense()[0, 0], sequence.documents[0]
    expected = torch.ones(120, 120).tril().bool() & (document[:, None] == document) & (document >= 0)
    start, stop = sequence.hidden[0, 0].tolist()  # the noised patches of the clean copy, which the rest of their document does not see
    expected[stop:, start:stop] = False
    assert torch.equal(dense, expected)
    assert torch.equal(IMAGE_ATTENTION["bidirectional"].mask(sequence).dense(), sequence.mask().dense()) and (sequence.mask().dense()[0, 0] & ~dense).any()


def test_first_fit_leaves_out_only_what_fits_in_no_row():
    document = encode([Text("a handwritten seven")], TOKENIZER, CONFIG)
    size = len(document.tokens)
    assert (pack([document] * 5, 2 * size, 4, rows=2).documents >= 0).sum() == 4 * size
    assert pack([document] * 5, 2 * size, 4).tokens.shape == (3, 2 * size)


def test_left_layout_ends_all_rows_in_the_last_column():
    short, long = (encode([Text(t)], TOKENIZER, CONFIG, end=False) for t in ("a", "a handwritten seven"))
    sequence = lay_out([[short], [long]], len(long.tokens), 4, left=True)
    assert (sequence.documents[:, -1] == 0).all() and sequence.positions[:, -1].tolist() == [len(short.tokens) - 1, len(long.tokens) - 1]


def test_images_of_several_sizes_share_a_batch():
    wide = Image(torch.zeros(1, 4, 12))
    sequence = pack([encode([wide, Text("a"), PICTURE], TOKENIZER, CONFIG)], 64, 4)
    assert sequence.layout.grids == ((2, 6), (4, 4)) and sequence.layout.image.bincount().tolist() == [12, 16]


def test_text_and_patches_are_taken_apart_and_put_together_again():
    sequence = pack([encode(parts, TOKENIZER, CONFIG) for parts in ([Text("a"), PICTURE], [PICTURE, Text("b")])], 40, 4)
    assert sequence.tokens.shape[0] == 2 and (sequence.documents < 0).any()
    packed = torch.randn(*sequence.tokens.shape, 3, requires_grad=True)
    text, patches = sequence.modality.split(packed)
    assert torch.equal(text[0], packed[sequence.image < 0]) and torch.equal(patches[0], packed[sequence.image >= 0])
    joined = sequence.modality.join(text, patches)
    assert torch.equal(joined, packed)
    weight = torch.randn(joined.shape)
    assert torch.equal(torch.autograd.grad((joined * weight).sum(), packed)[0], weight)


@pytest.mark.parametrize("parts,message", [
    ([], "parts is empty"),
    (["a string"], "a part is a str"),
    ([Image(torch.zeros(1, 7, 8))], "latent is 7x8 and the patch size 2; multiples"),
    ([Image(torch.zeros(3, 8, 8))], r"latent has shape \(3, 8, 8\)"),
    ([Image(torch.zeros(8, 8))], r"latent has shape \(8, 8\)"),
    ([Image(torch.zeros(1, 1, 8, 8))], r"latent has shape \(1, 1, 8, 8\)"),
    ([Image(torch.zeros(1, 0, 8))], "latent is 0x8 and the patch size 2; multiples"),
    ([Image(torch.zeros(1, 8, 0))], "latent is 8x0 and the patch size 2; multiples"),
    ([Image(torch.zeros(1, 8, 8, dtype=torch.uint8))], "latent is of torch.uint8; floating point"),
    ([Image(torch.ones(1, 8, 8, dtype=torch.bool))], "latent is of torch.bool; floating point"),
    ([Image(torch.ones(1, 8, 8, dtype=torch.complex64))], "latent is of torch.complex64; floating point"),
    ([Image(torch.full((1, 8, 8), float("nan")))], "latent has values that are NaN or infinite"),
    ([Image(torch.full((1, 8, 8), -float("inf"), dtype=torch.float16))], "latent has values that are NaN or infinite"),
    ([Image(torch.full((1, 8, 8), 1e300, dtype=torch.float64))], "latent has values that are NaN or infinite"),
    ([Image(torch.zeros(1, 8, 8, requires_grad=True))], "latent requires a gradient"),
    ([Image(torch.zeros(1, 8, 8, device="meta"))], "latent is on the meta device"),
    ([Image([[0.0]])], "latent is a list; a floating-point tensor"),
    ([Text(None)], "text is a NoneType; a str fits"),
    ([Text("a\ud800")], "which is no Unicode text"),
    ("a string", "parts is a str; a list of Text and Image fits"),
    (Text("a"), "parts is a Text; a list of Text and Image fits"),
])
def test_parts_that_do_not_fit_are_refused_by_name(parts, message):
    with pytest.raises(ValueError, match=message):
        encode(parts, TOKENIZER, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_floating_point_are_float32_patches(dtype):
    (_, patches, *_), = encode([Image(PICTURE.latent.to(dtype))], TOKENIZER, CONFIG).images
    assert patches.dtype == torch.float32 and torch.equal(patches, patchify(PICTURE.latent.to(dtype).float()[None], 2))


@pytest.mark.parametrize("ids", [(3, 3), (2, 4), (3, 1)])
def test_boi_and_eoi_are_tokens_of_their_own(ids):
    config = copy.copy(CONFIG)
    config.boi_token_id, config.eoi_token_id = ids
    with pytest.raises(ValueError, match=f"boi_token_id is {ids[0]} and eoi_token_id {ids[1]}, .* two tokens of their"):
        encode([PICTURE], TOKENIZER, config)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a document has .* tokens and seq_len is 8"):
        pack([encode([PICTURE], TOKENIZER, CONFIG)], 8, 4)
