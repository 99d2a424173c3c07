"""Every registered operator's fake: sizes, dtypes and strides are those of the real result, whatever the strides of the
inputs are."""
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import DEVICE, cpu_only, traced
from tests.tfkernels.test_arguments import CALLS, whole
from tfkernels import PackedLatents, TransfusionMask, _library, attention
from tfkernels._library import made_once

MASKS = {
    "mask from spans": lambda: (
        TransfusionMask.from_spans,
        {
            "spans": whole([[[1, 4], [5, 6]]]),
            "seq_len": 8,
            "documents": whole([[0, 0, 0, 0, 1, 1, 1, -1]]),
            "hidden": whole([[[1, 4]]]),
        },
    ),
    "mask from token types": lambda: (TransfusionMask.from_token_types, {"token_types": whole([[0, 1, 1, 0, 2, 2]])}),
}
REVERSED = [tuple(range(ndim))[::-1] for ndim in range(6)]
LAID = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[..., 0],
    "reversed": lambda x: x.permute(REVERSED[x.ndim]).contiguous().permute(REVERSED[x.ndim]),
    "sliced": lambda x: torch.cat([x, x], -1)[..., :x.shape[-1]] if x.ndim else x,
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim > 1 and x.is_floating_point() else x,
    "expanded columns": lambda x: x[..., :1].expand(x.shape) if x.ndim > 1 and x.is_floating_point() else x,
}


class Recorded(TorchDispatchMode):
    """The calls of our operators, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tfkernels":
            self.calls[function] = args
        return function(*args, **(kwargs or {}))


def leaves_of(name, arguments):
    """The arguments that a public function has gradients of, which from now on require one."""
    constant = {"row_weight", "p", "q", "loss_weight", "signal", "noise", "cos", "sin", "eps"}
    constant |= set() if name in ("noise_patchify", "patchify_packed") else {"x0"}
    constant |= {"weight"} if name == "diffusion_loss" else set()
    if name == "qk_norm_rotary":
        constant -= {"q"}
    values = {key: x.values if isinstance(x, PackedLatents) else x for key, x in arguments.items()}
    return [x.requires_grad_() for key, x in values.items()
            if key not in constant and isinstance(x, torch.Tensor) and x.is_floating_point()]


def calls_of(name):
    """The operators that a public function and its backward call, with their arguments."""
    function, arguments = {**CALLS, **MASKS}[name]()
    leaves_of(name, arguments)
    with Recorded() as recorded:
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        outputs = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        if outputs:
            sum((x * torch.linspace(1, 2, x.numel(), device=DEVICE).view(x.shape)).sum() for x in outputs).backward()
    return recorded.calls


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("name", [*CALLS, *MASKS])
def test_a_fake_has_the_strides_of_the_real_result_whatever_its_inputs_are(name, layout):
    calls = calls_of(name)
    assert calls or name in ("min_snr_weight", "rotary_table", "grid_positions", "pack_latents")
    for operator, arguments in calls.items():
        laid = tuple(LAID[layout](x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(operator, laid, test_utils=("test_schema", "test_faketensor"))
        found, expected = (operator(*laid),
                           operator(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in laid)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_registered_operator_is_checked():
    found = set().union(*(calls_of(name) for name in (*CALLS, *MASKS)))
    names = {str(operator).split(".")[1] for operator in found}
    assert names | {"attention_forward", "attention_backward", "paged_attention"} >= {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tfkernels::") and "." not in name
    }
    assert DEVICE in ("cpu", "cuda")


@pytest.fixture
def made(monkeypatch):
    """A function that counts how often it makes something of two tensors, as if inside of an operator."""
    monkeypatch.setattr(_library._calls, "are_eager", True)
    calls = []

    def make(x, other, plus):
        calls.append(plus)
        return x + other + plus

    make.calls = calls
    return make


def test_what_is_made_once_is_made_again_where_a_tensor_was_written_or_is_another_one(made):
    x, other = torch.arange(3), torch.ones(3, dtype=torch.int64)
    first = made_once(made, x, other, plus=1)
    assert made_once(made, x, other, plus=1) is first and made.calls == [1]
    made_once(made, x, other, plus=2)
    x[0] = 7
    assert made_once(made, x, other, plus=1).tolist() == [9, 3, 4] and made.calls == [1, 2, 1]
    other += 1
    assert made_once(made, x, other, plus=1).tolist() == [10, 4, 5] and made.calls == [1, 2, 1, 1]
    assert made_once(made, x, torch.zeros_like(x), plus=1).tolist() == [8, 2, 3] and len(made.calls) == 5
    assert made_once(made, x.clone(), other, plus=1).tolist() == [10, 4, 5] and len(made.calls) == 6


def test_what_was_made_of_older_numbers_is_forgotten_whatever_its_sizes(made):
    x = torch.arange(3)
    results = []
    for plus in range(3):
        results.append(weakref.ref(made_once(made, x, x, plus=plus)))
        x += 1
    assert [result() is None for result in results] == [True, True, False]


@traced
def test_a_compiled_graph_that_writes_to_its_own_buffers_makes_everything_anew():
    """Of masks that share all but the rows' ends, whose buffers the compiler takes again for the next one."""
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 64, 64))
    lo, until = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 64, dtype=torch.int32)

    def steps(lens):
        found = []
        for _ in range(3):
            mask = replace(TransfusionMask.from_cache(lens, 1, 64), lo=lo, key_until=until)
            found.append(attention(q, k, v, mask))
            lens = lens + 7 + (found[-1].flatten(1).sum(1) > 1e9).long()
        return torch.stack(found)

    lens = torch.tensor([5])
    torch.testing.assert_close(torch.compile(steps, fullgraph=True)(lens), steps(lens))


@cpu_only
@pytest.mark.parametrize("dual", [False, True])
def test_forward_mode_gradients_are_refused_and_never_zero(dual):
    mask, shape = TransfusionMask.causal(5), (1, 2, 5, 16)
    q, k, v, tangent = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4))

    def tangent_of(op):
        if not dual:
            return torch.func.jvp(lambda q: op(q, k, v, mask), (q,), (tangent,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(op(forward_ad.make_dual(q, tangent), k, v, mask)).tangent

    with pytest.raises(NotImplementedError, match="forward-mode gradients .* are not computed; those of backward"):
        tangent_of(attention)
    with forward_ad.dual_level():
        assert attention(q, k, v, mask).shape == shape, "tensors without a tangent are computed"


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_made_of_a_tensor_is_forgotten_with_it(made, twice):
    x, other = torch.arange(3), torch.ones(3, dtype=torch.int64)
    result = weakref.ref(made_once(made, x, x if twice else other, plus=1))
    assert result() is not None
    del x
    gc.collect()
    assert result() is None


def test_of_an_inference_tensor_whose_writes_nobody_counts_it_is_made_each_time(made):
    with torch.inference_mode():
        x = torch.arange(3)
        made_once(made, x, x, plus=1)
        x += 1
        assert made_once(made, x, x, plus=1).tolist() == [3, 5, 7] and made.calls == [1, 1]
