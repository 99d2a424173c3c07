"""Where patches and text stand in packed rows."""
import torch

from tests.transfusion.conftest import tiny_model
from transfusion import Image, Text
from transfusion.sequence.encoding import encode
from transfusion.sequence.packing import pack

MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config
PICTURE = Image(torch.arange(64.0).view(1, 8, 8) / 32 - 1)


def test_images_of_several_sizes_share_a_batch():
    wide = Image(torch.zeros(1, 4, 12))
    sequence = pack([encode([wide, Text("a"), PICTURE], TOKENIZER, CONFIG)], 64, 4)
    assert sequence.layout.grids == ((2, 6), (4, 4)) and sequence.layout.image_ids.bincount().tolist() == [12, 16]


def test_text_and_patches_are_taken_apart_and_put_together_again():
    sequence = pack([encode(parts, TOKENIZER, CONFIG) for parts in ([Text("a"), PICTURE], [PICTURE, Text("b")])], 40, 4)
    assert sequence.tokens.shape[0] == 2 and (sequence.documents < 0).any()
    packed = torch.randn(*sequence.tokens.shape, 3, requires_grad=True)
    text, patches = sequence.modality.split(packed)
    assert torch.equal(text[0], packed[sequence.image_ids < 0]) and torch.equal(
        patches[0], packed[sequence.image_ids >= 0]
    )
    joined = sequence.modality.join(text, patches)
    assert torch.equal(joined, packed)
    weight = torch.randn(joined.shape)
    assert torch.equal(torch.autograd.grad((joined * weight).sum(), packed)[0], weight)
