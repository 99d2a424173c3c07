"""The digits, their documents and the batches made of them."""
import dataclasses
import json
import math
import re

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion.data.batches import (
    PROBED,
    document_lengths,
    draw_batch,
    fill_rows,
    noise_limits,
    step_generator,
)
from transfusion.data.dataset import Arrangement, DatasetSettings
from transfusion.recipes.digits import Digits, DigitsSettings, jitter
from transfusion.sequence import Image, Text, encode, lay_out
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig, train


def test_the_held_out_digits_are_not_among_the_training_digits():
    train, held_out = Digits("train"), Digits("held-out")
    assert len(train.labels) == 1437 and len(held_out.labels) == 360
    assert torch.cdist(held_out.pictures.flatten(1), train.pictures.flatten(1)).amin() > 0
    assert train.pictures.amin() == -1 and train.pictures.amax() == 1


def test_documents_come_in_the_shares_asked_for():
    settings = DigitsSettings(caption_first=0.7, caption_dropout=0.2, story=0.25)
    digits, generator = settings.open(), torch.Generator().manual_seed(0)
    shapes = [tuple(type(part) for part in digits.document(generator, settings)) for _ in range(4000)]
    shares = {shape: shapes.count(shape) / len(shapes) for shape in set(shapes)}
    expected = {(Text, Image, Text, Image): 0.25, (Image, Text): 0.75 * 0.3, (Image,): 0.75 * 0.7 * 0.2,
                (Text, Image): 0.75 * 0.7 * 0.8}
    assert shares.keys() == expected.keys() and all(abs(shares[k] - expected[k]) < 0.03 for k in expected)


def test_captions_tell_the_digit_of_their_image():
    digits, generator = Digits(story=1.0), torch.Generator().manual_seed(0)
    for _ in range(50):
        parts = digits.document(generator, Arrangement())
        for text, image in ((parts[0], parts[1]), (parts[2], parts[3])):
            at = (digits.pictures == image.latent).flatten(1).all(1).nonzero()[0, 0]
            assert text.text.removeprefix(" and ") == Digits.caption(int(digits.labels[at]))


def test_a_batch_depends_on_seed_and_step_alone_and_fills_its_rows():
    model = tiny_model()

    def batch(seed, step):
        return draw_batch(Digits(), DigitsSettings(), model.tokenizer, model.config, 4, 128, step_generator(seed, step))

    (first, limit), (again, _), (other, _) = batch(0, 3), batch(0, 3), batch(0, 4)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.patches, again.patches)
    assert first.patches.shape != other.patches.shape or not torch.equal(first.patches, other.patches)
    assert (first.documents >= 0).float().mean() > 0.8 and len(limit) == first.image_count


def test_only_images_that_stand_before_their_caption_get_the_noise_limit():
    model = tiny_model()
    for settings, expected in ((DigitsSettings(caption_first=0.0), {0.5}),
                               (DigitsSettings(caption_first=1.0, caption_dropout=0.5), {1.0}),
                               (DigitsSettings(story=1.0), {1.0}),
                               (DigitsSettings(caption_first=0.5, noise_limit=0.25), {0.25, 1.0})):
        sequence, limit = draw_batch(settings.open(), settings, model.tokenizer, model.config, 4, 128,
                                     step_generator(0, 0))
        assert set(limit.tolist()) == expected
        assert ((limit < 1) <= sequence.image_first).all()


def test_jitter_moves_ink_without_making_or_losing_much_of_it():
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    assert torch.allclose(jitter(digits.pictures[0], 0.0, generator), digits.pictures[0], atol=1e-5)
    moved = torch.stack([jitter(image, 1.0, generator) for image in digits.pictures[:200]])
    assert moved.amin() >= -1 - 1e-6 and moved.amax() <= 1 + 1e-6
    ink = ((moved + 1).sum() / (digits.pictures[:200] + 1).sum()).item()
    assert 0.9 < ink < 1.1 and 0.05 < (moved - digits.pictures[:200]).abs().mean() < 0.5


