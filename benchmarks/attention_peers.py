"""The other implementations of the same attention, each fed what its own users have.

That is ids per token, a dense mask, or nothing. Every function returns a Contender with the phases build (where there
is a mask), forward and backward, all of one call.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.batches import PackedBatch, dense_definition
from benchmarks.harness import Contender, LeftOut


def contender(name, inputs, check, forward, build=None) -> Contender:
    """Wrap `forward(q, k, v, mask)` into phases; `check` gets the state with `out` and `grads`."""
    q, k, v, dout = inputs

    def run_build(state):
        state["mask"] = build()

    def run_forward(state):
        state["out"] = forward(q, k, v, state.get("mask"))

    def run_backward(state):
        state["grads"] = torch.autograd.grad(state["out"], (q, k, v), dout)

    phases = {"build": run_build} if build else {}
    return Contender(name, {**phases, "forward": run_forward, "backward": run_backward}, check)


def sdpa_dense(batch: PackedBatch, inputs, check) -> Contender:
    """PyTorch's SDPA with the (S, S) bool mask and the backend that PyTorch picks.

    Key heads are repeated, as transformers does.
    """
    def forward(q, k, v, mask):
        return scaled_dot_product_attention(q, *repeated(q, k, v), attn_mask=mask)

    return contender("SDPA, dense mask", inputs, check, forward, lambda: dense_definition(batch))


def sdpa_causal(backend: SDPBackend, inputs, check) -> Contender:
    """Plain causal attention by one backend: another mask, the ceiling of what the hardware gives."""
    def forward(q, k, v, _):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return contender(f"SDPA {backend.name.split('_')[0].lower()}, plain causal (another mask)", inputs, check, forward)


def flex(batch: PackedBatch, inputs, check) -> Contender:
    """Compiled FlexAttention; its block mask built by compiled create_block_mask from ids per token."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents, images, secret = batch.documents[0], batch.image_ids[0], batch.hidden_ids[0]
    some_hidden = batch.hidden is not None
    seq_len, device = documents.shape[0], documents.device.type

    def visible(b, h, i, j):
        seen = (documents[i] == documents[j]) & ((j <= i) | ((images[i] == images[j]) & (images[i] > 0)))
        return seen & ((secret[j] == 0) | (secret[i] == secret[j])) if some_hidden else seen

    create = torch.compile(create_block_mask, dynamic=False)

    def build():
        return create(visible, None, None, seq_len, seq_len, device=device)

    return flex_contender("FlexAttention, create_block_mask", inputs, check, build)


def flex_with_our_blocks(make_mask, inputs, check) -> Contender:
    """Compiled FlexAttention; its block mask from `TransfusionMask.block_mask()`."""
    return flex_contender("FlexAttention, mask.block_mask()", inputs, check, lambda: make_mask().block_mask())


def flex_contender(name, inputs, check, build) -> Contender:
    """Compiled FlexAttention; on a CPU forward alone, as it has no backward there."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def forward(q, k, v, mask):
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    if inputs[0].is_cuda:
        return contender(name, inputs, check, forward, build)
    whole = contender(name, [x.detach() for x in inputs], check, forward, build)
    return Contender(name, {phase: run for phase, run in whole.phases.items() if phase != "backward"}, check)


def products_alone(seq_len: int, document: int, inputs) -> Contender:
    """The two matrix products of attention for every pair of a document's tokens, and nothing else: a ceiling."""
    q, k, v = (x.detach().unflatten(2, (seq_len // document, document)) for x in inputs[:3])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def forward(state):
        state["out"] = (q @ k.mT) @ v

    def check(state):
        exact = (q.double() @ k.double().mT) @ v.double()
        error = ((state["out"] - exact).norm() / exact.norm()).item()
        assert error < 1e-5, f"products: relative error {error:.1e}"

    return Contender("matrix products alone (all pairs of a document)", {"forward": forward}, check)


def xformers_dense(batch: PackedBatch, inputs, check) -> Contender:
    """xformers' memory-efficient attention with the dense additive bias; it has no form of this mask without one."""
    from xformers import _cpp_lib
    from xformers.ops import memory_efficient_attention

    broken = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    if broken is not None:
        raise LeftOut(f"its compiled part does not load, what it runs then is PyTorch's: {broken}")

    q = inputs[0]

    def build():
        bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~dense_definition(batch), -torch.inf)
        return bias.expand(-1, q.shape[1], -1, -1)

    def forward(q, k, v, bias):
        q, k, v = (x.transpose(1, 2) for x in (q, *repeated(q, k, v)))
        return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)

    return contender("xformers, dense bias", inputs, check, forward, build)


def flash_segments(batch: PackedBatch, inputs, check) -> Contender:
    """flash-attn, exact: causal attention for all rows, then each image's rows again against its document so far."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if batch.hidden is not None:
        raise LeftOut("hidden images would need a copy of the other keys for each segment")
    counts = torch.bincount(batch.documents[0].long())
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    starts, longest, documents = ends.tolist(), counts.max().item(), batch.documents[0].tolist()

    def forward(q, k, v, _):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                   # (1, S, H, D)
        text = flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, longest, longest, causal=True)[None]
        parts, at = [], 0
        for a, b in batch.spans[0]:
            first = starts[documents[a]]
            parts += [text[:, at:a], flash_attn_func(q[:, a:b], k[:, first:b], v[:, first:b])]
            at = b
        return torch.cat([*parts, text[:, at:]], 1).transpose(1, 2)

    return contender("flash-attn, per segment", inputs, check, forward)


def repeated(q, k, v):
    """Return k and v with as many heads as q."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
