"""The diffusion loss from the hidden states on: accuracy and gradients against float64, layouts, strides, PyTorch's
machinery, resources."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tfkernels
from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, compiles, cpu_only, traced
from tests.resources import resources
from tests.tfkernels.patches.latents import CASES, numbers, random, rows_of_tokens, uniform
from tfkernels import (
    diffusion_loss,
    modulated_layer_norm_diffusion_loss,
    modulated_rms_norm_diffusion_loss,
    pack_latents,
    patchify,
)
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels._library import INTERPRET
from tfkernels.losses.head import _backward, _loss
from tfkernels.losses.triton import head as kernels

SEED = torch.tensor([-99, 2**31 + 5, 0], device=DEVICE)
NORMS = ("modulated_layer_norm", "modulated_rms_norm")
WIDTH = 24 if INTERPRET else 40  # of hidden, where a test does not name another
PADDED = "tokens, an empty image, padding"
# one of each layout; what the interpreter, seconds a case, has time for
SOME = ("latents", "packed, patch 3, padding", PADDED)
WIDE = {} if INTERPRET else {"tiles of every kind": rows_of_tokens([70, 1, 0, 140], 150, before=3, behind=2)}


def tensors(case, width=WIDTH, missing=()):
    """The differentiable inputs in float64; twice as many hidden states as patches."""
    shapes = {"hidden": (2 * case.rows + 3, width), "scale": (case.images, width), "shift": (case.images, width),
              "weight": (case.dim, width), "bias": (case.dim,)}
    found = {name: random(*shape, seed=10 + i).to(DEVICE) for i, (name, shape) in enumerate(shapes.items())}
    found["weight"] /= width**0.5
    return {name: None if name in missing else x for name, x in found.items()}


def places_of(case, seed=0):
    """Patches in any order among the hidden states; rows of no image name none."""
    places = torch.randperm(2 * case.rows + 3, generator=torch.Generator().manual_seed(seed))[:case.rows]
    if case.layout[0] is not None:
        offsets = case.layout[0].cpu()
        places[:offsets[0]] = places[offsets[-1]:] = -7
    return places.to(DEVICE)


def run(norm, case, inputs, dtype, *, reference=False, weighted=True, dloss=None, places=None, eps=1e-6):
    """Return {name: value} of the losses and of every input's gradient, the inputs in `dtype`."""
    inputs = {n: x if x is None else x.to(dtype).detach().requires_grad_() for n, x in inputs.items()}
    p, q, w = (numbers(case.images, seed) for seed in (1, 2, 3))
    data, places = case.data.to(dtype), places_of(case) if places is None else places
    given = [*list(inputs.values())[:1], places, *list(inputs.values())[1:]]
    if reference:
        loss = getattr(tfkernels, f"{norm}_diffusion_loss_reference")(*given, data, p, q, w if weighted else None, SEED,
                                                                      *case.layout, eps=eps)
    else:
        loss = getattr(tfkernels, f"{norm}_diffusion_loss")(*given, case.like(data), p, q, w if weighted else None,
                                                            SEED, **case.options, eps=eps)
    present = {n: x for n, x in inputs.items() if x is not None}
    dloss = random(case.images, seed=5).to(DEVICE) if dloss is None else dloss
    gradients = torch.autograd.grad(loss, list(present.values()), dloss.to(loss.dtype))
    return {"loss": loss.detach()} | dict(zip(("d" + n for n in present), gradients))


def check(norm, case, inputs, dtype, **options):
    """Hold the operator to the accuracy rule in the losses and every gradient."""
    inputs = {n: x if x is None else x.to(dtype).double() for n, x in inputs.items()}
    rounded = case._replace(x=case.like(case.data.to(dtype).double()))
    exact = run(norm, rounded, inputs, torch.float64, reference=True, **options)
    theirs = run(norm, rounded, inputs, dtype, reference=True, **options)
    ours = run(norm, rounded, inputs, dtype, **options)
    assert ours["loss"].dtype == torch.float32 and exact.keys() == ours.keys()
    for name, x in exact.items():
        # prediction - target cancels, and so does all that follows from it
        spread = x.abs().amax() if x.numel() else x.sum()
        assert ours[name].shape == x.shape and (name == "loss" or ours[name].dtype == dtype)
        assert_as_accurate(f"{norm} {name}", ours[name], theirs[name], x,
                           terms=4 * x.abs() if name == "loss" else x.abs() + spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SOME if INTERPRET else [*CASES, *WIDE])
