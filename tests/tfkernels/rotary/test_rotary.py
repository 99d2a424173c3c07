"""Accuracy, gradients, layouts, positions, registration, errors and resources of `tfkernels.rotary`, on whichever
device runs the tests."""
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, compiles, cpu_only, traced
from tests.resources import resources
from tfkernels import qk_norm_rotary, qk_norm_rotary_reference, rotary_table
from tfkernels._launch import ARCHITECTURES, Config
from tfkernels._library import INTERPRET
from tfkernels.rotary import op, triton
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_lie_as_their_inputs_do(layout):
    tensors, table, arriving = random_inputs(CASES["norm, shared kv heads"])
    ordered = {"heads first": LAYOUTS["heads first"], "columns apart": LAYOUTS["heads first"]}.get(
        layout, LAYOUTS["tokens first"]
    )
    laid = {n: x.float() for n, x in tensors.items()} | {n: LAYOUTS[layout](tensors[n].float()).requires_grad_()
                                                         for n in "qk"}
    found = qk_norm_rotary(*laid.values(), *table)
    grads = torch.autograd.grad(found, (laid["q"], laid["k"]), [LAYOUTS[layout](g.float()) for g in arriving])
    for n, out, grad in zip("qk", found, grads):
        assert out.stride() == grad.stride() == ordered(tensors[n]).stride()


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("layout,copies",
                         [("heads first", 0), ("tokens first", 0), ("slice of a projection", 0), ("columns apart", 2)])
def test_no_layout_with_unit_columns_is_copied(layout, copies):
    tensors, table, _ = random_inputs(CASES["norm, shared kv heads"])
    q, k = (LAYOUTS[layout](tensors[n].float()) for n in "qk")
    weights, twice = [tensors[n].float() for n in ("q_weight", "k_weight")], [torch.cat([x, x], -1) for x in table]
    with Operators() as operators:
        qk_norm_rotary(q, k, *weights, *(x[..., :16] for x in twice))
    assert operators.names.count("tfkernels::qk_norm_rotary") == 1 and operators.names.count("aten::clone") == copies
    assert set(operators.names) <= {"tfkernels::qk_norm_rotary", "aten::slice", "aten::expand", "aten::clone"}


@pytest.mark.parametrize("empty", [{"tokens": 0}, {"batch": 0}])
def test_no_token_at_all_gives_empty_outputs_and_zero_gradients(empty):
    sizes = CASES["part turns"]._replace(**empty)
    tensors, table, arriving = random_inputs(sizes)
    found = run(qk_norm_rotary, tensors, table, arriving, torch.float32)
    assert (all((x == 0).all() for x in found.values()) and found["q"].shape == tensors["q"].shape
            and found["dq_weight"].shape == (sizes.dim,))


def test_the_gradients_are_the_same_to_the_bit_every_time():
    case = random_inputs(CASES["part turns"]._replace(batch=2, tokens=3 if INTERPRET else 9))
    first = run(qk_norm_rotary, *case, torch.float32)
    for _ in range(1 if INTERPRET else 50):
        assert all(
            torch.equal(a, b) for a, b in zip(first.values(), run(qk_norm_rotary, *case, torch.float32).values())
        )


def test_autocast_changes_nothing():
    case = random_inputs(CASES["part turns"]._replace(tokens=2))
    expected = run(qk_norm_rotary, *case, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        found = run(qk_norm_rotary, *case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values()))


def test_weights_may_be_wider_than_q_and_tables_narrower():
    tensors, table, arriving = random_inputs(CASES["part turns"])
    tensors = {n: x.to(torch.float16 if n in "qk" else torch.float32) for n, x in tensors.items()}
    table, arriving = [x.half() for x in table], [g.half() for g in arriving]
    exact = run(qk_norm_rotary_reference, tensors, table, arriving, torch.float64)
    inputs = [x.requires_grad_() for x in tensors.values()]
    outputs = qk_norm_rotary(*inputs, *table)
    found = [*outputs, *torch.autograd.grad(outputs, inputs, arriving)]
    assert [x.dtype for x in found] == [torch.float16] * 4 + [torch.float32] * 2
    for ours, truth in zip(found, exact.values()):
        torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-5)


