"""Decoders of many families against transformers' own eager attention; what a forward costs; which are refused."""
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.transfusion.conftest import tiny_model
from tests.transfusion.plain import add_noise, noise_of, plain_output
from tfkernels import TransfusionMask
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.generate.generation import Sampling, _Generation, check_graph
from transfusion.generate.kv_cache import Canvas
from transfusion.model.backbone import FULL, SLIDING, windowed
from transfusion.model.config import BACKBONES, IMAGE_LAYERS
from transfusion.sequence import encode, pack, with_clean_copies

SEED, WINDOW = 11, 7
TOKENIZER, IDS = (
    tiny_model().tokenizer,
    {name: getattr(tiny_model().config, name) for name in ("boi_token_id", "eoi_token_id")},
)
SIZES = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.15,
)
HEADS, BOTH = dict(head_dim=8), dict(sliding_window=WINDOW, layer_types=[SLIDING, FULL])
GPT2 = dict(
    vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
)
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | dict(sliding_window=WINDOW),
    "ministral": SIZES | HEADS | dict(sliding_window=WINDOW, layer_types=[SLIDING] * 2),
    "qwen2": SIZES | BOTH | dict(use_sliding_window=True),
    "qwen3": SIZES | HEADS,
    "gemma": SIZES | HEADS,
    "olmo2": SIZES,
    "olmo3": SIZES | BOTH,
    "gemma2": SIZES
    | HEADS
    | BOTH
    | dict(final_logit_softcapping=None, query_pre_attn_scalar=8, attn_logit_softcapping=0.5),
    "gemma3_text": SIZES | HEADS | BOTH | dict(query_pre_attn_scalar=8),
    "phi3": SIZES | dict(sliding_window=WINDOW),
    "granite": SIZES,
    "mixtral": SIZES | dict(num_local_experts=4),
    "qwen3_moe": SIZES | HEADS | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "starcoder2": {**SIZES, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt_neox": {**SIZES, "num_key_value_heads": 4},
    "gpt2": GPT2,
    "cohere2": SIZES | BOTH | dict(logit_scale=1.0, head_dim=8),
    "opt": dict(
        vocab_size=512,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.0,
        max_position_embeddings=128,
        init_std=0.15,
    ),
}


def family_model(family, backbone="decoder", **options):
    """A random Transfusion around a tiny decoder of one family, images not silent."""
    torch.manual_seed(0)
    text = AutoConfig.for_model(family, **{**FAMILIES[family], **options})
    model = Transfusion(TransfusionConfig(text_config=text, backbone=backbone, **IDS), TOKENIZER)
    for name, parameter in model.named_parameters():
        if name.startswith(("image_head", "patch_embedding")) or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def packed(documents, seq_len=48, clean=False):
    encoded = [encode(parts, TOKENIZER, tiny_model().config) for parts in documents]
    return pack([with_clean_copies(document) if clean else document for document in encoded], seq_len, 4)


def dense(sequence, window=None):
    """Who sees whom, written out: causal or in one image, within a document, and no further back than a window."""
    image, documents, order = sequence.image_ids, sequence.documents, sequence.positions
    same = (image[:, :, None] == image[:, None]) & (image[:, :, None] >= 0)
    rows = torch.arange(image.shape[1])
    visible = (
        (same | (rows[:, None] >= rows)) & (documents[:, :, None] == documents[:, None]) & (documents[:, :, None] >= 0)
    )
    near = order[:, :, None] - order[:, None] < window if window else visible
    return (visible & near)[:, None]


