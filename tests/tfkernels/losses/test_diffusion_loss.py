"""The diffusion loss: values and gradients against float64, the round trip with noise_patchify, weights, and PyTorch's
machinery."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, compiles, cpu_only, traced
from tests.resources import resources
from tests.tfkernels.patches.latents import (
    CASES,
    COMPILED,
    layout_constants,
    numbers,
    random,
    rows_of_tokens,
    uniform,
)
from tests.transfusion.plain import add_noise
from tfkernels import diffusion_loss, diffusion_loss_reference, min_snr_weight, noise_patchify, pack_latents, patchify
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels._library import INTERPRET
from tfkernels.losses.diffusion import _backward, _loss
from tfkernels.losses.triton.diffusion import (
    BLOCK,
    ROW_REGISTERS,
    _diffusion_loss_bwd,
    _diffusion_loss_images,
    _diffusion_loss_rows,
)
from tfkernels.patches import noise_reference
from tfkernels.patches.triton import layout as layouts
from transfusion.diffusion.objective import OBJECTIVES

SEED = torch.tensor([-99, 2**31 + 5, 0], device=DEVICE)
LONG = {"rows beyond one block": rows_of_tokens([2 * BLOCK + 3, 1, BLOCK], 8 if INTERPRET else 16),
        "one element": uniform(1, 1, 1, 1, patch=1)}


def given(case):
    """p, q and weight of every image."""
    return numbers(case.images, 1), numbers(case.images, 2), numbers(case.images, 3)


def results(case, dtype, weighted):
    """Losses and gradient: ours, the reference's in float64, and in `dtype`."""
    p, q, weight = given(case)
    weight = weight if weighted else None
    prediction, data = random(case.rows, case.dim, seed=4).to(DEVICE, dtype), case.data.to(dtype)
    dloss = random(case.images, seed=5).to(DEVICE)

    def run(function, prediction):
        prediction = prediction.detach().requires_grad_()
        loss = function(prediction)
        return [loss.detach(), *torch.autograd.grad(loss, prediction, dloss.to(loss.dtype))]

    ours = run(lambda x: diffusion_loss(x, case.like(data), p, q, weight, SEED, **case.options), prediction)
    exact, rounded = (run(lambda x: diffusion_loss_reference(x, data.to(x.dtype), p, q, weight, SEED, *case.layout),
                          prediction.to(t)) for t in (torch.float64, dtype))
    return ours, exact, rounded


def check(case, dtype, weighted=True):
    """Hold the losses and the gradient to the accuracy rule."""
    ours, exact, rounded = results(case, dtype, weighted)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_as_accurate("loss", ours[0], rounded[0], exact[0], terms=4 * exact[0].abs())
    spread = exact[1].abs().amax() if exact[1].numel() else exact[1].sum()                 # prediction - target cancels
    assert_as_accurate("dprediction", ours[1], rounded[1], exact[1], terms=(exact[1].abs() + spread))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_losses_and_gradients_are_as_accurate_as_pytorch(name, dtype, weighted):
    check({**CASES, **LONG}[name], dtype, weighted)


@pytest.mark.parametrize("name", ["packed, patch 3, padding", "tokens, an empty image, padding"])
def test_padding_counts_nowhere_and_an_empty_image_costs_nothing(name):
    case = CASES[name]
    p, q, weight = given(case)
    prediction = random(case.rows, case.dim, seed=4).float().to(DEVICE)
    offsets = case.layout[0]
    poisoned = prediction.clone()
    poisoned[:offsets[0]], poisoned[offsets[-1]:] = float("nan"), float("inf")
    poisoned.requires_grad_()
    loss = diffusion_loss(poisoned, case.like(case.data.float()), p, q, weight, SEED, **case.options)
    assert torch.equal(loss,
                       diffusion_loss(prediction, case.like(case.data.float()), p, q, weight, SEED, **case.options))
    assert torch.equal(loss == 0, offsets.diff() == 0)
    gradient, = torch.autograd.grad(loss.sum(), poisoned)
    assert (not gradient[:offsets[0]].any() and not gradient[offsets[-1]:].any()
            and gradient[offsets[0]:offsets[-1]].all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_padding_and_an_empty_image_hold_reaches_nothing(value):
    case = rows_of_tokens([4, 0, 3], 16, before=2, behind=3)
    empty = torch.tensor([False, True, False], device=DEVICE)
    row = torch.arange(case.rows, device=DEVICE)
    padding = (row < 2) | (row >= 9)
    x0, dloss = case.data.float(), random(3, seed=5).float().to(DEVICE)

    def run(fill):
        p, q, weight, arriving = (x.masked_fill(empty, fill) for x in (*given(case), dloss))
        prediction = random(case.rows, case.dim, seed=4).float().to(DEVICE)
        prediction = prediction.masked_fill(padding[:, None], fill).requires_grad_()
        loss = diffusion_loss(prediction, x0.masked_fill(padding[:, None], fill), p, q, weight, SEED, **case.options)
        return loss.detach(), *torch.autograd.grad(loss, prediction, arriving)

    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(run(value), run(0.0)))


