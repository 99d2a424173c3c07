"""Accuracy, gradients, edge cases, registration, errors and resources of `tfkernels.norm`, on whichever device runs the
tests."""
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tfkernels
from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, compiles
from tests.resources import resources
from tfkernels import gated_residual, gated_residual_rms_norm, modulated_layer_norm, modulated_rms_norm
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels._library import INTERPRET
from tfkernels.norm import sums
from tfkernels.norm import triton as kernels
from tfkernels.norm.reference import of_token

ARGUMENTS = {
    "modulated_rms_norm": ("x", "weight", "scale", "shift"),
    "modulated_layer_norm": ("x", "weight", "bias", "scale", "shift"),
    "gated_residual": ("x", "branch", "gate"),
    "gated_residual_rms_norm": ("x", "branch", "gate", "weight", "scale", "shift"),
}
NORMS = [op for op in ARGUMENTS if op != "gated_residual"]
WIDTHS = (64, 96, 150, 1000)  # in the interpreter, whose blocks are 64 wide, all but the first go block by block


class Case(NamedTuple):
    """Inputs of any of the operators in float64, and the gradients that arrive at its outputs."""

    tensors: dict
    index: torch.Tensor
    arriving: list


def random_case(index, width, images, seed=0, missing=()):
    generator = torch.Generator().manual_seed(seed)
    tokens = index.shape
    sizes = {"x": (*tokens, width), "branch": (*tokens, width), "weight": (width,), "bias": (width,)}
    sizes |= dict.fromkeys(("gate", "scale", "shift"), (images, width))
    tensors = {name: None if name in missing else torch.randn(size, generator=generator, dtype=torch.float64)
               for name, size in sizes.items()}
    arriving = [torch.randn((*tokens, width), generator=generator, dtype=torch.float64) for _ in range(2)]
    return Case(tensors, index.to(DEVICE), arriving)


def as_tuple(x):
    return tuple(x) if isinstance(x, tuple) else (x,)


