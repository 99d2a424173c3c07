"""A mixture of transformers against a form that computes both sets of weights for every token and picks one."""
import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.compare import assert_as_accurate
from tests.transfusion.conftest import tiny_decoder_config, tiny_model
from tests.transfusion.model.test_from_language_model import language_model
from tests.transfusion.model.test_transfusion import hidden_states, losses, packed
from tests.transfusion.train.test_transfusion import losses as steps_of
from tests.transfusion.train.test_transfusion import small
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.model.config import TransfusionSettings
from transfusion.model.from_language_model import InitSettings, init
from transfusion.sequence import encode, pack
from transfusion.train import ModelSettings, train


@pytest.fixture(scope="module")
def model():
    return tiny_model(backbone="mixture_of_transformers")


def random_model(family):
    """A model in which every weight, those of norms and of the modulation too, is its own random number."""
    config = TransfusionConfig(text_config=tiny_decoder_config(family), backbone="mixture_of_transformers")
    model = Transfusion(config, tiny_model().tokenizer).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=float(parameter.ndim == 1))
    return model


def rms_norm(x: Tensor, norm) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def both_and_pick(backbone, x: Tensor, positions: Tensor, visible: Tensor, condition: Tensor, image: Tensor) -> Tensor:
    """Both sets of weights of every layer for every token, and torch.where; attention with a dense mask."""
    decoder, text = backbone.decoder.get_decoder(), (image < 0)[..., None]
    cos, sin = decoder.rotary_emb(x, position_ids=positions)
    for number, pair in enumerate(zip(decoder.layers, backbone.image_layers)):
        table = (
            backbone.modulation(torch.nn.functional.silu(condition)).view(-1, 6, x.shape[-1])
            + backbone.offsets.weight[number]
        )
        # (B, S, C) each
        scale1, shift1, gate1, scale2, shift2, gate2 = table[image.clamp(min=0)].unbind(-2)
        plain, own = (rms_norm(x, layer.input_layernorm) for layer in pair)
        normed = plain, own * (1 + scale1) + shift1
        projections = []
        for name in ("q", "k", "v"):
            heads = []
            for layer, rows in zip(pair, normed):
                head = getattr(layer.self_attn, f"{name}_proj")(rows).unflatten(-1, (-1, layer.self_attn.head_dim))
                norm = getattr(layer.self_attn, f"{name}_norm", None)
                heads.append(head if norm is None else rms_norm(head, norm))
            projections.append(torch.where(text[..., None], *heads).transpose(1, 2))
        q, k, v = projections
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.mT * pair[0].self_attn.scaling).masked_fill(~visible, -1e30)
        mixed = ((scores.softmax(-1) * visible).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        plain, own = (layer.self_attn.o_proj(mixed) for layer in pair)
        x = x + torch.where(text, plain, own * (1 + gate1))
        plain, own = (rms_norm(x, layer.post_attention_layernorm) for layer in pair)
        plain, own = pair[0].mlp(plain), pair[1].mlp(own * (1 + scale2) + shift2)
        x = x + torch.where(text, plain, own * (1 + gate2))
    return torch.where(text, rms_norm(x, decoder.norm), rms_norm(x, backbone.image_norm))


@pytest.fixture
def sequence(model, pictures):
    small = Image(pictures[1].latent[:, :4])
    return packed(
        model, [[Text("a"), pictures[0], Text("b"), small], [small, Text("c d")], [Text("e")], [pictures[2], small]], 48
    )


def states_and_gradients(model, sequence, plain, dtype):
    """Hidden states of random inputs, and gradients of a random sum of them for the inputs and every weight."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*sequence.tokens.shape, 32, generator=generator).to(dtype).requires_grad_()
    condition = torch.randn(sequence.image_count, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(x.shape, generator=generator).to(dtype)
    where = x, sequence.positions
    if plain:
        out = both_and_pick(model.backbone, *where, sequence.mask().dense(), condition, sequence.image_ids)
    else:
        out = model.backbone(*where, sequence.mask(), condition, sequence.modality)
    names, parameters = zip(
        *((n, p) for n, p in model.backbone.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    )
    found = torch.autograd.grad((out * weight).sum(), [x, condition, *parameters])
    return {"states": out} | dict(zip(("x", "condition", *names), found))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_states_and_every_gradient_are_those_of_both_sets_of_weights_everywhere_and_a_pick(sequence, family):
    model = random_model(family).double()
    assert sequence.tokens.shape[0] > 1 and (sequence.documents < 0).any()
    ours, plain = (states_and_gradients(model, sequence, plain, torch.float64) for plain in (False, True))
    assert ours.keys() == plain.keys() and all(x.abs().max() > 0 for x in plain.values())
    for name in plain:
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_under_autocast_states_are_as_accurate_as_the_plain_form_there(sequence):
    model = random_model("qwen3")
    exact = states_and_gradients(copy.deepcopy(model).double(), sequence, True, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, rounded = (states_and_gradients(model, sequence, plain, torch.float32) for plain in (False, True))
    assert not torch.equal(ours["states"], states_and_gradients(model, sequence, False, torch.float32)["states"])
    assert_as_accurate("states", ours["states"].detach(), rounded["states"].detach(), exact["states"].detach())
    gradients = [
        torch.cat([(found[name] / exact[name].norm()).flatten() for name in exact if name != "states"])
        for found in (ours, rounded, exact)
    ]
    # together: of a small one the largest error is chance
    assert_as_accurate("gradients", *(x.detach() for x in gradients))


def test_every_weight_is_multiplied_once_by_its_own_rows_alone(model, sequence):
    rows, handles = {}, []
    for name, module in model.backbone.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            handles.append(
                module.register_forward_hook(
                    lambda _, x, y, name=name: rows.setdefault(name, []).append(x[0].shape[:-1].numel())
                )
            )
    hidden_states(model, sequence, sequence.patches, torch.full((sequence.image_count,), 0.5))
    for handle in handles:
        handle.remove()
    patches = len(sequence.patches)
    assert len(rows) == 2 * 2 * 7
    assert all(
        counts == [patches if name.startswith("image_layers") else sequence.tokens.numel() - patches]
        for name, counts in rows.items()
    )


def test_nothing_waits_for_the_device(model, sequence):
    """Tensors without values: whatever would have to be read from one raises."""
    meta, there = copy.deepcopy(model.backbone).to("meta"), sequence.to("meta")
    x = torch.empty(*sequence.tokens.shape, 32, device="meta")
    mask = type(sequence.mask()).from_intervals(torch.zeros_like(there.positions), there.positions + 1)
    out = meta(x, there.positions, mask, torch.empty(sequence.image_count, 32, device="meta"), there.modality)
    assert out.shape == x.shape and out.is_meta


def copied(backbone, decoder):
    """For each weight of the image layers, whether it is a copy of its counterpart in the decoder."""
    decoder = decoder.get_decoder()
    pairs = [
        *zip(backbone.image_layers.parameters(), decoder.layers.parameters()),
        (backbone.image_norm.weight, decoder.norm.weight),
    ]
    assert len(pairs) == 2 * 9 + 1
    return [torch.equal(image, text) and image.data_ptr() != text.data_ptr() for image, text in pairs]


def test_image_layers_start_as_copies_of_the_decoder_wherever_it_comes_from(model, tmp_path):
    fresh, other = Transfusion(model.config), tiny_model().backbone.decoder
    assert all(copied(fresh.backbone, fresh.backbone.decoder)) and not any(copied(fresh.backbone, other)[:7])
    fresh.backbone.load_text(other)
    assert all(copied(fresh.backbone, other)) and all(copied(fresh.backbone, fresh.backbone.decoder))
    tiny_model(backbone="adaln").save_pretrained(tmp_path)
    again = Transfusion.from_pretrained(tmp_path, backbone="mixture_of_transformers")
    assert all(copied(again.backbone, again.backbone.decoder))
    model.save_pretrained(tmp_path / "own")
    own = Transfusion.from_pretrained(tmp_path / "own").backbone.image_layers
    assert all(map(torch.equal, own.parameters(), model.backbone.image_layers.parameters()))


def test_image_layers_of_a_language_model_start_as_its_layers(tmp_path):
    path = language_model(tmp_path / "llm", "llama")
    out = init(
        InitSettings(
            llm=path, out=tmp_path / "model", image_channels=1, image_size=(8, 8), backbone="mixture_of_transformers"
        )
    )
    assert all(copied(Transfusion.from_pretrained(out).backbone, AutoModelForCausalLM.from_pretrained(path)))


def test_the_name_that_earlier_versions_gave_it_still_means_it(model, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert written["backbone"] == "mixture_of_transformers"
    file.write_text(json.dumps(written | {"backbone": "experts"}))
    old = Transfusion.from_pretrained(tmp_path).eval()
    assert old.config.backbone == "mixture_of_transformers" and old.state_dict().keys() == model.state_dict().keys()
    documents = [[Text("a"), pictures[0], Text("b")]]
    assert torch.equal(losses(old, documents, 32).loss, losses(model, documents, 32).loss)
    for made in (
        TransfusionConfig(backbone="experts"),
        ModelSettings(backbone="experts"),
        TransfusionSettings(backbone="experts"),
        InitSettings(llm=tmp_path, out=tmp_path, backbone="experts"),
    ):
        assert made.backbone == "mixture_of_transformers"


def gradients(model, loss):
    """The names of the backbone's parameters that a loss reaches."""
    names, parameters = zip(*model.backbone.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name for name, gradient in zip(names, found) if gradient is not None and gradient.abs().max() > 0}


def test_gradients_reach_the_weights_of_what_was_read_and_no_others(model, pictures):
    own = {name for name, _ in model.backbone.named_parameters() if name.startswith("image_")}
    text = {name for name, _ in model.backbone.named_parameters() if name.startswith("decoder.model.layers.")}
    # no image at all
    assert not own & gradients(model, losses(model, [[Text("a b c")]], 24).loss)
    before = pack([encode([Text("a b"), pictures[0]], model.tokenizer, model.config, end=False)], 32, 4)
    # no text behind the image
    assert not own & gradients(model, model(before, torch.tensor([0.5]), 0).text_loss)
    read = gradients(model, losses(model, [[pictures[0], Text("a b")]], 32).text_loss)
    # of a last layer, what the other reads
    keys = {f"{name}.weight" for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")}
    last = {name for name in own if name.startswith(("image_layers.1.", "image_norm"))}
    assert text <= read and own & read == own - last | {f"image_layers.1.{name}" for name in keys}
    drawn = gradients(model, losses(model, [[Text("a b"), pictures[0]]], 32).diffusion_loss)
    assert own <= drawn
    assert {name for name in text if ".layers.1." in name} & drawn == {
        f"decoder.model.layers.1.{name}" for name in keys
    }


def test_a_changed_image_layer_never_changes_text_before_the_image(model, pictures):
    sequence, times = packed(model, [[Text("a b"), pictures[0], Text("c d")]], 32), torch.tensor([0.4])
    changed = copy.deepcopy(model)
    for parameter in (*changed.backbone.image_layers.parameters(), changed.backbone.image_norm.weight):
        torch.nn.init.normal_(parameter)
    before, after = (hidden_states(m, sequence, sequence.patches, times)[0] for m in (model, changed))
    start = int(sequence.spans[0, 0, 0])
    assert torch.equal(before[:start], after[:start])
    moved = (before - after).abs().amax(-1) > 1e-3
    assert moved[start:int((sequence.documents >= 0).sum())].all()


def test_text_alone_and_images_alone_are_batches(model):
    text = packed(model, [[Text("a b c")], [Text("d")]], 16)
    assert text.image_count == 0
    ours = hidden_states(model, text, text.patches, torch.zeros(0))
    tokens = text.tokens[:1, :int((text.documents[0] == 0).sum())]
    torch.testing.assert_close(
        ours[:1, : tokens.shape[1]],
        model.backbone.decoder.get_decoder()(tokens).last_hidden_state,
        rtol=1e-5,
        atol=1e-6,
    )
    modality = text.modality._replace(
        image_ids=torch.zeros_like(text.image_ids),
        text_places=text.modality.patch_places,
        patch_places=torch.arange(16),
    )
    x, condition = torch.randn(1, 16, 32), torch.randn(1, 32)
    ours = model.backbone(x, text.positions, text.mask(), condition, modality)
    expected = both_and_pick(model.backbone, x, text.positions, text.mask().dense(), condition, modality.image_ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_with_its_text_frozen_a_model_learns_images_and_writes_as_before(pictures):
    model = tiny_model(backbone="mixture_of_transformers").train()
    model.backbone.decoder.requires_grad_(False)
    tokens, alone, times = (
        torch.randint(5, model.config.text_config.vocab_size, (2, 30)),
        packed(model, [[Text("a b c")]], 16),
        torch.zeros(0),
    )
    first = {name: p.clone() for name, p in model.named_parameters()}
    written = model.text_logits(tokens), hidden_states(model, alone, alone.patches, times)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        losses(model, [[Text("a"), pictures[0], Text("b")]], 32).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, first[name])}
    assert moved == {name for name in first if not name.startswith("backbone.decoder.")}
    assert torch.equal(model.text_logits(tokens), written[0]) and torch.equal(
        hidden_states(model, alone, alone.patches, times), written[1]
    )


def test_a_run_that_was_saved_under_the_earlier_name_goes_on(tmp_path):
    settings = dataclasses.replace(small(tmp_path).model, backbone="mixture_of_transformers")
    train(small(tmp_path, model=settings, stop_after=2))
    file = tmp_path / "resume" / "run.json"
    file.write_text(file.read_text().replace('"mixture_of_transformers"', '"experts"'))
    train(small(tmp_path, model=dataclasses.replace(settings, backbone="experts"), resume=True, stop_after=3))
    assert json.loads(file.read_text())["config"]["model"]["backbone"] == "mixture_of_transformers"
    assert [line["step"] for line in steps_of(tmp_path)] == [0, 1, 2]
