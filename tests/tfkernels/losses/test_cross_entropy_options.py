"""The cross-entropy's options and log-sum-exp: a bound of the logits, label smoothing, z-loss, each and together."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, compiles, cpu_only, traced
from tests.resources import resources
from tests.tfkernels.losses.test_cross_entropy import CASES, random_case
from tests.tfkernels.mask.test_mask import LargestTensor
from tfkernels import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse,
    linear_cross_entropy_with_lse_reference,
)
from tfkernels._launch import ARCHITECTURES
from tfkernels._library import INTERPRET
from tfkernels.losses import cross_entropy as module
from tfkernels.losses.triton.cross_entropy import WIDEST, _cross_entropy_rows, launch_config

OPTIONS = {"lse": {}, "softcap": {"softcap": 1.5}, "smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss": 1e-2},
           "all target": {"label_smoothing": 1.0},
           "everything": {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.05}}
NAMES = ("loss", "losses", "lse", "dhidden", "dweight", "dbias")


def run(function, case, dtype, options, of):
    """{name: value} of the three outputs and of the gradients of a sum of those that `of` names."""
    hidden, weight, bias = inputs = case.inputs(dtype)
    found = function(hidden, weight, case.targets, case.rows, bias=bias, row_weight=case.row_weight, **options)
    factors = torch.linspace(-1, 2, len(case.rows), device=DEVICE, dtype=found.lse.dtype)
    parts = {"loss": found.loss / 7, "losses": (found.losses * factors).sum(), "lse": (found.lse * (1 - factors)).sum()}
    given_inputs = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(sum(parts[name] for name in of), given_inputs)
    return dict(zip(NAMES, (*(x.detach() for x in found), *gradients)))


def terms_of(case, options, of):
    """The sums behind each result over absolute values, in float64: what their rounding errors scale with."""
    hidden, weight, bias = (x if x is None else x.detach() for x in case.inputs(torch.float64))
    rows, known = hidden[case.rows], (case.targets >= 0)[:, None]
    size = rows.abs() @ weight.abs().mT + (0 if bias is None else bias.abs())
    z = rows @ weight.mT + (0 if bias is None else bias)
    softcap, smoothing, z_loss = (options.get(n) or 0 for n in ("softcap", "label_smoothing", "z_loss"))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    p, lse, peak = z.softmax(-1), z.logsumexp(-1, keepdim=True).abs(), size.amax(1, keepdim=True) * 2 + 1
    row_weight = torch.ones(len(z), 1) if case.row_weight is None else case.row_weight.double().abs().cpu()[:, None]
    row_weight = row_weight.to(z)
    factors = torch.linspace(-1, 2, len(z), device=z.device, dtype=z.dtype)[:, None]
    scale = row_weight / 7 * ("loss" in of) + factors.abs() * ("losses" in of)
    of_p = scale * (1 + 2 * z_loss * (lse + peak)) + (1 - factors).abs() * ("lse" in of)
    chosen = torch.nn.functional.one_hot(case.targets.clamp(min=0), weight.shape[0]) + smoothing / weight.shape[0]
    dz = torch.where(known, of_p * p * (size + peak) + scale * chosen, 0)
    losses = torch.where(known, peak + z_loss * lse * (lse + 2 * peak), 0)
    dhidden = torch.zeros_like(hidden).index_copy_(0, case.rows, dz @ weight.abs())
    return {"loss": (losses * row_weight).sum(), "losses": losses[:, 0], "lse": torch.where(known, peak, 0)[:, 0],
            "dhidden": dhidden, "dweight": dz.mT @ rows.abs(), "dbias": dz.sum(0)}


def check(case, dtype, options, of):
    """Hold the outputs and every gradient to the accuracy rule."""
    rounded = case._replace(**{n: x.to(dtype).double()
                               for n in ("hidden", "weight", "bias") if (x := getattr(case, n)) is not None})
    ours, theirs, exact = (run(f, rounded, t, options, of) for f, t in (
        (linear_cross_entropy_with_lse, dtype), (linear_cross_entropy_with_lse_reference, dtype),
        (linear_cross_entropy_with_lse_reference, torch.float64)))
    terms = terms_of(rounded, options, of)
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == theirs[name].dtype
        assert_as_accurate(name, ours[name], theirs[name], exact[name], terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("of", [("loss",), ("losses",), ("lse",), ("loss", "losses", "lse")], ids="-".join)
@pytest.mark.parametrize("name", ["both, odd sizes", "one row", "row weights"])
def test_losses_lse_and_gradients_are_as_accurate_as_pytorch(name, of, options, dtype):
    check(CASES[name], dtype, OPTIONS[options], of)


@given(st.data())
def test_fuzzed_sizes_and_options_follow_the_reference(data):
    tokens, width, vocabulary = (data.draw(st.integers(1, most)) for most in (12 if INTERPRET else 30, 20, 80))
    case = random_case(tokens, width, vocabulary, data.draw(st.integers(0, tokens)), bias=data.draw(st.booleans()),
                       row_weight=data.draw(st.booleans()), seed=tokens, least=data.draw(st.sampled_from([-1, -100])))
    options = {"softcap": data.draw(st.sampled_from([None, 0.5, 30.0])),
               "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
               "z_loss": data.draw(st.sampled_from([0.0, 1e-4, 0.5]))}
    of = data.draw(st.sampled_from([("loss",), ("losses",), ("lse",), ("loss", "lse"), ("loss", "losses", "lse")]))
    check(case, data.draw(st.sampled_from(DTYPES)), options, of)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's chunks and blocks are small: every case has several")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_chunk_and_more_words_than_a_block(dtype, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 2**20)
    everything = OPTIONS["everything"]
    check(random_case(1500, 24, 300, 1500, bias=True, row_weight=True), dtype, everything, ("loss", "losses", "lse"))
    check(random_case(80, 8, 2 * WIDEST + 5, 70), dtype, everything, ("loss",))


@cpu_only
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_pass_gradcheck(options):
    case = CASES["both, odd sizes"]
    inputs = case._replace(hidden=case.hidden[:, :3], weight=case.weight[:, :3]).inputs(torch.float64)

    def function(hidden, weight, bias):
        return linear_cross_entropy_with_lse(hidden, weight, case.targets, case.rows, bias=bias,
                                             row_weight=case.row_weight, **OPTIONS[options])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_are_those_of_the_function_without_lse(options):
    case = CASES["both, odd sizes"]
    hidden, weight, bias = inputs = case.inputs(torch.float32)
    arguments = (hidden, weight, case.targets, case.rows)
    more = {"bias": bias, "row_weight": case.row_weight, **OPTIONS[options]}
    plain, with_lse = linear_cross_entropy(*arguments, **more), linear_cross_entropy_with_lse(*arguments, **more)
    assert torch.equal(plain.loss, with_lse.loss) and torch.equal(plain.losses, with_lse.losses)
    assert all(torch.equal(*pair) for pair in zip(*(torch.autograd.grad(x.loss, inputs) for x in (plain, with_lse))))
    expected = linear_cross_entropy_reference(*arguments, **more)
    torch.testing.assert_close(plain, expected)


def test_what_an_ignored_target_names_may_hold_anything_and_its_lse_is_0():
    case = CASES["both, odd sizes"]
    without, everything, of = case.targets < 0, OPTIONS["everything"], ("loss", "losses", "lse")
    case = case._replace(row_weight=case.row_weight.masked_fill(without, 0))
    plain = run(linear_cross_entropy_with_lse, case, torch.float32, everything, of)
    hidden = case.hidden.clone()
    hidden[case.rows[without].cpu()] = math.nan
    poisoned = case._replace(hidden=hidden, row_weight=case.row_weight.masked_fill(without, math.nan))
    found = run(linear_cross_entropy_with_lse, poisoned, torch.float32, everything, of)
    assert without.any() and not found["lse"][without].any() and not found["losses"][without].any()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_parts_of_a_loss_are_told_by_its_lse():
    case = CASES["bias"]
    hidden, weight, bias = case.inputs(torch.float32)
    plain = linear_cross_entropy(hidden, weight, case.targets, case.rows, bias=bias).losses
    found = linear_cross_entropy_with_lse(hidden, weight, case.targets, case.rows, bias=bias, z_loss=0.5)
    torch.testing.assert_close(found.losses - 0.5 * found.lse.square(), plain, rtol=1e-5, atol=1e-5)


def test_no_rows_and_no_logits_of_all_rows(monkeypatch):
    if not INTERPRET:
        monkeypatch.setattr(module, "LOGITS_BYTES", 2**20)
    case = random_case(6, 16, 20, 0, bias=True)
    found = run(linear_cross_entropy_with_lse, case, torch.float32, OPTIONS["everything"], ("loss", "lse"))
    assert found["lse"].shape == (0,) and not any(found[n].any() for n in ("loss", "dhidden", "dweight", "dbias"))
    rows, vocabulary = (64, 100) if INTERPRET else (8192, 100)
    case = random_case(rows, 128, vocabulary, rows)
    with LargestTensor() as largest:
        run(linear_cross_entropy_with_lse, case, torch.float32, OPTIONS["everything"], ("loss", "lse"))
    chunk = module.chunk_rows(rows, vocabulary, 4)
    assert largest.bytes <= 4 * max(chunk * 112, rows * 128, vocabulary * 128)


@traced
def test_opcheck():
    case = CASES["both, odd sizes"]
    hidden, weight, bias = case.inputs(torch.float32)
    lse_weight = torch.randn(len(case.rows), device=DEVICE)
    for more in ((30.0, 0.1, 1e-3, True), (0.0, 0.1, 0.0), (0.0, 0.0, 0.0, False, lse_weight)):
        torch.library.opcheck(module._forward, (hidden, weight, case.targets, case.rows, bias, case.row_weight, True,
                                                True, True, *more))


@traced
def test_compiles_whole_and_serves_other_lengths_and_values_without_a_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, bias, targets, rows, row_weight):
        found = linear_cross_entropy_with_lse(2 * hidden, weight, targets, rows, bias=bias, row_weight=row_weight,
                                              **OPTIONS["everything"])
        return found.loss / len(rows) + (found.lse.square() * row_weight).mean(), found.losses

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens, rows in ((18, 7), (33, 12), (40, 31)):
        case = random_case(tokens, 16, 40, rows, bias=True, row_weight=True)
        inputs = case.inputs(torch.float32)
        found, expected = ([losses.detach(), *torch.autograd.grad(loss, inputs)] for loss, losses in
                           (f(*inputs, case.targets, case.rows, case.row_weight) for f in (compiled, step)))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # one static, one with dynamic sizes


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_with_lse])
@pytest.mark.parametrize("name, wrong, fits", [
    ("softcap", (0, -1.0, math.inf, math.nan, True, "30", torch.tensor(30.0)), "a positive, finite bound fits"),
    ("label_smoothing", (-0.1, 1.1, math.nan, None, True, "0", torch.tensor(0.1)), "a number from 0 to 1 fits"),
    ("z_loss", (-1e-4, math.inf, math.nan, None, True, "0"), "a finite number of at least 0 fits")])
def test_options_that_do_not_fit_are_refused_by_name(name, wrong, fits, function):
    x, index = torch.zeros(6, 8, device=DEVICE), torch.arange(4, device=DEVICE)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{function.__name__}: {name} is .*; {fits}"):
            function(x, x, index, index, **{name: value})


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocabulary", [500, 50257, 128256])
def test_the_kernel_with_every_option_spills_nothing(vocabulary, size, architecture):
    launch, stride = launch_config(vocabulary), -(-vocabulary // module.ALIGNMENT) * module.ALIGNMENT
    constants = {"V": vocabulary, "STRIDE": stride, "WEIGHT": True, "GRADIENT": True, "BLOCK": launch.block_n}
    found = resources(_cross_entropy_rows, constants, launch, architecture=architecture, element_size=size,
                      float32=("row_weight_ptr", "losses_ptr", "lse_weight_ptr"))
    assert found.fit(architecture), found
