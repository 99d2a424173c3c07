"""Kernels whose compiled code is mutated: checks of their operators by the rule of accuracy, on small inputs.

Several inputs of one kernel: a bound is met by few of the registers that an unrolled loop holds, and by others where
the sizes differ by a little. Each input is small, and yet loops reach their steady state and last tiles are not full.
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.compare import assert_as_accurate
from tests.tfkernels.attention import test_attention as attention
from tests.tfkernels.attention import test_attention_rows as attention_rows
from tests.tfkernels.losses import test_cross_entropy as cross_entropy
from tests.tfkernels.losses import test_diffusion_loss as diffusion_loss
from tests.tfkernels.losses import test_head_loss as head_loss
from tests.tfkernels.norm import test_norm as norm
from tests.tfkernels.patches import latents
from tests.tfkernels.patches import test_embed as embed
from tests.tfkernels.patches import test_patchify as patchify
from tests.tfkernels.rotary import test_rotary as rotary
from tfkernels import TransfusionMask, attention_reference, attention_with_lse

BFLOAT16 = torch.bfloat16


def images(seq_len: int, hidden=None) -> TransfusionMask:
    """A document of text and two images, and one of two tokens."""
    documents = (torch.arange(seq_len) >= seq_len - 2).long()[None]
    return TransfusionMask.from_spans([[(3, 19), (70, seq_len - 50)]], seq_len, documents=documents, hidden=hidden)


def attend(mask: TransfusionMask, heads: int = 1):
    """Forward and backward of one batch row."""
    size = 1, heads, 1, mask.query_len, mask.key_len, 64
    attention.check(attention.random_inputs(*size, seed=mask.key_len), mask, BFLOAT16)


def attend_beside_junk(mask: TransfusionMask):
    """NaN and infinities in the second document, which make the rows and keys that see them go one by one."""
    length = mask.key_len
    tensors = [x.to(BFLOAT16) for x in attention_rows.inputs(1, 1, 1, length, length, 64, seed=4)]
    junk = (torch.arange(length) >= length - 2)[None]
    zeros, given = ([attention_rows.filled(x, junk, fill) for x in tensors] for fill in (False, True))
    ours = attention_rows.run(attention_with_lse, *given, mask)
    exact, rounded = (attention_rows.run(attention_reference, *(x.to(t) for x in zeros), mask)
                      for t in (torch.float64, BFLOAT16))
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), ours, rounded, exact):
        for rows in (slice(0, length - 2), slice(length - 7, length - 2)):  # of many keys one weighs little, so apart
            kept = [x[:, :, rows] for x in values]
            assert_as_accurate(name, *kept, kept[2].abs())


def rotate(heads: int, kv_heads: int, tokens: int):
    sizes = rotary.Sizes(2, heads, kv_heads, tokens, 32, 12, tables=2)
    rotary.check(sizes, BFLOAT16, seed=tokens)


def normalise(op: str, width: int, tokens: int = 29):
    norm.check(op, norm.random_case(norm.packed_index(tokens), width, 4, seed=tokens), BFLOAT16)


def embed_patches(name: str):
    embed.test_output_and_gradients_are_as_accurate_as_pytorch(name, BFLOAT16)


def of_images(sizes, before: int, behind: int):
    """Images of sizes of their own, patch 3, between rows of padding."""
    case = latents.ragged(sizes, 2, 3, before, behind)
    latents.CASES["mutated"] = patchify.CASES["mutated"] = diffusion_loss.CASES["mutated"] = case
    return case


def noise(*layout):
    of_images(*layout)
    patchify.test_noised_tokens_and_their_gradient_are_as_accurate_as_pytorch("mutated", BFLOAT16)


def diffuse(*layout):
    of_images(*layout)
    diffusion_loss.test_losses_and_gradients_are_as_accurate_as_pytorch("mutated", BFLOAT16, True)


def diffuse_from_hidden(*layout):
    case = of_images(*layout)
    head_loss.check("modulated_rms_norm", case, head_loss.tensors(case), BFLOAT16)


def predict(vocabulary: int, rows: int):
    cross_entropy.check(cross_entropy.random_case(60, 24, vocabulary, rows, bias=True, row_weight=True), BFLOAT16)


@triton.jit
def _product_of_boxes(a_boxes, b_boxes, out_boxes, k, SIZE: tl.constexpr):
    """out = a @ b by the copy engine (TMA), whose copies mbarriers count."""
    row = tl.program_id(0) * SIZE
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for at in tl.range(0, k, SIZE, num_stages=3):
        acc = tl.dot(a_boxes.load([row, at]), b_boxes.load([at, 0]), acc)
    out_boxes.store([row, 0], acc.to(tl.bfloat16))


def multiply_boxes(rows: int, k: int, size: int = 64):
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(shape, generator=generator).to(BFLOAT16) for shape in ((rows, k), (k, size)))
    out = torch.full((rows, size), torch.nan, dtype=BFLOAT16)
    boxes = [TensorDescriptor.from_tensor(x, [size, size]) for x in (a, b, out)]
    _product_of_boxes[(-(-rows // size),)](*boxes, k, SIZE=size)
    assert_as_accurate("out", out, a @ b, a.double() @ b.double(), a.double().abs() @ b.double().abs())


LAYOUTS = ([(2, 3), (1, 2), (4, 1)], 2, 3), ([(2, 5), (1, 3), (4, 2)], 1, 2), ([(3, 5), (1, 1), (2, 2)], 3, 1)
CASES = {  # the quick ones first
    "boxes": [lambda: multiply_boxes(100, 328)],
    "rotary": [lambda: rotate(6, 2, 5), lambda: rotate(6, 2, 7)],
    "noise": [lambda layout=layout: noise(*layout) for layout in LAYOUTS],
    "diffusion loss": [lambda layout=layout: diffuse(*layout) for layout in LAYOUTS],
    "gated norm": [lambda: normalise("gated_residual_rms_norm", 150),
                   lambda: normalise("gated_residual_rms_norm", 150, 31)],
    "patches": [lambda: embed_patches(embed.TYPICAL), lambda: embed_patches("a batch")],
    "cross-entropy": [lambda: predict(80, 21), lambda: predict(80, 37)],
    "attention": [lambda: attend(images(201)), lambda: attend(images(261)), lambda: attend_beside_junk(images(135))],
    "diffusion loss from hidden states": [lambda layout=layout: diffuse_from_hidden(*layout) for layout in LAYOUTS],
    "decoding": [lambda: attend(TransfusionMask.from_cache(torch.tensor([200]), 1, 201), 2),
                 lambda: attend(TransfusionMask.from_cache(torch.tensor([130]), 1, 131), 2)],
    "layer norm": [lambda: normalise("modulated_layer_norm", 150), lambda: normalise("modulated_layer_norm", 150, 31)],
    "attention, hidden images": [
        lambda: attend(images(201, [[(3, 19)]])), lambda: attend(images(261, [[(3, 19)]])),
        lambda: attend_beside_junk(images(135, [[(3, 19)]]))],
}
SM_90_ALONE = ("boxes",)  # TMA
