"""What was wrong in the implementation that this project began from, an unofficial Transfusion.

There is a test for each defect, numbered as they were found.

The twelfth, adapters without BOI, EOI and image layers, has its tests in `model/test_lora.py`; the wish for an
interleaved loop in the twentieth, in `generate/test_generation.py`.
"""
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_transfusion import losses, packed
from tests.transfusion.train.test_transfusion import small
from tfkernels import diffusion_loss
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.data.batches import draw_batch, step_generator
from transfusion.diffusion.guidance import Guidance
from transfusion.diffusion.objective import OBJECTIVES
from transfusion.model.transfusion import IMAGE_LAYER_CLASSES
from transfusion.recipes.digits import DigitsSettings
from transfusion.sequence import encode, pack
from transfusion.train.transfusion import train

SEED = 3


def picture(channels=1, height=8, width=8):
    return Image(torch.rand(channels, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1)


@pytest.fixture
def recorded(model, monkeypatch):
    """How many columns the decoder was given at each call."""
    seen, decoder = [], model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x, *rest: seen.append(x.shape[1]) or decoder(x, *rest))
    return seen


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_01_the_target_is_made_of_the_noise_that_is_in_the_input(objective, monkeypatch):
    model, seen = tiny_model(objective), []
    embed = model.patch_embedding.forward
    monkeypatch.setattr(model.patch_embedding, "forward",
                        lambda x, patches, *rest: seen.append(patches) or embed(x, patches, *rest))
    sequence, t = packed(model, [[Text("a"), picture()]], 32), torch.tensor([0.6])
    model(sequence, t, SEED)
    (signal, noise), (p, q) = model.objective.path(t), model.objective.target(t)
    eps = (seen[0] - signal * sequence.patches) / noise
    perfect = p * sequence.patches + q * eps
    assert diffusion_loss(perfect, sequence.patches, p, q, None, SEED, offsets=sequence.layout.offsets) < 1e-9
    assert 0.5 < eps.std() < 1.5


def test_02_patches_of_an_image_see_later_patches_and_images_do_not_see_later_images(model):
    sequence, condition = packed(model, [[picture(), picture()]], 64), model.timestep(torch.zeros(2))

    def hidden(patches):
        positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
        return model.backbone(model.embed(sequence, patches, condition)[0], positions, sequence.mask(), condition,
                              sequence.modality)[0]

    first, changed = sequence.patch_places[0], sequence.patches.clone()
    changed[15] += 1
    assert not torch.allclose(hidden(sequence.patches)[first], hidden(changed)[first], atol=1e-5)
    changed = sequence.patches.clone()
    changed[16:] += 1
    assert torch.equal(hidden(sequence.patches)[first], hidden(changed)[first])


def test_03_the_timestep_reaches_the_transformers_input(model):
    sequence = packed(model, [[picture()]], 24)
    early, late = (model.embed(sequence, sequence.patches, model.timestep(torch.tensor([t])))[0] for t in (0.2, 0.8))
    assert (early - late).abs().max() > 1e-3


def test_04_rows_of_text_alone_train_beside_images_and_by_themselves(model):
    assert torch.isfinite(losses(model, [[Text("only words")], [Text("a"), picture()]], 32).loss)
    alone = losses(model, [[Text("only words")]], 32)
    assert alone.loss == alone.text_loss > 0 and alone.diffusion_loss == 0


def test_05_and_18_images_of_any_number_of_channels_and_any_sizes_share_a_batch():
    base = tiny_model().config
    model = Transfusion(TransfusionConfig(text_config=base.text_config, image_channels=3,
                                          boi_token_id=base.boi_token_id, eoi_token_id=base.eoi_token_id),
                        tiny_model().tokenizer).eval()
    sequence = packed_of(model, [[Text("a"), picture(3, 8, 4)], [picture(3, 4, 12), Text("b")]], 12)
    assert model(sequence, torch.tensor([0.3, 0.7]), SEED).image_losses.shape == (2,)
    assert model.draw(["a"], image_size=(4, 10), steps=1)[0].latent.shape == (3, 4, 10)


def packed_of(model, documents, patch_dim):
    return pack([encode(parts, model.tokenizer, model.config) for parts in documents], 40, patch_dim)


def test_06_a_document_holds_several_images_each_with_its_own_time_and_loss(model):
    sequence = packed(model, [[picture(), Text("a"), picture(), picture()]], 80)
    together = model(sequence, torch.tensor([0.2, 0.5, 0.8]), SEED).image_losses
    other = model(sequence, torch.tensor([0.2, 0.5, 0.4]), SEED).image_losses
    assert together.shape == (3,) and torch.equal(together[:2], other[:2]) and together[2] != other[2]


