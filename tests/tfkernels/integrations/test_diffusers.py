"""TransfusionAttnProcessor in models we did not write: outputs and gradients equal those of diffusers'
AttnProcessor2_0."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tests.conftest import DEVICE, adapts
from tfkernels import TransfusionMask
from tfkernels.integrations.diffusers import TransfusionAttnProcessor

pytestmark = adapts


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def kept_tokens():
    kept = torch.ones(2, 6, device=DEVICE)
    kept[0, 4:], kept[1, 2] = 0, 0
    return kept


def unet():
    """Self-attention over 4 x 4 and 2 x 2 pixels, cross attention to 6 tokens."""
    model = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32),
                                 layers_per_block=1, cross_attention_dim=24,
                                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
                                 norm_num_groups=4)
    return (model,
            dict(sample=noise(2, 4, 4, 4), timestep=torch.tensor([3, 400], device=DEVICE),
                 encoder_hidden_states=noise(2, 6, 24, seed=2)))


def pixart():
    """Self-attention over 16 patches, cross attention to 6 tokens."""
    model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                     num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2,
                                     caption_channels=24, use_additional_conditions=False)
    return (model,
            dict(hidden_states=noise(2, 4, 8, 8), timestep=torch.tensor([3, 400], device=DEVICE),
                 encoder_hidden_states=noise(2, 6, 24, seed=2)))


def dit():
    """Self-attention over 16 patches."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=1000
    )
    return (model,
            dict(hidden_states=noise(2, 4, 8, 8), timestep=torch.tensor([3, 400], device=DEVICE),
                 class_labels=torch.tensor([1, 2], device=DEVICE)))


MODELS = {"unet": unet, "pixart": pixart, "dit": dit}


