"""How `tfkernels.rotary` meets PyTorch: layouts, autograd, autocast, registration, compilation and errors."""
import pytest
import torch

from tests.conftest import DEVICE, cpu_only, traced
from tests.tfkernels.rotary.test_rotary import CASES, LAYOUTS, frequencies, random_inputs, run
from tfkernels import qk_norm_rotary, qk_norm_rotary_reference, rotary_table
from tfkernels._library import INTERPRET
from tfkernels.rotary import op


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
