"""Patchify, unpatchify and noise_patchify: element order, all layouts, values and gradients against float64, and
PyTorch's machinery."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, compiles, cpu_only, traced
from tests.resources import resources
from tests.tfkernels.patches.latents import CASES, COMPILED, layout_constants, numbers, padded, random, rows_of_tokens
from tfkernels import (
    PackedLatents,
    noise_patchify,
    pack_latents,
    patchify,
    patchify_packed,
    unpatchify,
    unpatchify_packed,
)
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels.patches import noise_patchify_reference, noise_reference
from tfkernels.patches.patchify import _noise_patchify, _noise_patchify_backward, _patchify, _unpatchify
from tfkernels.patches.triton import layout as layouts
from tfkernels.patches.triton.patchify import _patchify_bwd, _patchify_fwd

SEED = torch.tensor([1234, 56, 0], device=DEVICE)
SHAPES = [(3, 4, 8, 6, 2), (1, 1, 1, 1, 1), (2, 3, 8, 12, 4), (2, 5, 6, 9, 3), (4, 1, 7, 5, 1)]


def rearranged(x, p):
    """rearrange(x, "n c (h p) (w q) -> (n h w) (c p q)"), written out by unfolding."""
    return torch.nn.functional.unfold(x, p, stride=p).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c, h, w, p", SHAPES)
def test_tokens_are_the_patches_in_the_models_order_and_come_back(n, c, h, w, p, dtype):
    x = random(n, c, h, w).to(DEVICE, dtype)
    tokens = patchify(x, p)
    assert torch.equal(tokens, rearranged(x, p))
    # as the model's documents hold them
    assert torch.equal(tokens, torch.nn.functional.pixel_unshuffle(x, p).flatten(2).mT.flatten(0, 1))
    assert torch.equal(unpatchify(tokens, p, h, w), x)


def test_any_strides_cost_no_copy_and_no_error():
    x = random(2, 8, 6, 4).to(DEVICE, torch.float32)
    for view in (x.permute(0, 3, 1, 2), x[:, ::2], x.transpose(2, 3), x[:1, :1].expand(3, 2, -1, -1)):
        assert torch.equal(patchify(view, 2), patchify(view.contiguous(), 2))


def test_packed_images_are_each_patchified_and_come_back():
    latents = [random(3, 2 * h, 2 * w, seed=h).to(DEVICE, torch.float32) for h, w in ((3, 2), (1, 5), (4, 4), (1, 1))]
    packed = padded(pack_latents(latents, 2), 3, 4)
    tokens = patchify_packed(packed)
    assert torch.equal(tokens[3:-4], torch.cat([rearranged(x[None], 2) for x in latents]))
    assert not tokens[:3].any() and not tokens[-4:].any()
    back = unpatchify_packed(tokens, packed)
    assert (torch.equal(back.values[36:-48], packed.values[36:-48]) and not back.values[:36].any()
            and not back.values[-48:].any())
    assert back.channels == 3 and back.offsets is packed.offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_patchify_and_unpatchify_are_each_others(dtype):
    x = random(2, 3, 4, 6).to(DEVICE, dtype).requires_grad_()
    tokens = patchify(x, 2)
    dout = random(*tokens.shape, seed=1).to(tokens)
    dx, = torch.autograd.grad(tokens, x, dout)
    assert torch.equal(dx, unpatchify(dout, 2, 4, 6))
    t = tokens.detach().requires_grad_()
    dt, = torch.autograd.grad(unpatchify(t, 2, 4, 6), t, x.detach())
    assert torch.equal(dt, tokens)
    parts = [x[0].detach().requires_grad_(), x[1, :, :2].detach().requires_grad_()]
    packed = pack_latents(parts, 2)
    tokens = patchify_packed(packed)
    dparts = torch.autograd.grad(tokens, parts, dout[:len(tokens)])
    assert (torch.equal(dparts[0], unpatchify(dout[:6], 2, 4, 6)[0])
            and torch.equal(dparts[1], unpatchify(dout[6:9], 2, 2, 6)[0]))
    t = tokens.detach().requires_grad_()
    dt, = torch.autograd.grad(unpatchify_packed(t, packed).values, t, packed.values.detach())
    assert torch.equal(dt, tokens)


def noised(case, dtype):
    """Tokens and gradient of noise_patchify, and of its reference in float64 and in `dtype`."""
    signal, noise = numbers(case.images, 1), numbers(case.images, 2)
    dout, data = random(case.rows, case.dim, seed=3).to(DEVICE, dtype), case.data.to(dtype)

    def run(function, data):
        data = data.detach().requires_grad_()
        tokens = function(data)
        return [tokens.detach(), *torch.autograd.grad(tokens, data, dout.to(tokens.dtype))]

    ours = run(lambda x: noise_patchify(case.like(x), signal, noise, SEED, **case.options), data)
    exact, rounded = (run(lambda x: noise_patchify_reference(x, signal, noise, SEED, *case.layout), data.to(t))
                      for t in (torch.float64, dtype))
    return ours, exact, rounded


def check(case, dtype):
    """Hold the noised tokens and their gradient to the accuracy rule."""
    ours, exact, rounded = noised(case, dtype)
    for what, a, e, r in zip(("tokens", "dx0"), ours, exact, rounded):
        assert a.dtype == dtype and a.shape == e.shape
        assert_as_accurate(what, a, r, e, terms=(e.abs() + 8) if what == "tokens" else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_noised_tokens_and_their_gradient_are_as_accurate_as_pytorch(name, dtype):
    check(CASES[name], dtype)


def test_padding_comes_out_zero_with_zero_gradient():
    case = CASES["packed, patch 3, padding"]
    (tokens, dx), _, _ = noised(case, torch.float32)
    for x in (tokens, dx.view(-1, case.dim)):
        assert not x[:2].any() and not x[-5:].any() and x[2:-5].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_padding_and_an_image_without_rows_hold_reaches_nothing(value):
    case = rows_of_tokens([4, 0, 3], 16, before=2, behind=3)
    empty, row = torch.tensor([False, True, False], device=DEVICE), torch.arange(case.rows, device=DEVICE)
    padding = ((row < 2) | (row >= 9))[:, None]

    def run(fill):
        x = case.data.float().masked_fill(padding, fill).requires_grad_()
        signal, noise = (numbers(3, seed).masked_fill(empty, fill) for seed in (1, 2))
        tokens = noise_patchify(x, signal, noise, SEED, **case.options)
        return (tokens.detach(),
                *torch.autograd.grad(tokens, x,
                                     random(*tokens.shape, seed=3).float().to(DEVICE).masked_fill(padding, fill)))

    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(run(value), run(0.0)))


def test_noise_is_the_references_and_the_same_in_every_layout_and_batch():
    x = random(3, 4, 8, 6).to(DEVICE, torch.float32)
    signal, noise = numbers(3, 1), torch.ones(3, device=DEVICE)
    uniform = noise_patchify(x, signal, noise, SEED, patch_size=2)
    offsets = torch.tensor([0, 12, 24, 36], dtype=torch.int32, device=DEVICE)
    assert torch.equal(noise_patchify(pack_latents(list(x), 2), signal, noise, SEED), uniform)
    assert torch.equal(noise_patchify(patchify(x, 2), signal, noise, SEED, offsets=offsets), uniform)
    assert torch.equal(noise_patchify(x[:2], signal[:2], noise[:2], SEED[:2], patch_size=2), uniform[:24])
    second = SEED + torch.tensor([0, 0, 1], device=DEVICE)
    assert torch.equal(noise_patchify(x[1:], signal[1:], noise[1:], second, patch_size=2), uniform[12:])
    eps = noise_patchify(torch.zeros_like(x), signal, noise, SEED, patch_size=2)
    torch.testing.assert_close(eps, noise_reference(SEED, None, 3, 36, 16)[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(eps, noise_reference(SEED, offsets, 3, 36, 16)[1], rtol=1e-5, atol=2e-6)


def test_noise_does_not_depend_on_the_tiles_of_the_launch(monkeypatch):
    x, ones = random(2, 3, 8, 8).to(DEVICE, torch.float32), torch.ones(2, device=DEVICE)
    first = noise_patchify(x, ones, ones, SEED, patch_size=4)
    for tile, widest in ((16, 4), (256, 64), (4096, 1024)):
        monkeypatch.setattr(layouts, "TILE", tile)
        monkeypatch.setattr(layouts, "WIDEST", widest)
        assert torch.equal(noise_patchify(x, ones, ones, SEED, patch_size=4), first)


def test_the_seed_and_the_offset_decide_the_noise():
    x, ones = torch.zeros(2, 3, 8, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    found = [noise_patchify(x, ones, ones, seed, patch_size=2)
             for seed in (*(SEED + torch.tensor(more, device=DEVICE)
                            for more in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 2])), 1234)]
    assert all((a != b).float().mean() > 0.99 for i, a in enumerate(found) for b in found[:i])
    assert torch.equal(found[0], noise_patchify(x, ones, ones, SEED.clone(), patch_size=2))
    assert torch.equal(found[4], noise_patchify(x, ones, ones, torch.tensor([1234, 0], device=DEVICE), patch_size=2))


def test_mixed_precision_numbers_are_taken_in_float32():
    x, signal, noise = random(2, 1, 4, 4).to(DEVICE, torch.float16), numbers(2, 1), numbers(2, 2)
    signal = signal.half()
    assert torch.equal(noise_patchify(x, signal, noise.double(), SEED, patch_size=2),
                       noise_patchify(x, signal.float(), noise, SEED, patch_size=2))


@cpu_only
@pytest.mark.parametrize("name", ["latents", "packed, patch 3, padding", "tokens, an empty image, padding"])
def test_gradients_pass_gradcheck(name):
    case = CASES[name]
    data = case.data.detach().requires_grad_()
    signal, noise = numbers(case.images, 1), numbers(case.images, 2)
    assert torch.autograd.gradcheck(lambda x: noise_patchify(case.like(x), signal, noise, SEED, **case.options), data)
    if name == "latents":
        assert (torch.autograd.gradcheck(lambda x: patchify(x, 2), data)
                and torch.autograd.gradgradcheck(lambda x: patchify(x, 2), data))
        assert torch.autograd.gradcheck(lambda t: unpatchify(t, 2, 8, 6), patchify(data, 2).detach().requires_grad_())


@traced
@pytest.mark.parametrize("name", ["latents", "packed, patch 3, padding", "tokens, an empty image, padding"])
def test_opcheck(name):
    case = CASES[name]
    x = case.data.float()
    signal, noise = numbers(case.images, 1), numbers(case.images, 2)
    size = x.shape[2:] if x.ndim == 4 else (0, 0)
    dout = random(case.rows, case.dim, seed=3).float().to(DEVICE)
    grad = x.clone().requires_grad_()
    torch.library.opcheck(_patchify, (grad, *case.layout))
    torch.library.opcheck(_unpatchify, (dout.clone().requires_grad_(), *case.layout, *size))
    torch.library.opcheck(_noise_patchify, (grad, signal, noise, SEED, *case.layout))
    torch.library.opcheck(_noise_patchify_backward, (dout, signal, *case.layout, *size))


@traced
def test_compiles_whole_and_serves_other_batches_without_a_graph_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, signal, noise, seed):
        return unpatchify(noise_patchify(x, signal, noise, seed, patch_size=2) + patchify(x, 2), 2, 8, 6).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for n in (5, 2, 3, 7):  # not three images first: torch takes sizes that are equal for one, and a seed has 3
        x = random(n, 4, 8, 6).float().to(DEVICE).requires_grad_()
        given = numbers(n, 1), numbers(n, 2), SEED
        (dx,), (expected,) = (torch.autograd.grad(f(x, *given), x) for f in (compiled, step))
        torch.testing.assert_close(dx, expected)
    assert counter.frame_count == 1


@traced
def test_packed_latents_compile_whole_and_serve_other_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(packed, signal, noise, seed):
        return unpatchify_packed(noise_patchify(packed, signal, noise, seed) + patchify_packed(packed), packed).values

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for sizes in ([(2, 3), (4, 1), (1, 1), (2, 2), (1, 4)],  # 5 images: equal sizes would count as one
                  [(1, 3), (2, 2), (5, 5)], [(3, 3), (1, 2), (1, 4), (2, 2)]):
        packed = pack_latents([random(3, 2 * h, 2 * w).float().to(DEVICE) for h, w in sizes], 2)
        given = packed, numbers(len(sizes), 1), numbers(len(sizes), 2), SEED
        torch.testing.assert_close(compiled(*given), step(*given))
    assert counter.frame_count == 1


def test_bad_inputs_are_refused_by_name():
    x, ones = torch.zeros(2, 3, 4, 6, device=DEVICE), torch.ones(2, device=DEVICE)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    packed, tokens = pack_latents(list(x), 2), torch.zeros(8, 16, device=DEVICE)

    def noising(x=x, signal=ones, noise=ones, seed=SEED, patch_size=2, offsets=None):
        return noise_patchify(x, signal, noise, seed, patch_size=patch_size, offsets=offsets)

    for call, message in [
            (lambda: patchify(x[0], 2), "patchify: x has shape \\(3, 4, 6\\); 4 dimensions"),
            (lambda: patchify(x, 4), "patchify: x is 4x6 and patch_size 4; multiples of the patch size fit"),
            (lambda: patchify(x, 0), "patchify: patch_size is 0; a positive int fits"),
            (lambda: patchify(x, 2.0), "patchify: patch_size is 2.0; a positive int fits"),
            (lambda: patchify(x.int(), 2), "patchify: x is torch.int32"),
            (lambda: patchify(x[:, :0], 2), "patchify: x has shape \\(2, 0, 4, 6\\); at least one channel"),
            (lambda: unpatchify(tokens[None], 2, 4, 4), "unpatchify: tokens has shape \\(1, 8, 16\\); 2 dimensions"),
            (lambda: unpatchify(tokens, 2, 4, 6),
             "unpatchify: tokens has shape \\(8, 16\\); a multiple of 6 rows of a multiple of 4 elements fits 4x6"),
            (lambda: unpatchify(tokens, 2, 4, 5), "unpatchify: height x width is 4x5 and patch_size 2"),
            (lambda: pack_latents([], 2), "pack_latents: latents is empty"),
            (lambda: pack_latents([x[0], x[0, :2]], 2),
             "pack_latents: latents\\[1\\] is torch.float32 of shape \\(2, 4, 6\\)"),
            (lambda: pack_latents([x[0], x[0, :, :3]], 2), "pack_latents: latents\\[1\\] is 3x6 and patch_size 2"),
            (lambda: patchify_packed(PackedLatents(packed.values[1:], *packed[1:])),
             "x.values has shape \\(143,\\); one dimension, a multiple of .* = 12"),
            (lambda: patchify_packed(packed._replace(columns=packed.columns[1:])),
             "patchify_packed: x.columns is torch.int32 of shape \\(1,\\)"),
            (lambda: patchify_packed(packed._replace(offsets=packed.offsets.long())),
             "patchify_packed: x.offsets is torch.int64 of shape \\(3,\\)"),
            (lambda: unpatchify_packed(tokens, packed),
             "unpatchify_packed: tokens has shape \\(8, 16\\) .* \\(12, 12\\) fits"),
            (lambda: noising(signal=ones[:1]),
             "noise_patchify: signal is torch.float32 of shape \\(1,\\) .* \\(2,\\) on"),
            (lambda: noising(noise=1.0), "noise_patchify: noise is a float; a floating-point tensor \\(2,\\)"),
            (lambda: noising(noise=ones.int()), "noise_patchify: noise is torch.int32"),
            (lambda: noising(signal=ones.clone().requires_grad_()),
             "noise_patchify: signal requires a gradient, which .* pass signal.detach\\(\\)"),
            (lambda: noising(seed=SEED[:1]), "noise_patchify: seed is torch.int64 of shape \\(1,\\)"),
            (lambda: noising(patch_size=None), "noise_patchify: patch_size is None; a positive int fits"),
            (lambda: noising(offsets=offsets), "noise_patchify: offsets is given and x0 are latents of one size"),
            (lambda: noising(packed, patch_size=3),
             "noise_patchify: patch_size is 3 and offsets None beside packed latents"),
            (lambda: noising(tokens, offsets=offsets), "noise_patchify: patch_size is 2 and x0 are tokens"),
            (lambda: noising(tokens, patch_size=None),
             "noise_patchify: offsets is a NoneType; an int32 tensor \\(N \\+ 1,\\)"),
            (lambda: noising([x]), "noise_patchify: x0 is a list; latents")]:
        with pytest.raises(ValueError, match=message):
            call()


KERNELS = {"patchify": (_patchify_fwd, False), "noise_patchify": (_patchify_fwd, True),
           "unpatchify": (_patchify_bwd, False), "noise_patchify backward": (_patchify_bwd, True)}


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout, size, dim, patch", COMPILED)
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_spill_nothing(name, layout, size, dim, patch, architecture):
    kernel, noise = KERNELS[name]
    constants = {"NOISE": noise, **layout_constants(layout, dim, patch)}
    found = resources(kernel, constants, Config(0, 0, 4, 3), architecture=architecture, element_size=size)
    assert found.fit(architecture), found
