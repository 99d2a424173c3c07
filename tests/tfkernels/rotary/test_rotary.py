"""Accuracy, gradients, positions and resources of `tfkernels.rotary`, on whichever device runs the tests."""
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, compiles
from tests.resources import resources
from tfkernels import qk_norm_rotary, qk_norm_rotary_reference, rotary_table
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels.rotary import triton
from tfkernels.rotary.reference import rotate


class Sizes(NamedTuple):
    """Batch, query heads, kv heads, tokens, head dim, R/2, which of q and k have a norm, and how many rows of cos and
    sin there are."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    half: int
    norms: tuple[bool, bool] = (True, True)
    tables: int | None = None  # 1, batch, or None for (S, R/2)


CASES = {
    "no norm": Sizes(2, 4, 4, 3, 16, 8, (False, False)),
    "no norm, part turns": Sizes(1, 3, 2, 7, 20, 4, (False, False), 1),
    "norm, shared kv heads": Sizes(2, 6, 2, 4, 32, 16, tables=2),
    "part turns": Sizes(1, 5, 1, 5, 24, 4),
    "80 elements": Sizes(2, 2, 1, 1, 80, 40, tables=1),
    "96 elements, half of them turn": Sizes(1, 3, 1, 2, 96, 24),
    "norm of q": Sizes(1, 2, 5, 6, 16, 8, (True, False)),
    "norm of k": Sizes(2, 5, 2, 2, 20, 6, (False, True), 2),
    "one token, two elements": Sizes(1, 1, 1, 1, 2, 1),
}
LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a projection":
        lambda x: torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous()[:, :, :x.shape[1]].transpose(1, 2),
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
}


def frequencies(half):
    return 100.0 ** -(torch.arange(half, dtype=torch.float32, device=DEVICE) / half)


def random_inputs(sizes, seed=0):
    """{name: float64} of q, k and the weights that there are; cos and sin in float32; the gradients that arrive."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (sizes.batch, sizes.heads, sizes.tokens, sizes.dim),
              "k": (sizes.batch, sizes.kv_heads, sizes.tokens, sizes.dim)}
    weights = {name: (sizes.dim,) for name, norm in zip(("q_weight", "k_weight"), sizes.norms) if norm}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
               for name, shape in (shapes | weights).items()}
    leading = () if sizes.tables is None else (sizes.tables,)
    positions = torch.randint(0, 50, (*leading, sizes.tokens), generator=generator).to(DEVICE)
    arriving = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes.values()]
    return tensors, rotary_table(positions, frequencies(sizes.half)), arriving


def run(function, tensors, table, arriving, dtype, layout=lambda x: x, **options):
    """{name: value} of both outputs and of the gradient of every input, in `dtype`; q, k and what arrives in
    `layout`."""
    inputs = {n: (layout(x.to(dtype)) if n in "qk" else x.to(dtype)).detach().requires_grad_()
              for n, x in tensors.items()}
    outputs = function(inputs["q"], inputs["k"], inputs.get("q_weight"), inputs.get("k_weight"), *table, **options)
    grads = torch.autograd.grad(outputs, list(inputs.values()), [layout(g.to(dtype)) for g in arriving])
    return outputs._asdict() | {f"d{n}": g for n, g in zip(inputs, grads)}


def absolute_terms(tensors, table, arriving, eps=1e-6):
    """The sums behind every output and gradient over absolute values, in float64: what their rounding errors scale
    with."""
    cos, sin = (x.double().abs() for x in table)
    found = {}

    def turned(x):
        return torch.maximum(rotate(x, cos, -sin), rotate(x, cos, sin))

    for name, g in zip("qk", arriving):
        x, g, weight = tensors[name].abs(), turned(g.abs()), tensors.get(f"{name}_weight")
        found[f"d{name}"] = g
        if weight is not None:
            rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            x, dxhat = x * rstd, g * weight.abs()
            found |= {f"d{name}": 3 * rstd * (dxhat + x * (dxhat * x).mean(-1, keepdim=True)),
                      f"d{name}_weight": (2 * g * x).sum((0, 1, 2))}
            x = 2 * x * weight.abs()
        found[name] = turned(x)
    return found