def test_losses_and_gradients_are_as_accurate_as_pytorch(name, norm, dtype):
    case = {**CASES, **WIDE}[name]
    check(norm, case, tensors(case), dtype, weighted=dtype != torch.float16)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's small blocks reach the same loops with narrow rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [7, 64, 1000, 4096])
def test_wide_and_narrow_rows_fit(width, norm, dtype):
    case = rows_of_tokens([40, 3], 64)
    check(norm, case, tensors(case, width), dtype)


@pytest.mark.skipif(DEVICE != "cuda", reason="more patches than a chunk holds take a GPU's time only")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [32, 64, 300])
def test_many_chunks_fit(dim, norm):
    case = rows_of_tokens([256] * 12 + [100, 0, 7, 900], dim)
    check(norm, case, tensors(case, 320), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_whose_beginning_says_little_of_the_rest_fit(norm, dtype):
    """The kernel guesses mean and 1 / std from the first columns."""
    case = CASES["latents"]._replace(**uniform(2, 4, 4, 4, patch=2)._asdict())
    inputs = tensors(case, 2 * WIDTH)
    hidden, ends = inputs["hidden"], kernels.PILOT * kernels.config(kernels.FORWARD, dtype.itemsize).block_n
    hidden[0::4] += 5                                # a mean far from 0
    hidden[1::4, :ends // 4] *= 20                   # a guess too great
    hidden[2::4, ends:] = 4 * hidden[2::4, ends:] + 2  # a guess too small and beside the mean
    hidden[3::4] *= 1e-3                             # eps counts
    check(norm, case, inputs, dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_row_has_the_norm_that_eps_gives_it(norm):
    case = uniform(2, 4, 4, 4, patch=2)
    inputs = tensors(case) | {"hidden": torch.full((2 * case.rows + 3, WIDTH), 3.0, device=DEVICE, dtype=torch.float64)}
    found = run(norm, case, inputs, torch.float32, eps=16.0)
    for name, expected in run(norm, case, inputs, torch.float64, reference=True, eps=16.0).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("missing", [("shift",), ("bias",), ("shift", "bias")], ids="-".join)
@pytest.mark.parametrize("norm", NORMS)
def test_shift_and_bias_may_be_none(norm, missing):
    case = CASES["one image"]
    check(norm, case, tensors(case, missing=missing), torch.float32)


def test_the_loss_is_that_of_the_operators_one_after_the_other():
    case = uniform(2, 4, 4, 6, patch=2)
    hidden, scale, shift, weight, bias = (x.float() for x in tensors(case).values())
    p, q, w = (numbers(case.images, seed) for seed in (1, 2, 3))
    places, index = places_of(case), torch.arange(case.rows, device=DEVICE) // 6
    normed = tfkernels.modulated_layer_norm(hidden[places], None, None, scale, shift, index)
    expected = diffusion_loss(normed @ weight.T + bias, case.data.float(), p, q, w, SEED, patch_size=2)
    found = modulated_layer_norm_diffusion_loss(hidden, places, scale, shift, weight, bias, case.data.float(), p, q, w,
                                                SEED, patch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_every_layout_gives_the_same_losses_and_gradients():
    x0 = random(3, 4, 4, 6).float().to(DEVICE)
    case = uniform(3, 4, 4, 6, patch=2)
    offsets = torch.tensor([0, 6, 12, 18], dtype=torch.int32, device=DEVICE)
    inputs = [x.float().requires_grad_() for x in tensors(case).values()]
    p, q, places = numbers(3, 1), numbers(3, 2), places_of(case)
    losses = [modulated_rms_norm_diffusion_loss(inputs[0], places, *inputs[1:], x, p, q, None, SEED, **options)
              for x, options in ((x0, {"patch_size": 2}), (pack_latents(list(x0), 2), {}),
                                 (patchify(x0, 2), {"offsets": offsets}))]
    gradients = [torch.autograd.grad(loss.sum(), inputs) for loss in losses]
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], rtol=1e-6, atol=0)
        for ours, theirs in zip(gradients[other], gradients[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_what_no_patch_names_counts_nowhere_and_gets_no_gradient(norm):
    case = rows_of_tokens([4, 0, 3], 16, before=1, behind=3)
    inputs, places = tensors(case), places_of(case)
    named = torch.zeros(len(inputs["hidden"]), dtype=torch.bool, device=DEVICE)
    named[places[places >= 0]] = True
    expected = run(norm, case, inputs, torch.float32)
    inputs["hidden"][~named] = float("nan")
    found = run(norm, case, inputs, torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not found["dhidden"][~named].any() and found["dhidden"][named].any(1).all()
    assert torch.equal(found["loss"] == 0, case.layout[0].diff() == 0) and not found["dscale"][1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
def test_what_an_image_without_rows_and_padding_hold_reaches_nothing(norm, value, monkeypatch):
    case = rows_of_tokens([4, 0, 3], 16, before=1, behind=3)
    inputs, dloss, data = tensors(case), random(3, seed=5).to(DEVICE), case.data.clone()
    expected = run(norm, case, inputs, torch.float32, dloss=dloss)
    dloss[1] = value
    for name in ("scale", "shift"):
        inputs[name][1] = value
    data[:1], data[8:] = value, value
    count = numbers
    monkeypatch.setitem(run.__globals__, "numbers",
                        lambda images, seed: count(images, seed).index_fill(0, torch.tensor(1, device=DEVICE), value))
    found = run(norm, case._replace(x=data), inputs, torch.float32, dloss=dloss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["hidden", "scale", "shift", "weight", "bias"])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_that_a_patch_sees_shows_wherever_the_reference_has_it(norm, what):
    case = rows_of_tokens([4, 2, 3], 16, before=1, behind=3)
    inputs = tensors(case)
    at = {"hidden": (int(places_of(case)[6]), 3), "bias": (3,)}.get(what, (1, 3))
    inputs[what][at] = float("nan")
    found, expected = run(norm, case, inputs, torch.float32), run(norm, case, inputs, torch.float64, reference=True)
    assert expected["loss"].isnan().any() and torch.equal(found["loss"].isnan(), expected["loss"].isnan())
    for name in expected:
        assert not (expected[name].isnan() & ~found[name].isnan()).any(), name


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="on a GPU looking would synchronise")
def test_a_place_named_twice_is_refused_where_looking_costs_nothing():
    case = rows_of_tokens([4, 3], 16)
    places = places_of(case)
    places[5] = places[2]
    with pytest.raises(ValueError, match=f"places names row {places[2]} 2 times; each row at most once fits"):
        run(NORMS[0], case, tensors(case), torch.float32, places=places)


def test_strides_as_they_come_give_equal_results():
    case = CASES["one image"]
    inputs = {n: x.float() for n, x in tensors(case).items()}
    inputs["hidden"], places = inputs["hidden"][:8], torch.arange(4, device=DEVICE) * 2
    table = torch.cat([inputs["scale"], inputs["shift"]], 1)  # (N, 2 C), as one projection gives it
    laid = inputs | dict(zip(("scale", "shift"), table.chunk(2, 1))) | {"weight": inputs["weight"].T.contiguous().T}
    expected = run("modulated_layer_norm", case, laid, torch.float32, places=places)
    for name, x in run("modulated_layer_norm", case, inputs, torch.float32, places=places).items():
        # the products of shift and weight may round otherwise
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6)
    for layout in (lambda x: torch.cat([x, x], 1)[:, :WIDTH], lambda x: torch.stack([x, x], -1)[..., 0],
                   lambda x: x.unflatten(0, (2, 4)).transpose(0, 1).contiguous().transpose(0, 1)):
        found = run("modulated_layer_norm", case, laid | {"hidden": layout(inputs["hidden"])}, torch.float32,
                    places=places)
        assert all(torch.equal(x.reshape(expected[name].shape), expected[name]) for name, x in found.items())


def test_results_repeat_in_bits_whatever_else_is_wanted():
    case = rows_of_tokens([3, 10], 16)
    inputs = tensors(case)
    first, again = (run("modulated_layer_norm", case, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    p, q, w, dloss = *(numbers(case.images, seed) for seed in (1, 2, 3)), random(case.images, seed=5).float().to(DEVICE)
    for wanted in (("hidden",), ("bias",), ("scale", "weight")):
        some = {n: x.float().requires_grad_(n in wanted) for n, x in inputs.items()}
        hidden, *rest = some.values()
        loss = modulated_layer_norm_diffusion_loss(hidden, places_of(case), *rest, case.data.float(), p, q, w, SEED,
                                                   **case.options)
        for name, gradient in zip(wanted, torch.autograd.grad(loss, [some[n] for n in wanted], dloss)):
            assert torch.equal(gradient, first[f"d{name}"])


@pytest.mark.skipif(not KERNEL_RUNS, reason="chunks are the kernel's")
def test_how_many_programs_share_the_patches_changes_rounding_only(monkeypatch):
    case = rows_of_tokens([7, 0, 11, 1], 16, before=1, behind=2)
    expected = run("modulated_layer_norm", case, tensors(case), torch.float32)
    monkeypatch.setattr(kernels, "PROGRAMS", 100)
    monkeypatch.setattr(kernels, "FEWEST_ROWS", 3)
    for name, found in run("modulated_layer_norm", case, tensors(case), torch.float32).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_each_input_may_have_its_own_dtype_and_float16_holds_small_gradients(norm):
    case = CASES["packed"]
    inputs = tensors(case)
    inputs["hidden"] = inputs["hidden"].half().double()
    p, q, dloss = numbers(case.images, 1), numbers(case.images, 2), torch.full((case.images,), 1e-7, device=DEVICE)
    mixed = {n: x.to(torch.float16 if n in ("hidden", "bias") else torch.float32).requires_grad_()
             for n, x in inputs.items()}
    hidden, *rest = mixed.values()
    loss = getattr(tfkernels, f"{norm}_diffusion_loss")(hidden, places_of(case), *rest, case.like(case.data.float()), p,
                                                        q, None, SEED)
    gradients = dict(zip(mixed, torch.autograd.grad(loss, list(mixed.values()), dloss)))
    exact = run(norm, case, inputs, torch.float64, reference=True, weighted=False, dloss=dloss)
    torch.testing.assert_close(loss.double(), exact["loss"], rtol=2e-3, atol=0)
    for name, x in mixed.items():
        assert gradients[name].dtype == x.dtype
        if x.dtype == torch.float32:
            torch.testing.assert_close(gradients[name].double() / 1e-7, exact[f"d{name}"] / 1e-7, rtol=4e-3, atol=4e-3)


def test_backward_keeps_nothing_as_wide_as_hidden_but_hidden():
    case, sizes = CASES["one image"], []
    hidden, *rest = (x.float().requires_grad_() for x in tensors(case, 512).values())
    given = {x.data_ptr() for x in (hidden, *rest)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(0 if x.data_ptr() in given else x.numel())
                                                  or x, lambda x: x):
        modulated_layer_norm_diffusion_loss(hidden, places_of(case), *rest, case.data.float(), numbers(1, 1),
                                            numbers(1, 2), None, SEED, patch_size=2)
    assert sum(sizes) < 2 * 512 * case.images + case.rows * (case.dim + 4 + 1) + 32


@pytest.mark.parametrize("bad", [-1, 75])
def test_a_place_that_is_not_there_is_never_silent(bad):
    case = CASES["latents"]
    places = places_of(case)
    places[13] = bad
    if not KERNEL_RUNS:
        with pytest.raises(ValueError, match=f"places has rows .*{bad}.* and hidden 75; 0 to 74 fits"):
            run("modulated_rms_norm", case, tensors(case), torch.float32, places=places)
        return
    found = run("modulated_rms_norm", case, tensors(case), torch.float32, places=places)
    assert (found["loss"].isnan().tolist() == [False, True, False] and found["dweight"].isnan().any()
            and found["dscale"][1].isnan().all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["no images", "no rows"])
def test_no_image_and_no_row_give_zero_gradients(name, norm):
    case = {"no rows": rows_of_tokens([0, 0], 16), **CASES}[name]
    found = run(norm, case, tensors(case), torch.float32)
    assert all(not x.any() for x in found.values()) and found["loss"].shape == (case.images,)


@cpu_only
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["one image", "tokens, padding"])
def test_gradients_pass_gradcheck(name, norm):
    case = {"tokens, padding": rows_of_tokens([3, 0, 2], 6, before=1, behind=1), **CASES}[name]
    inputs = [x.requires_grad_() for x in tensors(case, 5).values()]
    p, q, w = (numbers(case.images, seed) for seed in (1, 2, 3))
    function = getattr(tfkernels, f"{norm}_diffusion_loss")
    assert torch.autograd.gradcheck(lambda hidden,
                                    *rest: function(hidden, places_of(case), *rest, case.x, p, q, w, SEED,
                                                    **case.options), inputs)


@traced
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_opcheck(name, center):
    case = CASES[name]
    hidden, scale, _, weight, _ = (x.float().requires_grad_() for x in tensors(case).values())
    p, q, w = (numbers(case.images, seed) for seed in (1, 2, 3))
    base = random(case.images, case.dim).float().to(DEVICE).requires_grad_() if center else None
    arguments = (places_of(case), scale, weight, base, case.data.float(), p, q, w, SEED, *case.layout, 1e-6, center)
    torch.library.opcheck(_loss, (hidden, *arguments))
    _, error, statistics = _loss(
        hidden.detach(), *(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    )
    given = (numbers(case.images, 6), hidden.detach(), places_of(case), scale.detach(), weight.detach(), w,
             case.layout[0], error, statistics)
    for wanted in ([True, True, True, center], [False, True, False, False]):
        torch.library.opcheck(_backward, (*given, wanted))


@traced
@pytest.mark.parametrize("norm", NORMS)
def test_compiles_whole_and_serves_other_lengths_without_a_graph_break(norm):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(tfkernels, f"{norm}_diffusion_loss")

    def step(hidden, scale, shift, weight, bias, places, x, offsets, p, q):
        return function(hidden * 2, places, scale, shift, weight, bias, x, p, q, None, SEED, offsets=offsets).sum()

    compiled, frames = torch.compile(step, fullgraph=True, backend=counter, dynamic=True), []
    # not three images first: torch takes sizes that are equal for one, and a seed has 3
    for counts in ([1, 9, 4, 4, 2], [7, 3], [5, 2, 12]):
        case = rows_of_tokens(counts, 12)
        inputs = [x.float().requires_grad_() for x in tensors(case).values()]
        others = (places_of(case), case.data.float(), case.options["offsets"], numbers(case.images, 1),
                  numbers(case.images, 2))
        actual, expected = (torch.autograd.grad(f(*inputs, *others), inputs) for f in (compiled, step))
        for ours, theirs in zip(actual, expected):
            torch.testing.assert_close(ours, theirs)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0]  # the first call may begin anew once, when it finds eps constant


def test_autocast_changes_nothing():
    case = CASES["one image"]
    inputs, found = [x.float().requires_grad_() for x in tensors(case).values()], []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.float16 if INTERPRET else torch.bfloat16, enabled=enabled):
            loss = modulated_layer_norm_diffusion_loss(inputs[0], places_of(case), *inputs[1:], case.data.float(),
                                                       numbers(1, 1), numbers(1, 2), None, SEED, patch_size=2)
            inside = torch.autograd.grad(loss, inputs[:2] + inputs[4:], retain_graph=True)
        # shift's, a product of PyTorch's, outside as PyTorch asks
        found.append((loss, *inside, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


HIDDEN, TABLE, WEIGHT, BIAS = torch.zeros(20, 8), torch.zeros(2, 8), torch.zeros(12, 8), torch.zeros(12)
BAD_CALLS = {
    r"hidden has shape \(8,\) on .*; \(tokens, C\) or \(batch, tokens, C\)": {"hidden": HIDDEN[0]},
    r"hidden has shape \(20, 0\)": {"hidden": HIDDEN[:, :0]},
    "hidden is torch.int32 on": {"hidden": HIDDEN.int()},
    r"places is torch.int64 of shape \(11,\) on .*; int64 \(12,\)": {"places": torch.arange(11)},
    "places is torch.int32 of shape": {"places": torch.arange(12).int()},
    "places is a list": {"places": [0] * 12},
    r"scale has shape \(1, 8\); \(2, 8\) fits 2 images of 12 elements a patch and 8 columns of hidden":
        {"scale": TABLE[:1]},
    "scale is None": {"scale": None},
    r"shift has shape \(2, 7\); \(2, 8\) fits": {"shift": TABLE[:, :7]},
    r"weight has shape \(11, 8\); \(12, 8\) fits": {"weight": WEIGHT[:11]},
    "weight is torch.float64 on cpu and hidden torch.float32 on cpu; float16, bfloat16 or float32 on the same device":
        {"weight": WEIGHT.double()},
    r"bias has shape \(8,\); \(12,\) fits": {"bias": HIDDEN[0]},
    r"p is torch.float32 of shape \(3,\)": {"p": torch.ones(3)},
    "q requires a gradient, which .* pass q.detach": {"q": torch.ones(2, requires_grad=True)},
    "loss_weight is a float": {"loss_weight": 1.0},
    "x0 requires a gradient": {"x0": torch.zeros(2, 3, 4, 6, requires_grad=True)},
    "x0 is 4x6 and patch_size 3": {"patch_size": 3},
    "seed is a str": {"seed": "7"},
    "eps is -1.0; 0 or more fits": {"eps": -1.0},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_inputs_that_do_not_fit_are_refused_by_name(message):
    given = {"hidden": HIDDEN, "places": torch.arange(12), "scale": TABLE, "shift": TABLE, "weight": WEIGHT,
             "bias": BIAS, "x0": torch.zeros(2, 3, 4, 6), "p": torch.ones(2), "q": torch.ones(2), "loss_weight": None,
             "seed": 3, "patch_size": 2}
    with pytest.raises(ValueError, match="modulated_rms_norm_diffusion_loss: " + message):
        modulated_rms_norm_diffusion_loss(**given | BAD_CALLS[message])


FLAGS = {"all": {}, "rows": {"WEIGHT": False, "BASE": False}, "head": {"HIDDEN": False, "SCALE": False}}
LAYOUTS = {16: ("latents", 2), 32: ("latents", 2), 64: ("packed", 4), 300: ("tokens", 1)}


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dim", LAYOUTS)
def test_the_kernels_spill_nothing(dim, size, architecture):
    launch, (layout, patch), tile = kernels.config(kernels.FORWARD, size), LAYOUTS[dim], kernels.tile(dim, size)
    constants = {"C": 4096, "CENTER": dim != 32, "PRECISION": "ieee", **tile}
    shared = constants | {"BASE": True, "GUESS": kernels.PILOT * launch.block_n, "LAYOUT": layout,
                          "SEARCH": layout != "latents", "PATCH": patch}
    own = {"BLOCK_R": launch.block_m, "BLOCK_C": launch.block_n, "AWAITED": kernels.awaited(architecture, size)}
    found = [resources(kernels._head_loss_fwd, shared | own, launch, architecture=architecture, element_size=size,
                       fuses=False)]
    launch = kernels.config(kernels.BACKWARD, size)
    for flags in ("all",) if dim <= tile["BLOCK_D"] else ("rows", "head"):
        flags = dict.fromkeys(("HIDDEN", "SCALE", "WEIGHT", "BASE"), True) | FLAGS[flags]
        found.append(resources(kernels._head_loss_bwd,
                               constants | flags | {"BLOCK_R": launch.block_m, "BLOCK_C": launch.block_n}, launch,
                               architecture=architecture, element_size=size, float32=("k_ptr", "dweight_ptr")))
    found.append(resources(kernels._head_loss_factors, {"DIM": dim, "BLOCK": kernels.BLOCK}, Config(1, 1, 4, 3),
                           architecture=architecture, element_size=size, float32=("k_ptr", "top_ptr",
                                                                                  "loss_weight_ptr")))
    assert all(f.fit(architecture) for f in found), found


@pytest.mark.parametrize("norm", NORMS)
def test_columns_whose_beginning_is_small_do_not_overflow_in_half_precision(norm):
    """The normalised row is at most the root of its width, whatever its first columns are."""
    case = CASES["latents"]
    inputs = tensors(case, 64)
    inputs["hidden"][:, :32] *= 0.01
    inputs["hidden"][:, 50] = 1000.0
    check(norm, case, inputs, torch.float16)
