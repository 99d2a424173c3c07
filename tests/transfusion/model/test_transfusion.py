"""The model against transformers' own Llama, the paper's mask and loss, and its checkpoint's round trip."""
import copy
import inspect
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.compare import assert_as_accurate
from tests.transfusion.conftest import tiny_model
from tests.transfusion.plain import noise_of, plain_output
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.diffusion.objective import OBJECTIVES
from transfusion.model.config import BACKBONES, IMAGE_LAYERS, TransfusionSettings
from transfusion.model.lora import spare_images
from transfusion.model.transfusion import BACKBONE_CLASSES, IMAGE_LAYER_CLASSES
from transfusion.sequence import encode, pack

SEED = 11


def packed(model, documents, seq_len):
    return pack([encode(parts, model.tokenizer, model.config) for parts in documents], seq_len, 4)


def losses(model, documents, seq_len):
    sequence = packed(model, documents, seq_len)
    return model(sequence, torch.full((sequence.image_count,), 0.5), SEED)


def hidden_states(model, sequence, patches, times):
    condition = model.timestep(times)
    positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
    return model.backbone(
        model.embed(sequence, patches, condition)[0], positions, sequence.mask(), condition, sequence.modality
    )


@pytest.mark.parametrize("tied", [False, True])
def test_text_logits_are_those_of_the_same_llama_to_the_bit(tied):
    model = tiny_model(tie_word_embeddings=tied)
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "sdpa"
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.backbone.decoder.state_dict())
    tokens = torch.randint(5, model.config.text_config.vocab_size, (2, 100))
    with torch.no_grad():
        assert llama.config._attn_implementation == "sdpa"
        assert (llama(tokens).logits - model.text_logits(tokens)).abs().max() == 0


def test_patches_of_an_image_see_each_other_and_nobody_sees_the_future(model, pictures):
    sequence = pack([encode([Text("a"), pictures[0], Text(" and"), pictures[1]], model.tokenizer, model.config)], 64, 4)
    times = torch.zeros(2)
    before = hidden_states(model, sequence, sequence.patches, times)[0]
    changed = sequence.patches.clone()
    changed[15] += 1  # the last patch of the first image
    after = hidden_states(model, sequence, changed, times)[0]
    moved = (before - after).abs().amax(-1) > 1e-6
    start, stop = sequence.spans[0, 0].tolist()
    assert not moved[:start].any() and moved[start:int((sequence.documents >= 0).sum())].all()
    changed = sequence.patches.clone()
    changed[16:] += 1  # the whole second image
    moved = (before - hidden_states(model, sequence, changed, times)[0]).abs().amax(-1) > 1e-6
    assert not moved[:sequence.spans[0, 1, 0]].any()


