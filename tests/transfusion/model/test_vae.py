"""The autoencoder around the model: scale and shift, determinism, its way through checkpoints and commands."""
import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from tests.transfusion.model.test_from_language_model import language_model
from transfusion import Image, Transfusion
from transfusion.cli import main
from transfusion.data.model_images import load_image
from transfusion.model.from_language_model import InitSettings, init
from transfusion.model.vae import VAE


def autoencoder(**options):
    torch.manual_seed(4)
    return AutoencoderKL(
        **{
            **dict(
                in_channels=3,
                out_channels=3,
                latent_channels=8,
                block_out_channels=(8, 16, 16),
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                scaling_factor=0.5,
            ),
            **options,
        }
    )


@pytest.mark.parametrize("scale,shift", [(0.18215, None), (0.3611, 0.1159), (1.0, 0.0)])
def test_latents_are_the_posteriors_mean_shifted_and_scaled_and_decoding_undoes_both(scale, shift):
    plain, pictures = autoencoder(scaling_factor=scale, shift_factor=shift), torch.rand(2, 3, 16, 24) * 2 - 1
    vae = VAE(plain)
    with torch.no_grad():
        posterior = plain.encode(pictures).latent_dist
        latents = (posterior.mean - (shift or 0.0)) * scale
        decoded = plain.decode(posterior.mean).sample.clamp(-1, 1)
    assert vae.factor == 4 and latents.shape == (2, 8, 4, 6) and posterior.std.min() > 0
    torch.testing.assert_close(vae.encode(pictures), latents)
    assert torch.equal(vae.encode(pictures), vae.encode(pictures))
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_carries_its_autoencoder_and_pictures_go_through_it(tmp_path, capsys):
    autoencoder().save_pretrained(tmp_path / "vae")
    out = init(
        InitSettings(
            llm=language_model(tmp_path / "llm", "llama"),
            vae=tmp_path / "vae",
            out=tmp_path / "model",
            image_size=(4, 4),
        )
    )
    model = Transfusion.from_pretrained(out).eval()
    assert model.config.image_channels == 8 and not any(
        "vae" in name or "autoencoder" in name for name in model.state_dict()
    )
    assert {p.suffix for p in (out / "vae").iterdir()} == {".json", ".safetensors"}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.vae.autoencoder.state_dict().values(), autoencoder().state_dict().values())
    )
    assert copy.deepcopy(model).vae is model.vae

    Picture.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    image = load_image(tmp_path / "red.png", model.config, model.vae)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(image.latent, model.vae.encode(red)[0])
    main(
        [
            "sample",
            "--model",
            str(out),
            "--image",
            str(tmp_path / "red.png"),
            "--prompt",
            "blue",
            "--out",
            str(tmp_path / "blue.png"),
            "--steps",
            "1",
        ]
    )
    with Picture.open(tmp_path / "blue.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    vae = VAE(autoencoder())
    with pytest.raises(ValueError, match=r"pictures has shape \(1, 3, 10, 16\); .* sides that 4 divides"):
        vae.encode(torch.zeros(1, 3, 10, 16))
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4, 4, 4\); \(N, 8, height, width\) fits"):
        vae.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="holds no config.json"):
        VAE.from_pretrained(tmp_path)
    autoencoder().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="whose weights cannot be loaded"):
        VAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8 channels and no VAE"):
        load_image(tmp_path / "x.png", type("", (), {"image_channels": 8}))
    assert Image(torch.zeros(8, 4, 4)).latent.shape[0] == vae.channels


def test_an_autoencoder_that_lacks_weights_or_is_another_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "diffusion_pytorch_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name != "decoder.conv_out.weight"}, file)
    with pytest.raises(ValueError, match="VAE.from_pretrained: path is .* lack 1 of .*decoder.conv_out.weight"):
        VAE.from_pretrained(tmp_path / "half")
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        tmp_path / "tiny")
    with pytest.raises(ValueError, match="holds an AutoencoderTiny; AutoencoderKL fits"):
        VAE.from_pretrained(tmp_path / "tiny")
