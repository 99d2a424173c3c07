"""U-Net image layers: shapes of every size, skips that matter, images that do not touch each other."""
import pytest
import torch

from tests.transfusion.conftest import tiny_model
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.sequence import ImageLayout, encode, pack

HIDDEN = 32


def unet_model(patch_size=2, channels=(8, 16), image_channels=1, words=None):
    base = tiny_model()
    config = TransfusionConfig(
        text_config=base.config.text_config,
        patch_size=patch_size,
        image_size=(16, 16),
        image_channels=image_channels,
        image_layers="unet",
        unet_channels=channels,
        unet_blocks=1,
        unet_words=words,
        boi_token_id=base.config.boi_token_id,
        eoi_token_id=base.config.eoi_token_id,
    )
    torch.manual_seed(0)
    model = Transfusion(config, base.tokenizer).eval()
    torch.nn.init.normal_(model.image_head.output.weight, std=0.3)
    return model


def through(model, grids, patches, condition):
    """Predictions of the image layers with nothing but a copy between them."""
    layout = ImageLayout.of(grids)
    hidden, skips = model.patch_embedding(
        torch.zeros(len(patches), HIDDEN), patches, condition, layout, torch.arange(len(patches))
    )
    return model.image_head(hidden, condition, layout, skips)


@pytest.mark.parametrize("patch_size,channels", [(1, (8,)), (2, (8, 16)), (4, (8, 8, 16)), (8, (4, 4, 8, 8))])
def test_every_patch_size_and_images_of_several_sizes_come_out_as_they_would_alone(patch_size, channels):
    model, grids = unet_model(patch_size, channels, image_channels=3), [(4, 2), (1, 3), (4, 2)]
    patches, condition = torch.randn(19, 3 * patch_size**2), torch.randn(3, HIDDEN)
    with torch.no_grad():
        together = through(model, grids, patches, condition)
        apart = [through(model, [grid], x, t[None]) for grid, x, t in zip(grids, patches.split([8, 3, 8]), condition)]
    assert together.shape == patches.shape
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    assert together.std() > 0.01


def test_detail_and_time_reach_the_prediction_around_the_decoder():
    model, patches, condition = (
        unet_model(),
        torch.randn(16, 4, requires_grad=True),
        torch.randn(1, HIDDEN, requires_grad=True),
    )
    layout = ImageLayout.of([(4, 4)])
    hidden, skips = model.patch_embedding(torch.zeros(16, HIDDEN), patches, condition, layout, torch.arange(16))
    prediction = model.image_head(hidden.detach(), condition.detach(), layout, skips)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(prediction.sum(), [patches, condition]))


def test_the_model_trains_through_them_and_draws(pictures):
    model = unet_model()
    images = [Image(torch.rand(1, 16, 16)), pictures[0]]
    sequence = pack([encode([Text("a"), images[0], Text("b"), images[1]], model.tokenizer, model.config)], 128, 4)
    model.train()(sequence, torch.tensor([0.3, 0.6]), 1).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in (*model.patch_embedding.parameters(), *model.image_head.parameters())
    )
    image, = model.eval().draw(["a"], steps=2)
    assert image.latent.shape == (1, 16, 16) and torch.isfinite(image.latent).all()


def test_a_model_with_them_is_saved_and_loaded(tmp_path):
    model = unet_model()
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and all(
        torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items()
    )


def test_a_fresh_unet_predicts_nothing():
    base = unet_model()
    fresh = Transfusion(base.config)
    assert not through(fresh, [(2, 2)], torch.randn(4, 4), torch.randn(1, HIDDEN)).any()


def test_channels_that_do_not_fit_the_patch_are_refused():
    for patch_size, channels in ((2, (8,)), (3, (8, 8))):
        with pytest.raises(ValueError, match=r"patch_size is . and unet_channels \(8"):
            TransfusionConfig(patch_size=patch_size, image_size=(6, 6), image_layers="unet", unet_channels=channels)


def test_a_token_is_a_mean_of_vectors_by_a_softmax_and_is_one_of_them_where_that_is_sure(tmp_path):
    model, patches, condition = unet_model(words=5), torch.randn(16, 4), torch.randn(1, HIDDEN)
    layout, places = ImageLayout.of([(4, 4)]), torch.arange(16)
    connector = model.patch_embedding.output
    scores, vectors = connector.scores, connector.vectors
    assert connector.words.shape == (5, HIDDEN)
    with torch.no_grad():
        (members, maps), = model.patch_embedding.features(patches, condition, layout)
        weights = torch.einsum("krc,vk->vrc", maps[-1][0], scores.weight[:, :, 0, 0]) + scores.bias[:, None, None]
        expected = weights.flatten(1).softmax(0).T @ vectors.weight[:, :, 0, 0].T                             # (16, C)
        tokens, _ = model.patch_embedding(torch.zeros(16, HIDDEN), patches, condition, layout, places)
        torch.testing.assert_close(tokens[members], expected)
        scores.weight.zero_()
        scores.bias.copy_(torch.tensor([0.0, 0.0, 80.0, 0.0, 0.0]))
        tokens, _ = model.patch_embedding(torch.zeros(16, HIDDEN), patches, condition, layout, places)
        torch.testing.assert_close(tokens, connector.words[2].expand(16, -1))
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert loaded.config.unet_words == 5
    assert torch.equal(loaded.patch_embedding.output.words, connector.words)


def test_words_train_with_all_else():
    model = unet_model(words=5)
    document = encode([Text("a"), Image(torch.rand(1, 16, 16)), Text("b")], model.tokenizer, model.config)
    sequence = pack([document], 128, 4)
    model.train()(sequence, torch.tensor([0.3]), 1).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.patch_embedding.output.parameters())