def test_07_generating_ends_in_an_image(model):
    assert isinstance(model.draw(["a"], steps=1)[0], Image)


def test_08_guidance_asks_an_unconditional_model_and_scale_one_is_the_conditional_one(model):
    free, whole, strong = (model.draw(["a handwritten two"], steps=3, guidance=Guidance(scale, interval=(0, 1)))
                           for scale in (0.0, 1.0, 4.0))
    assert not torch.allclose(whole[0].latent, strong[0].latent, atol=1e-4)
    other = model.draw(["a handwritten nine and so on"], steps=3, guidance=0.0)
    # at scale 0 the prompt says nothing
    torch.testing.assert_close(free[0].latent, other[0].latent, rtol=1e-4, atol=1e-4)


def test_09_a_model_in_bfloat16_draws():
    image, = tiny_model().to(torch.bfloat16).draw(["a"], steps=2)
    assert torch.isfinite(image.latent).all()


def test_10_a_unet_gives_as_many_tokens_as_there_are_patches_and_runs():
    base = tiny_model().config
    config = TransfusionConfig(text_config=base.text_config, image_layers="unet", unet_channels=(8, 8), unet_blocks=1,
                               boi_token_id=base.boi_token_id, eoi_token_id=base.eoi_token_id)
    model = Transfusion(config, tiny_model().tokenizer).eval()
    sequence = packed(model, [[Text("a"), picture()]], 32)
    assert len(sequence.patch_places) == 16 and torch.isfinite(model(sequence, torch.tensor([0.5]), SEED).loss)


@pytest.mark.parametrize("layers", IMAGE_LAYER_CLASSES)
def test_11_the_layers_that_are_asked_for_are_the_layers_that_are_built(layers):
    model = Transfusion(TransfusionConfig(text_config=tiny_model().config.text_config, image_layers=layers))
    assert ((type(model.patch_embedding), type(model.image_head)) == IMAGE_LAYER_CLASSES[layers]
            and model.config.image_layers == layers)


def test_13_lambda_is_the_papers_and_the_paths_are_the_papers(model):
    output = losses(model, [[Text("a"), picture()]], 32)
    torch.testing.assert_close(output.loss, output.text_loss + 5 * output.diffusion_loss)
    t = torch.linspace(0, 1, 11)
    signal, noise = OBJECTIVES["eps"].path(t)
    torch.testing.assert_close(signal, torch.cos(t * torch.pi / 2))
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(11))


def test_14_a_denoising_step_runs_the_images_tokens_alone(model, recorded):
    model.draw(["a handwritten seven"], steps=5, guidance=1.0)
    assert recorded[1:6] == [16] * 5


def test_15_captions_stand_before_images_too_and_only_images_that_stand_first_have_limited_noise():
    model, settings = tiny_model(), DigitsSettings(caption_first=0.5, noise_limit=0.3)
    sequence, limit = draw_batch(
        settings.open(), settings, model.tokenizer, model.config, 16, 128, step_generator(0, 0)
    )
    assert 0 < sequence.image_first.float().mean() < 1
    assert ((limit[~sequence.image_first] == 1).all() and (limit == 0.3).any()
            and set(limit.tolist()) <= {torch.tensor(0.3).item(), 1.0})


def test_16_evaluation_is_deterministic(model):
    first, again = (losses(model, [[Text("a"), picture()]], 32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(*(model.draw(["a"], steps=2, seed=1)[0].latent for _ in range(2)))


def test_17_the_text_loss_is_the_language_models_own(model):
    sequence = packed(model, [[Text("a handwritten seven")]], 32)
    logits = model.text_logits(sequence.tokens).flatten(0, 1)[sequence.target_places]
    expected = torch.nn.functional.cross_entropy(logits, sequence.text_targets)
    torch.testing.assert_close(losses(model, [[Text("a handwritten seven")]], 32).text_loss, expected)


def test_19_and_21_transformers_own_classes_load_a_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert (AutoConfig.from_pretrained(tmp_path).model_type == "transfusion"
            and type(AutoModel.from_pretrained(tmp_path)) is Transfusion)


def test_20_averaged_weights_are_kept_and_saved(tmp_path):
    train(small(tmp_path / "averaged"))
    train(dataclasses.replace(small(tmp_path / "last"), optim=dataclasses.replace(small(tmp_path).optim, ema=0.0)))
    averaged, last = (load_file(tmp_path / name / "model.safetensors") for name in ("averaged", "last"))
    assert (averaged.keys() == last.keys()
            and not torch.equal(averaged["image_head.linear.weight"], last["image_head.linear.weight"]))
