"""The modulated norms and gated residuals under PyTorch's machinery, and what they refuse."""
import pytest
import torch

import tfkernels
from tests.conftest import DEVICE, KERNEL_RUNS, cpu_only, traced
from tests.tfkernels.norm.test_norm import ARGUMENTS, as_tuple, packed_index, random_case, run
from tfkernels import gated_residual, gated_residual_rms_norm, modulated_layer_norm, modulated_rms_norm
from tfkernels._library import INTERPRET


@pytest.mark.parametrize("op", ARGUMENTS)
def test_autocast_changes_nothing(op):
    case = random_case(packed_index(), 72, 4)
    expected = run(op, case, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        found = run(op, case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values()))


@cpu_only
@pytest.mark.parametrize("missing", [(), ("weight", "bias", "shift")])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_gradcheck_in_float64(op, missing):
    case = random_case(torch.tensor([2, -1, 0, 2, -1, 0, 0]), 5, 3, missing=missing)
    names = [n for n in ARGUMENTS[op] if case.tensors[n] is not None]

    def function(*values):
        given = dict(zip(names, values))
        return getattr(tfkernels, op)(*(given.get(n) for n in ARGUMENTS[op]), case.index)

    assert torch.autograd.gradcheck(function, [case.tensors[n].requires_grad_() for n in names])


def test_opcheck_passes_for_every_operator():
    case = random_case(packed_index(), 72, 4)
    ops, index = torch.ops.tfkernels, case.index
    t = {n: x.to(DEVICE).float() for n, x in case.tensors.items()}
    dy, dout = (g.to(DEVICE).float() for g in case.arriving)
    wanted = {n: x.clone().requires_grad_() for n, x in t.items()}
    for bias, shift, center in (("bias", "shift", True), (None, "shift", False), (None, None, False)):
        given = [None if n is None else n for n in ("x", "weight", bias, "scale", shift)]
        arguments, values = ([n and source[n] for n in given] for source in (wanted, t))
        torch.library.opcheck(ops.modulated_norm_forward.default, (*arguments, index, 1e-6, center))
        _, mean, rstd = ops.modulated_norm_forward(*values, index, 1e-6, center)
        torch.library.opcheck(ops.modulated_norm_backward.default, (dy, *values, index, mean, rstd, center))
    gated = [wanted[n] for n in ARGUMENTS["gated_residual"]]
    torch.library.opcheck(ops.gated_residual_forward.default, (*gated, index))
    torch.library.opcheck(ops.gated_residual_backward.default, (dout, t["branch"], t["gate"], index))
    torch.library.opcheck(ops.gated_residual_norm_forward.default,
                          (*(wanted[n] for n in ARGUMENTS["gated_residual_rms_norm"]), index, 1e-6))
    values = [t[n] for n in ARGUMENTS["gated_residual_rms_norm"]]
    out, _, rstd = ops.gated_residual_norm_forward(*values, index, 1e-6)
    torch.library.opcheck(ops.gated_residual_norm_backward.default, (dout, dy, out, *values[1:], index, rstd))


@traced
@pytest.mark.parametrize("op", ARGUMENTS)
def test_compiles_whole_and_does_not_recompile_when_tokens_or_images_change(op):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(index, *inputs):
        return sum(y.square().mean() for y in as_tuple(getattr(tfkernels, op)(inputs[0] * 2, *inputs[1:], index)))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    frames = []
    for tokens, images in ((29, 4), (35, 5), (64, 7), (41, 12), (96, 6)):
        case = random_case(packed_index(tokens), 72, images)
        inputs = [case.tensors[n].to(DEVICE).float().requires_grad_() for n in ARGUMENTS[op]]
        grads, expected = (torch.autograd.grad(f(case.index, *inputs), inputs) for f in (compiled, step))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, expected))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[-1] <= 2, f"graphs compiled after each call: {frames}"  # one static, one with dynamic sizes


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_index_of_no_image_is_never_silent(op):
    index = packed_index()
    index[5] = 4
    case = random_case(index, 72, 4)
    if not KERNEL_RUNS:
        with pytest.raises(ValueError, match="index names image 4 and there are 4"):
            run(op, case, torch.float32)
        return
    found = run(op, case, torch.float32)
    for name in {"residual", "y", "dx", "dbranch"} & found.keys() - ({"dx"} if op == "gated_residual" else set()):
        assert found[name][5].isnan().all() and not found[name][[4, 6]].isnan().any()
    assert not any(found[name].isnan().any() for name in ("dscale", "dshift", "dgate") if name in found)


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter computes bfloat16 wrongly")
def test_the_interpreter_refuses_bfloat16():
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        modulated_rms_norm(x, None, x[:0], None, torch.full((3,), -1))


X, TABLE, INDEX = torch.zeros(6, 64), torch.zeros(2, 64), torch.zeros(6, dtype=torch.int64)
BAD_CALLS = {
    "modulated_rms_norm: x has shape": (X[0], None, TABLE, None, INDEX),
    "modulated_rms_norm: x is torch.int64": (X.long(), None, TABLE, None, INDEX),
    "modulated_rms_norm: x has 0 columns": (X[:, :0], None, TABLE[:, :0], None, INDEX),
    "modulated_rms_norm: index is torch.int64 of shape .5,.": (X, None, TABLE, None, INDEX[:5]),
    "modulated_rms_norm: index is torch.float32": (X, None, TABLE, None, INDEX.float()),
    "modulated_rms_norm: index is a list": (X, None, TABLE, None, [0] * 6),
    "modulated_rms_norm: weight has shape .63,.": (X, X[0, :63], TABLE, None, INDEX),
    "modulated_rms_norm: weight is torch.int64": (X, X[0].long(), TABLE, None, INDEX),
    "modulated_rms_norm: weight is torch.float64": (X, X[0].double(), TABLE, None, INDEX),
    "modulated_rms_norm: scale is None": (X, None, None, None, INDEX),
    "modulated_rms_norm: scale has shape .6, 32.": (X, None, X[:, :32], None, INDEX),
    "modulated_rms_norm: scale has shape .64,.": (X, None, X[0], None, INDEX),
    "modulated_rms_norm: shift has 1 rows and scale 2": (X, None, TABLE, TABLE[:1], INDEX),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_inputs_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        modulated_rms_norm(*BAD_CALLS[message])


def test_the_other_operators_refuse_by_name_too():
    with pytest.raises(ValueError, match="modulated_layer_norm: bias has shape"):
        modulated_layer_norm(X, None, X, TABLE, None, INDEX)
    with pytest.raises(ValueError, match="gated_residual: branch has shape"):
        gated_residual(X, X[:5], TABLE, INDEX)
    with pytest.raises(ValueError, match="gated_residual: gate has shape"):
        gated_residual(X, X, TABLE[0], INDEX)
    with pytest.raises(ValueError, match="gated_residual_rms_norm: scale has 1 rows and gate 2"):
        gated_residual_rms_norm(X, X, TABLE, None, TABLE[:1], None, INDEX)
    with pytest.raises(ValueError, match="modulated_rms_norm: eps is -1"):
        modulated_rms_norm(X, None, TABLE, None, INDEX, eps=-1.0)
    with pytest.raises(ValueError, match="modulated_rms_norm: x has 16385 columns"):
        modulated_rms_norm(torch.zeros(1, 16385), None, torch.zeros(0, 16385), None, INDEX[:1])
