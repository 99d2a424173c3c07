"""The modulated norms and gates with one image per batch row and no index: a timestep per row, as in a diffusion
transformer."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tfkernels
from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, compiles, cpu_only, traced
from tests.tfkernels.norm.test_norm import ARGUMENTS, FLAGS, Case, absolute_terms, as_tuple, compiled, random_case, run
from tfkernels._launch import ARCHITECTURES
from tfkernels._library import INTERPRET
from tfkernels.norm import op as ops
from tfkernels.norm import triton as kernels

NO_INDEX = ("image_ids_ptr", "order_ptr", "starts_ptr")


def row_case(batch, tokens, width, seed=0, missing=()):
    """A case whose index says what no index says."""
    index = torch.arange(batch)[:, None].repeat(1, tokens)
    return random_case(index, width, batch, seed=seed, missing=missing)


def check(op, case, dtype):
    """Hold every output and gradient without an index to the accuracy rule."""
    rounded = Case({n: x if x is None else x.to(dtype).double() for n, x in case.tensors.items()}, case.index,
                   [g.to(dtype).double() for g in case.arriving])
    without = rounded._replace(index=None)
    exact, theirs = (run(op, without, t, reference=True) for t in (torch.float64, dtype))
    ours, terms = run(op, without, dtype), absolute_terms(op, rounded)
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == dtype
        assert_as_accurate(f"{op} {name}", ours[name], theirs[name], exact[name], terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("sizes", [(3, 11, 96), (1, 20, 64), (4, 1, 150)], ids=str)
def test_errs_at_most_twice_as_much_as_pytorch(sizes, op, dtype):
    check(op, row_case(*sizes), dtype)


@pytest.mark.skipif(INTERPRET, reason="the interpreter takes minutes")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_rows_of_more_tokens_than_programs_and_wide_ones_fit(op):
    check(op, row_case(2, 1500, 96), torch.bfloat16)
    check(op, row_case(2, 5, 5000), torch.float32)


@given(st.data())
def test_fuzzed_sizes_follow_the_reference(data):
    op = data.draw(st.sampled_from(list(ARGUMENTS)))
    sizes = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 8)), data.draw(st.integers(1, 100))
    missing = data.draw(st.sampled_from([(), ("weight",), ("bias", "shift")]))
    check(op, row_case(*sizes, seed=sum(sizes), missing=missing), data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_results_are_those_of_the_index_to_the_bit_and_every_time(op):
    case = row_case(2, 7, 70) if INTERPRET else row_case(3, 21, 130)
    with_index, *without = (run(op, c, torch.float32) for c in (case, *[case._replace(index=None)] * 2))
    for found in without:
        assert found.keys() == with_index.keys()
        assert all(torch.equal(found[name], with_index[name]) for name in found)


@pytest.mark.skipif(not KERNEL_RUNS, reason="the CPU's implementation makes an index of its own")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_nothing_is_sorted_and_no_tensor_of_ids_is_made(op, monkeypatch):
    def sorting(*arguments, **options):
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", sorting)
    made, real = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: made.append(real(x, *a, **k)) or made[-1])
    run(op, row_case(2, 3, 70)._replace(index=None), torch.float32)
    assert made and all(x.is_floating_point() for x in made)


@cpu_only
@pytest.mark.parametrize("op", ARGUMENTS)
def test_gradients_pass_gradcheck(op):
    case = row_case(2, 3, 5)
    inputs = [case.tensors[n].clone().requires_grad_() for n in ARGUMENTS[op]]
    assert torch.autograd.gradcheck(lambda *x: as_tuple(getattr(tfkernels, op)(*x, None)), inputs)


@traced
def test_opcheck():
    t = {n: x.float().to(DEVICE).requires_grad_() for n, x in row_case(2, 5, 24).tensors.items()}
    torch.library.opcheck(ops._norm_forward, (t["x"], t["weight"], t["bias"], t["scale"], t["shift"], None, 1e-6, True))
    torch.library.opcheck(ops._gated_forward, (t["x"], t["branch"], t["gate"], None))
    torch.library.opcheck(ops._gated_norm_forward,
                          (t["x"], t["branch"], t["gate"], t["weight"], t["scale"], t["shift"], None, 1e-6))


@traced
@pytest.mark.parametrize("op", ARGUMENTS)
def test_compiles_whole(op):
    torch._dynamo.reset()
    case = row_case(2, 7, 32)

    def step(*inputs):
        return sum(x.square().sum() for x in as_tuple(getattr(tfkernels, op)(*inputs, None)))

    inputs = [case.tensors[n].float().to(DEVICE).requires_grad_() for n in ARGUMENTS[op]]
    found, expected = (torch.autograd.grad(f(*inputs), inputs)
                       for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_index_is_refused_where_a_batch_row_is_no_image(op):
    case = row_case(2, 5, 24)
    inputs = [case.tensors[n].float().to(DEVICE) for n in ARGUMENTS[op]]
    first = "gate" if "gate" in ARGUMENTS[op] else "scale"
    more = [torch.cat([x, x]) if n in ("gate", "scale", "shift") else x for n, x in zip(ARGUMENTS[op], inputs)]
    flat = [x.flatten(0, 1) if x.ndim == 3 else x for x in inputs]
    for given_inputs, message in ((more, rf"has shape \(2, 5, 24\) and {first} 4 rows"),
                                  (flat, rf"has shape \(10, 24\) and {first} 2 rows")):
        with pytest.raises(ValueError, match=f"^{op}: index is None, .* {message}; .*fit; pass the image of each"):
            getattr(tfkernels, op)(*given_inputs, None)


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [64, 1024, 2048, 4096, 16384])
def test_the_kernels_without_an_index_spill_nothing(width, architecture):
    variants = [(kernel, op) for kernel in ("fwd", "bwd") for op in FLAGS] + [("means", "norm")] * (
        width > kernels.WIDEST_BACKWARD
    ) + [("images", "norm")]
    for kernel, op in variants:
        found = compiled(kernel, op, width, architecture, 2, left_out=NO_INDEX)
        assert found.fit(architecture), (kernel, op, found)
