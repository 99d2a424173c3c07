"""The text head's cross-entropy: losses and gradients against float64, chunks, edge cases, memory, errors, and
PyTorch's machinery."""
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compare import assert_as_accurate
from tests.conftest import DEVICE, DTYPES, KERNEL_RUNS, compiles
from tests.launches import seen
from tests.resources import resources
from tests.step_counts import tensors_of
from tfkernels import LinearCrossEntropy, linear_cross_entropy, linear_cross_entropy_reference
from tfkernels._launch import ARCHITECTURES
from tfkernels._library import INTERPRET
from tfkernels.losses import cross_entropy as module
from tfkernels.losses.cross_entropy import chunk_rows
from tfkernels.losses.triton.cross_entropy import WIDEST, _cross_entropy_rows, launch_config


class Case(NamedTuple):
    """Inputs in float64; the bias and the row weights are there where the case has them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    bias: Tensor | None
    row_weight: Tensor | None

    def inputs(self, dtype):
        """hidden, weight and bias in `dtype`, requiring gradients."""
        return [x if x is None else x.to(DEVICE, dtype, copy=True).requires_grad_()
                for x in (self.hidden, self.weight, self.bias)]


def random_case(tokens=40, width=24, vocabulary=70, rows=21, *, bias=False, row_weight=False, seed=0, least=-1):
    """`rows` of `tokens` in random order; about one target in four is negative."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets = torch.where(torch.rand(rows, generator=generator) < 0.25, least, targets)
    chosen = torch.randperm(tokens, generator=generator)[:rows]
    weights = normal(rows).float().to(DEVICE) if row_weight else None
    return Case(normal(tokens, width), normal(vocabulary, width) / max(1, width)**0.5, targets.to(DEVICE),
                chosen.to(DEVICE), normal(vocabulary) if bias else None, weights)


CASES = {
    "plain": random_case(), "bias": random_case(bias=True), "row weights": random_case(row_weight=True, seed=1),
    "both, odd sizes": random_case(41, 13, 37, 19, bias=True, row_weight=True, seed=2),
    "one word": random_case(12, 8, 1, 7, bias=True, seed=3), "one row": random_case(5, 16, 33, 1, seed=4, least=3),
    "every row": random_case(24, 9, 64, 24, row_weight=True, seed=5),
    "one column": random_case(9, 1, 40, 5, bias=True, seed=6)
}


def run(function, case, dtype, divisor=7.0):
    """{name: value} of the losses and of the gradients of loss / divisor."""
    hidden, weight, bias = inputs = case.inputs(dtype)
    output = function(hidden, weight, case.targets, case.rows, bias=bias, row_weight=case.row_weight)
    given = [x for x in inputs if x is not None]
    names = ["dhidden", "dweight", "dbias"][:len(given)]
    return {"loss": output.loss.detach(), "losses": output.losses.detach()} | dict(zip(names,
                                                                                       torch.autograd.grad(output.loss
                                                                                                           / divisor,
                                                                                                           given)))


def run_from_losses(function, case, dtype, divisor=7.0):
    """`run` with row_weight applied by the caller, to losses: the same numbers, but for how they are rounded."""
    hidden, weight, bias = inputs = case.inputs(dtype)
    output = function(hidden, weight, case.targets, case.rows, bias=bias)
    loss = (output.losses * (1 if case.row_weight is None else case.row_weight)).sum()
    given = [x for x in inputs if x is not None]
    names = ["dhidden", "dweight", "dbias"][:len(given)]
    return {"loss": loss.detach(), "losses": output.losses.detach()} | dict(zip(names,
                                                                                torch.autograd.grad(loss / divisor,
                                                                                                    given)))


def terms_of(case, divisor=7.0):
    """The sums behind the losses and the gradients over absolute values, in float64: what their rounding errors scale
    with."""
    hidden, weight, bias = (x if x is None else x.detach() for x in case.inputs(torch.float64))
    rows, known = hidden.flatten(0, -2)[case.rows], (case.targets >= 0)[:, None]
    # how far a logit can be off, in roundings
    size = rows.abs() @ weight.abs().mT + (0 if bias is None else bias.abs())
    probability = (rows @ weight.mT + (0 if bias is None else bias)).softmax(-1)
    scale = (torch.ones_like(case.rows, dtype=torch.float64)
             if case.row_weight is None else case.row_weight.double().abs())
    peak = size.amax(1) * 2 + 1
    off = probability * (size + peak[:, None])
    off = off + torch.nn.functional.one_hot(case.targets.clamp(min=0), weight.shape[0])
    dz = torch.where(known, off * scale[:, None] / divisor, 0)
    dhidden = torch.zeros_like(hidden)
    dhidden.view(-1, hidden.shape[-1])[case.rows] = dz @ weight.abs()
    losses = torch.where(known[:, 0], peak, 0)
    return {"loss": (losses * scale).sum(), "losses": losses, "dhidden": dhidden, "dweight": dz.mT @ rows.abs(),
            "dbias": dz.sum(0)}


