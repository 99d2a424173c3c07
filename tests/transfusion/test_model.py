"""The model against transformers' own Llama, the paper's mask and loss, and its checkpoint's round trip."""
import copy
import json

import pytest
import torch
from transformers import AutoModel, LlamaForCausalLM

from tests.transfusion.conftest import tiny_model
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.objective import add_noise
from transfusion.sequence import encode, pack


def losses(model, documents, seq_len, times=None, seed=0):
    sequence = pack([encode(parts, model.tokenizer, model.config) for parts in documents], seq_len, 4)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sequence.patches.shape, generator=generator)
    times = torch.full((sequence.image_count,), 0.5) if times is None else times
    return model(sequence, times, noise), sequence, noise


def hidden_states(model, sequence, patches, times):
    x = model.embed(sequence, patches, model.timestep(times))
    return model.backbone(x, sequence.positions, sequence.mask())


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


def test_the_loss_is_text_plus_lambda_times_the_mean_over_images_of_their_mean_error(model, pictures):
    small = Image(pictures[1].latent[:, :4, :4])
    output, sequence, noise = losses(model, [[Text("a"), pictures[0]], [small, Text("b")]], 64, torch.tensor([0.3, 0.7]))
    with torch.no_grad():
        noised, target = add_noise(model.objective, sequence.patches, noise, torch.tensor([0.3] * 16 + [0.7] * 4)[:, None])
        condition = model.timestep(torch.tensor([0.3, 0.7]))
        hidden = model.backbone(model.embed(sequence, noised, condition), sequence.positions, sequence.mask()).flatten(0, 1)
        prediction = model.image_head(hidden[sequence.patch_rows], condition, sequence.patch_image)
        error = (prediction - target).square()
        per_image = torch.stack([error[:16].mean(), error[16:].mean()])
        text = torch.nn.functional.cross_entropy(model.backbone.logits(hidden[sequence.text_rows]), sequence.text_targets)
    torch.testing.assert_close(output.image_losses, per_image)
    torch.testing.assert_close(output.loss, text + 5 * per_image.mean())


def test_packed_documents_have_the_losses_they_have_alone(model, pictures):
    documents = [[Text("a handwritten seven"), pictures[0]], [pictures[1], Text("a handwritten two")], [Text("only text")]]
    packed, sequence, noise = losses(model, documents, 80)
    alone = [model(pack([encode(parts, model.tokenizer, model.config)], 40, 4), torch.full((n,), 0.5), noise[16 * i:16 * (i + n)])
             for i, (parts, n) in enumerate(zip(documents, (1, 1, 0)))]
    torch.testing.assert_close(packed.image_losses, torch.cat([o.image_losses for o in alone]))
    counts = [len(pack([encode(parts, model.tokenizer, model.config)], 40, 4).text_rows) for parts in documents]
    torch.testing.assert_close(packed.text_loss, sum(o.text_loss * n for o, n in zip(alone, counts)) / sum(counts))


@pytest.mark.parametrize("kind", ["text", "image", "three images"])
def test_every_kind_of_batch_trains_its_parameters(pictures, kind):
    model = tiny_model()
    documents = {"text": [[Text("a b c")]], "image": [[pictures[0]]], "three images": [[*pictures[:3]]]}[kind]
    output, _, _ = losses(model, documents, 80)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    groups = {"backbone": model.backbone, "image_head": model.image_head, "patch_embedding": model.patch_embedding, "timestep": model.timestep}
    for name, module in groups.items():
        trained = all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        assert trained == (kind != "text" or name == "backbone"), name


def test_a_fresh_model_predicts_nothing_about_images(pictures):
    fresh = Transfusion(tiny_model().config, tiny_model().tokenizer)
    output, sequence, noise = losses(fresh, [[pictures[0]]], 24)
    torch.testing.assert_close(output.diffusion_loss, (noise - sequence.patches).square().mean())


def test_checkpoints_come_back_equal_and_hold_no_pickle(model, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    for again in (Transfusion.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is Transfusion and again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert losses(again.eval(), [[Text("a"), pictures[0]]], 32)[0].loss == losses(model, [[Text("a"), pictures[0]]], 32)[0].loss
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "transfusion"


def test_a_decoder_of_another_family_fits(pictures):
    from transformers import Qwen3Config
    config = tiny_model().config
    qwen = Qwen3Config(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Transfusion(TransfusionConfig(text_config=qwen, boi_token_id=config.boi_token_id, eoi_token_id=config.eoi_token_id), tiny_model().tokenizer)
    output, _, _ = losses(model, [[Text("a"), pictures[0]]], 32)
    output.loss.backward()
    assert torch.isfinite(output.loss) and model.backbone.decoder.model.layers[0].self_attn.q_norm.weight.grad is not None


def test_paths_and_configs_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        Transfusion.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="objective is 'fow'; one of 'eps', 'v', 'flow'"):
        TransfusionConfig(objective="fow")
    with pytest.raises(ValueError, match="image_size is .* patch_size 3"):
        TransfusionConfig(patch_size=3)
