"""Patches into the sequence: values and gradients against float64, what goes nowhere, strides, and PyTorch's
machinery."""
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, compiles, cpu_only, traced
from tests.resources import resources
from tests.tfkernels.patches.latents import random
from tfkernels import embed_patches, embed_patches_reference
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels._library import INTERPRET
from tfkernels.patches import embed as op
from tfkernels.patches.reference import placed
from tfkernels.patches.triton import embed
from transfusion.model.image_layers.embedding import PatchEmbedding

NAMES = ("hidden", "patches", "weight", "condition")


class Case(NamedTuple):
    """The operator's arguments in float64, and the gradient that arrives."""

    tensors: dict[str, Tensor]
    places: Tensor
    offsets: Tensor
    dout: Tensor

    def rounded(self, dtype: torch.dtype) -> "Case":
        """The same numbers as `dtype` holds them, in float64."""
        return self._replace(tensors={n: x.to(dtype).double() for n, x in self.tensors.items()},
                             dout=self.dout.to(dtype).double())

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.tensors[n].to(DEVICE, dtype).requires_grad_() for n in NAMES]


def make(shape, width, dim, counts, before=0, behind=0, nowhere=0, seed=0) -> Case:
    """Images of `counts` patches in random places of a sequence of `shape`, between rows of padding; `nowhere` patches
    of images have no place."""
    tokens, rows = torch.Size(shape).numel(), before + sum(counts) + behind
    generator = torch.Generator().manual_seed(seed)
    places = torch.full((rows,), -1)
    taken = torch.randperm(sum(counts), generator=generator)[nowhere:] + before
    places[taken] = torch.randperm(tokens, generator=generator)[:len(taken)]
    places[:before] = places[before + sum(counts):] = 0  # padding goes nowhere, whatever its place
    sizes = (*shape, width), (rows, dim), (width, dim), (len(counts), width)
    tensors = {n: random(*size, seed=seed + i) for i, (n, size) in enumerate(zip(NAMES, sizes))}
    offsets = torch.tensor([0, *counts]).cumsum(0).int() + before
    return Case(tensors, places.to(DEVICE), offsets.to(DEVICE), random(*shape, width, seed=seed + 4))


CASES = {"images between text": make((70,), 40, 20, [9, 13, 20]), "a batch": make((2, 37), 72, 16, [30, 17]),
         "padding, an empty image, no place": make((90,), 48, 37, [7, 0, 1, 12, 30, 0], before=3, behind=6, nowhere=5),
         "images alone": make((51,), 33, 8, [17, 17, 17]),
         "small images, wide patches": make((64,), 20, 100, [1, 2, 3] * 8), "text alone": make((20,), 24, 8, []),
         "padding alone": make((20,), 24, 8, [], before=5), "no tokens": make((0,), 24, 8, [4], nowhere=4),
         "an empty batch": make((0, 7), 24, 8, []), "one of each": make((1,), 1, 1, [1]),
         "every place negative": make((9,), 24, 8, [6], nowhere=6)}
TYPICAL = "padding, an empty image, no place"


def run(function, inputs, case):
    """The output and the gradient of every input."""
    out = function(*inputs, case.places, case.offsets)
    return out.detach(), *torch.autograd.grad(out, inputs, case.dout.to(DEVICE, out.dtype))


def absolute_terms(case):
    """The sums behind the output and every gradient over absolute values: those of the operator on absolute values."""
    inputs = [x.abs().to(DEVICE).requires_grad_() for x in case.tensors.values()]
    return run(embed_patches_reference, inputs, case._replace(dout=case.dout.abs()))