def check(case, dtype, run=run):
    """Hold the losses and every gradient to the accuracy rule."""
    rounded = case._replace(**{n: x.to(dtype).double()
                               for n in ("hidden", "weight", "bias") if (x := getattr(case, n)) is not None})
    ours, theirs, exact = (run(f, rounded, t)
                           for f, t in ((linear_cross_entropy, dtype), (linear_cross_entropy_reference, dtype),
                                        (linear_cross_entropy_reference, torch.float64)))
    assert (ours["loss"].dtype == ours["losses"].dtype == torch.promote_types(dtype, torch.float32)
            and ours["dhidden"].dtype == dtype)
    terms = terms_of(rounded)
    for name in exact:
        assert ours[name].shape == exact[name].shape
        assert_as_accurate(name, ours[name], theirs[name], exact[name], terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_as_accurate_as_pytorch(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_from_losses_are_as_accurate_as_pytorch(name, dtype):
    check(CASES[name], dtype, run_from_losses)


def test_gradients_from_loss_and_losses_add_up():
    case = CASES["both, odd sizes"]
    hidden, weight, bias = inputs = case.inputs(torch.float32)
    factors = torch.randn(len(case.rows), device=DEVICE)
    output = linear_cross_entropy(hidden, weight, case.targets, case.rows, bias=bias, row_weight=case.row_weight)
    apart = [torch.autograd.grad(x, inputs, retain_graph=True) for x in (output.loss, (output.losses * factors).sum())]
    both = torch.autograd.grad(output.loss + (output.losses * factors).sum(), inputs)
    for a, b, c in zip(*apart, both):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-5)
        assert b.any()


def test_a_mean_over_many_rows_does_not_vanish_in_float16():
    case = CASES["plain"]
    hidden, weight, _ = case.inputs(torch.float16)
    losses = linear_cross_entropy(hidden, weight, case.targets, case.rows).losses
    small, one = (torch.autograd.grad((losses * factor).sum(), weight, retain_graph=True)[0]
                  for factor in (2.0**-10, 1.0))
    torch.testing.assert_close(small.float() * 2**10, one.float(), rtol=2e-3, atol=2.0**-14)


def test_small_row_weights_do_not_vanish_in_float16_where_the_loss_is_scaled():
    """As by a GradScaler; what an ignored target weighs is no measure."""
    case = CASES["row weights"]
    hidden, weight, _ = inputs = case.inputs(torch.float16)
    ignored = torch.where(case.targets < 0, 1e6, case.row_weight * 2.0**-27)
    found = [torch.autograd.grad(scale * linear_cross_entropy(hidden, weight, case.targets, case.rows,
                                                              row_weight=w).loss,
                                 inputs[:2]) for w, scale in ((ignored, 2.0**27), (case.row_weight, 1.0))]
    for small, one in zip(*found):
        torch.testing.assert_close(small.float(), one.float(), rtol=2e-3, atol=2.0**-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_an_ignored_target_names_may_hold_anything(value):
    case = CASES["both, odd sizes"]
    without = case.targets < 0
    others = torch.ones(len(case.hidden), dtype=torch.bool)
    others[case.rows.cpu()] = False
    for function in (run, run_from_losses):
        plain = function(linear_cross_entropy, case._replace(row_weight=case.row_weight.masked_fill(without, 0)),
                         torch.float32)
        hidden = case.hidden.clone()
        hidden[case.rows[without].cpu()] = value
        hidden[others] = value
        row_weight = case.row_weight.masked_fill(without, value) if function is run else case.row_weight
        found = function(linear_cross_entropy, case._replace(hidden=hidden, row_weight=row_weight), torch.float32)
        for name in plain:
            assert torch.equal(found[name], plain[name]), name
    hidden, weight, bias = inputs = case.inputs(torch.float32)
    losses = linear_cross_entropy(hidden, weight, case.targets, case.rows, bias=bias).losses
    ones, poisoned = (torch.autograd.grad(losses, inputs, x, retain_graph=True) for x in
                      (torch.ones_like(losses), torch.ones_like(losses).masked_fill(without, value)))
    assert all(torch.equal(a, b) for a, b in zip(ones, poisoned))


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "row_weight"])
def test_nan_that_a_target_reaches_shows_in_its_loss_and_gradients(name):
    case = CASES["both, odd sizes"]
    r = int((case.targets >= 0).nonzero()[0])
    at = {"hidden": (int(case.rows[r]), 3), "weight": (int(case.targets[r]), 3), "bias": (int(case.targets[r]),),
          "row_weight": (r,)}[name]
    changed = getattr(case, name).clone()
    changed[at] = float("nan")
    found, expected = (run(f, case._replace(**{name: changed}), torch.float32)
                       for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert expected["loss"].isnan()
    # plain PyTorch multiplies 0 by the weight
    expected["dhidden"][case.rows[case.targets < 0]] = 0
    for key in expected:
        assert not (expected[key].isnan() & ~found[key].isnan()).any(), key


@pytest.mark.skipif(INTERPRET, reason="the interpreter's chunks and blocks are small: every case has several")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_chunk_and_more_words_than_a_block(dtype, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 2**20)
    check(random_case(1500, 24, 300, 1500, bias=True, row_weight=True), dtype)
    check(random_case(80, 8, 2 * WIDEST + 5, 70), dtype)


def test_a_batch_and_its_flat_rows_give_equal_results():
    case = CASES["both, odd sizes"]._replace(hidden=torch.randn(4, 11, 13, generator=torch.Generator().manual_seed(1),
                                                                dtype=torch.float64))
    batch, flat = (run(linear_cross_entropy, c, torch.float32)
                   for c in (case, case._replace(hidden=case.hidden.flatten(0, 1))))
    assert all(torch.equal(batch[n].view_as(flat[n]), flat[n]) for n in flat)


@given(st.data())
def test_fuzzed_sizes_follow_the_reference(data):
    tokens, width, vocabulary = (data.draw(st.integers(1, most)) for most in (16 if INTERPRET else 30, 20, 80))
    case = random_case(tokens, width, vocabulary, data.draw(st.integers(0, tokens)), bias=data.draw(st.booleans()),
                       row_weight=data.draw(st.booleans()), seed=tokens, least=data.draw(st.sampled_from([-1, -100])))
    check(case, data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("tokens", [0, 6])
def test_no_rows_cost_nothing_and_give_zero(tokens):
    found = run(linear_cross_entropy, random_case(tokens, 16, 20, 0, bias=True, row_weight=True), torch.float32)
    assert found["loss"] == 0 and found["losses"].shape == (0,) and found["dhidden"].shape == (tokens, 16)
    assert not any(found[n].any() for n in ("dhidden", "dweight", "dbias"))


def test_rows_without_a_target_have_no_loss_and_no_gradient():
    case = CASES["row weights"]
    found, without = run(linear_cross_entropy, case, torch.float32), case.targets < 0
    assert without.any() and torch.equal(found["losses"] == 0, without)
    touched = found["dhidden"].any(1)
    assert touched[case.rows[~without]].all() and touched.sum() == (~without).sum()
    left = case._replace(targets=case.targets[~without], rows=case.rows[~without], row_weight=case.row_weight[~without])
    for name, value in run(linear_cross_entropy, left, torch.float32).items():
        torch.testing.assert_close(value, found[name][~without] if name == "losses" else found[name], rtol=1e-5,
                                   atol=1e-6)
    assert not any(x.any()
                   for x in run(linear_cross_entropy, case._replace(targets=torch.full_like(case.targets, -5)),
                                torch.float32).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits_neither_overflow_nor_vanish(dtype):
    case = random_case(20, 8, 50, 12, seed=3)
    large = case._replace(hidden=case.hidden * 1e4 / case.hidden.abs().amax()
                          if dtype == torch.float16 else case.hidden * 1e4)
    found = run(linear_cross_entropy, large, dtype)
    assert all(x.isfinite().all() for x in found.values()) and found["losses"].max() > 1e3
    check(large, dtype)


def test_words_ruled_out_by_minus_infinity_have_no_probability():
    case = random_case(20, 8, 100, 12, bias=True, seed=3)
    out = torch.arange(100) < 70  # the interpreter's first two blocks, and part of the third
    case = case._replace(bias=case.bias.masked_fill(out, -torch.inf),
                         targets=torch.where(case.targets >= 0, 70 + case.targets % 30, -1))
    found, expected = (run(f, case, torch.float32) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert not found["dweight"][:70].any() and not found["dbias"][:70].any()


@pytest.mark.parametrize("sizes", [(40, 24, 70, 13), (1, 1, 1, 1)], ids=str)
def test_any_strides_and_other_integers_and_floats_give_equal_results(sizes):
    case = random_case(*sizes, bias=True, row_weight=True)
    hidden, weight, bias = case.inputs(torch.float32)
    expected = run(linear_cross_entropy, case, torch.float32)
    for lay in (lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], -1)[..., :x.shape[-1]],
                lambda x: torch.stack([x, x], -1)[..., 0]):
        laid = [lay(x.detach()).requires_grad_() for x in (hidden, weight)] + [
            torch.stack([bias, bias], 1).detach()[:, 0].requires_grad_()
        ]
        output = linear_cross_entropy(laid[0], laid[1], torch.stack([case.targets] * 2, 1)[:, 0],
                                      torch.stack([case.rows] * 2, 1)[:, 0], bias=laid[2],
                                      row_weight=case.row_weight.double())
        for name, value in zip(expected, (output.loss, output.losses, *torch.autograd.grad(output.loss / 7, laid))):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_shifted_batch_is_not_copied():
    # rows of 8: [:, :-1] has no one stride
    batch, rows = torch.randn(3, 9, 16, device=DEVICE), torch.tensor([0, 7, 8, 20], device=DEVICE)
    expected = batch[:, :-1].reshape(-1, 16)[rows]
    assert torch.equal(module._gather(batch[:, :-1], rows, 24), expected)
    targets, weight = torch.tensor([1, 0, -1, 4], device=DEVICE), torch.randn(5, 16, device=DEVICE)
    found = linear_cross_entropy(batch[:, :-1], weight, targets, rows)
    torch.testing.assert_close(
        found.losses, linear_cross_entropy_reference(expected, weight, targets, torch.arange(4, device=DEVICE)).losses
    )


@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_that_are_wanted_are_made(wanted, monkeypatch):
    case, made = CASES["both, odd sizes"], []
    monkeypatch.setattr(module, "_accumulate", lambda *arguments: made.append("dweight"))
    inputs = [x.requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(case.inputs(torch.float32))]
    given = [x for x in inputs if x.requires_grad]
    kept = []
    # kept too, but no memory of ours
    passed = {x.data_ptr() for x in (*inputs, case.targets, case.rows, case.row_weight)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel() * (x.data_ptr() not in passed)) or x,
                                                  lambda x: x):
        output = linear_cross_entropy(inputs[0], inputs[1], case.targets, case.rows, bias=inputs[2],
                                      row_weight=case.row_weight)
    assert bool(made) == (wanted >> 1 & 1) and output.loss.requires_grad == output.losses.requires_grad == bool(wanted)
    (width, vocabulary), count = (13, 37), len(case.rows)
    sizes = [count * width, vocabulary * width, vocabulary]
    assert sum(kept) == sum(size for i, size in enumerate(sizes) if wanted >> i & 1)
    if given:
        assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(output.loss, given), given))
    with torch.no_grad():
        made.clear()
        quiet = linear_cross_entropy(inputs[0], inputs[1], case.targets, case.rows, bias=inputs[2],
                                     row_weight=case.row_weight)
    assert not made and not quiet.loss.requires_grad
    torch.testing.assert_close(quiet, LinearCrossEntropy(*(x.detach() for x in output)), rtol=1e-6, atol=1e-6)