@pytest.mark.parametrize("what", ["prediction", "x0", "p", "q", "weight"])
def test_nan_that_an_image_sees_shows_in_its_loss_alone(what):
    case = rows_of_tokens([4, 2, 3], 16, before=2, behind=3)
    x0, prediction = case.data.float(), random(case.rows, case.dim, seed=4).float().to(DEVICE)
    arguments = dict(zip(("p", "q", "weight"), (x.clone() for x in given(case)))) | {"x0": x0.clone(),
                                                                                     "prediction": prediction}
    arguments[what][(7, 3) if arguments[what].ndim == 2 else 1] = float("nan")
    arguments["prediction"].requires_grad_()
    loss = diffusion_loss(*(arguments[n] for n in ("prediction", "x0", "p", "q", "weight")), SEED, **case.options)
    assert loss.isnan().tolist() == [False, True, False]
    gradient, = torch.autograd.grad(loss.sum(), arguments["prediction"])
    rows = gradient.isnan().any(1).nonzero().flatten().tolist()
    assert rows == ([7] if what in ("prediction", "x0") else [6, 7])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_mean_square_on_the_noise_that_noise_patchify_added(objective):
    x0, t = random(3, 4, 8, 6).float().to(DEVICE), torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    image, eps = noise_reference(SEED, None, 3, 36, 16)
    noised, target = add_noise(OBJECTIVES[objective], patchify(x0, 2), eps, t[image][:, None])
    ours = noise_patchify(x0, *OBJECTIVES[objective].path(t), SEED, patch_size=2)
    torch.testing.assert_close(ours, noised, rtol=1e-5, atol=4e-6)
    prediction = random(36, 16, seed=4).float().to(DEVICE)
    loss = diffusion_loss(prediction, x0, *OBJECTIVES[objective].target(t), None, SEED, patch_size=2)
    torch.testing.assert_close(loss, (prediction - target).square().view(3, -1).mean(1), rtol=1e-5, atol=1e-6)
    perfect = target.clone().requires_grad_()
    loss = diffusion_loss(perfect, x0, *OBJECTIVES[objective].target(t), None, SEED, patch_size=2)
    gradient, = torch.autograd.grad(loss.sum(), perfect)
    assert loss.max() < 1e-10 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_pair_trains_the_best_linear_denoiser(objective):
    """x0 ~ N(0, 0.5^2): the best prediction of target from x_t is a line through 0 whose slope and loss are known."""
    t, deviation = torch.full((4,), 0.4, device=DEVICE), 0.5
    (signal, noise), (p, q) = OBJECTIVES[objective].path(t), OBJECTIVES[objective].target(t)
    s, n, a, b = (v[0].item() for v in (signal, noise, p, q))
    power = s * s * deviation**2 + n * n
    side, steps, tolerance = (8, 5, 0.12) if INTERPRET else (16, 12, 0.06)  # the interpreter takes seconds a step
    x0 = deviation * random(4, 4, side, side, seed=7).float().to(DEVICE)
    slope = torch.zeros((), device=DEVICE, requires_grad=True)
    for step in range(steps):
        seed = torch.tensor([5, step], device=DEVICE)
        loss = diffusion_loss(slope * noise_patchify(x0, signal, noise, seed, patch_size=2), x0, p, q, None, seed,
                              patch_size=2).mean()
        gradient, = torch.autograd.grad(loss, slope)
        slope = (slope - gradient / (4 * power)).detach().requires_grad_()
    best = (s * a * deviation**2 + n * b) / power
    assert abs(slope.item() - best) < tolerance
    assert abs(loss.item() - (a * a * deviation**2 + b * b - best**2 * power)) < tolerance


def test_every_layout_gives_the_same_losses_and_gradients():
    x0 = random(3, 4, 8, 6).float().to(DEVICE)
    p, q, weight = numbers(3, 1), numbers(3, 2), numbers(3, 3)
    offsets = torch.tensor([0, 12, 24, 36], dtype=torch.int32, device=DEVICE)
    prediction = random(36, 16, seed=4).float().to(DEVICE).requires_grad_()
    losses = [diffusion_loss(prediction, x0, p, q, weight, SEED, patch_size=2),
              diffusion_loss(prediction, pack_latents(list(x0), 2), p, q, weight, SEED),
              diffusion_loss(prediction, patchify(x0, 2), p, q, weight, SEED, offsets=offsets)]
    gradients = [torch.autograd.grad(loss.sum(), prediction)[0] for loss in losses]
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-6, atol=1e-9)


