"""Clean copies of noised images, against a mask written by hand, a model of clean images alone, and sampling."""
import copy
import dataclasses

import pytest
import torch

from tests.compare import assert_as_accurate
from tests.transfusion.conftest import tiny_model
from tests.transfusion.plain import add_noise, noise_of, plain_output
from tests.transfusion.train.test_transfusion import losses, small
from transfusion import Image, Text, Transfusion
from transfusion.data.batches import draw_batch, step_generator
from transfusion.generate.generation import Sampling, _Generation
from transfusion.generate.kv_cache import Canvas
from transfusion.recipes.digits import DigitsSettings
from transfusion.sequence import encode, pack, with_clean_copies
from transfusion.train.transfusion import train

SEED = 11
MODEL = tiny_model()
TOKENIZER, CONFIG = MODEL.tokenizer, MODEL.config


def packed(*documents, clean=True, seq_len=160):
    """Documents in rows of `seq_len` tokens, with clean copies or as the paper has them."""
    encoded = [encode(parts, TOKENIZER, CONFIG) for parts in documents]
    return pack([with_clean_copies(document) for document in encoded] if clean else encoded, seq_len, 4)


def hidden_states(model, sequence, times, seed=SEED):
    noised, _ = add_noise(
        model.objective, sequence.patches, noise_of(sequence, seed), times[sequence.layout.image_ids][:, None]
    )
    condition = model.timestep(times)
    positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
    return model.backbone(
        model.embed(sequence, noised, condition)[0], positions, sequence.mask(), condition, sequence.modality
    )


def seen_by_later_tokens(sequence):
    """(B, S) the tokens of documents that are in no noised copy with a clean one behind it."""
    seen = sequence.documents >= 0
    for row, spans in zip(seen, sequence.hidden.tolist()):
        for start, stop in spans:
            row[start:stop] = False
    return seen


@pytest.fixture
def story(pictures):
    return [Text("a handwritten seven"), pictures[0], Text(" and a handwritten two"), pictures[1], Text(" and")]


def test_the_mask_of_a_document_is_the_one_written_by_hand():
    two, one = Image(torch.zeros(1, 2, 4)), Image(torch.ones(1, 2, 2))
    sequence = packed([Text("a"), two, one, Text("b")], [one], seq_len=19)
    rows = """
        1.................. BOS
        11................. a
        111................ BOI
        11111.............. noised
        11111..............
        111..11............ clean
        111..11............
        111..111........... EOI
        111..1111.......... BOI
        111..11111......... noised
        111..1111.1........ clean
        111..1111.11....... EOI
        111..1111.111...... b
        111..1111.1111..... EOS
        ..............1.... BOS
        ..............11... BOI
        ..............111.. the only copy: nothing reads it
        ..............1111. EOI
        ..............11111 EOS"""
    visible = ["".join(".1"[seen] for seen in row) for row in sequence.mask().dense()[0, 0].int().tolist()]
    assert visible == [row.split()[0] for row in rows.strip().splitlines()]
    assert sequence.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 7, 8, 9, 10, 0, 1, 2, 3, 4]
    assert sequence.drawn.tolist() == [True, False, True, False, True]
    assert sequence.patches[:, 0].tolist() == [0] * 4 + [1] * 3 and sequence.image_ids[0].tolist().count(-1) == 12


def test_an_image_is_copied_where_a_loss_stands_behind_it(pictures):
    a, b, c, _ = pictures
    for parts, copied in (
        ([Text("x"), a], [True]),
        ([a, Text("x")], [True]),
        ([a, Text("x", loss=False)], [True]),
        ([a], [False]),
        ([a, Text("")], [False]),
        ([a, b, c], [True, True, False]),
        ([Text("x"), a, b, Text("y"), c], [True] * 3),
        ([Text("x")], []),
    ):
        document = with_clean_copies(encode(parts, TOKENIZER, CONFIG))
        assert len(document.images) == sum(1 + copy for copy in copied) and len(document.hidden) == sum(copied), parts
        sequence, once = pack([document], 160, 4), packed(parts, clean=False)
        assert sequence.drawn.tolist() == [drawn for copy in copied for drawn in [True, False][:1 + copy]]
        assert torch.equal(sequence.text_targets, once.text_targets)
        assert torch.equal(sequence.tokens[seen_by_later_tokens(sequence)], once.tokens[once.documents >= 0])
        assert torch.equal(sequence.positions[seen_by_later_tokens(sequence)], once.positions[once.documents >= 0])
        assert (sequence.mask().since is None) == (not any(copied))