def check(case, dtype):
    """Hold the operator to the accuracy rule in its output and every gradient."""
    case = case.rounded(dtype)
    ours = run(embed_patches, case.inputs(dtype), case)
    exact, theirs = (run(embed_patches_reference, case.inputs(t), case) for t in (torch.float64, dtype))
    for what, a, e, r, t in zip(("out", *(f"d{n}" for n in NAMES)), ours, exact, theirs, absolute_terms(case),
                                strict=True):
        assert a.dtype == dtype and a.shape == e.shape and a.is_contiguous()
        assert_as_accurate(what, a, r, e, terms=t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_as_accurate_as_pytorch(name, dtype):
    check(CASES[name], dtype)


def test_text_is_copied_to_the_bit_and_what_images_replace_is_never_read():
    case = CASES[TYPICAL]
    hidden, *rest = case.inputs(torch.float32)
    row, place, _ = placed(case.places, case.offsets)
    poisoned = hidden.detach().clone()
    poisoned[place] = float("nan")
    poisoned.requires_grad_()
    out, dhidden, *_ = run(embed_patches, [poisoned, *rest], case)
    text = torch.ones(90, dtype=torch.bool, device=DEVICE).index_fill(0, place, False)
    assert len(place) == 45 and not out.isnan().any() and torch.equal(out[text], hidden[text])
    dout = case.dout.to(out)
    assert torch.equal(dhidden[text], dout[text]) and not dhidden[place].any()


def test_patches_that_go_nowhere_count_nowhere():
    case = CASES[TYPICAL]
    inputs = case.inputs(torch.float32)
    expected = run(embed_patches, inputs, case)
    row, _, image = placed(case.places, case.offsets)
    poisoned = torch.full_like(inputs[1], float("nan")).index_copy(0, row, inputs[1].detach()[row]).requires_grad_()
    found = run(embed_patches, [inputs[0], poisoned, *inputs[2:]], case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    empty = torch.bincount(image, minlength=6) == 0  # two images without patches, and one whose patch has no place
    nowhere = torch.ones(len(case.places), dtype=torch.bool, device=DEVICE).index_fill(0, row, False)
    assert not found[2][nowhere].any() and found[2][row].any(1).all()
    assert empty.sum() == 3 and not found[4][empty].any() and found[4][~empty].any(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_condition_of_an_image_without_patches_reaches_nothing(value):
    case = CASES[TYPICAL]
    inputs = case.inputs(torch.float32)
    expected = run(embed_patches, inputs, case)
    _, _, image = placed(case.places, case.offsets)
    empty = torch.bincount(image, minlength=6) == 0
    condition = inputs[3].detach().masked_fill(empty[:, None], value).requires_grad_()
    found = run(embed_patches, [*inputs[:3], condition], case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("what", ["hidden", "patches", "weight", "condition", "dout"])
def test_nan_that_shows_in_the_reference_shows_in_ours(what):
    case = CASES[TYPICAL]
    row, place, image = (int(x[4]) for x in placed(case.places, case.offsets))
    text = min(set(range(90)) - set(placed(case.places, case.offsets)[1].tolist()))
    at = {"hidden": text, "patches": row, "weight": 5, "condition": image, "dout": place}[what]
    case = case._replace(tensors={n: x.clone() for n, x in case.tensors.items()}, dout=case.dout.clone())
    (case.dout if what == "dout" else case.tensors[what])[at, 3] = float("nan")
    found, expected = (run(embed_patches, case.inputs(torch.float32), case),
                       run(embed_patches_reference, case.inputs(torch.float64), case))
    for name, a, b in zip(("out", *NAMES), found, expected):
        assert not (b.isnan() & ~a.isnan()).any(), name
    assert found[0].isnan().any() == (what != "dout")


@pytest.mark.skipif(KERNEL_RUNS, reason="on a GPU looking would synchronise")
def test_a_place_named_twice_is_refused_where_looking_costs_nothing():
    case = CASES[TYPICAL]
    row, place, _ = placed(case.places, case.offsets)
    places = case.places.clone()
    places[row[3]] = place[7]
    with pytest.raises(ValueError, match=f"embed_patches: places names row {int(place[7])} 2 times; each row at most "
                                         "once fits"):
        embed_patches(*case.inputs(torch.float32), places, case.offsets)
    # rows of padding may name anything, as often as they like
    places[row[3]] = -1
    embed_patches(*case.inputs(torch.float32), places, case.offsets)


@pytest.mark.skipif(not KERNEL_RUNS, reason="a CPU refuses it")
def test_of_patches_that_name_one_place_one_takes_it():
    case = CASES[TYPICAL]
    row, place, _ = placed(case.places, case.offsets)
    places = case.places.clone()
    places[row[3]] = place[7]
    inputs = case.inputs(torch.float32)
    found = embed_patches(*inputs, places, case.offsets)[place[7]]
    each = [embed_patches_reference(*inputs,
                                    case.places.index_fill(0, row[other], -1).index_fill(0, row[one], int(place[7])),
                                    case.offsets)[place[7]] for one, other in ((3, 7), (7, 3))]
    assert any(torch.allclose(found, x, atol=1e-5) for x in each)


def test_it_is_the_models_patch_embedding():
    torch.manual_seed(0)
    layer = PatchEmbedding(SimpleNamespace(patch_dim=20), 40).to(DEVICE)
    torch.nn.init.normal_(layer.time.weight)
    case = CASES["images between text"]
    hidden, patches, _, times = (x.to(DEVICE).float() for x in case.tensors.values())
    row, place, image = placed(case.places, case.offsets)
    # the timestep before the linear layer
    expected = hidden.index_copy(0, place, layer.linear(patches[row] + layer.time(times)[image]))
    layout = SimpleNamespace(offsets=case.offsets)
    torch.testing.assert_close(layer(hidden, patches, times, layout, case.places)[0], expected, rtol=1e-5, atol=1e-5)


def test_strides_as_they_come_give_equal_results():
    case = CASES["a batch"]
    inputs = case.inputs(torch.float32)
    expected = run(embed_patches, inputs, case)
    for layout in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
                   lambda x: torch.cat([x, x], -1)[..., :x.shape[-1]], lambda x: torch.stack([x, x], -1)[..., 0],
                   lambda x: torch.cat([x, x], -2)[..., :x.shape[-2], :]):
        laid = [layout(x.detach()).requires_grad_() for x in inputs]
        out = embed_patches(*laid, case.places.repeat_interleave(2)[::2], case.offsets.repeat_interleave(2)[::2])
        found = out, *torch.autograd.grad(out, laid, layout(case.dout.to(out)))
        assert out.is_contiguous() and all(torch.equal(a, b) for a, b in zip(found, expected))
    out = embed_patches(*inputs, case.places, case.offsets)
    ones = case._replace(dout=torch.ones_like(case.dout))
    for a, b in zip(torch.autograd.grad(out.sum(), inputs), run(embed_patches, inputs, ones)[1:]):
        assert torch.equal(a, b)


def test_results_are_the_same_to_the_bit_every_time():
    case = make((200,), 40, 24, [60, 3, 70]) if not INTERPRET else CASES[TYPICAL]
    inputs = case.inputs(torch.float32)
    first = run(embed_patches, inputs, case)
    for _ in range(1 if INTERPRET else 20):
        assert all(torch.equal(a, b) for a, b in zip(run(embed_patches, inputs, case), first))


@pytest.mark.skipif(not KERNEL_RUNS, reason="plain PyTorch knows no tiles")
@pytest.mark.parametrize("programs, parts", [(1, 1), (64, 64)])
def test_results_do_not_depend_on_how_the_work_is_shared(programs, parts, monkeypatch):
    case = make((100,), 40, 24, [30, 3, 20], before=5)
    inputs = case.inputs(torch.float32)
    first = run(embed_patches, inputs, case)
    monkeypatch.setattr(embed, "PROGRAMS", programs)
    monkeypatch.setattr(embed, "PARTS", parts)
    found = run(embed_patches, inputs, case)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], first))
    for a, b in zip(found[3:], first[3:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.float16, *[torch.float32] * 3), (torch.float32, *[torch.float16] * 3)],
                         ids=["half", "float"])
