"""What a model's configuration holds, what it refuses by name, and what transformers' own keys come to in it."""
import inspect
import json

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion import Transfusion, TransfusionConfig
from transfusion.model.config import BACKBONES, IMAGE_LAYERS, TransfusionSettings
from transfusion.model.transfusion import BACKBONE_CLASSES, IMAGE_LAYER_CLASSES


def test_paths_and_configs_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        Transfusion.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="objective is 'fow'; one of 'eps', 'v', 'flow', 'x0'"):
        TransfusionConfig(objective="fow")
    with pytest.raises(
        ValueError, match="backbone is 'adalm'; one of 'decoder', 'adaln', 'mixture_of_transformers' fits"
    ):
        TransfusionConfig(backbone="adalm")
    with pytest.raises(ValueError, match="positions is '2d' and backbone 'decoder'"):
        TransfusionConfig(positions="2d")
    with pytest.raises(ValueError, match="unet_words is 8 and image_layers 'dit'"):
        TransfusionConfig(unet_words=8)
    with pytest.raises(ValueError, match="image_size is .* patch_size 3"):
        TransfusionConfig(patch_size=3)


NAN, INF = float("nan"), float("inf")
UNFIT = [
    (name, value)
    for name, values in {
        "image_channels": (0, -1, 1.5, True, NAN),
        "patch_size": (0, -2, 2.0, NAN, "2"),
        "image_size": (8, (8,), (0, 8), (8, -8), (8.0, 8.0), "88", None),
        "unet_channels": ((), (0, 8), (8.5, 8), 64, None),
        "unet_blocks": (0, 1.5, True),
        "unet_words": (0, -3, 1.5, True, "words"),
        "diffusion_weight": (NAN, INF, -1.0, True, "5"),
        "time_shift_tokens": (0, -4, 2.5, NAN, True),
        "boi_token_id": (-1, 32_000, 3.5, None, True),
        "eoi_token_id": (3, -1, 10**9),
        "text_config": ("llama", 3),
        "objective": (None, 3),
        "backbone": ("", None),
    }.items()
    for value in values
]


@pytest.mark.parametrize("name,value", UNFIT, ids=lambda x: str(x))
def test_a_setting_that_no_model_can_have_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"TransfusionConfig: .*{name} (is|are both) .* fit"):
        TransfusionConfig(**{name: value})


def test_every_backbone_and_every_image_layer_that_a_configuration_may_name_has_its_classes():
    assert tuple(BACKBONE_CLASSES) == BACKBONES and tuple(IMAGE_LAYER_CLASSES) == IMAGE_LAYERS


def test_a_configuration_begins_with_the_defaults_of_a_run_and_says_so_in_its_signature():
    shared, config = TransfusionSettings().shared(), TransfusionConfig()
    signature = inspect.signature(TransfusionConfig).parameters
    assert {name: signature[name].default for name in shared} == shared
    assert {name: getattr(config, name) for name in shared} == json.loads(json.dumps(shared))
    assert [*signature][:-1] == TransfusionConfig.names()


def test_an_unknown_setting_is_answered_with_the_nearest():
    for name, near in (("objectve", "objective"), ("image_chanels", "image_channels"), ("patchsize", "patch_size")):
        with pytest.raises(ValueError, match=f"TransfusionConfig: {name} is no setting; .* fit; did you mean {near}"):
            TransfusionConfig(**{name: 1})
        with pytest.raises(ValueError, match=f"{name} is no setting; .*did you mean {near}"):
            TransfusionConfig.from_dict({name: 1})
    with pytest.raises(ValueError, match="sound_channels is no setting; text_config, image_channels, .* fit"):
        TransfusionConfig(sound_channels=2)
    with pytest.raises(ValueError, match="text_config is a dict without model_type"):
        TransfusionConfig(text_config={"hidden_size": 32})


def test_embeddings_are_tied_where_text_config_says_so_and_nothing_else_may_say_otherwise(tmp_path):
    tied, loose = ({"model_type": "llama", "tie_word_embeddings": one} for one in (True, False))
    for text_config, given in ((tied, False), (loose, True), (None, True)):
        with pytest.raises(ValueError, match=f"TransfusionConfig: tie_word_embeddings is {given} and text_config's "
                                             f"{not given}; the same fits; set it in text_config"):
            TransfusionConfig(text_config=text_config, tie_word_embeddings=given)
    for text_config in (tied, loose):
        config = TransfusionConfig(text_config=text_config, tie_word_embeddings=text_config["tie_word_embeddings"])
        config.save_pretrained(tmp_path)
        is_tied, other = config.tie_word_embeddings, loose if text_config is tied else tied
        assert TransfusionConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert TransfusionConfig.from_pretrained(tmp_path, tie_word_embeddings=is_tied).tie_word_embeddings == is_tied
        assert TransfusionConfig.from_pretrained(tmp_path, text_config=other).tie_word_embeddings != is_tied
        with pytest.raises(ValueError, match=f"tie_word_embeddings is {not is_tied} and text_config's {is_tied}"):
            TransfusionConfig.from_pretrained(tmp_path, tie_word_embeddings=not is_tied)


def test_what_transformers_writes_into_a_configuration_stays_in_it(tmp_path):
    config = tiny_model().config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    old = {
        "torch_dtype": "float32",
        "use_bfloat16": False,
        "pruned_heads": {},
        "transformers_version": "4.30.0",
        "_name_or_path": "x",
        "max_length": 20,
        "is_decoder": False,
        "tokenizer_class": None,
        "id2label": {"0": "a", "1": "b"},
        "a_key_of_another_library": [1],
    }
    (tmp_path / "config.json").write_text(json.dumps(written | old))
    again = TransfusionConfig.from_pretrained(tmp_path)
    assert again.patch_size == config.patch_size and again.a_key_of_another_library == [1]
    assert TransfusionConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert TransfusionConfig(
        text_config=config.text_config, architectures=["Transfusion"], dtype="float32", num_labels=2
    ).architectures == ["Transfusion"]
    loaded, unused = TransfusionConfig.from_pretrained(
        tmp_path, diffusion_weight=2.0, return_unused_kwargs=True, other=1
    )
    assert loaded.diffusion_weight == 2.0 and unused == {"other": 1}