def test_all_that_later_tokens_see_is_what_a_model_with_the_clean_images_alone_has(model, story):
    sequence, alone = packed(story, story[:2], clean=True), packed(story, story[:2], clean=False)
    times = torch.where(sequence.drawn, 0.3 + 0.1 * torch.arange(len(sequence.drawn)), 0)
    ours, theirs = hidden_states(model, sequence, times), hidden_states(model, alone, torch.zeros(alone.image_count))
    assert alone.image_count == 3 and sequence.image_count == 6
    torch.testing.assert_close(ours[seen_by_later_tokens(sequence)], theirs[alone.documents >= 0])


@pytest.mark.parametrize(
    "layers,backbone,positions", [("dit", "decoder", "1d"), ("dit", "adaln", "2d"), ("unet", "decoder", "1d")]
)
@torch.no_grad()
def test_losses_are_those_of_what_the_sampler_predicts_and_text_goes_on_as_after_drawing(
    story, layers, backbone, positions
):
    model = tiny_model(image_layers=layers, backbone=backbone, positions=positions)
    sequence, times = packed(story), torch.tensor([0.2, 0.9, 0.6, 0.8])
    output = model(sequence, times, SEED)
    hidden = hidden_states(model, sequence, torch.where(sequence.drawn, times, 0))
    for image, prompt in ((0, story[:1]), (2, story[:3])):
        generation = _Generation(model, [prompt], Sampling(guidance=1.0), force_image=True)
        generation.clean = model.timestep(torch.zeros(1))
        generation.cache, _ = generation.prefill(generation.documents)
        own = sequence.layout.image_ids == image
        noised, target = add_noise(model.objective, sequence.patches[own], noise_of(sequence, SEED)[own], times[image])
        prediction = Canvas(model, generation.cache, generation.grid).predict(noised[None], times[image])[0]
        torch.testing.assert_close(output.image_losses[image], (prediction - target).square().mean())
        torch.testing.assert_close(
            generation.append_images([0], sequence.patches[own][None]), hidden[:, sequence.spans[0, image + 1, 1]]
        )


def test_noise_reaches_what_follows_in_the_papers_form_and_not_with_clean_copies(model, story):
    for clean, second in ((True, 2), (False, 1)):
        sequence = packed(story, clean=clean)
        times = torch.full((sequence.image_count,), 0.5)
        output, reseeded = (model(sequence, times, seed) for seed in (SEED, SEED + 1))
        # the first image, in front of the second
        noisier = model(sequence, times.index_fill(0, torch.tensor([0]), 0.9), SEED)
        assert (
            torch.equal(output.text_loss, reseeded.text_loss)
            == torch.equal(output.text_loss, noisier.text_loss)
            == clean
        )
        assert torch.equal(output.image_losses[second], noisier.image_losses[second]) == clean
        assert output.image_losses[0] not in (reseeded.image_losses[0], noisier.image_losses[0])