def check(sizes, dtype, layout=lambda x: x, seed=0, **options):
    """Hold the operator to the accuracy rule in both outputs and every gradient."""
    tensors, table, arriving = random_inputs(sizes, seed)
    tensors, arriving = {n: x.to(dtype).double() for n, x in tensors.items()}, [g.to(dtype).double() for g in arriving]
    exact, theirs = (run(qk_norm_rotary_reference, tensors, table, arriving, t, **options)
                     for t in (torch.float64, dtype))
    ours = run(qk_norm_rotary, tensors, table, arriving, dtype, layout, **options)
    terms = absolute_terms(tensors, table, arriving)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert ours[name].dtype == dtype and ours[name].shape == exact[name].shape
        assert_as_accurate(name, ours[name], theirs[name], exact[name], terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errs_at_most_twice_as_much_as_pytorch(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_fit(layout):
    check(CASES["norm, shared kv heads"], torch.float32, LAYOUTS[layout])


def test_cos_and_sin_may_have_strides_of_their_own():
    tensors, (cos, sin), arriving = random_inputs(CASES["norm, shared kv heads"])
    expected = run(qk_norm_rotary, tensors, (cos, sin), arriving, torch.float32)
    for laid in ((cos, torch.cat([sin, sin], -1)[..., :16]),
                 (cos.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([sin, sin], -1)[..., 0])):
        found = run(qk_norm_rotary, tensors, laid, arriving, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values()))


@given(st.data())
def test_fuzzed_sizes_follow_the_reference(data):
    draw = data.draw
    dim = 2 * draw(st.integers(1, 20))
    batch = draw(st.integers(1, 2))
    sizes = Sizes(batch, draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 4)), dim,
                  draw(st.integers(1, dim // 2)), (draw(st.booleans()), draw(st.booleans())),
                  draw(st.sampled_from([None, 1, batch])))
    check(sizes, draw(st.sampled_from(DTYPES)), LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))], seed=dim)


@pytest.mark.skipif(DEVICE != "cuda",
                    reason="more tokens than programs take a GPU's time only; the interpreter has few programs")
