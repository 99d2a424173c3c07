"""The text head's cross-entropy under PyTorch's machinery, and what it refuses."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, cpu_only, traced
from tests.tfkernels.losses.test_cross_entropy import CASES, random_case, run
from tfkernels import linear_cross_entropy, linear_cross_entropy_reference
from tfkernels._library import INTERPRET
from tfkernels.losses.cross_entropy import _forward, _scale


@cpu_only
@pytest.mark.parametrize("name", ["both, odd sizes", "one word", "plain"])
def test_gradients_pass_gradcheck(name):
    case = CASES[name]
    case = case._replace(hidden=case.hidden[:, :3], weight=case.weight[:, :3])
    hidden, weight, bias = case.inputs(torch.float64)

    def function(*inputs):
        return linear_cross_entropy(*inputs[:2], case.targets, case.rows, bias=None if bias is None else inputs[2],
                                    row_weight=case.row_weight).loss

    def losses(*inputs):
        return linear_cross_entropy(*inputs[:2], case.targets, case.rows, bias=None if bias is None else inputs[2],
                                    row_weight=case.row_weight)

    given = [x for x in (hidden, weight, bias) if x is not None]
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradcheck(losses, given)


@traced
def test_opcheck():
    case = CASES["both, odd sizes"]
    hidden, weight, bias = case.inputs(torch.float32)
    batch = hidden.detach()[:40].unflatten(0, (4, 10)).requires_grad_()
    rows = case.rows.clamp(max=39).unique()
    targets = case.targets[:len(rows)]
    torch.library.opcheck(_forward, (hidden, weight, case.targets, case.rows, bias, case.row_weight, True, True, True))
    torch.library.opcheck(_forward, (batch, weight, targets, rows, None, None, True, True, False))
    torch.library.opcheck(_forward, (hidden, weight.detach(), case.targets, case.rows, None, None, True, False, False))
    torch.library.opcheck(_forward,
                          (hidden.detach(), weight.detach(), case.targets, case.rows, None, None, False, False, False))
    _, _, *gradients, _ = _forward(batch.detach(), weight.detach(), targets, rows, None, None, True, True, False)
    torch.library.opcheck(_scale, (torch.tensor(0.3, device=DEVICE), *gradients, rows, [4, 10, 13]))


@traced
def test_compiles_whole_and_serves_other_lengths_without_a_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, bias, targets, rows, row_weight):
        output = linear_cross_entropy(2 * hidden, weight, targets, rows, bias=bias, row_weight=row_weight)
        return output.loss / len(rows) + (output.losses * row_weight.square()).mean(), output.losses

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch, tokens, rows in ((2, 9, 7), (3, 11, 12), (5, 8, 31), (4, 20, 64)):
        case = random_case(batch * tokens, 16, 40, rows, bias=True, row_weight=True)
        hidden, weight, bias = case.inputs(torch.float32)
        inputs = [hidden.detach().unflatten(0, (batch, tokens)).requires_grad_(), weight, bias]
        found, expected = ([losses.detach(), *torch.autograd.grad(loss, inputs)] for loss, losses in
                           (f(*inputs, case.targets, case.rows, case.row_weight) for f in (compiled, step)))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # one static, one with dynamic sizes


@traced
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_the_graph_itself_finds_compile_whole():
    torch._dynamo.reset()

    def step(hidden, weight, targets):
        rows = (targets.flatten() >= 0).nonzero()[:, 0]
        return linear_cross_entropy(hidden, weight, targets.flatten()[rows], rows).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        targets = random_case(rows=40, seed=seed).targets.view(2, 20)
        hidden, weight, _ = random_case(seed=seed).inputs(torch.float32)
        inputs = [hidden.detach().unflatten(0, (2, 20)).requires_grad_(), weight]
        found, expected = (torch.autograd.grad(f(*inputs, targets), inputs) for f in (compiled, step))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_casts_as_linear_does(dtype):
    case = CASES["bias"]
    hidden, weight, bias = inputs = case.inputs(torch.float32)
    target = torch.float16 if INTERPRET else torch.bfloat16
    with torch.autocast(DEVICE, target):
        found = linear_cross_entropy(hidden.to(dtype), weight, case.targets, case.rows, bias=bias)
        expected = linear_cross_entropy_reference(hidden.to(dtype), weight, case.targets, case.rows, bias=bias)
        wide = (linear_cross_entropy(*(x if x is None else x.double() for x in inputs[:2]), case.targets, case.rows)
                if DEVICE == "cpu" else None)
    cast = linear_cross_entropy(hidden.to(dtype).to(target), weight.to(target), case.targets, case.rows,
                                bias=bias.to(target))
    assert found.loss.dtype == torch.float32 and torch.equal(found.losses, cast.losses)
    assert wide is None or wide.loss.dtype == torch.float64
    # a logit's last bit, where two products round it apart
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0.02)
    grads, casts = (torch.autograd.grad(x.loss, inputs) for x in (found, cast))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(grads, casts))


def test_gradients_of_gradients_are_refused():
    case = CASES["plain"]
    hidden, weight, _ = case.inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, case.targets, case.rows).loss
    with pytest.raises(
        RuntimeError,
        match="linear_cross_entropy: the backward runs with create_graph=True; .*take linear_cross_entropy_reference"
    ):
        torch.autograd.grad(loss, hidden, create_graph=True)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("what, value, weighted",
                         [("targets", 70, False), ("targets", 2**40, True), ("rows", 40, True), ("rows", -1, False)])
def test_values_that_name_nothing_are_never_silent(what, value, weighted):
    case = random_case(rows=9, row_weight=weighted, least=2)._replace(rows=torch.arange(1, 10, device=DEVICE))
    case = case._replace(**{what: getattr(case, what).index_fill(0, torch.tensor(4, device=DEVICE), value)})
    if not KERNEL_RUNS:
        with pytest.raises(ValueError,
                           match=f"linear_cross_entropy: {what} holds .*{value}.* has (70|40) rows; 0 to (69|39) fits"):
            run(linear_cross_entropy, case, torch.float32)
        return
    found = run(linear_cross_entropy, case, torch.float32)
    assert (found["losses"].isnan().nonzero().flatten().tolist() == [4] and found["loss"].isnan()
            and found["dweight"].isnan().all())
    assert found["dhidden"][case.rows[4].clamp(0, 39)].isnan().all() and found["dhidden"].isnan().any(1).sum() == 1
    without = case._replace(targets=case.targets.index_fill(0, torch.tensor(4, device=DEVICE), -1))
    assert run(linear_cross_entropy, without, torch.float32)["loss"].isnan() == (what == "rows")


@pytest.mark.skipif(KERNEL_RUNS, reason="on a GPU looking would synchronise")
def test_a_row_named_twice_is_refused_where_looking_costs_nothing():
    case = CASES["plain"]
    with pytest.raises(ValueError, match="linear_cross_entropy: rows names row 3 2 times; each row at most once fits"):
        linear_cross_entropy(case.hidden, case.weight, case.targets[:3], torch.tensor([3, 5, 3]))


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter computes bfloat16 wrongly")
def test_the_interpreter_refuses_bfloat16():
    case = CASES["plain"]
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        linear_cross_entropy(case.hidden.bfloat16(), case.weight.bfloat16(), case.targets, case.rows)


def test_inputs_that_do_not_fit_are_refused_by_name():
    x, weight, index = (torch.zeros(6, 8, device=DEVICE), torch.zeros(5, 8, device=DEVICE),
                        torch.arange(4, device=DEVICE))

    def call(hidden=x, weight=weight, targets=index, rows=index, **options):
        return linear_cross_entropy(hidden, weight, targets, rows, **options)

    assert call().losses.shape == (4,)
    for name in ("hidden", "weight", "targets", "rows", "bias", "row_weight"):
        for wrong in ([[1.0]], "tensor", torch.nn.Linear(8, 5)) + (() if name in ("bias", "row_weight") else (None,)):
            with pytest.raises(ValueError, match=f"linear_cross_entropy: {name} is .*; a tensor( or None)? fits; "):
                call(**{name: wrong})
    for bad, message in [
            ({"hidden": x[0]}, "hidden has shape \\(8,\\); \\(tokens, C\\) or \\(batch, tokens, C\\) fits"),
            ({"hidden": x.int()}, "hidden is torch.int32 .*; float16, bfloat16 or float32 fits"),
            ({"weight": weight.half()},
             "weight is torch.float16 on .* and hidden torch.float32 on .*; one dtype and device fit; convert weight"),
            ({"weight": weight[0]}, "weight has shape \\(8,\\) and hidden 8 columns; \\(words, 8\\) fits"),
            ({"weight": weight[:, :7]}, "weight has shape \\(5, 7\\) and hidden 8 columns; \\(words, 8\\) fits"),
            ({"weight": weight[:0]}, "weight has shape \\(0, 8\\) and hidden 8 columns; .* at least one of each"),
            ({"bias": weight[0]}, "bias has shape \\(8,\\) and weight 5 words; \\(5,\\) or None fits"),
            ({"bias": weight[:, 0].half()}, "bias is torch.float16"),
            ({"rows": index.int()}, "rows is torch.int32 of shape \\(4,\\) on .*; int64 \\(R,\\) on .* fits"),
            ({"rows": index[:, None]}, "rows is torch.int64 of shape \\(4, 1\\)"),
            ({"targets": index[:3]},
             "targets is torch.int64 of shape \\(3,\\) .*; int64 \\(R,\\) on .* fits, one of each"),
            ({"targets": index.float()}, "targets is torch.float32"),
            ({"rows": torch.arange(7, device=DEVICE), "targets": torch.zeros(7, device=DEVICE, dtype=torch.int64)},
             "rows (names 7|holds 0 to 6)"),
            ({"row_weight": x[0]},
             "row_weight is torch.float32 of shape \\(8,\\) on .*; floating-point numbers \\(4,\\) on .* fit, or None "
              "for 1"),
            ({"row_weight": index}, "row_weight is torch.int64"),
            ({"row_weight": x[0, :4].clone().requires_grad_()},
             "row_weight requires a gradient, which .* pass row_weight.detach\\(\\)")]:
        with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
            call(**bad)
