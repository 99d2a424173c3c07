"""A classifier's features: what they are, what the classifier sees, gradients, and which checkpoints are refused."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.dinov2 import Dinov2Config, Dinov2ForImageClassification

from transfusion.eval.features import Features, Preprocessing, in_batches

LABELS = {0: "cat", 1: "dog", 2: "bird"}


def resnet(**options):
    """A random ResNet whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    network = ResNetForImageClassification(ResNetConfig(**{**dict(num_channels=3, embedding_size=8,
                                                                  hidden_sizes=[8, 12], depths=[1, 1],
                                                                  layer_type="basic", id2label=LABELS), **options}))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def convnext():
    torch.manual_seed(0)
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2,
                                                         image_size=32, id2label=LABELS)).eval()


def pictures(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("make,width", [(resnet, 12), (convnext, 12)])
def test_stages_pooled_features_and_logits_are_the_networks_own(tmp_path, make, width):
    network = make()
    network.save_pretrained(tmp_path)
    features, x = Features.from_pretrained(tmp_path), pictures(2, 3, 32, 32)
    with torch.no_grad():
        own = network(x, output_hidden_states=True)
    torch.testing.assert_close(features.logits(x), own.logits)
    assert len(features.stages(x)) == len(own.hidden_states) == 3
    for ours, theirs in zip(features.stages(x), own.hidden_states):
        torch.testing.assert_close(ours, theirs)
    pooled = features.pooled(x)
    assert pooled.shape == (2, width)
    torch.testing.assert_close(network.classifier(pooled), own.logits)
    assert features.label_names == ["cat", "dog", "bird"]
    assert features.name == f"{network.config.model_type} ({tmp_path})"


def test_the_network_is_frozen_and_pictures_have_a_gradient(tmp_path):
    resnet().save_pretrained(tmp_path)
    features, x = Features.from_pretrained(tmp_path), pictures(4, 1, 16, 16).requires_grad_()
    before = features.logits(x).detach()
    sum(stage.square().sum() for stage in features.stages(x)).backward()
    features.pooled(x).sum().backward()
    assert x.grad.abs().max() > 0
    for network in (features.body, features.classifier):
        assert not network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    torch.testing.assert_close(features.logits(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [None, (12, 10), (5, 7)])
def test_the_gradient_is_that_of_finite_differences(size):
    network = resnet(hidden_act="silu").double()
    features = Features(network.resnet, network, Preprocessing(3, size, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), "resnet")
    x = pictures(1, 1, 8, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: (*features.stages(x), features.pooled(x), features.logits(x)), x)


@pytest.mark.parametrize("shape,size",
                         [((40, 40), (16, 16)), ((8, 8), (32, 32)), ((20, 30), (24, 24)), ((16, 16), (16, 16))])
def test_what_the_network_sees_is_what_its_image_processor_makes_of_8_bit_pictures(tmp_path, shape, size):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path)
    bytes_ = torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = processor(Picture.fromarray(bytes_.numpy()), return_tensors="pt").pixel_values
    ours = Preprocessing.read(tmp_path, {"num_channels": 3})(bytes_.movedim(-1, 0)[None].float() / 127.5 - 1)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1.01 / 255 / min(std)  # PIL rounds after each of its two passes


def test_each_way_of_writing_the_preprocessing_is_read(tmp_path):
    def read(said, **config):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        return Preprocessing.read(tmp_path, config)

    assert read({"size": {"shortest_edge": 224}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}) == (
        3, (224, 224), [0.1] * 3, [0.2] * 3, 1
    )
    assert read(
        {"size": 256, "do_center_crop": True, "crop_size": {"height": 224, "width": 192}}, num_channels=1
    ) == (1, (224, 192), [0.5], [0.5], 1)
    assert read(
        {"do_resize": False, "size": 256, "do_normalize": False, "do_rescale": False}
    ) == (3, None, [0.0], [1.0], 255)
    (tmp_path / "preprocessor_config.json").unlink()
    assert Preprocessing.read(tmp_path, {"image_size": 96}) == (3, (96, 96), [0.5], [0.5], 1)
    assert Preprocessing.read(tmp_path, {"num_channels": 4}) == (4, None, [0.5], [0.5], 1)
    timm = {"input_size": [3, 299, 299], "mean": [0.5] * 3, "std": [0.5] * 3}
    assert Preprocessing.read(tmp_path, {"pretrained_cfg": timm}) == (3, (299, 299), [0.5] * 3, [0.5] * 3, 1)
    x = pictures(1, 3, 8, 8)
    torch.testing.assert_close(Preprocessing(3, None, [0.5], [0.5])(x), x)
    assert Preprocessing(3, (4, 4), [0.0], [1.0], 255)(torch.ones(1, 1, 8, 8)).unique().tolist() == [255]


def test_a_body_without_a_head_has_features_and_no_logits(tmp_path):
    network = resnet()
    network.resnet.save_pretrained(tmp_path)
    features, x = Features.from_pretrained(tmp_path), pictures(2, 3, 32, 32)
    torch.testing.assert_close(network.classifier(features.pooled(x)), network(x).logits)
    assert len(features.stages(x)) == 3 and features.label_names == []
    with pytest.raises(ValueError, match=r"Features.logits: resnet \(.*\) has no classification head; .* fits"):
        features.logits(x)


def test_batches_change_nothing(tmp_path):
    resnet().save_pretrained(tmp_path)
    features, x = Features.from_pretrained(tmp_path), pictures(7, 3, 16, 16)
    batched = in_batches(features.pooled, x, rows=3)
    torch.testing.assert_close(batched, features.pooled(x))
    assert not batched.requires_grad


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json; a directory that transformers wrote fits"):
        Features.from_pretrained(tmp_path)
    network = resnet()
    network.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    # it is whole but for its form
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "pickled", use_safetensors=False)
    with pytest.raises(ValueError, match="cannot be loaded .* in safetensors"):
        Features.from_pretrained(tmp_path / "pickled")
    network.save_pretrained(tmp_path / "part",
                            state_dict={key: x
                                        for key, x in network.state_dict().items() if "encoder.stages.1" not in key})
    with pytest.raises(ValueError, match="has no weights for encoder.stages.1"):
        Features.from_pretrained(tmp_path / "part")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match="cannot be loaded .* a convolutional classifier of transformers"):
        Features.from_pretrained(tmp_path / "text")
    network.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"pictures has shape \(1, 4, 8, 8\); \(N, 3, height, width\) and grey"):
        Features.from_pretrained(tmp_path / "whole").pooled(torch.zeros(1, 4, 8, 8))