def layers(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def build(family, processor):
    """A random model whose attention matters (its projections are drawn large), and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[family]()
    model = model.to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # zero-initialised outputs
        for attn in layers(model):
            attn.to_q.weight.mul_(4)
    for attn in layers(model):
        attn.set_processor(processor)
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(processor)
    return model, inputs


def output(family, processor, **more):
    model, inputs = build(family, processor)
    with torch.no_grad():
        return model(**{**inputs, **more}).sample


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


class Masked(AttnProcessor2_0):
    """AttnProcessor2_0 under a dense mask, given in SDPA's way, in self-attention."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            hidden = ~self.visible[:, 0].expand(hidden_states.shape[0], -1, -1)
            attention_mask = torch.zeros(hidden.shape, device=DEVICE).masked_fill(hidden, float("-inf"))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_equal_attn_processor_2_0s(family):
    results = []
    for processor in (TransfusionAttnProcessor(), AttnProcessor2_0()):
        model, inputs = build(family, processor)
        assert {type(attn.processor) for attn in layers(model)} == {type(processor)}
        name = "sample" if family == "unet" else "hidden_states"
        inputs[name].requires_grad_()
        out = model(**inputs).sample
        (out * noise(*out.shape, seed=4)).sum().backward()
        results.append((out, inputs[name].grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (out, dx, grads), (expected, dx_expected, grads_expected) = results
    close(out, expected)
    close(dx, dx_expected, atol=1e-4)
    assert grads.keys() == grads_expected.keys()
    assert sum("attn" in name or "to_q" in name for name in grads) >= 8
    for name, grad in grads.items():
        scale = grads_expected[name].abs().max().item()
        torch.testing.assert_close(grad, grads_expected[name], rtol=1e-3, atol=1e-4 * max(scale, 1),
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["unet", "pixart"])
def test_padding_of_the_text_is_honoured_in_cross_attention(family):
    more = {"encoder_attention_mask": kept_tokens()}
    ours = output(family, TransfusionAttnProcessor(), **more)
    close(ours, output(family, AttnProcessor2_0(), **more))
    differ(ours, output(family, AttnProcessor2_0()))


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_a_mask_governs_self_attention_alone(family):
    mask = TransfusionMask.from_spans([[(2, 9)], [(5, 7), (7, 14)]], 16, device=DEVICE)
    ours = output(family, TransfusionAttnProcessor(mask))
    close(ours, output(family, Masked(mask.dense())))
    differ(ours, output(family, AttnProcessor2_0()))
    if family == "pixart":
        more = {"encoder_attention_mask": kept_tokens()}
        close(output(family, TransfusionAttnProcessor(mask), **more), output(family, Masked(mask.dense()), **more))
        more = {"encoder_hidden_states": noise(2, 16, 24, seed=2)}  # as many text tokens as patches
        close(output(family, TransfusionAttnProcessor(mask), **more), output(family, Masked(mask.dense()), **more))


def layer(**more):
    torch.manual_seed(0)
    return Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **more}).to(DEVICE).eval()


def both(attn, *args, **kwargs):
    results = []
    for processor in (TransfusionAttnProcessor(), AttnProcessor2_0()):
        attn.set_processor(processor)
        with torch.no_grad():
            results.append(attn(*args, **kwargs))
    return results


@pytest.mark.parametrize("more",
                         [{"norm_num_groups": 4}, {"residual_connection": True, "rescale_output_factor": 1.7},
                          {"qk_norm": "layer_norm"}, {"qk_norm": "rms_norm"}, {"qk_norm": "l2"},
                          {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
                          {"cross_attention_dim": 24, "cross_attention_norm": "group_norm",
                           "cross_attention_norm_num_groups": 4}, {"out_dim": 32}, {"bias": True}], ids=str)
@pytest.mark.parametrize("image", [False, True], ids=["tokens", "pixels"])
def test_every_part_of_the_layer_is_applied(more, image):
    if image and "out_dim" in more:
        more = {**more, "out_dim": 16}
    x = noise(2, 16, 3, 4) if image else noise(2, 12, 16)
    text = noise(2, 5, 24, seed=2) if "cross_attention_dim" in more else None
    attn = layer(**more)
    ours, theirs = both(attn, x, encoder_hidden_states=text)
    close(ours, theirs)
    assert ours.shape == theirs.shape


def test_the_spatial_norm_of_a_decoder_is_applied():
    attn = layer(spatial_norm_dim=8, query_dim=32, norm_num_groups=4)
    x, latent = noise(2, 32, 4, 4), noise(2, 8, 2, 2, seed=3)
    ours, theirs = both(attn, x, temb=latent)
    close(ours, theirs)
    differ(ours, both(attn, x, temb=latent + 1)[0])


@pytest.mark.parametrize("form", ["padding", "padding-2d", "bool", "rows", "infinite"])
def test_attention_masks_in_every_form_equal_attn_processor_2_0s(form):
    causal = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).tril()
    bias = (1 - kept_tokens()) * -10000.0
    mask = {"padding": bias[:, None], "padding-2d": bias, "bool": kept_tokens().bool()[:, None],
            "rows": ((~causal) * -10000.0).expand(2, -1, -1),
            "infinite": torch.zeros(2, 6, 6, device=DEVICE).masked_fill(~causal, float("-inf"))}[form]
    ours, theirs = both(layer(), noise(2, 6, 16), attention_mask=mask)
    close(ours, theirs)
    differ(ours, both(layer(), noise(2, 6, 16))[1])


def test_the_mask_that_hides_nothing_is_made_once_and_serves_training_after_inference():
    from tfkernels.integrations import diffusers as integration

    integration._kept.cache_clear()
    attn, x = layer(), noise(2, 12, 16)
    attn.set_processor(TransfusionAttnProcessor())
    with torch.inference_mode():
        attn(x)
    attn(x).sum().backward()
    assert attn.to_q.weight.grad is not None
    attn.set_processor(TransfusionAttnProcessor())
    attn(x)
    assert integration._kept.cache_info().misses == 1
    assert integration._kept.cache_info().hits == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_length_and_leaves_no_fake_mask_behind(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = layer(processor=TransfusionAttnProcessor())

        def forward(self, x):
            return self.attn(x)

    model, tokens = Model(), torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(model, (noise(2, 23, 16),), dynamic_shapes=({1: tokens},), strict=strict).module()
    for x in (noise(2, 23, 16), noise(2, 9, 16)):
        found = model(x)
        assert type(found) is torch.Tensor
        close(exported(x), found)


def test_an_export_of_one_length_leaves_no_fake_mask_behind():
    attn, x = layer(processor=TransfusionAttnProcessor()), noise(2, 21, 16)
    torch.export.export(torch.nn.Sequential(attn), (x,))
    assert type(attn(x)) is torch.Tensor


def test_a_scale_of_the_layers_own_is_honoured():
    """AttnProcessor2_0 would drop it; AttnProcessor, which diffusers picks for such a layer, does not."""
    attn, x = layer(scale_qk=False), noise(2, 12, 16) * 3
    with torch.no_grad():
        expected = attn(x)
        attn.set_processor(TransfusionAttnProcessor())
        close(attn(x), expected)
        attn.set_processor(AttnProcessor2_0())
        differ(attn(x), expected)


@pytest.mark.parametrize("name",
                         ["scale", "ip_hidden_states", "image_rotary_emb", "rotary_emb", "query_rotary_emb",
                          "key_rotary_emb", "freqs_cis", "kv_cache"])
def test_an_argument_of_another_processor_is_refused_by_name(name):
    attn = layer(processor=TransfusionAttnProcessor())
    with pytest.raises(ValueError, match=f"TransfusionAttnProcessor: {name} is given"):
        attn(noise(1, 4, 16), **{name: torch.ones(1)})


def test_what_cannot_be_honoured_is_refused_by_name():
    x = noise(2, 6, 16)
    processor = TransfusionAttnProcessor()
    with pytest.raises(ValueError, match="attn.add_k_proj is given"):
        layer(added_kv_proj_dim=16, processor=processor)(x, noise(2, 3, 16))
    with pytest.raises(ValueError, match="attn.to_out is None"):
        layer(pre_only=True, processor=processor)(x)
    with pytest.raises(ValueError, match="attn.is_causal is True and mask is None"):
        layer(is_causal=True, processor=processor)(x)
    with pytest.raises(ValueError, match="encoder_hidden_states is a tuple"):
        layer(processor=processor)(x, (x, [x]))
    with pytest.raises(ValueError, match="attn is a SimpleNamespace without spatial_norm"):
        processor(SimpleNamespace(), x)
    for mask in ([[0]], "mask", torch.ones(5, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="TransfusionAttnProcessor: mask is a.*|TransfusionAttnProcessor: mask "
                                             "is torch.bool"):
            TransfusionAttnProcessor(mask)
    with pytest.raises(ValueError, match="attention_mask is given beside the processor's mask"):
        layer(processor=TransfusionAttnProcessor(TransfusionMask.causal(6, device=DEVICE)))(
            x, attention_mask=torch.zeros(2, 6, device=DEVICE)
        )
    with pytest.raises(ValueError, match="mask is 5 queries by 5 keys, q has 6 tokens"):
        layer(processor=TransfusionAttnProcessor(TransfusionMask.causal(5, device=DEVICE)))(x)


@pytest.mark.parametrize("mask,message",
                         [(torch.full((2, 6), -0.5), "adds numbers other than 0"),
                          (torch.ones(2, 6, dtype=torch.int64), "attention_mask is torch.int64"),
                          (torch.full((2, 6), -1e4), "hides every key from a query"),
                          (torch.zeros(2, 7), r"shape \(2, 7\) for 6 queries and 6 keys"),
                          (torch.zeros(4, 6, 6), r"shape \(4, 6, 6\) for 6 queries and 6 keys in a batch of 2")])
def test_an_attention_mask_that_does_not_fit_is_refused_by_name(mask, message):
    with pytest.raises(ValueError,
                       match=f"TransfusionAttnProcessor: attention_mask.*{message}"
                       if "attention_mask" not in message else message):
        layer(processor=TransfusionAttnProcessor())(noise(2, 6, 16), attention_mask=mask.to(DEVICE))


def test_the_integration_imports_without_diffusers():
    code = ("import sys; sys.modules['diffusers'] = None; import tfkernels.integrations.diffusers as m; assert "
            "m.TransfusionAttnProcessor().mask is None")
    subprocess.run([sys.executable, "-c", code], check=True)
