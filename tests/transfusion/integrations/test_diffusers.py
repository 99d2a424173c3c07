"""The pipeline with diffusers' words: the images of `draw`, to the bit, in each type of output, and its errors."""
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_vae import autoencoder
from transfusion import Guidance, Text
from transfusion.data.model_images import image_of, pictures_of
from transfusion.integrations.diffusers import TransfusionPipeline
from transfusion.model.vae import VAE

PROMPTS = ["a handwritten seven", "a handwritten two"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipe")
    tiny_model().save_pretrained(where)
    made = TransfusionPipeline.from_pretrained(where)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(images):
    return torch.stack([image.latent for image in images])


def test_images_are_those_of_draw_with_the_generators_seed_to_the_bit(pipe):
    drawn = pipe.model.draw(PROMPTS, steps=3, guidance=2.0, seed=5)
    call = dict(num_inference_steps=3, guidance_scale=2.0)
    assert torch.equal(pipe(PROMPTS, generator=seeded(5), output_type="latent", **call).images, latents(drawn))
    shown = pipe(PROMPTS, generator=seeded(5), **call).images
    assert [one.tobytes() for one in shown] == [one.tobytes() for one in pictures_of(drawn)]
    assert isinstance(shown[0], Picture.Image) and shown[0].size == (8, 8)
    pixels = (latents(drawn).clamp(-1, 1) + 1) / 2
    assert torch.equal(pipe(PROMPTS, generator=seeded(5), output_type="pt", **call).images, pixels)
    array, = pipe(PROMPTS, generator=seeded(5), output_type="np", return_dict=False, **call)
    assert array.shape == (2, 8, 8, 1) and np.array_equal(array, pixels.movedim(1, -1).numpy())


def test_the_defaults_are_draws_own(pipe):
    again = pipe(PROMPTS[0], generator=seeded(), output_type="latent").images
    assert torch.equal(again, latents(pipe.model.draw([PROMPTS[0]])))


def test_several_images_of_each_prompt_stand_together_and_a_list_has_a_generator_for_each(pipe):
    four = pipe(PROMPTS, num_images_per_prompt=2, num_inference_steps=2, output_type="latent",
                generator=[seeded(seed) for seed in (3, 1, 4, 1)]).images
    drawn = pipe.model.draw([prompt for prompt in PROMPTS for _ in range(2)], steps=2, seeds=[3, 1, 4, 1])
    assert torch.equal(four, latents(drawn)) and not torch.equal(four[0], four[1])
    torch.testing.assert_close(four[2], pipe.model.draw([PROMPTS[1]], steps=2, seed=4)[0].latent)


def test_a_generator_that_was_used_gives_further_images_the_same_ones_each_time(pipe):
    def thrice():
        generator = seeded(9)
        return [pipe(PROMPTS[0], num_inference_steps=1, generator=generator, output_type="latent").images
                for _ in range(3)]
    first, again = thrice(), thrice()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_without_a_generator_torchs_own_seed_decides(pipe):
    torch.manual_seed(1)
    one, two = (pipe(PROMPTS[0], num_inference_steps=1, output_type="latent").images for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(pipe(PROMPTS[0], num_inference_steps=1, output_type="latent").images, one)
    assert not torch.equal(one, two)


def test_height_and_width_are_pixels_and_guidance_may_be_settings(pipe):
    drawn = pipe.model.draw([PROMPTS[0]], steps=2, image_size=(4, 12), guidance=Guidance(2.0, rescale=0.5))
    given = dict(height=4, width=12, guidance_scale=Guidance(2.0, rescale=0.5), num_inference_steps=2)
    assert torch.equal(pipe(PROMPTS[0], generator=seeded(), output_type="latent", **given).images, latents(drawn))
    assert pipe(PROMPTS[0], generator=seeded(), **given).images[0].size == (12, 4)


def test_a_callback_sees_every_step_of_the_whole_batch_and_changes_nothing(pipe):
    seen = []

    def look(pipeline, step, time, state):
        seen.append((pipeline is pipe, step, time, state["latents"].shape))
        state["latents"].fill_(7)

    watched = pipe(PROMPTS, num_inference_steps=3, generator=seeded(), output_type="latent",
                   callback_on_step_end=look).images
    assert [(ours, step, shape) for ours, step, _, shape in seen] == [(True, i, (2, 1, 8, 8)) for i in range(3)]
    assert [time for _, _, time, _ in seen] == sorted((time for _, _, time, _ in seen), reverse=True)
    assert torch.equal(watched, latents(pipe.model.draw(PROMPTS, steps=3)))


def test_the_bar_counts_the_steps_and_changes_nothing(pipe, capsys):
    shown = TransfusionPipeline(pipe.model)
    drawn = shown(PROMPTS, num_inference_steps=3, generator=seeded(), output_type="latent").images
    assert "3/3" in capsys.readouterr().err
    assert torch.equal(drawn, latents(pipe.model.draw(PROMPTS, steps=3)))


def test_a_picture_is_edited_as_draw_edits_it(pipe):
    picture = Picture.new("RGBA", (20, 16), (200, 30, 30, 255))
    edited = pipe(PROMPTS[0], image=picture, num_inference_steps=2, generator=seeded(), output_type="latent").images
    prompt = [image_of(picture, pipe.model.config), Text(PROMPTS[0])]
    assert torch.equal(edited, latents(pipe.model.draw([prompt], steps=2)))


def test_latents_are_decoded_and_sizes_are_those_of_the_decoded_pictures(tmp_path):
    made = TransfusionPipeline(tiny_model()).to("cpu")
    made.set_progress_bar_config(disable=True)
    made.model.vae = VAE(autoencoder(latent_channels=1))
    made.save_pretrained(tmp_path)
    again = TransfusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    shown = again(PROMPTS[0], height=16, width=48, num_inference_steps=1, generator=seeded(), output_type="pt").images
    drawn = made.model.draw([PROMPTS[0]], steps=1, image_size=(4, 12))
    assert shown.shape == (1, 3, 16, 48)
    assert torch.equal(shown, (made.model.vae.decode(latents(drawn)) + 1) / 2)


@pytest.mark.parametrize("given, says", [
    ({"output_type": "png"}, "output_type is 'png'; one of 'pil', 'pt', 'np', 'latent' fits"),
    ({"height": 7}, "height is 7; multiples of 2 fit"), ({"width": 0}, "width is 0; a whole number of at least 1 fits"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"), ({"prompt": 3}, "prompt is 3; a text or a list"),
    ({"image": "a.png"}, "image is 'a.png' and there are 1 prompts; a PIL image"),
    ({"generator": 3}, "generator is 3; a torch.Generator or a list of them fits"),
    ({"generator": [torch.Generator()] * 2}, "generator is a list of 2 and there are 1 images; one for each fits"),
])
def test_an_argument_that_does_not_fit_is_named(pipe, given, says):
    with pytest.raises(ValueError, match=f"TransfusionPipeline: {says}"):
        pipe(**{"prompt": PROMPTS[0], **given})


@pytest.mark.parametrize("options,words", [
    ({"num_inference_steps": 0}, "num_inference_steps is 0"), ({"guidance_scale": -1.0}, "guidance_scale is -1"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0")])
def test_arguments_that_do_not_fit_have_the_names_that_diffusers_gives_them(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(PROMPTS, **options)


def test_any_seed_of_a_generator_fits(pipe):
    assert pipe(PROMPTS[0], num_inference_steps=1, generator=seeded(2**63 + 5)).images