def test_results_repeat_in_bits_and_an_image_does_not_depend_on_the_others(monkeypatch):
    case = CASES["packed"]
    p, q, weight = given(case)
    prediction, data = random(case.rows, case.dim, seed=4).float().to(DEVICE), case.data.float()
    first = diffusion_loss(prediction, case.like(data), p, q, weight, SEED)
    assert torch.equal(first, diffusion_loss(prediction, case.like(data), p, q, weight, SEED))
    offsets, columns, channels, patch = case.layout
    part = type(case.x)(data[:11 * 16], offsets[:3], columns[:2], channels, patch)
    alone = diffusion_loss(prediction[:11], part, p[:2], q[:2], weight[:2], SEED)
    torch.testing.assert_close(alone, first[:2], rtol=0 if INTERPRET or DEVICE == "cuda" else 1e-6, atol=0)
    if INTERPRET or DEVICE == "cuda":
        monkeypatch.setattr(layouts, "TILE", 256)
        torch.testing.assert_close(diffusion_loss(prediction, case.like(data), p, q, weight, SEED), first, rtol=1e-6,
                                   atol=0)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
def test_a_half_prediction_beside_float32_latents_keeps_the_latents_precision(dtype):
    case = CASES["latents"]
    p, q, weight = given(case)
    prediction, data = random(case.rows, case.dim, seed=4).to(DEVICE, dtype), case.data.float()
    loss = diffusion_loss(prediction, data, p, q, weight, SEED, patch_size=2)
    torch.testing.assert_close(loss, diffusion_loss(prediction.float(), data, p, q, weight, SEED, patch_size=2),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_the_papers_for_every_form(gamma):
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    signal, noise = OBJECTIVES["v"].path(t)
    snr = (signal / noise).square()
    least, zero, one = snr.clamp(max=gamma), torch.zeros_like(t), torch.ones_like(t)
    for (p, q), expected in (((one, zero), least), ((zero, one), least / snr), ((-noise, signal), least / (snr + 1))):
        torch.testing.assert_close(min_snr_weight(signal, noise, p, q, gamma), expected)
    signal, noise = OBJECTIVES["flow"].path(t)
    torch.testing.assert_close(min_snr_weight(signal, noise, -one, one, gamma),
                               (signal / noise).square().clamp(max=gamma) * noise.square())


def test_min_snr_weight_takes_its_limits_at_the_ends():
    one, zero = torch.ones(1), torch.zeros(1)
    assert min_snr_weight(zero, one, zero, one).item() == 1.0 and min_snr_weight(one, zero, one, zero).item() == 5.0
    assert min_snr_weight(one, zero, zero, one).item() == 0.0 and min_snr_weight(zero, one, one, zero).item() == 0.0
    for gamma in (0, -1.0):
        with pytest.raises(ValueError, match="min_snr_weight: gamma is .*; a positive number fits"):
            min_snr_weight(one, one, one, zero, gamma)


def test_min_snr_weight_turns_every_objective_into_the_same_loss_of_x0():
    t, x0 = torch.tensor([0.2, 0.5, 0.8], device=DEVICE), random(3, 4, 4, 4).float().to(DEVICE)
    image, eps = noise_reference(SEED, None, 3, 12, 16)
    signal, noise = OBJECTIVES["v"].path(t)
    x_t = signal[image][:, None] * patchify(x0, 2) + noise[image][:, None] * eps
    guess, found = random(12, 16, seed=2).float().to(DEVICE), []  # a guess of x0, and what it says of every target
    for p, q in ((torch.ones_like(t), torch.zeros_like(t)), OBJECTIVES["eps"].target(t), OBJECTIVES["v"].target(t)):
        implied = p[image][:, None] * guess + q[image][:, None] * (
            x_t - signal[image][:, None] * guess
        ) / noise[image][:, None]
        found.append(diffusion_loss(implied, x0, p, q, min_snr_weight(signal, noise, p, q), SEED, patch_size=2))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=0)


@cpu_only
@pytest.mark.parametrize("name", ["latents", "packed, patch 3, padding", "tokens, an empty image, padding"])
def test_gradients_pass_gradcheck(name):
    case = CASES[name]
    p, q, weight = given(case)
    prediction = random(case.rows, case.dim, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffusion_loss(x, case.x, p, q, weight, SEED, **case.options), prediction)