@pytest.mark.parametrize("sizes", [Sizes(3, 32, 8, 1111, 128, 64), Sizes(1, 6, 6, 2500, 64, 16)])
def test_more_tokens_than_programs(sizes):
    check(sizes, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_hugging_faces_qwen3(dtype):
    """Its norm and its rotation of tables that hold each half twice, of which a view is passed."""
    sizes = CASES["norm, shared kv heads"]
    tensors, table, arriving = random_inputs(sizes)
    tensors, arriving = {n: x.to(dtype).double() for n, x in tensors.items()}, [g.to(dtype).double() for g in arriving]
    twice = [torch.cat([x, x], -1).to(dtype) for x in table]
    table = [x[..., :sizes.half] for x in twice]

    class Turned(NamedTuple):
        q: torch.Tensor
        k: torch.Tensor

    def theirs(q, k, q_weight, k_weight, cos, sin):
        norms = [Qwen3RMSNorm(sizes.dim, 1e-6).to(DEVICE) for _ in range(2)]
        q, k = (torch.func.functional_call(norm, {"weight": weight}, x)
                for norm, weight, x in zip(norms, (q_weight, k_weight), (q, k)))
        return Turned(*apply_rotary_pos_emb(q, k, *twice))

    exact = run(qk_norm_rotary_reference, tensors, table, arriving, torch.float64)
    rounded, ours = (run(f, tensors, table, arriving, dtype) for f in (theirs, qk_norm_rotary))
    terms = absolute_terms(tensors, table, arriving)
    for name in exact:
        assert (
            rounded[name].double() - exact[name]
        ).abs().max() <= 4 * torch.finfo(dtype).eps * terms[name].max(), "they compute something else"
        assert_as_accurate(name, ours[name], rounded[name], exact[name], terms[name])


def test_eps_is_added_to_the_mean_square():
    q = torch.full((1, 1, 1, 8), 3.0, device=DEVICE)
    cos, sin = torch.ones(1, 4, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    torch.testing.assert_close(qk_norm_rotary(q, q, q[0, 0, 0], None, cos, sin, eps=16.0).q, q * 3 / 5)
    check(CASES["norm, shared kv heads"], torch.float32, eps=0.0)  # heads behind the last are 0, and 0 / 0 is not


def test_what_does_not_turn_stays_and_the_rest_is_a_smaller_head():
    tensors, table, _ = random_inputs(CASES["no norm, part turns"])
    q, k = (tensors[n].float() for n in "qk")
    found, part = qk_norm_rotary(q, k, None, None, *table), qk_norm_rotary(q[..., :8], k[..., :8], None, None, *table)
    for x, ours, smaller in zip((q, k), found, part):
        assert torch.equal(ours[..., 8:], x[..., 8:]) and torch.equal(ours[..., :8], smaller)


def test_a_rotation_keeps_norms_and_its_gradient_turns_back():
    tensors, table, _ = random_inputs(CASES["no norm"])
    q, k = (tensors[n].float().requires_grad_() for n in "qk")
    found = qk_norm_rotary(q, k, None, None, *table)
    for x, ours, back in zip((q, k), found, torch.autograd.grad(found, (q, k), [x.detach() for x in found])):
        torch.testing.assert_close(ours.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(back, x)


def scores(q, k, positions, axes=None):
    """Every query with every key, (S, S), all turned from one vector each."""
    tokens = positions.shape[-2 if axes is not None else -1]
    q, k = (torch.nn.functional.normalize(x, dim=0).expand(1, 1, tokens, -1).contiguous() for x in (q, k))
    q, k = qk_norm_rotary(q, k, None, None, *rotary_table(positions, frequencies(8), axes))
    return (q @ k.mT)[0, 0]


def test_scores_depend_on_the_difference_of_positions_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = scores(q, k, torch.arange(9, device=DEVICE))
    for difference in range(-8, 9):
        same = found.diagonal(difference)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert len(found[0].unique()) == 9


def test_scores_of_patches_depend_on_rows_and_columns_apart():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows, columns = (x.flatten().to(DEVICE) for x in torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij"))
    found = scores(
        q, k, torch.stack([rows, columns], -1), torch.arange(8, device=DEVICE) % 2
    ).unflatten(0, (4, 3)).unflatten(2, (4, 3))
    torch.testing.assert_close(found[1:, 1:, 1:, 1:], found[:-1, :-1, :-1, :-1])
    assert not torch.allclose(found[0, 0, 0, 1], found[0, 0, 1, 0])                        # a column on is not a row on


RESOURCES = [(32, 8, 128, 64, 2, True), (32, 8, 128, 64, 4, True), (32, 32, 64, 32, 2, True),
             (16, 16, 256, 128, 2, True), (32, 8, 96, 16, 2, True), (32, 8, 128, 64, 2, False),
             (5, 1, 24, 4, 2, True)]


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("heads,kv_heads,dim,half,size,norm", RESOURCES)
def test_the_kernels_spill_nothing(heads, kv_heads, dim, half, size, norm, architecture):
    for kernel, table in ((triton._qk_norm_rotary_fwd, triton.FORWARD), (triton._qk_norm_rotary_bwd, triton.BACKWARD)):
        constants, warps = triton.launch_config(heads, kv_heads, dim, half, *table)
        found = resources(kernel, constants | {"Q_NORM": norm, "K_NORM": norm}, Config(0, 0, warps, 3),
                          architecture=architecture, element_size=size, float32=("cos_ptr", "sin_ptr"), fuses=False)
        assert found.fit(architecture) and found.uneven_sums == 0, (kernel, found)