def test_the_timestep_reaches_the_transformer(model, pictures):
    sequence = pack([encode([pictures[0]], model.tokenizer, model.config)], 24, 4)
    early, late = (hidden_states(model, sequence, sequence.patches, torch.tensor([t])) for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-3


@pytest.mark.parametrize("backbone,layers", [("decoder", "dit"), ("decoder", "linear"), ("adaln", "dit")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_every_gradient_are_those_of_the_plain_form_under_the_same_seed(
    pictures, objective, backbone, layers
):
    model, small = tiny_model(objective, backbone, layers), Image(pictures[1].latent[:, :4, :4])
    sequence, times = (
        packed(model, [[Text("a"), pictures[0]], [small, Text("b"), pictures[2]], [Text("c")]], 64),
        torch.tensor([0.3, 0.7, 0.9]),
    )

    def run(function, model, dtype):
        output = function(model, replace(sequence, patches=sequence.patches.to(dtype)), times.to(dtype), SEED)
        return {"loss": output.loss, "images": output.image_losses} | dict(zip(
            (name for name, _ in model.named_parameters()), torch.autograd.grad(output.loss, list(model.parameters()))))

    ours, rounded = run(Transfusion.__call__, model, torch.float32), run(plain_output, model, torch.float32)
    exact = run(plain_output, copy.deepcopy(model).double(), torch.float64)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_as_accurate(name, ours[name].detach(), rounded[name].detach(), exact[name].detach(),
                           terms=exact[name].detach().abs().amax().expand_as(exact[name]))


def test_packed_documents_have_the_losses_they_have_in_rows_of_their_own(model, pictures):
    documents = [
        [Text("a handwritten seven"), pictures[0]],
        [pictures[1], Text("a handwritten two")],
        [Text("only text")],
    ]
    together, apart = losses(model, documents, 80), losses(model, documents, 40)
    assert packed(model, documents, 80).tokens.shape[0] == 1 and packed(model, documents, 40).tokens.shape[0] > 1
    torch.testing.assert_close(together.image_losses, apart.image_losses)
    torch.testing.assert_close(together.text_loss, apart.text_loss)


@pytest.mark.parametrize("kind", ["text", "image", "three images"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_kind_of_batch_trains_its_parameters(pictures, kind, backbone):
    model = tiny_model(backbone=backbone)
    documents = {"text": [[Text("a b c")]], "image": [[pictures[0]]], "three images": [[*pictures[:3]]]}[kind]
    output = losses(model, documents, 80)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    groups = {
        "decoder": model.backbone.decoder,
        "image_head": model.image_head,
        "patch_embedding": model.patch_embedding,
        "timestep": model.timestep,
    }
    for name, module in groups.items():
        trained = all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        assert trained == (kind != "text" or name == "decoder"), name
    assert all(
        (p.grad.abs().sum() > 0) == (kind != "text")
        for name, p in model.backbone.named_parameters()
        if "modulation" in name or "offsets" in name
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_fresh_model_predicts_nothing_about_images(pictures, backbone):
    fresh = Transfusion(tiny_model(backbone=backbone).config, tiny_model().tokenizer)
    sequence = packed(fresh, [[pictures[0]]], 24)
    torch.testing.assert_close(
        losses(fresh, [[pictures[0]]], 24).diffusion_loss, (noise_of(sequence, SEED) - sequence.patches).square().mean()
    )


@pytest.mark.parametrize("backbone", ["adaln", "mixture_of_transformers"])
def test_a_fresh_backbone_is_the_unmodified_decoder_and_text_always_sees_that(pictures, backbone):
    plain, trained = tiny_model(), tiny_model(backbone=backbone)
    fresh = Transfusion(trained.config).eval()
    for model in (fresh, trained):
        model.load_state_dict(plain.state_dict(), strict=False)
    fresh.backbone.load_text(plain.backbone.decoder)
    sequence, times = packed(plain, [[Text("a"), pictures[0], Text("b")]], 32), torch.tensor([0.4])
    expected = hidden_states(plain, sequence, sequence.patches, times)
    torch.testing.assert_close(hidden_states(fresh, sequence, sequence.patches, times), expected)
    start = int(sequence.spans[0, 0, 0])
    differs = (hidden_states(trained, sequence, sequence.patches, times) - expected).abs().amax(-1)[0] > 1e-3
    assert not differs[:start].any() and differs[start:start + 16].all()


def test_two_positions_tell_rows_from_columns_and_leave_text_alone(pictures):
    line, grid = (
        tiny_model(backbone="adaln", positions=positions, initializer_range=0.3) for positions in ("1d", "2d")
    )
    sequence, times = packed(line, [[Text("a b"), pictures[0]]], 32), torch.tensor([0.4])
    start = int(sequence.spans[0, 0, 0])
    ours, theirs = (hidden_states(model, sequence, sequence.patches, times)[0] for model in (grid, line))
    assert torch.equal(ours[:start], theirs[:start]) and not torch.allclose(
        ours[start : start + 16], theirs[start : start + 16], atol=0.1
    )
    placed = (
        grid.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)[0, start : start + 16] - start
    )
    assert placed.tolist() == [[i // 4, i % 4] for i in range(16)]


@pytest.mark.parametrize("backbone", ["adaln", "mixture_of_transformers"])
def test_gradient_checkpointing_changes_no_gradient(pictures, backbone):
    model = tiny_model(backbone=backbone).train()
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        gradients.append(
            torch.autograd.grad(losses(model, [[Text("a"), pictures[0]]], 32).loss, list(model.parameters()))
        )
    assert model.backbone.gradient_checkpointing and all(map(torch.equal, *gradients))


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


@pytest.mark.parametrize("patch_size", [1, 4, 8])
@pytest.mark.parametrize("layers", ["linear", "dit"])
def test_patches_of_other_sizes_train_and_draw(pictures, layers, patch_size):
    base = tiny_model()
    config = TransfusionConfig(
        text_config=base.config.text_config,
        patch_size=patch_size,
        image_layers=layers,
        boi_token_id=base.config.boi_token_id,
        eoi_token_id=base.config.eoi_token_id,
    )
    model = Transfusion(config, base.tokenizer)
    sequence = pack([encode([Text("a"), pictures[0]], model.tokenizer, config)], 80, patch_size**2)
    output = model(sequence, torch.tensor([0.5]), SEED)
    output.loss.backward()
    torch.testing.assert_close(
        output.diffusion_loss, plain_output(model, sequence, torch.tensor([0.5]), SEED).diffusion_loss
    )
    assert len(sequence.patches) == (8 // patch_size)**2 and model.image_head.linear.weight.grad.abs().sum() > 0
    assert model.eval().draw(["a"], steps=1, image_size=(8, 16))[0].latent.shape == (1, 8, 16)


def test_tied_embeddings_come_back_tied(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    again = Transfusion.from_pretrained(tmp_path)
    decoder = again.backbone.decoder
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
    assert torch.equal(
        decoder.get_input_embeddings().weight,
        tiny_model(tie_word_embeddings=True).backbone.decoder.get_input_embeddings().weight,
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_decoders_of_other_families_fit(pictures, family, backbone):
    config = tiny_model().config
    text = AutoConfig.for_model(
        family,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    model = Transfusion(
        TransfusionConfig(
            text_config=text, backbone=backbone, boi_token_id=config.boi_token_id, eoi_token_id=config.eoi_token_id
        ),
        tiny_model().tokenizer,
    ).eval()
    output = losses(model, [[Text("a"), pictures[0]]], 32)
    output.loss.backward()
    assert torch.isfinite(output.loss) and all(p.grad is not None for p in model.backbone.decoder.parameters())
    sequence = packed(model, [[Text("a"), pictures[0], Text("b")]], 32)
    llama = AutoModelForCausalLM.from_config(copy.deepcopy(text), attn_implementation="sdpa").eval()
    llama.load_state_dict(model.backbone.decoder.state_dict())
    with torch.no_grad():
        x, _ = model.embed(sequence, sequence.patches, model.timestep(torch.tensor([0.0])))
        visible = sequence.mask().dense()
        expected = llama.get_decoder()(
            inputs_embeds=x, position_ids=sequence.positions, attention_mask=visible
        ).last_hidden_state
        ours = hidden_states(model, sequence, sequence.patches, torch.tensor([0.0]))
    real = sequence.documents >= 0
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=1e-5)


def test_an_adaln_backbone_refuses_a_family_of_other_blocks():
    text = AutoConfig.for_model(
        "gemma2",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=None,
    )
    with pytest.raises(ValueError, match="model_type is 'gemma2'; 'llama', 'mistral', 'qwen2', 'qwen3' fit"):
        Transfusion(TransfusionConfig(text_config=text, backbone="adaln"))


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
        ({"diffusion_weight": NAN}, "diffusion_weight is nan"),
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