class Eager:
    """A decoder of transformers under its own eager attention and dense masks, called as a backbone is."""

    def __init__(self, model, sequence):
        self.text = model.config.text_config
        self.decoder = AutoModelForCausalLM.from_config(copy.deepcopy(self.text), attn_implementation="eager")
        self.decoder.load_state_dict(model.backbone.decoder.state_dict())
        self.masks = {
            kind: torch.where(dense(sequence, window), 0.0, -1e30) for kind, window in ((FULL, None), (SLIDING, WINDOW))
        }

    def __call__(self, x, positions, mask, condition, modality):
        kinds = getattr(self.text, "layer_types", None) or [
            SLIDING if getattr(self.text, "sliding_window", None) else FULL
        ]
        masks = self.masks if len(set(kinds)) > 1 else self.masks[kinds[0]]
        return self.decoder.get_decoder()(
            inputs_embeds=x.clone(), position_ids=positions, attention_mask=masks, use_cache=False
        ).last_hidden_state

    def embed(self, tokens):
        return self.decoder.get_input_embeddings()(tokens)

    def logits(self, x):
        return self.decoder.get_output_embeddings()(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_its_own_eager_attention_does_under_the_dense_mask(family, pictures):
    model = family_model(family).train()
    sequence, times = (
        packed([[Text("a handwritten seven"), pictures[0], Text(" and")], [pictures[1], Text("two")]]),
        torch.tensor([0.3, 0.7]),
    )
    eager = Eager(model, sequence)
    theirs = plain_output(
        SimpleNamespace(
            backbone=eager,
            **{
                n: getattr(model, n)
                for n in ("objective", "timestep", "patch_embedding", "image_head", "positions", "config")
            },
        ),
        sequence,
        times,
        SEED,
    )
    ours = model(sequence, times, SEED)
    assert (sequence.documents >= 0).sum(1).max() > 2 * WINDOW
    torch.testing.assert_close(ours, theirs)
    weights = [dict(decoder.named_parameters()) for decoder in (model.backbone.decoder, eager.decoder)]
    gradients = [dict(zip(named, torch.autograd.grad(output.loss, list(named.values()), materialize_grads=True)))
                 for named, output in zip(weights, (ours, theirs))]
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, gradient.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("backbone", ["adaln", "mixture_of_transformers"])
def test_the_window_of_a_decoder_reaches_blocks_of_ours(backbone, pictures):
    sequence = packed([[Text("a handwritten seven"), pictures[0], Text(" and")]])
    model, plain = family_model("mistral", backbone).eval(), family_model("mistral").eval()
    torch.nn.init.zeros_(model.backbone.modulation.weight)
    torch.nn.init.zeros_(model.backbone.modulation.bias)
    model.backbone.load_text(plain.backbone.decoder)
    condition, x = torch.zeros(1, 32), torch.randn(1, 48, 32)
    ours, theirs, wide = (m.backbone(x, sequence.positions, sequence.mask(), condition, sequence.modality)
                          for m in (model, plain, family_model("mistral", sliding_window=None).eval()))
    real = sequence.documents >= 0
    torch.testing.assert_close(ours[real], theirs[real])
    assert not torch.allclose(wide[real], theirs[real], atol=0.1)


def test_a_window_counts_what_lasts():
    small = Image(torch.zeros(1, 4, 4))
    sequence = packed(
        [[Text("a b"), small, Text("c d e f g")], [Text("h i j k l m n o"), small, Text("p q r s t u")]], 64
    )
    for window in (1, 2, 5, 30, 100):
        assert torch.equal(windowed(sequence.mask(), window).dense(), dense(sequence, window))
        spans = TransfusionMask.from_spans(sequence.spans, 64, documents=sequence.documents, window=window)
        assert torch.equal(windowed(sequence.mask(), window).dense(), spans.dense())
    sequence = packed([[Text("a b"), small, Text("c d e f g")]], 32, clean=True)
    order, whole = sequence.positions[0], sequence.mask().dense()[0, 0]
    for window in (1, 2, 3, 6, 9):
        assert torch.equal(windowed(sequence.mask(), window).dense()[0, 0], whole & (order[:, None] - order < window))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_sampling_sees_the_window_that_training_sees(family, pictures):
    """From a cache, text behind an image and predictions of an image are those of one row with clean copies."""
    model = family_model(family).eval()
    story = [Text("a handwritten seven"), pictures[0], Text(" and a handwritten two"), pictures[1], Text(" and")]
    sequence, times = packed([story], 160, clean=True), torch.tensor([0.2, 0.0, 0.6, 0.0])
    output = model(sequence, times, SEED)
    noised, _ = add_noise(
        model.objective, sequence.patches, noise_of(sequence, SEED), times[sequence.layout.image_ids][:, None]
    )
    condition = model.timestep(times)
    hidden = model.backbone(
        model.embed(sequence, noised, condition)[0], sequence.positions, sequence.mask(), condition, sequence.modality
    )
    for image, prompt in ((0, story[:1]), (2, story[:3])):
        other = [Text("a much longer prompt that keeps the shorter one on the left waiting for its turn"), pictures[2]]
        generation = _Generation(model, [prompt, other], Sampling(guidance=1.0), force_image=True)
        generation.clean = model.timestep(torch.zeros(1))
        generation.cache, _ = generation.prefill(generation.documents)
        own = sequence.layout.image_ids == image
        noised, target = add_noise(model.objective, sequence.patches[own], noise_of(sequence, SEED)[own], times[image])
        prediction = Canvas(model, generation.cache.select([0]), generation.grid).predict(noised[None], times[image])[0]
        torch.testing.assert_close(output.image_losses[image], (prediction - target).square().mean())
        # columns that the first row never sees
        generation.append_images([1], sequence.patches[own][None])
        behind = generation.append_images([0], sequence.patches[own][None])
        torch.testing.assert_close(behind[0], hidden[0, sequence.spans[0, image + 1, 1]])


@torch.no_grad()
def test_what_nobody_sees_in_a_cache_may_hold_anything(model, pictures):
    """Left padding and the columns of rows that waited, filled with NaN, change nothing."""
    generation = _Generation(
        model, [[Text("a")], [pictures[0], Text("a handwritten seven")]], Sampling(guidance=1.0), force_image=True
    )
    generation.clean = model.timestep(torch.zeros(1))
    generation.cache, _ = generation.prefill(generation.documents)
    generation.append_images([0], torch.randn(1, 16, 4))
    for layer in generation.cache.cache.layers:
        hidden = ~generation.cache.seen[:, None, :, None]
        layer.keys, layer.values = (
            layer.keys.masked_fill(hidden, float("nan")),
            layer.values.masked_fill(hidden, float("nan")),
        )
        assert layer.keys.isnan().any()
    x = torch.randn(2, 16, 4)
    assert torch.isfinite(Canvas(model, generation.cache, generation.grid).predict(x, torch.tensor(0.5))).all()
    assert torch.isfinite(generation.append_images([0, 1], x)).all()


class Costs(TorchDispatchMode):
    """The largest tensor that is made, and how often a value is waited for on the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal.")

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.startswith(self.WAITS) or func.__name__ == "repeat_interleave.Tensor":
            self.waits.append(func.__name__)
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("layers", IMAGE_LAYERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_step_makes_nothing_of_s_by_s_and_waits_for_no_value(backbone, layers, pictures):
    model, tokens = costed_model(backbone, layers), 1024
    sequence = packed([[Text("a handwritten seven"), pictures[n % 4]] for n in range(60)], tokens)
    with Costs() as costs:
        model(sequence, torch.rand(sequence.image_count), SEED).loss.backward()
    assert len(sequence.tokens) == 2 and costs.largest < 2 * tokens * tokens // 4
    assert len(costs.waits) <= 1, costs.waits  # the order of documents, which is looked at on a CPU alone


@pytest.mark.parametrize("layers", IMAGE_LAYERS)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_a_denoising_step_waits_for_no_value(backbone, layers, pictures):
    model = costed_model(backbone, layers).eval()
    generation = _Generation(model, [[Text("a")], [pictures[0], Text("b")]], Sampling(steps=3), force_image=True)
    generation.clean = model.timestep(torch.zeros(1))
    generation.cache, _ = generation.prefill(generation.documents)
    canvas, solver, x = Canvas(model, generation.cache, generation.grid), generation.solver(), torch.randn(2, 16, 4)
    with Costs() as costs:
        for number in range(3):
            x = solver.advance(x, canvas.predict(x, solver.times[number]), number)
    assert costs.waits == [] and torch.isfinite(x).all()


def costed_model(backbone, layers):
    if layers != "unet":
        return tiny_model(backbone=backbone, image_layers=layers).train()
    text = copy.deepcopy(tiny_model().config.text_config)
    return Transfusion(
        TransfusionConfig(
            text_config=text, backbone=backbone, image_layers="unet", unet_channels=(8, 16), unet_blocks=1, **IDS
        ),
        TOKENIZER,
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_compiled_backbone_needs_no_graph_break_and_gives_the_same(family, pictures):
    model = family_model(family).eval()
    sequence = packed([[Text("a handwritten seven"), pictures[0], Text(" and")]])
    x, condition = torch.randn(1, 48, 32), torch.zeros(1, 32)
    run = lambda x: model.backbone(x, sequence.positions, sequence.mask(), condition, sequence.modality)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


ROPES = {
    "dynamic": dict(factor=4.0),
    "longrope": dict(short_factor=[1.0] * 4, long_factor=[1.5, 2.0, 3.0, 4.0], original_max_position_embeddings=16,
                     factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("rope", ROPES)
def test_text_turns_in_two_dimensions_as_in_one_whatever_was_asked_before(rope):
    rope_parameters = dict(rope_type=rope, rope_theta=1e4, **ROPES[rope])
    backbone = family_model("llama", "adaln", max_position_embeddings=16, rope_parameters=rope_parameters).backbone
    found = []
    for length in (48, 8, 40):
        x, positions = torch.zeros(1, length, 32), torch.arange(length)[None]
        expected = copy.deepcopy(backbone).rotation(x, positions)
        found.append(backbone.rotation(x, positions[..., None].expand(-1, -1, 2)))
        assert all(map(torch.equal, found[-1], expected))
    assert torch.equal(found[0][0][:, :8], found[1][0]) == (rope == "yarn")  # the others' frequencies follow the length


@pytest.mark.parametrize("backbone", ["decoder", "adaln"])
@pytest.mark.parametrize("rope", ["default", *ROPES])
def test_no_cuda_graph_is_made_of_a_decoder_that_waits_to_choose_its_frequencies(rope, backbone):
    rope_parameters = dict(rope_type=rope, rope_theta=1e4, **ROPES.get(rope, {}))
    model = family_model("llama", backbone, max_position_embeddings=16, rope_parameters=rope_parameters).eval()
    rotary, x = model.backbone.decoder.get_decoder().rotary_emb, torch.zeros(1, 20, 32)
    positions = torch.arange(20)[None]
    rotary(x, position_ids=positions)
    with Costs() as costs:
        rotary(x, position_ids=positions)
    is_chosen = rope in ("dynamic", "longrope")  # the latter waits until transformers 5.17
    assert is_chosen or not costs.waits
    with pytest.raises(ValueError, match=f"'{rope}', whose .* False fits" if is_chosen else "a model on a CUDA device"):
        check_graph(model)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_trains_each_backbone(backbone, pictures):
    model = tiny_model(backbone=backbone).train()
    sequence, times = packed([[Text("a handwritten seven"), pictures[0]]]), torch.tensor([0.4])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(sequence, times, SEED)
    output.loss.backward()
    torch.testing.assert_close(output.loss, model(sequence, times, SEED).loss, rtol=3e-2, atol=3e-2)


REFUSED = {
    "final_logit_softcapping is 30.0": ("gemma2", {}),
    "logit_scale is 0.0625": ("cohere", {}),
    "logits_scaling is 8.0": ("granite", {"logits_scaling": 8.0}),
    "attention_dropout is 0.1": ("llama", {"attention_dropout": 0.1}),
    "resid_pdrop is 0.1": ("phi", {"resid_pdrop": 0.1}),
    "attn_pdrop is 0.1": ("gpt2", {}),
    "is_encoder_decoder is True": ("bart", {}),
    "output_router_logits is True": ("qwen3_moe", {"output_router_logits": True}),
    "is 'bloom'.* AttentionInterface": ("bloom", {}),
    "is 'falcon'.* AttentionInterface": ("falcon", {}),
    "is 'mpt'.* AttentionInterface": ("mpt", {}),
    "is 'mamba'.* AttentionInterface": ("mamba", {}),
    "is 'jamba'.* AttentionInterface": ("jamba", {}),
    "is 'gptj'.* AttentionInterface": ("gptj", {}),
    "keys and v_head_dim 128": ("deepseek_v3", {}),
    "is 'gpt_oss', whose attention has sinks": ("gpt_oss", SIZES | HEADS | {"num_local_experts": 4}),
    "layer_types holds 'chunked_attention'": ("llama4_text", {}),
    "hidden_size_per_layer_input is 256": ("gemma4_text", {}),
    "is 'bert', whose logits are made by more than one": (
        "bert",
        {
            "attention_probs_dropout_prob": 0.0,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
        },
    ),
    "a ViTConfig; .* causal language model": ("vit", {}),
    "a MllamaTextConfig; .* causal language model": ("mllama_text_model", {}),
    "heads of 1024; 1 to 512": ("llama", SIZES | {"head_dim": 1024}),
    "is 'nemotron', whose layers do not hand keyword arguments": ("nemotron", {}),
    "num_attention_heads is 4 and num_key_value_heads 3": ("llama", SIZES | {"num_key_value_heads": 3}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_decoder_that_would_be_trained_as_another_is_refused_when_the_model_is_made(message):
    family, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        Transfusion(TransfusionConfig(text_config=AutoConfig.for_model(family, **options), **IDS))


def test_the_decoders_attention_may_not_be_swapped_for_one_that_does_not_know_the_mask(tmp_path, pictures):
    model = tiny_model()
    for implementation in ("sdpa", "eager", {"text_config": "sdpa"}):
        with pytest.raises(ValueError, match="attn_implementation is .*'tfkernels' fits"):
            model.set_attn_implementation(implementation)
    model.set_attn_implementation("tfkernels")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="Transfusion.from_pretrained: attn_implementation is 'sdpa'; 'tfkernels' fits"
    ):
        Transfusion.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert (
        Transfusion.from_pretrained(
            tmp_path, attn_implementation="tfkernels"
        ).backbone.decoder.config._attn_implementation
        == "tfkernels"
    )
    model.backbone.decoder.set_attn_implementation("sdpa")
    sequence = packed([[Text("a"), pictures[0]]])
    for call in (lambda: model(sequence, torch.tensor([0.5]), SEED), lambda: model.draw(["a"], steps=1)):
        with pytest.raises(ValueError, match="attn_implementation is 'sdpa', .* 'tfkernels' fits"):
            call()


def test_a_single_mask_serves_rows_that_fit_into_the_window():
    mask = TransfusionMask.causal(WINDOW)
    backbone, longer = family_model("gemma3_text").backbone, TransfusionMask.causal(WINDOW + 1)
    assert backbone.masks(mask) == {FULL: mask, SLIDING: mask}
    assert backbone.masks(longer)[FULL] is longer and backbone.masks(longer)[SLIDING].area() == longer.area() - 1


def test_a_configuration_of_bfloat16_makes_a_model_of_the_default_dtype():
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                       dtype="bfloat16")
    model = Transfusion(TransfusionConfig(text_config=text, boi_token_id=62, eoi_token_id=63))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
