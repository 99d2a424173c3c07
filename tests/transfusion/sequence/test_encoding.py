"""Documents and their targets, held against the paper's rules."""
import copy

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from tfkernels import patchify
from transfusion import Image, Text
from transfusion.sequence.encoding import encode
from transfusion.sequence.packing import pack

MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config
PICTURE = Image(torch.arange(64.0).view(1, 8, 8) / 32 - 1)


def test_a_document_is_bos_parts_eos_with_each_image_between_boi_and_eoi():
    document = encode([Text("a handwritten seven"), PICTURE], TOKENIZER, CONFIG)
    words = TOKENIZER.encode("a handwritten seven", add_special_tokens=False)
    assert document.tokens == [
        TOKENIZER.bos_token_id,
        *words,
        CONFIG.boi_token_id,
        *[CONFIG.eoi_token_id] * 17,
        TOKENIZER.eos_token_id,
    ]
    (start, patches, grid, image_first), = document.images
    assert start == len(words) + 2 and grid == (4, 4) and not image_first
    assert torch.equal(patches, patchify(PICTURE.latent[None], 2))
    assert encode([PICTURE, Text("x")], TOKENIZER, CONFIG).images[0][3]


def test_text_loss_stands_where_text_or_boi_or_eos_follows_and_never_where_the_input_is_boi_or_a_patch():
    sequence = pack([encode([Text("a handwritten seven"), PICTURE, Text(" and")], TOKENIZER, CONFIG)], 48, 4)
    tokens = sequence.tokens[0].tolist()
    boi, eoi = tokens.index(CONFIG.boi_token_id), tokens.index(CONFIG.boi_token_id) + 17
    rows = sequence.target_places.tolist()
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


def test_a_tokenizer_without_bos_is_refused_by_name(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="encode: the tokenizer has no BOS, .*set tokenizer.bos_token"):
        encode([Text("a")], tokenizer, model.config)