def test_images_to_be_drawn_are_never_jittered():
    settings = DigitsSettings(caption_first=0.5, jitter=1.0)
    digits, generator = settings.open(), torch.Generator().manual_seed(0)
    real = {image.numpy().tobytes() for image in digits.pictures}
    jittered = read = 0
    for _ in range(200):
        parts = digits.document(generator, settings)
        image = next(part for part in parts if isinstance(part, Image))
        to_be_read = parts[0] is image and len(parts) == 2
        jittered += image.latent.numpy().tobytes() not in real
        read += to_be_read
        assert to_be_read or image.latent.numpy().tobytes() in real
    assert 0.3 < jittered / read < 0.7


class Mixture:
    """Documents of `lengths` tokens, each as often as its `shares` say; what was drawn is counted."""

    def __init__(self, lengths, shares=None):
        self.lengths = lengths
        self.shares = torch.tensor(shares or [1.0] * len(lengths)) / sum(shares or [1.0] * len(lengths))
        self.drawn = []

    def document(self, generator, settings):
        kind = int(torch.multinomial(self.shares, 1, generator=generator))
        self.drawn.append(self.lengths[kind])
        return [Text("a" * (self.lengths[kind] - 2))]  # between BOS and EOS, a token for each character


@pytest.fixture(scope="module")
def letters():
    """A model whose tokenizer has a token for each byte."""
    model = tiny_model()
    model.tokenizer = train_tokenizer([], 261)
    return model


def trained_lengths(model, dataset, rows, seq_len, steps, seed=0):
    """Lengths of the documents of so many batches, and the share of padding."""
    lengths, padding = [], 0.0
    for step in range(steps):
        generator = step_generator(seed, step)
        sequence, _ = draw_batch(dataset, DatasetSettings(), model.tokenizer, model.config, rows, seq_len, generator)
        padding += (sequence.documents < 0).float().mean().item() / steps
        lengths += [int(count) for row in sequence.documents for count in row[row >= 0].bincount()]
    return torch.tensor(lengths), padding


@pytest.mark.parametrize("lengths,shares,rows,seq_len", [
    ((10, 90), (0.5, 0.5), 1, 100), ((10, 90), (0.5, 0.5), 4, 128), ((5, 70), (0.9, 0.1), 2, 100),
    ((40, 60), (0.5, 0.5), 1, 100),
    (tuple(range(4, 60)), None, 1, 128), (tuple(range(4, 60)), None, 8, 128), ((33, 34, 64), (1.0, 1.0, 1.0), 3, 64)])
