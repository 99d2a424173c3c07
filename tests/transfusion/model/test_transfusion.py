"""The model against transformers' own Llama, and the paper's mask and loss."""
import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.compare import assert_as_accurate
from tests.transfusion.conftest import tiny_decoder_config, tiny_model
from tests.transfusion.plain import noise_of, plain_output
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.diffusion.objective import OBJECTIVES
from transfusion.model.config import BACKBONES
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


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_decoders_of_other_families_fit(pictures, family, backbone):
    config = tiny_model().config
    text = tiny_decoder_config(family)
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
    text = tiny_decoder_config("gemma2", final_logit_softcapping=None)
    with pytest.raises(ValueError, match="model_type is 'gemma2'; 'llama', 'mistral', 'qwen2', 'qwen3' fit"):
        Transfusion(TransfusionConfig(text_config=text, backbone="adaln"))
