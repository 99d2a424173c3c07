"""The digits, their documents and the batches made of them."""
import torch

from tests.transfusion.conftest import tiny_model
from transfusion.data import DataSettings, Digits, draw_batch, jitter, step_generator
from transfusion.sequence import Image, Text


def test_the_held_out_digits_are_not_among_the_training_digits():
    train, held_out = Digits("train"), Digits("held-out")
    assert len(train.labels) == 1437 and len(held_out.labels) == 360
    assert torch.cdist(held_out.images.flatten(1), train.images.flatten(1)).amin() > 0
    assert train.images.amin() == -1 and train.images.amax() == 1


def test_documents_come_in_the_shares_asked_for():
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    settings = DataSettings(caption_first=0.7, caption_dropout=0.2, story=0.25)
    shapes = [tuple(type(part) for part in digits.document(generator, settings)) for _ in range(4000)]
    shares = {shape: shapes.count(shape) / len(shapes) for shape in set(shapes)}
    expected = {(Text, Image, Text, Image): 0.25, (Image, Text): 0.75 * 0.3, (Image,): 0.75 * 0.7 * 0.2, (Text, Image): 0.75 * 0.7 * 0.8}
    assert shares.keys() == expected.keys() and all(abs(shares[k] - expected[k]) < 0.03 for k in expected)


def test_captions_tell_the_digit_of_their_image():
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    for _ in range(50):
        parts = digits.document(generator, DataSettings(story=1.0))
        for text, image in ((parts[0], parts[1]), (parts[2], parts[3])):
            at = (digits.images == image.latent).flatten(1).all(1).nonzero()[0, 0]
            assert text.text.removeprefix(" and ") == Digits.caption(int(digits.labels[at]))


def test_a_batch_depends_on_seed_and_step_alone_and_fills_its_rows():
    model = tiny_model()
    batch = lambda seed, step: draw_batch(Digits(), DataSettings(), model.tokenizer, model.config, 4, 128, step_generator(seed, step))  # noqa: E731
    (first, limit), (again, _), (other, _) = batch(0, 3), batch(0, 3), batch(0, 4)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.patches, again.patches)
    assert first.patches.shape != other.patches.shape or not torch.equal(first.patches, other.patches)
    assert (first.documents >= 0).float().mean() > 0.8 and len(limit) == first.image_count


def test_only_images_that_stand_before_their_caption_get_the_noise_limit():
    model = tiny_model()
    for settings, expected in ((DataSettings(caption_first=0.0), {0.5}), (DataSettings(caption_first=1.0, caption_dropout=0.5), {1.0}),
                               (DataSettings(story=1.0), {1.0}), (DataSettings(caption_first=0.5, noise_limit=0.25), {0.25, 1.0})):
        sequence, limit = draw_batch(Digits(), settings, model.tokenizer, model.config, 4, 128, step_generator(0, 0))
        assert set(limit.tolist()) == expected
        assert ((limit < 1) <= sequence.image_first).all()


def test_jitter_moves_ink_without_making_or_losing_much_of_it():
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    assert torch.allclose(jitter(digits.images[0], 0.0, generator), digits.images[0], atol=1e-5)
    moved = torch.stack([jitter(image, 1.0, generator) for image in digits.images[:200]])
    assert moved.amin() >= -1 - 1e-6 and moved.amax() <= 1 + 1e-6
    ink = ((moved + 1).sum() / (digits.images[:200] + 1).sum()).item()
    assert 0.9 < ink < 1.1 and 0.05 < (moved - digits.images[:200]).abs().mean() < 0.5


def test_images_to_be_drawn_are_never_jittered():
    digits = Digits()
    real = {image.numpy().tobytes() for image in digits.images}
    generator, settings = torch.Generator().manual_seed(0), DataSettings(caption_first=0.5, jitter=1.0)
    jittered = read = 0
    for _ in range(200):
        parts = digits.document(generator, settings)
        image = next(part for part in parts if isinstance(part, Image))
        to_be_read = parts[0] is image and len(parts) == 2
        jittered += image.latent.numpy().tobytes() not in real
        read += to_be_read
        assert to_be_read or image.latent.numpy().tobytes() in real
    assert 0.3 < jittered / read < 0.7