def test_documents_of_all_lengths_are_trained_on_as_often_as_drawn(letters, lengths, shares, rows, seq_len):
    dataset = Mixture(lengths, shares)
    found, _ = trained_lengths(letters, dataset, rows, seq_len, steps=600 // rows)
    assert sorted(found.tolist()) == sorted(dataset.drawn[PROBED:])                         # none is thrown away
    for length, share in zip(lengths, dataset.shares.tolist()):
        error = (share * (1 - share) / len(found)) ** 0.5
        assert abs((found == length).float().mean().item() - share) < 4.5 * error, length


def test_batches_are_as_full_as_the_longest_document_allows(letters):
    for lengths, rows, most in (((20, 24, 28), 8, 0.04), (tuple(range(4, 60)), 8, 0.04), ((24, 46), 4, 0.08)):
        _, padding = trained_lengths(letters, Mixture(lengths), rows, 256, steps=20)
        assert padding < most, lengths


def test_a_document_longer_than_any_before_begins_the_rows_anew_and_is_not_lost(letters):
    documents = [encode([Text("a" * (size - 2))], letters.tokenizer, letters.config) for size in (10, 10, 95, 4)]
    drawn = iter(documents)
    (row,), left_out = fill_rows(lambda: next(drawn), 1, 100, longest=10)
    assert [len(document.tokens) for document in row] == [95] and left_out == 0 and len(list(drawn)) == 1  # 5 are left


def test_documents_longer_than_a_row_are_left_out_and_counted(letters):
    dataset = Mixture((20, 200), (0.9, 0.1))
    lengths = document_lengths(dataset, DatasetSettings(), letters.tokenizer, letters.config, 64)
    assert lengths.longest == 20 and lengths.left_out == dataset.drawn.count(200) / PROBED > 0.05
    left_out = 0
    for step in range(50):
        generator = step_generator(0, step)
        sequence, _ = draw_batch(dataset, DatasetSettings(), letters.tokenizer, letters.config, 2, 64, generator)
        left_out += sequence.left_out
        assert sequence.documents.max() == 2 and sequence.to("cpu").left_out == sequence.left_out
    assert left_out == dataset.drawn[PROBED:].count(200) > 10
    with pytest.raises(ValueError, match="seq_len is 16 and the shortest of 500 documents has 20 tokens; raise"):
        draw_batch(dataset, DatasetSettings(), letters.tokenizer, letters.config, 2, 16, step_generator(0, 0))


def test_an_image_alone_that_fills_a_row_has_no_caption_in_the_next(letters):
    image = Image(torch.randn(letters.config.image_channels, *letters.config.image_size))
    alone, captioned = (encode(parts, letters.tokenizer, letters.config) for parts in ([image], [image, Text("a")]))
    length = len(alone.tokens)
    for rows, expected in (([[alone], [alone]], [1.0, 1.0]), ([[alone], [captioned]], [1.0, 0.25])):
        sequence = lay_out(rows, length + (rows[1][0] is captioned), letters.config.patch_dim)
        assert noise_limits(sequence, Arrangement(noise_limit=0.25)).tolist() == expected


@pytest.mark.parametrize("changes,message", [
    ({"caption_first": 2.0}, "settings.caption_first is 2.0; a number of at least 0 and at most 1 fits"),
    ({"noise_limit": -1.0}, "settings.noise_limit is -1.0; a number of at least 0 and at most 1 fits"),
    ({"story": math.nan}, "settings.story is nan; a number of at least 0 and at most 1 fits"),
    ({"context": "claen"}, "settings.context is 'claen'; one of .* fits; did you mean 'clean'"),
])
def test_settings_of_documents_that_do_not_fit_are_refused_by_name(letters, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_batch(Digits(), DigitsSettings(**changes), letters.tokenizer, letters.config, 2, 64, step_generator(0, 0))


def test_a_run_says_and_counts_what_it_leaves_out(tmp_path, capsys):
    model = ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64)
    optim = OptimSettings(steps=6, rows=2, seq_len=40, warmup=1)
    config = TrainConfig(out=tmp_path / "run", model=model, data=DigitsSettings(story=0.3), optim=optim, device="cpu")
    train(config)
    said = capsys.readouterr().out
    words = r"documents of more than optim.seq_len, 40 tokens, are left out, about (2|3)\d\.\d % of those drawn"
    assert re.search(words, said)
    counts = [json.loads(line).get("left_out", 0) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(counts) == 6 and sum(counts) > 0
    train(dataclasses.replace(config, out=tmp_path / "whole", optim=dataclasses.replace(optim, seq_len=64)))
    assert "left out" not in capsys.readouterr().out
    assert "left_out" not in (tmp_path / "whole" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="seq_len is 16 and the shortest of 500 documents has"):
        train(dataclasses.replace(config, out=tmp_path / "none", optim=dataclasses.replace(optim, seq_len=16)))


def test_images_in_a_row_are_captioned_where_text_follows_the_last(letters):
    image, text = Image(torch.randn(letters.config.image_channels, *letters.config.image_size)), Text("a")
    for parts, expected in (([image, image], [1.0, 1.0]), ([image, image, text], [0.25, 0.25]),
                            ([image] * 3 + [text], [0.25] * 3), ([image, text, image], [0.25, 1.0])):
        document = encode(parts, letters.tokenizer, letters.config)
        for rows in ([[document]], [[document, document]], [[document], [document]]):
            sequence = lay_out(rows, max(sum(len(one.tokens) for one in row) for row in rows), letters.config.patch_dim)
            limits = noise_limits(sequence, Arrangement(noise_limit=0.25)).tolist()
            assert limits == expected * sum(map(len, rows))