@pytest.mark.parametrize("name,kept",
                         [("no norm", set()), ("norm of q", {"q"}), ("norm of k", {"k"}), ("part turns", {"q", "k"})])
def test_backward_keeps_q_and_k_only_for_a_norm(name, kept):
    tensors, table, _ = random_inputs(CASES[name])
    inputs, saved = {n: x.float().requires_grad_() for n, x in tensors.items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        qk_norm_rotary(inputs["q"], inputs["k"], inputs.get("q_weight"), inputs.get("k_weight"), *table)
    assert {n for n in "qk" if inputs[n].data_ptr() in saved} == kept


@pytest.mark.parametrize("name", ["no norm", "part turns"])
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("q_weight",), ("q", "k_weight")], ids="-".join)
def test_gradients_that_nobody_asked_for_are_not_computed(name, wanted, monkeypatch):
    tensors, table, arriving = random_inputs(CASES[name]._replace(batch=1, tokens=2))
    wanted = [n for n in wanted if n in tensors] or ["q"]
    expected = run(qk_norm_rotary, tensors, table, arriving, torch.float32)
    inputs = {n: x.float().requires_grad_(n in wanted) for n, x in tensors.items()}
    outputs = qk_norm_rotary(inputs["q"], inputs["k"], inputs.get("q_weight"), inputs.get("k_weight"), *table)
    calls, backward = [], op._backward
    monkeypatch.setattr(op, "_backward", lambda *arguments: calls.append(arguments) or backward(*arguments))
    torch.autograd.backward(outputs, [g.float() for g in arriving])
    (call,) = calls
    assert [x is not None for x in call[:2]] == [any(n.startswith(x) for n in wanted) for x in "qk"]
    for n, x in inputs.items():
        assert x.grad is None if n not in wanted else torch.equal(x.grad, expected[f"d{n}"])


def test_a_gradient_may_arrive_on_one_of_the_two_outputs():
    tensors, table, arriving = random_inputs(CASES["norm, shared kv heads"])
    expected = run(qk_norm_rotary, tensors, table, arriving, torch.float32)
    inputs = {n: x.float().requires_grad_() for n, x in tensors.items()}
    grads = torch.autograd.grad(qk_norm_rotary(*inputs.values(), *table).q, list(inputs.values()), arriving[0].float())
    for n, grad in zip(inputs, grads):
        assert torch.equal(grad, expected[f"d{n}"] if n.startswith("q") else torch.zeros_like(grad))


@cpu_only
@pytest.mark.parametrize("name", ["no norm, part turns", "part turns", "norm of q", "norm of k"])
def test_gradcheck_in_float64(name):
    tensors, table, _ = random_inputs(CASES[name]._replace(tokens=2, dim=8, half=3, tables=None))
    names = list(tensors)

    def function(*values):
        present = dict(zip(names, values))
        return qk_norm_rotary(present["q"], present["k"], present.get("q_weight"), present.get("k_weight"), *table)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@traced
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "slice of a projection"])
@pytest.mark.parametrize("name", ["no norm", "part turns", "norm of q", "one token, two elements"])
def test_opcheck_passes_for_both_operators(name, layout):
    tensors, table, arriving = random_inputs(CASES[name])
    laid = {n: LAYOUTS[layout](x.float()) if n in "qk" else x.float() for n, x in tensors.items()}
    table, arriving = ([x.expand(CASES[name].batch, -1, -1) for x in table],
                       [LAYOUTS[layout](g.float()) for g in arriving])
    values = [laid.get(n) for n in ("q", "k", "q_weight", "k_weight")]
    wanted = [
        x if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in values
    ]
    torch.library.opcheck(torch.ops.tfkernels.qk_norm_rotary.default, (*wanted, *table, 1e-6))
    saved = [x if weight is not None else None for x, weight in zip(values, values[2:])]
    torch.library.opcheck(torch.ops.tfkernels.qk_norm_rotary_backward.default,
                          (*arriving, *saved, *values[2:], *table, 1e-6))
    torch.library.opcheck(torch.ops.tfkernels.qk_norm_rotary_backward.default,
                          (None, arriving[1], None, saved[1], None, values[3], *table, 1e-6))


