"""Each term of the autoencoder's loss alone: against a plain form written out here, and what its gradient reaches."""
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import ResNetConfig, ResNetForImageClassification

from transfusion.eval.features import Features
from transfusion.train.autoencoder import AutoencoderSettings, build_autoencoder, reconstruct
from transfusion.train.autoencoder_losses import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    identity_loss,
    kl_loss,
    perceptual_loss,
    reconstruction_loss,
)


def classifier(path):
    """A random residual network whose batch norms' statistics are not those it began with."""
    torch.manual_seed(5)
    network = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                        layer_type="basic", num_labels=4))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return Features.from_pretrained(classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))


@pytest.fixture
def autoencoder():
    return build_autoencoder(AutoencoderSettings(widths=(8, 16), latent_channels=2), (3, 32, 32), seed=0)


def gradients(loss, module):
    return [grad is not None and bool(grad.abs().sum() > 0)
            for grad in torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)]


def test_reconstruction_is_the_mean_absolute_difference(pair):
    x, y = pair
    torch.testing.assert_close(reconstruction_loss(x, y).item(), abs(x.double().numpy() - y.double().numpy()).mean(),
                               rtol=1e-6, atol=0)
    assert reconstruction_loss(x, x) == 0


def test_perception_is_the_squared_chord_between_unit_features_of_each_stage(features, pair):
    expected = 0.0
    for a, b in zip(*([stage.double().numpy() for stage in features.stages(x)] for x in pair)):
        cosines = (a * b).sum(1) / ((a**2).sum(1) * (b**2).sum(1)) ** 0.5  # |a / |a| - b / |b||^2 = 2 - 2 cos
        expected += (2 - 2 * cosines).mean()
    assert len(features.stages(pair[0])) == 3
    torch.testing.assert_close(perceptual_loss(features, *pair).item(), expected, rtol=1e-4, atol=0)
    assert perceptual_loss(features, pair[0], pair[0]) == 0


def test_identity_is_the_mean_absolute_difference_of_pooled_features(features, pair):
    a, b = (features.stages(x)[-1].double().mean((2, 3)).numpy() for x in pair)             # what a ResNet pools
    torch.testing.assert_close(identity_loss(features, *pair).item(), abs(a - b).mean(), rtol=1e-5, atol=0)
    assert identity_loss(features, pair[0], pair[0]) == 0


def test_the_kl_divergence_is_that_of_the_two_normal_distributions():
    moments = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    mean, log_variance = moments.double().chunk(2, dim=1)
    normal = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (log_variance / 2).exp()),
                                               torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(DiagonalGaussianDistribution(moments)).item(),
                               normal.sum((1, 2, 3)).mean().item(), rtol=1e-6, atol=0)


def test_the_hinge_counts_what_is_not_yet_told_apart_by_1():
    def scores(x):  # a discriminator that answers what it is shown
        return x

    real, drawn = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, -0.25, 2.0])
    assert discriminator_loss(scores, real, drawn).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 0.75 + 3) / 3) / 2)
    assert generator_loss(scores, drawn).item() == pytest.approx(-(-2 - 0.25 + 2) / 3)


@pytest.mark.parametrize("name", ["reconstruction", "perceptual", "identity", "adversarial"])
def test_the_terms_of_the_reconstruction_reach_encoder_and_decoder(features, pair, autoencoder, name):
    pictures, discriminator = pair[0], PatchDiscriminator(3, 8, layers=1)
    drawn, _ = reconstruct(autoencoder, pictures, torch.Generator().manual_seed(0))
    loss = {"reconstruction": lambda: reconstruction_loss(pictures, drawn),
            "perceptual": lambda: perceptual_loss(features, pictures, drawn),
            "identity": lambda: identity_loss(features, pictures, drawn),
            "adversarial": lambda: generator_loss(discriminator, drawn)}[name]()
    assert all(gradients(loss, autoencoder))
    assert all(p.grad is None for p in (*features.body.parameters(), *discriminator.parameters()))


def test_the_kl_divergence_reaches_the_encoder_alone(pair, autoencoder):
    _, posterior = reconstruct(autoencoder, pair[0], torch.Generator().manual_seed(0))
    reached = dict(zip(dict(autoencoder.named_parameters()), gradients(kl_loss(posterior), autoencoder)))
    assert {name.split(".")[0] for name, hit in reached.items() if hit} == {"encoder", "quant_conv"}
    assert {name.split(".")[0] for name, hit in reached.items() if not hit} == {"decoder", "post_quant_conv"}


def test_the_discriminators_loss_reaches_the_discriminator_alone(pair, autoencoder):
    discriminator = PatchDiscriminator(3, 8, layers=1)
    torch.nn.init.normal_(discriminator[-1].weight)  # some patches are beyond the margin, or the last bias would cancel
    drawn, _ = reconstruct(autoencoder, pair[0], torch.Generator().manual_seed(0))
    discriminator_loss(discriminator, pair[0], drawn).backward()
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())
    assert all(p.grad is None for p in autoencoder.parameters())


@pytest.mark.parametrize("layers,field", [(1, 16), (2, 34), (3, 70)])
def test_a_patch_of_the_discriminator_sees_as_many_pixels_as_pix2pix_says(layers, field):
    """One output depends on field x field pixels: 16, 34 and 70 (arXiv:1611.07004, section 6.1).

    That is so without its norms, which see the whole picture.
    """
    discriminator = PatchDiscriminator(1, 8, layers)
    convolutions = torch.nn.Sequential(*(module
                                         for module in discriminator if not isinstance(module, torch.nn.GroupNorm)))
    picture = torch.randn(1, 1, 128, 128, requires_grad=True)
    scores = convolutions(picture)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = picture.grad[0, 0].abs().sum(1).nonzero()
    assert scores.shape[1] == 1 and int(rows.max() - rows.min()) + 1 == field


def test_a_discriminator_learns_to_tell_two_kinds_of_pictures_apart():
    torch.manual_seed(0)
    discriminator, generator = PatchDiscriminator(1, 8, layers=1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    for _ in range(60):
        noise = torch.rand(2, 16, 1, 16, 16, generator=generator) * 2 - 1
        real, drawn = noise[0], torch.nn.functional.avg_pool2d(noise[1], 3, 1, 1)           # sharp and blurred
        loss = discriminator_loss(discriminator, real, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 and discriminator(real).mean() > 0.5 > -0.5 > discriminator(drawn).mean()


def test_what_the_discriminator_says_is_summed_in_float32():
    pictures = torch.rand(2, 1, 16, 16)
    discriminator = PatchDiscriminator(1, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(pictures).dtype == torch.bfloat16
        assert generator_loss(discriminator, pictures).dtype == torch.float32
        assert discriminator_loss(discriminator, pictures, pictures).dtype == torch.float32
