"""Where nothing watches operators a call goes past the custom op: it gives the same numbers, the same gradients and the
same errors, and whatever traces, transforms or watches still sees the op."""
import contextlib
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.conftest import DEVICE, INTERPRET, traced
from tests.tfkernels.test_arguments import CALLS
from tests.tfkernels.test_library import MASKS, leaves_of
from tfkernels import TransfusionMask, attention, attention_with_lse, paged_attention, qk_norm_rotary
from tfkernels._library import Operator
from tfkernels.attention import op as attention_op

AUTOCAST = torch.float16 if INTERPRET else torch.bfloat16
WITHOUT_OPERATOR = ("min_snr_weight", "rotary_table", "grid_positions", "pack_latents")


class Watched(TorchDispatchMode):
    """Changes nothing and sees every operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Seen(TorchFunctionMode):
    """Changes nothing and sees every function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A subclass that PyTorch handles by itself."""


@pytest.fixture
def direct(monkeypatch):
    """The names of the operators that were called past the custom op."""
    names, call = [], Operator.directly

    def record(self, *args):
        names.append(self._name)
        return call(self, *args)

    monkeypatch.setattr(Operator, "directly", record)
    return names


def attention_inputs(seq_len=40, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, seq_len, 16, generator=draw).to(DEVICE, dtype).requires_grad_()
            for heads in (4, 2, 2)], TransfusionMask.from_spans([[(3, 19)]], seq_len, device=DEVICE)


def of_attention(function):
    def call():
        (q, k, v), mask = attention_inputs()
        return function, {"q": q, "k": k, "v": v, "mask": mask}
    return call


def of_pages():
    pages = torch.randn(4, 4, 2, 16, device=DEVICE)
    mask = TransfusionMask.from_cache(torch.tensor([3, 9], device=DEVICE), 2, 16)
    return paged_attention, {"q": torch.randn(2, 4, 2, 16, device=DEVICE), "k_pages": pages, "v_pages": pages + 1,
                             "block_table": torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]], dtype=torch.int32,
                                                         device=DEVICE), "mask": mask}


EVERY = {**CALLS, **MASKS, "attention": of_attention(attention), "attention_with_lse": of_attention(attention_with_lse),
         "paged_attention": of_pages}


def tensors_of(result):
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    fields = vars(result).values() if hasattr(result, "__dict__") else result
    return [tensor for x in fields if isinstance(x, (torch.Tensor, tuple, list)) for tensor in tensors_of(x)]


def results(name, direct, around=contextlib.nullcontext):
    """Outputs and gradients of a public function, called and differentiated inside `around()`, whose direct calls alone
    are left in `direct`."""
    torch.manual_seed(0)
    function, arguments = EVERY[name]()
    if name in CALLS:
        leaves_of(name, arguments)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    direct.clear()
    with around():
        outputs = tensors_of(function(**arguments))
        differentiable = [x for x in outputs if x.requires_grad]
        if differentiable:
            weighted = (x * torch.linspace(1, 2, x.numel(), device=DEVICE).view(x.shape) for x in differentiable)
            sum(x.sum() for x in weighted).backward()
    return outputs, [x.grad for x in leaves]


@pytest.mark.parametrize("name", EVERY)
def test_outputs_and_gradients_are_those_of_the_custom_op_to_the_bit(name, direct):
    plain, names = results(name, direct), {*direct}
    watched = results(name, direct, Watched)
    assert not direct and (names or name in WITHOUT_OPERATOR)
    for found, expected in zip(plain, watched):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) and a.stride() == b.stride()
                assert a.dtype == b.dtype and a.requires_grad == b.requires_grad


@pytest.mark.parametrize("name", [name for name in EVERY if name not in MASKS])
def test_results_are_on_the_tensors_device_whatever_the_default_one_is(name, direct):
    for found, expected in zip(results(name, direct, lambda: torch.device("meta")), results(name, direct)):
        for a, b in zip(found, expected):
            assert a is b is None or a.device == b.device and torch.equal(a.nan_to_num(), b.nan_to_num())


def once(around=contextlib.nullcontext):
    (q, k, v), mask = attention_inputs()
    with around():
        return attention(q, k, v, mask)


def compiled():
    torch._dynamo.reset()
    (q, k, v), mask = attention_inputs()
    torch.compile(attention, backend="aot_eager", fullgraph=True)(q, k, v, mask)


def exported():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, TransfusionMask.causal(q.shape[2]))

    torch.export.export(Attend(), tuple(attention_inputs()[0]))


def fake():
    with FakeTensorMode():
        q = torch.randn(1, 2, 8, 16)
        attention(q, q, q, TransfusionMask.causal(8))


def subclassed():
    (q, k, v), mask = attention_inputs()
    attention(q.detach().as_subclass(Own), k, v, mask)


def negated():
    (q, k, v), mask = attention_inputs()
    with torch.no_grad():
        attention(torch._neg_view(q), k, v, mask)


def on_meta():
    q = torch.randn(1, 2, 8, 16, device="meta")
    attention(q, q, q, TransfusionMask.causal(8, device="meta"))


def traced_by_jit():
    (q, k, v), mask = attention_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda *x: attention(*x, mask), (q, k, v), check_trace=False)


def traced_by_fx(**options):
    (q, k, v), mask = attention_inputs()
    make_fx(lambda *x: attention(*x, mask), **options)(q, k, v)


def transformed():
    (q, k, v), mask = attention_inputs()
    with pytest.raises(RuntimeError, match="functorch transforms"):  # which the custom op does not know either
        torch.func.grad(lambda x: attention(x, k, v, mask).sum())(q)
    with torch.no_grad():
        torch.func.vmap(lambda x: attention(x, k, v, mask))(torch.stack([q, q]))


def selectively_checkpointed():
    (q, k, v), mask = attention_inputs()

    def keep(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    checkpoint(lambda: attention(q, k, v, mask), use_reentrant=False,
               context_fn=lambda: create_selective_checkpoint_contexts(keep))


@traced
@pytest.mark.parametrize("watch", [
    lambda: once(Watched), lambda: once(Seen), compiled, exported, fake, subclassed, negated, on_meta, traced_by_jit,
    traced_by_fx, lambda: traced_by_fx(pre_dispatch=True), transformed, selectively_checkpointed,
], ids=["dispatch mode", "function mode", "torch.compile", "torch.export", "fake tensors", "tensor subclass",
        "negated view", "meta", "torch.jit.trace", "make_fx", "make_fx before dispatch", "torch.func",
        "selective checkpoint"])
def test_whatever_watches_sees_the_custom_op(watch, direct):
    once()
    assert "attention_forward" in direct
    direct.clear()
    watch()
    assert "attention_forward" not in direct


def test_a_negated_view_is_read_with_its_sign():
    (q, k, v), mask = attention_inputs()
    assert torch.equal(attention(torch._neg_view(q), k, v, mask), attention(-q, k, v, mask))


def test_a_profile_names_the_operator_of_a_direct_call(direct):
    with profile(activities=[ProfilerActivity.CPU]) as calls:
        once().sum().backward()
    assert direct[-2:] == ["attention_forward", "attention_backward"]
    counts = {event.key: event.count for event in calls.key_averages()}
    assert [counts[f"tfkernels::{name}"] for name in ("attention_forward", "attention_backward")] == [1, 1]


@pytest.mark.parametrize("around", [contextlib.nullcontext, Watched], ids=["directly", "custom op"])
def test_a_second_derivative_is_refused_in_the_same_words(around):
    (q, k, v), mask = attention_inputs()
    with around():
        (first,) = torch.autograd.grad(attention(q, k, v, mask).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="Trying to backward through tfkernels.attention_backward.default"):
            first.sum().backward()


@pytest.mark.parametrize("around", [contextlib.nullcontext, Watched], ids=["directly", "custom op"])
def test_a_second_backward_needs_the_graph_and_gives_the_same(around):
    for retain in (True, False):
        (q, k, v), mask = attention_inputs()
        with around():
            loss = attention(q, k, v, mask).square().sum()
            first = torch.autograd.grad(loss, (q, k, v), retain_graph=retain)
            if retain:
                second = torch.autograd.grad(loss, (q, k, v))
                assert all(map(torch.equal, first, second))
            else:
                with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                    loss.backward()


def hooked(around):
    """What hooks of tensors, of nodes and of what is saved between forward and backward see."""
    (q, k, v), mask = attention_inputs()
    record = []

    def pack(x):
        record.append(("saved", tuple(x.shape), x.dtype, float(x.detach().double().nan_to_num(0, 0, 0).sum())))
        return x

    with around(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = attention_with_lse(q, k, v, mask)
    out.register_hook(lambda grad: record.append(("gradient", float(grad.sum()))))
    out.grad_fn.register_hook(lambda inputs, outputs: record.append(
        ("node", [None if x is None else tuple(x.shape) for x in inputs[:7]], len(outputs))))
    q.register_post_accumulate_grad_hook(lambda x: record.append(("accumulated", float(x.grad.sum()))))
    with around():
        (out.sum() + lse.sum()).backward()
    return record


def test_hooks_see_what_they_see_of_the_custom_op(direct):
    plain = hooked(contextlib.nullcontext)
    assert direct[-2:] == ["attention_forward", "attention_backward"]
    assert plain == hooked(Watched) and {kind for kind, *_ in plain} == {"saved", "gradient", "node", "accumulated"}


def few_queries():
    (q, k, v), mask = attention_inputs()
    return attention_with_lse, {"q": q.detach()[:, :, -1:].requires_grad_(), "k": k, "v": v,
                                "mask": mask.queries(39, 40)}


def heads_behind_tokens():
    q, k = torch.randn(2, 1, 8, 4, 16, device=DEVICE, requires_grad=True).transpose(2, 3)
    cos, sin = torch.randn(2, 8, 8, device=DEVICE)
    return qk_norm_rotary, {"q": q, "k": k, "q_weight": None, "k_weight": None, "cos": cos, "sin": sin}


WRITTEN = {**EVERY, "few queries": few_queries, "heads behind tokens": heads_behind_tokens}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", WRITTEN)
def test_results_may_be_written_to(name, mode):
    function, arguments = WRITTEN[name]()
    if name in CALLS:
        leaves_of(name, arguments)
    with mode():
        outputs = [x for x in tensors_of(function(**arguments)) if x.is_floating_point()]
    for x in outputs:
        expected = x.detach() * 2
        x.mul_(torch.full((), 2.0, device=DEVICE, requires_grad=True))
        assert torch.equal(x, expected)


def test_an_input_changed_in_place_before_backward_is_found():
    (q, k, v), mask = attention_inputs()
    kept = k * 1
    out = attention(q, kept, v, mask)
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("detached", [True, False])
def test_results_require_a_gradient_where_those_of_the_custom_op_do(mode, detached):
    found = []
    for around in (contextlib.nullcontext, Watched):
        (q, k, v), mask = attention_inputs()
        with mode(), around():
            out, lse = attention_with_lse(*(x.detach() if detached else x for x in (q, k, v)), mask)
        found.append([(x.requires_grad, x.is_inference(), x.is_leaf) for x in (out, lse)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "modulated_rms_norm", "gated_residual_rms_norm",
                                  "diffusion_loss", "qk_norm_rotary"])
def test_autocast_gives_the_numbers_and_dtypes_of_the_custom_op(name, direct):
    def both(*managers):
        stack = contextlib.ExitStack()
        for manager in managers:
            stack.enter_context(manager)
        return stack

    plain, names = results(name, direct, lambda: both(torch.autocast(DEVICE, AUTOCAST))), {*direct}
    watched = results(name, direct, lambda: both(torch.autocast(DEVICE, AUTOCAST), Watched()))
    assert names and not direct
    for a, b in zip((*plain[0], *plain[1]), (*watched[0], *watched[1])):
        assert a is b is None or a.dtype == b.dtype and torch.equal(a, b)


def test_gradients_of_a_batch_of_cotangents_are_refused_or_computed_alike():
    found = []
    for around in (contextlib.nullcontext, Watched):
        (q, k, v), mask = attention_inputs()
        out = attention(q, k, v, mask)
        with around():
            try:
                cotangents = torch.randn(2, *out.shape, device=DEVICE)
                found.append(torch.autograd.grad(out, q, cotangents, is_grads_batched=True)[0].shape)
            except RuntimeError as error:
                found.append(str(error).split("\n")[0])
    assert found[0] == found[1]


def test_an_implementation_that_is_registered_later_is_the_one_that_runs(direct):
    """As ptxrun and stubbed launches do."""
    operator, calls = attention_op._forward, []
    before = operator._backend_fns[DEVICE]
    operator.register_kernel(DEVICE)(lambda *args: calls.append(args[0].shape) or before(*args))
    try:
        once()
    finally:
        operator._backend_fns[DEVICE] = before
    assert calls == [(1, 4, 40, 16)] and direct[-1] == "attention_forward"