@traced
@pytest.mark.parametrize("name", ["no norm", "norm, shared kv heads"])
def test_compiles_whole_and_does_not_recompile_when_lengths_change(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(positions, *inputs):
        q, k, *weights = inputs
        table = rotary_table(positions, frequencies(8))
        found = qk_norm_rotary(q.transpose(1, 2) * 2, k.transpose(1, 2), *(weights or (None, None)), *table)
        return sum(x.square().mean() + x.sum() for x in found)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    frames = []
    for tokens, batch in ((5, 2), (7, 3), (16, 2), (9, 5), (33, 4)):
        tensors, *_ = random_inputs(CASES[name]._replace(tokens=tokens, batch=batch, dim=16, half=8, tables=None))
        inputs = [(x.transpose(1, 2).contiguous() if n in "qk" else x).float().requires_grad_()
                  for n, x in tensors.items()]
        positions = torch.arange(tokens, device=DEVICE).expand(batch, -1).contiguous()
        grads, expected = (torch.autograd.grad(f(positions, *inputs), inputs) for f in (compiled, step))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, expected))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[-1] <= 2, f"graphs compiled after each call: {frames}"  # one static, one with dynamic sizes


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter computes bfloat16 wrongly")
def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        qk_norm_rotary(*[torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)] * 2, None, None, torch.zeros(1, 2),
                       torch.zeros(1, 2))


Q, K, W, T = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16), torch.zeros(16), torch.zeros(5, 8)
BAD_CALLS = {
    "q has shape .4, 5, 16.; .batch, heads, tokens, D.": (Q[0], K, W, W, T, T),
    "q has shape .2, 0, 5, 16.": (Q[:, :0], K, W, W, T, T),
    "q is torch.int64 on cpu": (Q.long(), K, W, W, T, T),
    "q has heads of 15 elements; an even number from 2 to 256": (Q[..., :15], K, W, W, T, T),
    "q has heads of 258 elements": (torch.zeros(1, 1, 5, 258), K, W, W, T, T),
    "k has shape .2, 2, 4, 16. and q .2, 4, 5, 16.; .2, heads, 5, 16.": (Q, K[:, :, :4], W, W, T, T),
    "k has shape .1, 2, 5, 16.": (Q, K[:1], W, W, T, T),
    "k is torch.float16 on cpu and q torch.float32": (Q, K.half(), W, W, T, T),
    "q_weight is torch.float32 of shape .15,. on cpu": (Q, K, W[:15], W, T, T),
    "k_weight is torch.float64 of shape .16,. on cpu": (Q, K, W, W.double(), T, T),
    r"cos has shape .5, 9. and q .*; .5, R/2.*pass cos\[..., :R // 2\]": (Q, K, W, W, torch.zeros(5, 9), T),
    "cos has shape .5, 0.": (Q, K, W, W, T[:, :0], T[:, :0]),
    "cos has shape .8,.": (Q, K, W, W, T[0], T),
    "sin has shape .5, 7.": (Q, K, W, W, T, T[:, :7]),
    "sin has shape .3, 5, 8.": (Q, K, W, W, T, torch.zeros(3, 5, 8)),
    "sin is torch.float16 on cpu and q torch.float32": (Q, K, W, W, T, T.half()),
    r"cos requires a gradient, .*pass cos.detach\(\)": (Q, K, W, W, T.clone().requires_grad_(), T),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_inputs_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=f"qk_norm_rotary: {message}"):
        qk_norm_rotary(*BAD_CALLS[message])


def test_a_negative_eps_is_refused_and_tables_may_require_gradients_where_none_are_taken():
    with pytest.raises(ValueError, match="qk_norm_rotary: eps is -1"):
        qk_norm_rotary(Q, K, W, W, T, T, eps=-1.0)
    with torch.no_grad():
        qk_norm_rotary(Q, K, W, W, T.clone().requires_grad_(), T)


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