def test_each_argument_may_have_its_own_dtype(dtypes):
    case = CASES["images between text"]
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(case.tensors.values(), dtypes)]
    found = run(embed_patches, inputs, case)
    held = [x.detach().to(dtypes[0]).double().requires_grad_() for x in inputs[:3]] + [
        inputs[3].detach().double().requires_grad_()
    ]
    exact = run(embed_patches_reference, held, case._replace(dout=case.dout.to(dtypes[0])))
    assert found[0].dtype == dtypes[0] and all(g.dtype == x.dtype for g, x in zip(found[1:], inputs))
    for a, e, t in zip(found, exact, absolute_terms(case)):
        assert ((a.double() - e).abs() <= torch.finfo(torch.float16).eps * (e.abs() + t / 64) + 1e-6).all()


def test_autocast_changes_nothing():
    case = CASES["images between text"]
    expected = run(embed_patches, case.inputs(torch.float32), case)
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        found = run(embed_patches, case.inputs(torch.float32), case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_backward_keeps_the_patches_and_not_the_tokens():
    case, sizes = make((70,), 40, 20, [9, 13]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        embed_patches(*case.inputs(torch.float32), case.places, case.offsets)
    assert max(sizes) == 40 * 20 and 22 * 20 in sizes


class Wanted(TorchDispatchMode):
    """Records which gradients the backward operator was asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.tfkernels.embed_patches_backward.default:
            self.asked = args[-3:]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed, asked",
                         [("hidden", (True, False, False)), ("patches", (False, True, False)),
                          ("weight", (False, False, True)), ("condition", (False, False, True))])
def test_only_the_gradients_that_are_needed_are_computed(needed, asked):
    case = CASES[TYPICAL]
    expected = dict(zip(NAMES, run(embed_patches, case.inputs(torch.float32), case)[1:]))
    inputs = {n: x.detach().requires_grad_(n == needed) for n, x in zip(NAMES, case.inputs(torch.float32))}
    out = embed_patches(*inputs.values(), case.places, case.offsets)
    with Wanted() as mode:
        gradient, = torch.autograd.grad(out, inputs[needed], case.dout.to(out))
    assert mode.asked == asked and torch.equal(gradient, expected[needed])
    found = op._backward(case.dout.to(out), *(x.detach() for x in list(inputs.values())[1:]), case.places, case.offsets,
                         *asked)
    assert [g.numel() > 0 for g in found] == [*asked, asked[-1]]


@cpu_only
@pytest.mark.parametrize("name", ["a batch", TYPICAL])
def test_gradients_pass_gradcheck(name):
    shape, counts = ((2, 5), [3, 2]) if name == "a batch" else ((9,), [2, 0, 3])
    case = make(shape, 3, 4, counts, before=1, behind=2, nowhere=1)
    inputs = [x.requires_grad_() for x in case.tensors.values()]
    assert torch.autograd.gradcheck(lambda *x: embed_patches(*x, case.places, case.offsets), inputs)


@traced
@pytest.mark.parametrize("name", ["a batch", TYPICAL, "text alone"])
def test_opcheck(name):
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    torch.library.opcheck(op._embed, (*inputs, case.places, case.offsets))
    for wanted in ((True, True, True), (False, False, True), (True, False, False)):
        torch.library.opcheck(op._backward,
                              (case.dout.to(inputs[0]), *(x.detach() for x in inputs[1:]), case.places, case.offsets,
                               *wanted))


@traced
def test_compiles_whole_and_does_not_recompile_when_tokens_or_images_change():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(places, offsets, hidden, *inputs):
        return embed_patches(hidden * 2, *inputs, places, offsets).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens, counts in ((70, [9, 13, 20]), (55, [8, 7]), (90, [5, 1, 30, 2]), (64, [3] * 9)):
        case = make((tokens,), 40, 20, counts)
        inputs = case.inputs(torch.float32)
        found, expected = (torch.autograd.grad(f(case.places, case.offsets, *inputs), inputs) for f in (compiled, step))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one static, one with dynamic sizes


def test_a_place_behind_the_sequence_is_refused_or_none():
    case = CASES["images between text"]
    places = case.places.clone()
    places[3] = 70
    inputs = case.inputs(torch.float32)
    if not KERNEL_RUNS:
        with pytest.raises(
            ValueError, match="embed_patches: places names row 70 and hidden has 70; negative \\(none\\) to 69 fits"
        ):
            embed_patches(*inputs, places, case.offsets)
        return
    found = run(embed_patches, inputs, case._replace(places=places))
    places[3] = -1
    assert all(torch.equal(a, b) for a, b in zip(found, run(embed_patches, inputs, case._replace(places=places))))


def test_bad_inputs_are_refused_by_name():
    given = {"hidden": torch.zeros(8, 16, device=DEVICE), "patches": torch.zeros(5, 12, device=DEVICE),
             "weight": torch.zeros(16, 12, device=DEVICE), "condition": torch.zeros(2, 16, device=DEVICE),
             "places": torch.arange(5, device=DEVICE),
             "offsets": torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)}
    assert embed_patches(**given).shape == (8, 16)
    for name, bad, message in [
        ("hidden", given["hidden"][0], "hidden has shape \\(16,\\); \\(tokens, C\\) or \\(batch, tokens, C\\) fits"),
        ("hidden", given["hidden"][:, :0], "hidden has shape \\(8, 0\\); .* C at least 1"),
        ("hidden", given["hidden"].int(), "hidden is torch.int32 on .*; float16, bfloat16 or float32 fits"),
        ("patches", given["patches"][None],
         "patches has shape \\(1, 5, 12\\); \\(P, D\\) fits, D at least 1; patchify latents first"),
        ("patches", given["patches"][:, :0], "patches has shape \\(5, 0\\); \\(P, D\\) fits"),
        ("patches", given["patches"].double(),
         "patches is torch.float64 on .* and hidden torch.float32 on .*; float16, bfloat16 or float32"),
        ("weight", given["weight"].T,
         "weight has shape \\(12, 16\\), hidden 16 columns and patches 12 elements; \\(16, 12\\) fits, as an"),
        ("weight", given["weight"].long(), "weight is torch.int64 on .* and hidden torch.float32"),
        ("condition", given["condition"][:1],
         "condition has shape \\(1, 16\\), offsets 2 images and hidden 16 columns; \\(2, 16\\) fits, a row"),
        ("condition", given["condition"].to("meta"), "condition is torch.float32 on meta and hidden torch.float32"),
        ("places", given["places"][:4],
         "places is torch.int64 of shape \\(4,\\) on .*; an int64 tensor \\(5,\\) on .* fits, the row of hidden"),
        ("places", given["places"].int(), "places is torch.int32 of shape \\(5,\\)"),
        ("places", [0, 1, 2, 3, 4], "places is a list; an int64 tensor \\(5,\\)"),
        ("offsets", given["offsets"].long(), "offsets is torch.int64 of shape \\(3,\\)"),
        ("offsets", None, "offsets is a NoneType; an int32 tensor \\(N \\+ 1,\\)")
    ]:
        with pytest.raises(ValueError, match=f"embed_patches: {message}"):
            embed_patches(**{**given, name: bad})


KERNELS = {"forward": (embed._embed_fwd, embed.FORWARD), "backward": (embed._embed_bwd, embed.BACKWARD)}


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size, dim", [(2, 64), (2, 768), (4, 64)])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_that_multiply_spill_nothing(name, size, dim, architecture):
    kernel, table = KERNELS[name]
    constants = embed.tiles(table, size, 2048, dim) | {"PRECISION": "ieee"}
    launch = Config(0, 0, constants.pop("num_warps"), constants.pop("num_stages"))
    found = resources(
        kernel, constants, launch, architecture=architecture, element_size=size, float32=("products_ptr",)
    )
    assert found.fit(architecture), found
    assert size == 4 or found.tensor_core, found


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel, constants",
                         [(embed._embed_index, {"BLOCK": embed.COPY // 16}),
                          (embed._embed_bwd_hidden, {"C": 2048, "BLOCK_R": 4, "BLOCK_C": embed.COPY // 4}),
                          (embed._embed_bwd_images, {"C": 2048, "BLOCK_M": 32, "BLOCK": 64})])
def test_the_other_kernels_spill_nothing(kernel, constants, architecture):
    found = resources(kernel, constants, Config(0, 0, 4, 3), architecture=architecture, element_size=2)
    assert found.fit(architecture), found
