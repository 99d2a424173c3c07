"""transfusion-pytorch (lucidrains): its masks are TransfusionMask.from_spans, its attention one call of
tfkernels.attention."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE
from tests.tfkernels.mask.test_mask import disjoint_spans
from tfkernels import TransfusionMask, attention

theirs = pytest.importorskip("transfusion_pytorch.transfusion",
                             reason="transfusion-pytorch is not installed; pip install -e '.[dev]'")
rotary = pytest.importorskip("rotary_embedding_torch",
                             reason="rotary-embedding-torch, which transfusion-pytorch needs, is not installed")

SPANS = [[(3, 12), (12, 20)], [(7, 30)]]
LENGTH = 40


def modalities(spans):
    """Spans as transfusion-pytorch's (type, offset, length) and an empty one: its naive_attn_mask fails on no modality
    at all."""
    return theirs.modality_positions_to_tensor([[*((0, start, end - start) for start, end in row), (0, 0, 0)]
                                                for row in spans]).to(DEVICE)


@given(st.data())
def test_its_masks_are_from_spans(data):
    length = data.draw(st.integers(1, 30))
    spans = [data.draw(disjoint_spans(length)) for _ in range(data.draw(st.integers(1, 3)))]
    positions, ours = modalities(spans), TransfusionMask.from_spans(spans, length, device=DEVICE).dense()[:, 0]
    assert torch.equal(ours, theirs.naive_attn_mask(length, positions, device=DEVICE))
    at, rule = torch.arange(length, device=DEVICE), theirs.transfusion_attn_mask(positions)
    for row in range(len(spans)):
        assert torch.equal(ours[row], rule(row, 0, at[:, None], at[None]))


def test_its_excluded_spans_are_keys_and_queries_that_see_nothing():
    excluded = torch.tensor([[[5, 9], [20, 22]], [[30, 33], [0, 0]]], device=DEVICE)
    expected = theirs.naive_attn_mask(LENGTH, modalities(SPANS), device=DEVICE, excluded_spans=excluded)
    at = torch.arange(LENGTH, device=DEVICE)
    out = ((at >= excluded[..., :1]) & (at < excluded[..., 1:])).any(1)                    # (B, S)
    mask = TransfusionMask.from_spans(SPANS, LENGTH, device=DEVICE)
    until = torch.where(out, 0, LENGTH)
    mask = TransfusionMask.from_intervals(mask.lo, mask.hi.masked_fill(out, 0), since=torch.zeros_like(until),
                                          until=until)
    assert torch.equal(mask.dense()[:, 0], expected)
    assert not expected[0, 6].any() and expected[0, 4, 11] and not expected[0, 4, 6]


def one_call(module, x, mask, rotary_emb=None, softcap=True):
    """`module`'s own layers around one tfkernels.attention call."""
    (q, k), v = module.to_qk(x), module.to_v(x)
    q, k = module.q_norm(q), module.k_norm(k)
    if rotary_emb is not None:
        q, k = (rotary.apply_rotary_emb(rotary_emb, t, freqs_seq_dim=-2) for t in (q, k))
    out = attention(q, k, v, mask, scale=module.scale, softcap=module.softcap_value if softcap else None)
    return module.to_out(out * module.to_gates(x).sigmoid())


def build():
    """Its Attention with the default softcap of 50, query and key norms large enough to reach it, as trained ones
    may."""
    torch.manual_seed(0)
    module = theirs.Attention(dim=48, dim_head=16, heads=3)
    assert module.softcap_value == 50 and module.dropout.p == 0
    torch.nn.init.constant_(module.q_norm.gamma, 1.5)
    torch.nn.init.constant_(module.k_norm.gamma, 1.5)
    x = torch.randn(2, LENGTH, 48)
    freqs = rotary.RotaryEmbedding(16)(torch.arange(LENGTH))
    return module.to(DEVICE), x.to(DEVICE), freqs.to(DEVICE)


def gradients(module, x, run):
    x = x.clone().requires_grad_()
    out = run(module, x)
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
    names, parameters = zip(*module.named_parameters())
    return {
        "out": out.detach(), **dict(zip(("x", *names), torch.autograd.grad((out * weight).sum(), (x, *parameters))))
    }


def test_its_attention_is_one_call_forward_and_backward():
    module, x, freqs = build()
    visible, mask = (theirs.naive_attn_mask(LENGTH, modalities(SPANS), device=DEVICE),
                     TransfusionMask.from_spans(SPANS, LENGTH, device=DEVICE))
    ours = gradients(module, x, lambda m, x: one_call(m, x, mask, freqs))
    rounded = gradients(module, x, lambda m, x: m(x, attn_mask=visible, rotary_emb=freqs))
    exact = gradients(copy.deepcopy(module).double(), x.double(),
                      lambda m, x: m(x, attn_mask=visible, rotary_emb=freqs.double()))
    assert ours.keys() == rounded.keys() and len(ours) == 8
    for name in ours:
        assert exact[name].any(), name
        assert_as_accurate(name, ours[name], rounded[name], exact[name])


def test_mask_softcap_and_rotary_embedding_matter_in_that_comparison():
    module, x, freqs = build()
    mask = TransfusionMask.from_spans(SPANS, LENGTH, device=DEVICE)
    with torch.no_grad():
        out = one_call(module, x, mask, freqs)
        for other in (one_call(module, x, TransfusionMask.causal(LENGTH, device=DEVICE), freqs),
                      one_call(module, x, mask, freqs, softcap=False), one_call(module, x, mask)):
            assert (out - other).abs().max() > 1e-2


def test_every_attention_of_its_transformer_is_one_call():
    """The whole decoder runs with modality positions; each layer's attention is repeated by one call on that layer's
    input."""
    torch.manual_seed(1)
    model = theirs.Transformer(dim=48, depth=3, dim_head=16, heads=3).to(DEVICE).eval()
    calls = []
    for module in model.modules():
        if isinstance(module, theirs.Attention):
            module.register_forward_hook(lambda m, args, kwargs, out: calls.append((m, args[0], kwargs, out[0][0])),
                                         with_kwargs=True)
    freqs = rotary.RotaryEmbedding(16)(torch.arange(LENGTH)).to(DEVICE)
    mask = TransfusionMask.from_spans(SPANS, LENGTH, device=DEVICE)
    with torch.no_grad():
        model(torch.randn(2, LENGTH, 48, device=DEVICE), times=torch.rand(2, device=DEVICE),
              modality_positions=modalities(SPANS), rotary_emb=freqs)
        assert len(calls) == 3
        for module, x, kwargs, out in calls:
            assert torch.equal(kwargs["attn_mask"], mask.dense()[:, 0]) and kwargs["value_residual"] is None
            torch.testing.assert_close(one_call(module, x, mask, kwargs["rotary_emb"]), out, rtol=1e-4, atol=1e-5)