def test_vision_transformers_are_refused_where_their_tokens_are_no_maps(tmp_path):
    options = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
                   patch_size=8, id2label=LABELS)
    ViTForImageClassification(ViTConfig(**options)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError,
                       match="has no weights for pooler.dense.bias, pooler.dense.weight; a convolutional classifier"):
        Features.from_pretrained(tmp_path / "vit")
    Dinov2ForImageClassification(Dinov2Config(**options)).save_pretrained(tmp_path / "dino")
    features = Features.from_pretrained(tmp_path / "dino")
    assert features.pooled(pictures(2, 3, 16, 16)).shape == (2, 16)
    with pytest.raises(
        ValueError,
        match=r"dinov2 .* has hidden states of shape \(2, 5, 16\), not \(N, C, h, w\); a convolutional classifier"
    ):
        features.stages(pictures(2, 3, 16, 16))


def test_a_network_that_does_not_pool_is_refused_by_name(monkeypatch):
    body = resnet().resnet
    features = Features(body, None, Preprocessing(3, None, [0.5] * 3, [0.5] * 3), "poolformer")
    monkeypatch.setattr(body, "forward", lambda *_, **__: SimpleNamespace(last_hidden_state=torch.zeros(1, 8, 2, 2)))
    with pytest.raises(ValueError, match="Features.pooled: poolformer .*has no pooled features"):
        features.pooled(pictures(1, 3, 8, 8))
