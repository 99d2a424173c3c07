"""A checkpoint's round trip, the options of loading one, and quantisers that change its linear layers on the way."""
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

import transfusion.model.transfusion as loading
from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_transfusion import losses
from transfusion import Text, Transfusion, TransfusionConfig
from transfusion.model.config import BACKBONES
from transfusion.model.lora import spare_images


def test_checkpoints_come_back_equal_and_hold_no_pickle(model, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    for again in (Transfusion.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is Transfusion and again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        torch.testing.assert_close(
            *(losses(m.eval(), [[Text("a"), pictures[0]]], 32).loss for m in (again, model)), rtol=1e-6, atol=0
        )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "transfusion"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_whole_model_comes_back_from_pickle_with_equal_losses(backbone, pictures):
    model, file = tiny_model(backbone=backbone), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert [*map(type, again.modules())] == [*map(type, model.modules())]
    documents = [[Text("a"), pictures[0]]]
    assert torch.equal(losses(again, documents, 32).loss, losses(model, documents, 32).loss)


def test_tied_embeddings_come_back_tied(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    again = Transfusion.from_pretrained(tmp_path)
    decoder = again.backbone.decoder
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
    assert torch.equal(
        decoder.get_input_embeddings().weight,
        tiny_model(tie_word_embeddings=True).backbone.decoder.get_input_embeddings().weight,
    )


def test_loading_says_what_was_missing_and_takes_the_options_of_transformers(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again, found = Transfusion.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is Transfusion and not any(
        found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    wider, found = Transfusion.from_pretrained(str(tmp_path), output_loading_info=True, image_layers="linear")
    assert (
        any(key.startswith("image_head") for key in found["unexpected_keys"]) and wider.config.image_layers == "linear"
    )
    for options in (
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16", "device_map": "cpu"},
        {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True},
    ):
        loaded = Transfusion.from_pretrained(tmp_path, **options)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.device.type == "cpu"
    plain = Transfusion.from_pretrained(
        tmp_path, local_files_only=True, revision="main", trust_remote_code=False, diffusion_weight=2.0
    )
    assert plain.config.diffusion_weight == 2.0 and torch.equal(
        plain.get_input_embeddings().weight, model.get_input_embeddings().weight
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"use_safetensors": False}, "use_safetensors is False; True fits"),
        ({"objectve": "v"}, "objectve is no option; .*did you mean objective"),
        ({"objective": "w"}, "TransfusionConfig: objective is 'w'"),
        ({"diffusion_weight": float("nan")}, "diffusion_weight is nan"),
        ({"colour": 3}, "colour is no option"),
        ({"attn_implementation": "eager"}, "attn_implementation is 'eager'; 'tfkernels' fits"),
    ],
)
def test_an_option_of_loading_that_does_not_fit_is_refused_by_name(tmp_path, options, message):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Transfusion.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_quantiser_leaves_the_image_layers_and_the_text_head_as_they_are(tmp_path, backbone):
    """A quantiser of our own, registered as others are, which turns the linear layers that it may have into bytes."""
    tiny_model(backbone=backbone).save_pretrained(tmp_path)
    for given, others in (
        (ByteConfig(), set()),
        (ByteConfig(["backbone.decoder.model.layers.0"]), {"0"}),
        ({"quant_method": "bytes_of_a_test"}, set()),
    ):
        model = Transfusion.from_pretrained(tmp_path, quantization_config=given)
        packed = {name for name, module in model.named_modules() if name in BYTES}
        assert packed and all(name.startswith("backbone.decoder.model.layers.") for name in packed)
        assert {name.split(".")[4] for name in packed} == {"0", "1"} - others
    assert given == {"quant_method": "bytes_of_a_test"}
    spared = spare_images(
        tiny_model(backbone=backbone), BitsAndBytesConfig(llm_int8_skip_modules=["here"])
    ).llm_int8_skip_modules
    assert {"here", "timestep", "patch_embedding", "image_head"} < set(spared)


def test_quantised_weights_are_not_what_image_layers_start_from(tmp_path):
    tiny_model(backbone="adaln").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image layers for backbone 'mixture_of_transformers', and quantised"):
        Transfusion.from_pretrained(tmp_path, backbone="mixture_of_transformers", quantization_config=ByteConfig())


def test_image_layers_of_a_backbone_that_is_asked_for_are_not_quantised(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    outlines = []
    monkeypatch.setattr(loading, "spare_images", lambda outline, given: outlines.append(outline) or given)
    Transfusion.from_pretrained(tmp_path, backbone="adaln", quantization_config=ByteConfig())
    assert [outline.config.backbone for outline in outlines] == ["adaln"]


def test_the_condition_has_the_models_dtype_where_a_weight_is_stored_as_bytes():
    timestep = tiny_model().timestep
    expected, weight = timestep(torch.tensor([0.3])), timestep.mlp[0].weight
    timestep.mlp[0] = BytesLinear(weight, timestep.mlp[0].bias)
    assert timestep.mlp[0].weight.dtype == torch.uint8
    torch.testing.assert_close(timestep(torch.tensor([0.3])), expected)


class BytesLinear(torch.nn.Module):
    """A linear layer whose weight is kept as the bytes of its numbers."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = (
            torch.nn.Parameter(weight.detach().contiguous().view(torch.uint8), requires_grad=False),
            bias,
        )

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.view(x.dtype), self.bias)


BYTES: set[str] = set()


@register_quantization_config("bytes_of_a_test")
class ByteConfig(QuantizationConfigMixin):
    def __init__(self, modules_to_not_convert=None, **_):
        self.quant_method, self.modules_to_not_convert = "bytes_of_a_test", modules_to_not_convert


@register_quantizer("bytes_of_a_test")
class ByteQuantizer(HfQuantizer):
    requires_calibration, is_trainable = False, False

    def is_serializable(self, *_, **__):
        return False

    def _process_model_before_weight_loading(self, model, **_):
        kept = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        BYTES.clear()
        BYTES.update(
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and should_convert_module(name, kept)
        )


def test_whoever_loads_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    file, lost = tmp_path / "model.safetensors", "backbone.decoder.model.layers.0.mlp.down_proj.weight"
    save_file({name: x for name, x in load_file(file).items() if name != lost}, file, {"format": "pt"})
    for load in (Transfusion.from_pretrained, AutoModel.from_pretrained,
                 lambda path: Transfusion.from_pretrained(path, image_size=(4, 4)),
                 lambda path: Transfusion.from_pretrained(path, config=TransfusionConfig.from_pretrained(path))):
        with pytest.raises(ValueError, match=f"lack 1 of the model's weights, {lost}"):
            load(tmp_path)


def test_how_the_decoder_generates_is_kept(tmp_path):
    model = tiny_model()
    model.backbone.decoder.generation_config.update(eos_token_id=[2, 7], do_sample=True, temperature=0.6)
    model.save_pretrained(tmp_path / "a")
    Transfusion.from_pretrained(tmp_path / "a").save_decoder(tmp_path / "b")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    assert kept.eos_token_id == [2, 7] and kept.do_sample and kept.temperature == 0.6


def test_a_vocabulary_grows_as_transformers_models_do(pictures):
    model, tokens = tiny_model().eval(), torch.arange(5)[None]
    before, size = model.text_logits(tokens), len(model.tokenizer)
    model.resize_token_embeddings(size + 5)
    assert model.backbone.decoder.config.vocab_size == size + 5
    assert torch.equal(model.text_logits(tokens)[..., :size], before)