def test_each_gradient_is_right_without_the_others():
    case = CASES["both, odd sizes"]
    expected = run(linear_cross_entropy, case, torch.float32)
    for i, name in enumerate(("dhidden", "dweight", "dbias")):
        inputs = [x.requires_grad_(i == n) for n, x in enumerate(case.inputs(torch.float32))]
        loss = linear_cross_entropy(inputs[0], inputs[1], case.targets, case.rows, bias=inputs[2],
                                    row_weight=case.row_weight).loss
        assert torch.equal(torch.autograd.grad(loss / 7, inputs[i])[0], expected[name])


def test_sums_over_rows_beyond_float16_stay_finite_until_the_caller_divides():
    hidden = torch.full((40, 4), 2000.0, dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = torch.zeros(6, 4, dtype=torch.float16, device=DEVICE).requires_grad_()
    rows = torch.arange(40, device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, torch.zeros_like(rows), rows).loss / 40
    dweight, = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(dweight[0].float(), torch.full((4,), -2000 * 5 / 6, device=DEVICE), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
def test_gradients_are_scaled_by_dloss_before_they_are_rounded(dtype):
    case, scale = CASES["both, odd sizes"], 1 + 2**-9 + 2**-10  # rounded to bfloat16 first, it would be 1 + 2**-7 or 1
    hidden, weight, bias = case.inputs(dtype)
    loss = linear_cross_entropy(hidden, weight, case.targets, case.rows, bias=bias, row_weight=case.row_weight).loss
    one, more = (torch.autograd.grad(loss, (hidden, weight, bias), loss.new_tensor(s), retain_graph=True)
                 for s in (1.0, scale))
    assert torch.equal(more[0], (one[0].float() * scale).to(dtype))


def test_the_gradients_are_the_same_to_the_bit_every_time():
    case = random_case(bias=True, row_weight=True)
    first = run(linear_cross_entropy, case, torch.float32)
    for _ in range(1 if INTERPRET else 50):
        assert all(torch.equal(a, b)
                   for a, b in zip(first.values(), run(linear_cross_entropy, case, torch.float32).values()))


@pytest.mark.parametrize("rows", [0, 8, 1025, 16_384, 100_000])
@pytest.mark.parametrize("vocabulary", [1, 258, 32_000, 50_257, 128_256, 262_144])
def test_chunks_are_whole_tiles_of_about_equal_rows_within_a_budget(rows, vocabulary):
    size, tile = chunk_rows(rows, vocabulary, 2), module.TILE_ROWS
    assert size % tile == 0 and size <= max(module.FEWEST_ROWS, module.LOGITS_BYTES // (2 * vocabulary))
    chunks = -(-rows // max(1, size))
    assert size * chunks < rows + tile * max(1, chunks)                                    # no chunk is nearly empty
    if chunks > 1:                                                                         # nor are there too many
        fewer = rows / (chunks - 1)
        assert fewer > module.FEWEST_ROWS and 2 * vocabulary * (fewer + tile) > module.LOGITS_BYTES


class Memory(TorchDispatchMode):
    """The most bytes of results that lived together, those of the operators' implementations included."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tfkernels":
            with self:
                return OPDEFS[f"tfkernels::{function._opname}"]._backend_fns["cuda"](*args)
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors_of((args, tuple((kwargs or {}).values())))}
        self.live = {s: size for s, size in self.live.items() if not s.expired()}
        self.live |= {StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors_of(result)
                      if x.untyped_storage()._cdata not in given}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.skipif(KERNEL_RUNS, reason="nothing runs: launches are seen on tensors without memory")
@pytest.mark.parametrize("rows, vocabulary, width", [(16_384, 32_000, 2048), (4096, 128_256, 4096)])
def test_the_memory_beside_inputs_is_what_the_module_says(rows, vocabulary, width, monkeypatch):
    monkeypatch.setattr(module, "_accumulate", lambda total, a, b: None)                   # into `total`, on a GPU
    def leaf(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    hidden, weight = leaf(2 * rows, width), leaf(vocabulary, width)
    places = torch.empty(rows, dtype=torch.int64, device="meta")
    with seen(lambda *_: None), Memory() as memory:
        loss = linear_cross_entropy(hidden, weight, places, places).loss
    size = chunk_rows(rows, vocabulary, 2)
    logits, dweight, dhidden = 2 * size * vocabulary, 4 * vocabulary * width, 2 * rows * width
    assert logits <= max(module.LOGITS_BYTES, 2 * module.FEWEST_ROWS * vocabulary)
    chunk, numbers = 2 * size * width, 64 * rows                                           # losses, targets, places
    assert logits + dweight + dhidden <= memory.peak <= logits + dweight + dhidden + 2 * chunk + numbers
    assert loss.requires_grad


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocabulary, gradient",
                         [(500, True), (2048, True), (50257, True), (128256, True), (128256, False)])
def test_the_kernel_spills_nothing(vocabulary, gradient, size, architecture):
    launch, stride = launch_config(vocabulary), -(-vocabulary // module.ALIGNMENT) * module.ALIGNMENT
    constants = {"V": vocabulary, "STRIDE": stride, "WEIGHT": gradient, "GRADIENT": gradient, "BLOCK": launch.block_n}
    constants |= dict.fromkeys(("lse_ptr", "lse_weight_ptr", "softcap", "smoothing", "z_loss"))
    found = resources(_cross_entropy_rows, constants, launch, architecture=architecture, element_size=size,
                      float32=("row_weight_ptr", "losses_ptr"))
    assert found.fit(architecture), found