@pytest.mark.parametrize("layers", ["dit", "linear"])
@pytest.mark.parametrize("objective", ["flow", "eps"])
def test_losses_and_every_gradient_are_those_of_the_plain_form(story, objective, layers):
    model, sequence = tiny_model(objective, "adaln", layers), packed(story, story[:2], [story[1]])
    times = torch.linspace(0.1, 0.9, sequence.image_count)

    def run(function, model, dtype):
        output = function(
            model, dataclasses.replace(sequence, patches=sequence.patches.to(dtype)), times.to(dtype), SEED
        )
        return {"loss": output.loss, "images": output.image_losses} | dict(zip(
            (name for name, _ in model.named_parameters()), torch.autograd.grad(output.loss, list(model.parameters()))))

    ours, rounded = run(Transfusion.__call__, model, torch.float32), run(plain_output, model, torch.float32)
    exact = run(plain_output, copy.deepcopy(model).double(), torch.float64)
    for name in exact:
        assert_as_accurate(name, ours[name].detach(), rounded[name].detach(), exact[name].detach(),
                           terms=exact[name].detach().abs().amax().expand_as(exact[name]))


def test_text_and_diffusion_each_have_the_gradients_they_have_apart(model, pictures):
    """Of text: those of clean images alone; of one image: those of the paper's form, with nothing noised before it."""
    parts = [Text("a handwritten seven"), pictures[0]]
    both, alone = packed(parts), packed(parts, clean=False)
    weights = list(model.parameters())
    gradient = lambda loss: torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)  # noqa: E731
    ours, times = model(both, torch.tensor([0.4, 0.7]), SEED), torch.tensor([0.4])
    text, diffusion = model(alone, times * 0, SEED).text_loss, model(alone, times, SEED).diffusion_loss
    torch.testing.assert_close((ours.text_loss, ours.diffusion_loss), (text, diffusion))
    for a, b in ((ours.text_loss, text), (ours.diffusion_loss, diffusion)):
        torch.testing.assert_close(gradient(a), gradient(b))


def test_only_drawn_images_count_in_the_mean_and_clean_copies_are_at_time_0(model, pictures):
    sequence = packed([*pictures[:3]], [Text("a"), pictures[3]])
    times = torch.linspace(0.2, 0.8, sequence.image_count)
    output = model(sequence, times, SEED)
    assert sequence.drawn.tolist() == [True, False, True, False, True, True, False]
    assert (output.image_losses[~sequence.drawn] == 0).all() and (output.image_losses[sequence.drawn] > 0).all()
    torch.testing.assert_close(output.diffusion_loss, output.image_losses.sum() / 4)
    again = model(sequence, torch.where(sequence.drawn, times, 0.95), SEED)
    assert torch.equal(output.image_losses, again.image_losses) and torch.equal(output.text_loss, again.text_loss)


def test_a_batch_with_clean_copies_fits_its_rows_and_needs_no_noise_limit():
    settings = DigitsSettings(caption_first=0.5, caption_dropout=0.5, story=0.3, context="clean")
    digits, noised = settings.open(), dataclasses.replace(settings, context="noised")
    sequence, limit = draw_batch(digits, settings, TOKENIZER, CONFIG, 4, 128, step_generator(0, 0))
    assert (limit == 1).all() and len(limit) == sequence.image_count and sequence.image_first.any()
    copies = int((sequence.hidden[..., 0] < sequence.hidden[..., 1]).sum())
    assert 0 < copies == (~sequence.drawn).sum() < sequence.drawn.sum()  # an image alone in its document has none
    assert (sequence.documents >= 0).float().mean() > 0.7
    same, limited = draw_batch(digits, noised, TOKENIZER, CONFIG, 4, 128, step_generator(0, 0))
    assert (
        same.drawn.all()
        and same.mask().since is None
        and (limited < 1).any()
        and same.image_count < sequence.image_count + copies
    )
    with pytest.raises(ValueError, match="settings.context is 'claen'; one of 'noised', 'clean' fits"):
        draw_batch(
            digits, dataclasses.replace(settings, context="claen"), TOKENIZER, CONFIG, 4, 128, step_generator(0, 0)
        )


def test_training_with_clean_copies_lowers_both_losses(tmp_path):
    config = small(tmp_path)
    train(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, context="clean"),
            optim=dataclasses.replace(config.optim, steps=40, seq_len=96),
        )
    )
    records = losses(tmp_path)
    for key in ("text_loss", "diffusion_loss"):
        assert sum(r[key] for r in records[-5:]) < 0.9 * sum(r[key] for r in records[:5])
