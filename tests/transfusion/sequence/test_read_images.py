"""Images that are only read: clean, without a loss of their own, and a context like any other."""

import dataclasses

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from tests.transfusion.plain import plain_output
from transfusion import Image, Text
from transfusion.sequence import encode, pack, with_clean_copies

SEED = 5
MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config


def read(image):
    return dataclasses.replace(image, loss=False)


def packed(parts, clean=False):
    document = encode(parts, TOKENIZER, CONFIG)
    return pack([with_clean_copies(document) if clean else document], 120, 4)


@pytest.fixture
def editing(pictures):
    """A picture, an instruction, and the picture to draw."""
    return [read(pictures[0]), Text("a handwritten two", loss=False), pictures[1]]


def test_an_image_that_is_read_has_no_target_and_is_not_drawn(editing, pictures):
    document = encode([*editing, read(pictures[2])], TOKENIZER, CONFIG)
    assert document.read == (0, 2)
    begins = [start - 1 for start, *_ in document.images]
    assert [document.targets[i] for i in begins] == [False, True, False]
    sequence = pack([document], 120, 4)
    assert sequence.drawn.tolist() == [False, True, False] and not sequence.hidden.numel()
    assert encode([pictures[0]], TOKENIZER, CONFIG).read == () and Image(pictures[0].latent).loss


def test_only_images_that_are_drawn_are_copied(editing, pictures):
    document = with_clean_copies(encode([*editing, Text(" and"), read(pictures[2]), Text("one")], TOKENIZER, CONFIG))
    assert len(document.images) == 4 and document.hidden == (1,) and document.read == (0, 3)
    assert pack([document], 160, 4).drawn.tolist() == [False, True, False, False]


@pytest.mark.parametrize("clean", [False, True])
def test_the_loss_knows_nothing_of_the_time_and_the_noise_of_an_image_that_is_read(model, editing, clean):
    sequence = packed(editing, clean)
    times = torch.linspace(0.3, 0.7, sequence.image_count)
    output = model(sequence, times, SEED)
    again = model(sequence, torch.where(sequence.drawn, times, 0.95), SEED)
    assert torch.equal(output.loss, again.loss) and torch.equal(output.image_losses, again.image_losses)
    assert output.image_losses[0] == 0 and output.image_losses[1] > 0
    torch.testing.assert_close(output.diffusion_loss, output.image_losses[1])  # the mean is over what is drawn
    noisier = model(sequence, times, SEED + 1)
    assert noisier.diffusion_loss != output.diffusion_loss


def test_text_behind_an_image_that_is_read_has_the_loss_that_it_has_behind_a_clean_one(model, pictures):
    parts = [Text("a", loss=False), read(pictures[0]), Text("a handwritten seven")]
    reading, drawing = packed(parts), packed([parts[0], pictures[0], parts[2]])
    begin = int(drawing.spans[0, 0, 0]) - 2  # BOI follows here: a target when it is drawn
    kept = drawing.target_places != begin
    assert kept.sum() == len(kept) - 1
    drawing = dataclasses.replace(
        drawing, target_places=drawing.target_places[kept], text_targets=drawing.text_targets[kept]
    )
    ours, clean = model(reading, torch.tensor([0.8]), SEED), model(drawing, torch.tensor([0.0]), SEED)
    torch.testing.assert_close(ours.text_loss, clean.text_loss)
    assert ours.diffusion_loss == 0 and ours.loss == ours.text_loss


def test_gradients_reach_the_image_layers_through_an_image_that_is_read(model, pictures):
    sequence = packed([read(pictures[0]), Text("a handwritten seven")])
    patches = sequence.patches.clone()
    gradients = torch.autograd.grad(
        model(sequence, torch.tensor([0.5]), SEED).loss, list(model.patch_embedding.parameters())
    )
    assert all(gradient.abs().max() > 0 for gradient in gradients[:1])
    other = model(dataclasses.replace(sequence, patches=patches.flip(0)), torch.tensor([0.5]), SEED).loss
    assert other != model(sequence, torch.tensor([0.5]), SEED).loss  # it is a context
    head = torch.autograd.grad(
        model(sequence, torch.tensor([0.5]), SEED).loss, list(model.image_head.parameters()), materialize_grads=True
    )
    assert not any(gradient.abs().max() > 0 for gradient in head)  # and nothing is predicted of it


@pytest.mark.parametrize("layers", ["dit", "linear"])
def test_losses_are_those_of_the_plain_form(editing, layers):
    model = tiny_model("v", "adaln", layers)
    sequence, times = packed(editing), torch.tensor([0.6, 0.3])
    ours, plain = model(sequence, times, SEED), plain_output(model, sequence, times, SEED)
    torch.testing.assert_close((ours.loss, ours.image_losses), (plain.loss, plain.image_losses))


def test_generation_reads_such_an_image_as_any_other(pictures):
    one, other = (MODEL.caption([image], max_new_tokens=5) for image in (pictures[0], read(pictures[0])))
    assert one == other
    drawn = [
        MODEL.draw([[image, Text("a handwritten two")]], steps=3, seed=1)[0]
        for image in (pictures[0], read(pictures[0]))
    ]
    assert torch.equal(drawn[0].latent, drawn[1].latent)