def run(op, case, dtype, *, reference=False, **options):
    """Return {name: value} of the outputs and of the gradient of every input, the inputs in `dtype`."""
    names = ARGUMENTS[op]
    inputs = {n: None if case.tensors[n] is None else case.tensors[n].to(DEVICE, dtype).requires_grad_() for n in names}
    outputs = as_tuple(getattr(tfkernels, op + "_reference" * reference)(*inputs.values(), case.index, **options))
    present = {n: x for n, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(outputs, list(present.values()),
                                [g.to(DEVICE, dtype) for g in case.arriving[-len(outputs):]])
    return dict(zip(("residual", "y")[-len(outputs):] if op != "gated_residual" else ("residual",), outputs)) | {
        f"d{n}": g for n, g in zip(present, grads)
    }


def absolute_terms(op, case, eps=1e-6):
    """The sums behind every output and gradient over absolute values, in float64: what their rounding errors scale
    with."""
    t, names = case.tensors, ARGUMENTS[op]

    def rows(name, text):
        return of_token(t[name], case.index.cpu(), text) if t.get(name) is not None else torch.zeros(())

    def vector(name, missing):
        given = name in names and t[name] is not None
        return t[name] if given else torch.full((), missing, dtype=torch.float64)

    index = case.index.cpu().reshape(-1).clamp(min=-1) + 1

    def per_image(values):
        values = values.reshape(-1, values.shape[-1])
        return values.new_zeros(t["scale"].shape[0] + 1, values.shape[1]).index_add_(0, index, values)

    x, dy = t["x"], case.arriving[-1].abs()
    found, size, dx = {}, x.abs(), 0
    if "gate" in names:
        size = x.abs() + (rows("gate", 1) * t["branch"]).abs()
        x = x + rows("gate", 1) * t["branch"]
        found["residual"] = size
        dx = dx + case.arriving[-2 if "scale" in names else -1].abs()
    if "scale" in names:
        center = op == "modulated_layer_norm"
        x, size = (x - x.mean(-1, keepdim=True), size + size.mean(-1, keepdim=True)) if center else (x, size)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat, size = (x * rstd).abs(), size * rstd
        size = size + xhat * (size * xhat).mean(-1, keepdim=True)  # how far xhat can be off, in roundings
        weight, bias = vector("weight", 1).abs(), vector("bias", 0).abs()
        factor = 1 + rows("scale", 0).abs()
        found["y"] = (size * weight + bias) * factor + rows("shift", 0).abs()
        dxhat = dy * factor * weight
        norm = (dxhat + size * (dxhat * xhat).mean(-1, keepdim=True) + xhat * (dxhat * size).mean(-1, keepdim=True)
                + dxhat.mean(-1, keepdim=True))
        dx = dx + norm * rstd * (1 + (size * xhat).mean(-1, keepdim=True))
        a, b = per_image(dy * size), per_image(dy)
        found |= {"dscale": a[1:] * weight + b[1:] * bias, "dshift": b[1:],
                  "dweight": per_image(dy * size * factor).sum(0), "dbias": per_image(dy * factor).sum(0)}
    found["dx"] = dx
    if "gate" in names:
        found |= {"dbranch": dx * rows("gate", 1).abs(), "dgate": per_image(dx * t["branch"].abs())[1:]}
    return found


def check(op, case, dtype, **options):
    """Hold the operator to the accuracy rule in every output and gradient."""
    rounded = Case({n: x if x is None else x.to(dtype).double() for n, x in case.tensors.items()}, case.index,
                   [g.to(dtype).double() for g in case.arriving])
    exact = run(op, rounded, torch.float64, reference=True, **options)
    theirs = run(op, rounded, dtype, reference=True, **options)
    ours = run(op, rounded, dtype, **options)
    terms = absolute_terms(op, rounded)
    assert exact.keys() == theirs.keys() == ours.keys()
    for name in exact:
        assert ours[name].dtype == dtype and ours[name].shape == exact[name].shape
        assert_as_accurate(f"{op} {name}", ours[name], theirs[name], exact[name],
                           terms[name].expand_as(exact[name]).to(DEVICE))


def packed_index(tokens=29, images=4):
    """Text, image 2, text, images 0 and 3 side by side, text; no token is of image 1."""
    index = torch.full((tokens,), -1)
    index[3:9], index[12:17], index[17:tokens - 2] = 2, 0, 3
    return index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_errs_at_most_twice_as_much_as_pytorch(op, width, dtype):
    check(op, random_case(packed_index(), width, 4), dtype)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_batches_and_int32_indices_fit(op):
    index = torch.stack([packed_index(13), packed_index(13).flip(0)]).int()
    check(op, random_case(index, 72, 4), torch.float32)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's small blocks reach the same loops with narrow rows")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4096, 5120, 8192, 16384] if DEVICE == "cuda" else [5120])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_wide_rows_fit(op, width, dtype):
    check(op, random_case(torch.tensor([-1, 2, 2, 0, -1, 3, 0]), width, 4), dtype)


@pytest.mark.skipif(DEVICE != "cuda", reason="more tokens than programs take a GPU's time only")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_more_tokens_than_programs(op):
    index = torch.randint(-1, 7, (3, 5000), generator=torch.Generator().manual_seed(0)).sort(1).values
    check(op, random_case(index, 320, 7), torch.bfloat16)


@pytest.mark.parametrize("missing",
                         [("weight",), ("shift",), ("bias",), ("weight", "shift"), ("weight", "bias", "shift")],
                         ids="-".join)
@pytest.mark.parametrize("op", NORMS)
def test_vectors_and_shift_may_be_none(op, missing):
    check(op, random_case(packed_index(), 80, 4, missing=missing), torch.float32)


@given(st.data())
def test_fuzzed_indices_follow_the_reference(data):
    """Text, images in any order, scattered, without tokens; negative numbers other than -1; no image at all; one
    token."""
    images = data.draw(st.integers(0, 5))
    index = torch.tensor(data.draw(st.lists(st.integers(-3, images - 1), min_size=1, max_size=12 if INTERPRET else 24)))
    op, width = data.draw(st.sampled_from(sorted(ARGUMENTS))), data.draw(st.sampled_from([2, 7, 64, 65, 130]))
    check(op, random_case(index, width, images, seed=len(index)), data.draw(st.sampled_from(DTYPES)))


def test_text_is_torchs_own_norm():
    case = random_case(torch.full((9,), -1), 96, 2)
    x, weight, bias, scale, shift = (case.tensors[n].to(DEVICE).float()
                                     for n in ("x", "weight", "bias", "scale", "shift"))
    layer = torch.nn.functional.layer_norm(x, (96,), weight, bias, 1e-5)
    torch.testing.assert_close(modulated_layer_norm(x, weight, bias, scale, shift, case.index, eps=1e-5), layer)
    torch.testing.assert_close(modulated_rms_norm(x, weight, scale, shift, case.index, eps=1e-5),
                               torch.nn.functional.rms_norm(x, (96,), weight, 1e-5))


def test_one_image_is_the_papers_formula():
    case = random_case(torch.zeros(9, dtype=torch.int64), 96, 1)
    x, branch, gate, scale, shift = (case.tensors[n].to(DEVICE).float()
                                     for n in ("x", "branch", "gate", "scale", "shift"))
    expected = torch.nn.functional.layer_norm(x, (96,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulated_layer_norm(x, None, None, scale, shift, case.index), expected)
    torch.testing.assert_close(gated_residual(x, branch, gate, case.index), x + gate * branch)


def test_eps_is_added_to_the_mean_square():
    x = torch.full((1, 64), 3.0, device=DEVICE)
    table, index = torch.zeros(0, 64, device=DEVICE), torch.full((1,), -1, device=DEVICE)
    torch.testing.assert_close(modulated_rms_norm(x, None, table, None, index, eps=16.0), x / 5)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_images_without_tokens_get_zero_gradients(op):
    found = run(op, random_case(packed_index(), 70, 4), torch.float32)
    for name in {"dgate", "dscale", "dshift"} & found.keys():
        assert (found[name][1] == 0).all() and (found[name][[0, 2, 3]] != 0).any(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_what_an_image_without_tokens_holds_reaches_nothing(op, value):
    case = random_case(packed_index(), 70, 4)
    changed = {n: x.clone() for n, x in case.tensors.items()}
    for name in ("gate", "scale", "shift"):
        changed[name][1] = value
    expected, found = (run(op, case._replace(tensors=t), torch.float32) for t in (case.tensors, changed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["x", "branch", "weight", "bias", "scale", "shift", "gate"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_nan_that_a_token_sees_shows_wherever_the_reference_has_it(op, name):
    case = random_case(packed_index(), 70, 4)
    changed = {n: x.clone() for n, x in case.tensors.items()}
    changed[name].view(-1, 70)[4 if name in ("x", "branch") else 2 if changed[name].ndim == 2 else 0, 5] = float("nan")
    case = case._replace(tensors=changed)
    found, expected = run(op, case, torch.float32), run(op, case, torch.float64, reference=True)
    for key in expected:
        assert not (expected[key].isnan() & ~found[key].isnan()).any(), key


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_token_at_all_gives_empty_outputs_and_zero_gradients(op, images):
    found = run(op, random_case(torch.zeros(0, dtype=torch.int64), 64, images), torch.float32)
    assert all((x == 0).all() for x in found.values()) and found["dx"].shape == (0, 64)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_strides_as_they_come_give_equal_results(op):
    case = random_case(torch.stack([packed_index(9), packed_index(9)]), 72, 4)
    expected = run(op, case, torch.float32)
    # (N, 3 C), as one projection gives them
    tables = torch.cat([case.tensors[n] for n in ("gate", "scale", "shift")], 1)
    tensors = case.tensors | dict(zip(("gate", "scale", "shift"), tables.to(DEVICE, torch.float32).chunk(3, 1)))
    for layout in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: torch.cat([x, x], -1)[..., :72],
                   lambda x: torch.stack([x, x], -1)[..., 0]):
        laid = tensors | {n: layout(case.tensors[n].to(DEVICE, torch.float32)) for n in ("x", "branch")}
        inputs = {n: laid[n].to(DEVICE, torch.float32).detach().requires_grad_() for n in ARGUMENTS[op]}
        assert "gate" not in inputs or inputs["gate"].stride(0) == 3 * 72
        outputs = as_tuple(getattr(tfkernels, op)(*inputs.values(), case.index[:1].expand(2, -1)))
        arriving = [layout(g.to(DEVICE, torch.float32)) for g in case.arriving[-len(outputs):]]
        found = (*outputs, *torch.autograd.grad(outputs, list(inputs.values()), arriving))
        assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_index_with_gaps_between_its_numbers_gives_equal_results(op):
    case = random_case(packed_index(9), 72, 4)
    apart = torch.stack([case.index, torch.full_like(case.index, 3)], -1)[..., 0]
    assert apart.stride() == (2,)
    found, expected = (run(op, Case(case.tensors, index, case.arriving), torch.float32)
                       for index in (apart, case.index))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


@pytest.mark.skipif(not KERNEL_RUNS, reason="the CPU's implementation has no programs")
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_few_programs_take_many_rows_each(op, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(op, random_case(packed_index(9), 72, 4), torch.float32)


@pytest.mark.parametrize("multiprocessors", [1, 84, 132])
@pytest.mark.parametrize("width", [1, 64, 700, 1024, 2048, 4096, 16384])
def test_the_programs_of_the_backward_run_all_at_once_and_take_every_row(width, multiprocessors):
    block = kernels.backward_config(width).block_n
    for tokens in (1, 7, 1000, 32_768):
        rows, programs = kernels.backward_rows(tokens, width, multiprocessors)
        assert rows >= kernels.FEWEST_ROWS and rows * (programs - 1) < tokens <= rows * programs
        assert programs <= kernels.PROGRAMS
        assert programs == 1 or programs * -(-width // block) <= multiprocessors * kernels.RESIDENT[block]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_gradients_are_the_same_to_the_bit_every_time(op):
    case = random_case(packed_index(61), 130, 4)
    first = run(op, case, torch.float32)
    for _ in range(1 if INTERPRET else 50):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), run(op, case, torch.float32).values()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_form_equals_one_after_the_other(dtype):
    case = random_case(packed_index(), 96, 4)
    x, branch, gate, weight, scale, shift = (case.tensors[n].to(DEVICE, dtype)
                                             for n in ARGUMENTS["gated_residual_rms_norm"])
    fused = gated_residual_rms_norm(x, branch, gate, weight, scale, shift, case.index)
    residual = gated_residual(x, branch, gate, case.index)
    assert torch.equal(fused.residual, residual)
    assert torch.equal(fused.normed, modulated_rms_norm(residual, weight, scale, shift, case.index))


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_may_arrive_on_one_of_the_two_streams(which):
    case = random_case(packed_index(), 70, 4)
    grads = []
    for name in ("gated_residual_rms_norm", "gated_residual_rms_norm_reference"):
        inputs = [case.tensors[n].to(DEVICE).float().requires_grad_() for n in ARGUMENTS["gated_residual_rms_norm"]]
        stream = getattr(tfkernels, name)(*inputs, case.index)[which]
        grads.append(torch.autograd.grad(stream, inputs, case.arriving[which].to(DEVICE).float(), allow_unused=True))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_each_input_may_have_its_own_dtype(op):
    case = random_case(packed_index(), 72, 4)
    wide = {"weight", "scale", "gate"}
    tensors = {n: x.to(torch.float16 if n not in wide else torch.float32).double() for n, x in case.tensors.items()}
    inputs = {n: tensors[n].to(DEVICE, torch.float32 if n in wide else torch.float16).requires_grad_()
              for n in ARGUMENTS[op]}
    outputs = as_tuple(getattr(tfkernels, op)(*inputs.values(), case.index))
    assert all(y.dtype == torch.float16 for y in outputs)
    grads = torch.autograd.grad(outputs, list(inputs.values()),
                                [g.to(DEVICE, torch.float16) for g in case.arriving[-len(outputs):]])
    arriving = [g.half().double() for g in case.arriving]
    exact = run(op, Case(tensors, case.index, arriving), torch.float64, reference=True)
    for (name, x), grad in zip(inputs.items(), grads):
        assert grad.dtype == x.dtype
        torch.testing.assert_close(grad.double(), exact[f"d{name}"], rtol=4e-3, atol=4e-2)


@pytest.mark.parametrize("op,kept",
                         [("modulated_rms_norm", 1), ("modulated_layer_norm", 1), ("gated_residual", 1),
                          ("gated_residual_rms_norm", 2)])
def test_backward_keeps_no_more_of_the_tokens_than_its_equation_needs(op, kept):
    """x for a norm; branch for a gate; both, x being the output, for the fused form."""
    case, sizes = random_case(packed_index(), 72, 4), []
    inputs = [case.tensors[n].to(DEVICE).float().requires_grad_() for n in ARGUMENTS[op]]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        getattr(tfkernels, op)(*inputs, case.index)
    assert sum(size >= inputs[0].numel() for size in sizes) == kept


FLAGS = {"norm": {"GATED": False, "NORM": True}, "gated": {"GATED": True, "NORM": False},
         "fused": {"GATED": True, "NORM": True}}


def compiled(kernel, op, width, architecture, size, left_out=("row_len",)):
    """Compile one kernel with everything it can be asked for but the arguments `left_out`."""
    center = op != "fused"  # layer norm has no fused form
    flags = FLAGS[op] | {"C": width, "CENTER": center, "WEIGHT": True}
    if kernel in ("images", "tables"):
        function = {"images": sums._norm_bwd_images, "tables": sums._norm_bwd_tables}[kernel]
        return resources(function, {"C": width, "BLOCK_M": sums.IMAGES.block_m, "BLOCK": sums.IMAGES.block_n}
                         | ({"LEVEL": True} if kernel == "tables" else {})
                         | dict.fromkeys(set(left_out) & {p.name for p in function.params}),
                         sums.IMAGES, architecture=architecture, element_size=size)
    launch: Config = kernels.forward_config(width) if kernel == "fwd" else kernels.backward_config(width)
    constants = {"fwd": flags | {"BIAS": center, "SHIFT": True}, "bwd": flags | {"LEVEL": True},
                 "means": {k: flags[k] for k in ("C", "CENTER", "WEIGHT")}}[kernel]
    function = {"fwd": kernels._norm_fwd, "bwd": kernels._norm_bwd, "means": kernels._norm_bwd_means}[kernel]
    constants |= {"BLOCK": launch.block_n} | dict.fromkeys(set(left_out) & {p.name for p in function.params})
    return resources(function, constants, launch, architecture=architecture,
                     element_size=size)


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("width", [64, 512, 1024, 2048, 3000, 4096, 16384])
def test_the_kernels_spill_nothing(width, size, architecture):
    variants = [(kernel, op) for kernel in ("fwd", "bwd") for op in FLAGS] + [("means", "norm")] * (
        width > kernels.WIDEST_BACKWARD
    ) + [("images", "norm"), ("tables", "norm")]
    for kernel, op in variants:
        found = compiled(kernel, op, width, architecture, size)
        assert found.fit(architecture), (kernel, op, found)
        if kernel == "bwd":
            launch = kernels.backward_config(width)
            of_a_program = 32 * launch.num_warps * 8 * -(-found.registers // 8)             # ptxas rounds up to 8
            assert kernels.RESIDENT[launch.block_n] * of_a_program <= 65_536, (op, found)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's blocks are small")
def test_a_launch_table_has_a_row_for_every_block():
    for table, widest, config in ((kernels.FORWARD_WARPS, kernels.WIDEST_FORWARD, kernels.forward_config),
                                  (kernels.BACKWARD_WARPS, kernels.WIDEST_BACKWARD, kernels.backward_config)):
        assert {config(width).block_n for width in range(1, 16385, 63)} == table.keys() and max(table) == widest