@traced
@pytest.mark.parametrize("name", ["latents", "packed, patch 3, padding", "tokens, an empty image, padding"])
def test_opcheck(name):
    case = CASES[name]
    p, q, weight = given(case)
    prediction, data = random(case.rows, case.dim, seed=4).float().to(DEVICE), case.data.float()
    torch.library.opcheck(_loss, (prediction.clone().requires_grad_(), data, p, q, weight, SEED, *case.layout))
    torch.library.opcheck(_backward, (numbers(case.images, 6), prediction, data, p, q, None, SEED, *case.layout))


@traced
def test_compiles_whole_and_serves_other_batches_without_a_graph_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(scale, x, offsets, p, q, seed):
        tokens = noise_patchify(x, p, q, seed, offsets=offsets)
        return diffusion_loss(scale * tokens, x, p, q, min_snr_weight(p, q, -q, p), seed, offsets=offsets).mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    scale = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    # not three images first: torch takes sizes that are equal for one, and a seed has 3
    for counts in ([1, 9, 4, 4, 2], [7, 3], [5, 2, 12]):
        case = rows_of_tokens(counts, 12)
        inputs = (case.data.float(), case.options["offsets"], numbers(case.images, 1).abs(),
                  numbers(case.images, 2).abs(), SEED)
        (actual,), (expected,) = (torch.autograd.grad(f(scale, *inputs), scale) for f in (compiled, step))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_autocast_changes_nothing():
    case = CASES["latents"]
    p, q, weight = given(case)
    prediction = random(case.rows, case.dim, seed=4).float().to(DEVICE).requires_grad_()

    def run():
        loss = diffusion_loss(prediction, case.data.float(), p, q, weight, SEED, patch_size=2)
        return loss.detach(), *torch.autograd.grad(loss.sum(), prediction)

    plain = run()
    with torch.autocast(DEVICE, torch.float16 if INTERPRET else torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), plain))


def test_bad_inputs_are_refused_by_name():
    x0, ones, prediction = (torch.zeros(2, 3, 4, 6, device=DEVICE), torch.ones(2, device=DEVICE),
                            torch.zeros(12, 12, device=DEVICE))

    def call(prediction=prediction, x0=x0, p=ones, q=ones, weight=None, seed=SEED, **options):
        return diffusion_loss(prediction, x0, p, q, weight, seed, **({"patch_size": 2} | options))

    assert call().shape == (2,)
    for bad, message in [({"prediction": prediction[:6]},
                          "diffusion_loss: prediction has shape \\(6, 12\\) .* x0 12 tokens of 12 elements .* \\(12, "
                          "12\\) fits"),
                         ({"prediction": prediction.int()}, "diffusion_loss: prediction is torch.int32"),
                         ({"x0": x0.clone().requires_grad_()},
                          "diffusion_loss: x0 requires a gradient, which .* pass x0.detach\\(\\)"),
                         ({"p": ones[:1]}, "diffusion_loss: p is torch.float32 of shape \\(1,\\)"),
                         ({"q": ones.clone().requires_grad_()}, "diffusion_loss: q requires a gradient"),
                         ({"weight": ones.clone().requires_grad_()}, "diffusion_loss: weight requires a gradient"),
                         ({"weight": 2.0}, "diffusion_loss: weight is a float; a floating-point tensor \\(2,\\)"),
                         ({"seed": 1.0}, "diffusion_loss: seed is a float"),
                         ({"patch_size": 3}, "diffusion_loss: x0 is 4x6 and patch_size 3"),
                         ({"x0": prediction, "patch_size": None},
                          "diffusion_loss: offsets is a NoneType; an int32 tensor"),
                         ({"x0": prediction, "patch_size": None, "offsets": torch.tensor([0, 12], device=DEVICE)},
                          "diffusion_loss: offsets is torch.int64")]:
        with pytest.raises(ValueError, match=message):
            call(**bad)


PER_IMAGE = ("weight_ptr",)
KERNELS = {"rows": (_diffusion_loss_rows, {}), "backward": (_diffusion_loss_bwd, {"WEIGHT": True})}


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout, size, dim, patch", COMPILED)
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_spill_nothing(name, layout, size, dim, patch, architecture):
    kernel, constants = KERNELS[name]
    constants = {**constants, **layout_constants(layout, dim, patch)}
    most = ROW_REGISTERS.get(layout) if name == "rows" else None
    found = resources(kernel, constants, Config(0, 0, 4, 3, most), architecture=architecture, element_size=size,
                      float32=PER_IMAGE, fuses=name != "rows")
    assert found.fit(architecture) and found.uneven_sums == 0, found


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sum_over_an_images_rows_spills_nothing(architecture):
    constants = {"SEARCH": True, "WEIGHT": True, "DIM": 16, "BLOCK": BLOCK}
    found = resources(_diffusion_loss_images, constants, Config(0, 0, 4, 3), architecture=architecture, element_size=2,
                      float32=PER_IMAGE)
    assert found.fit(architecture), found
