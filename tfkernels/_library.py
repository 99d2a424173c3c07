"""The one way an operator meets PyTorch: a custom op with a CUDA kernel, a CPU implementation and a fake.

PyTorch's dispatcher picks by the tensors' device. Under `TRITON_INTERPRET=1` the CPU runs the Triton kernel through
Triton's interpreter, so that the same tests check the same kernel on a machine without a GPU.

Whatever traces, transforms or watches operators sees the custom op. Where nothing does, a call goes straight to the
same implementation, and where it needs a gradient to the same backward formula through an `autograd.Function`, because
the custom op's way through Python takes longer than many kernels do (docs/performance.md).
"""
import functools
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad as _forward_ad
from torch.autograd.profiler import record_function
from torch.utils.weak import WeakTensorKeyDictionary

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_PLAIN = (Tensor, nn.Parameter)
_keys_of = torch._C._dispatch_keys


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, if that is so."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return (f"on {device}, an AMD {torch.cuda.get_device_properties(device).gcnArchName}; an NVIDIA GPU or the CPU "
            "fits; the kernels' tiles are those of NVIDIA's cards; move the tensors to the CPU")


def register(name, *, kernel, cpu, fake):
    """Register `tfkernels::name` and return the `Operator`: `kernel` on CUDA, `cpu` on CPU, `fake` for tracing."""

    @functools.wraps(kernel)
    def launch(*args):
        if INTERPRET and any(x.dtype == torch.bfloat16 for x in args if isinstance(x, Tensor)):
            raise ValueError(f"{name}: dtype is torch.bfloat16; Triton's interpreter computes bfloat16 wrongly and "
                             "silently; use float32 or float16, or unset TRITON_INTERPRET")
        device = next(x for x in args if isinstance(x, Tensor)).device
        if refused := refusal(device):
            raise ValueError(f"{name}: its tensors are {refused}")
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    op = torch.library.custom_op(f"tfkernels::{name}", launch, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(launch if INTERPRET else cpu)
    op.register_fake(fake)
    op.__class__ = Operator
    op.defaults = tuple(argument.default_value for argument in op._opoverload._schema.arguments)
    return op


class Operator(torch.library.CustomOpDef):
    """A custom op that is called by a shorter way where nothing has to see an operator."""

    _differentiated = None  # what is called in place of the operator for a gradient; None where it has no backward

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return super().__call__(*args)
        if _forward_ad._current_level >= 0:
            self.refuse_tangents(args)
        before, _calls.are_eager = _calls.are_eager, True
        try:
            return self.called(args)
        finally:
            _calls.are_eager = before

    def called(self, args: tuple):
        """Call the operator by the shorter way or the dispatcher's."""
        if watched() or (device := plain_device(args)) not in self._backend_fns:
            return super().__call__(*args)
        differentiated = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if differentiated and self._differentiated is None:
            return super().__call__(*args)  # which refuses it once the backward comes here
        return self.directly(self._backend_fns[device], args, differentiated)

    def refuse_tangents(self, args: tuple) -> None:
        """Refuse forward-mode differentiation, which would take every tangent for zero.

        Raises:
            NotImplementedError: an argument has a tangent.
        """
        if any(isinstance(x, Tensor) and _forward_ad.unpack_dual(x).tangent is not None for x in args):
            raise NotImplementedError(f"{self._name}: forward-mode gradients (torch.func.jvp, dual tensors) are not "
                                      "computed; those of backward() are")

    def directly(self, implementation, args: tuple, differentiated: bool):
        """Call an implementation, with a node of the autograd graph around it where it is `differentiated`."""
        args += self.defaults[len(args):]  # as the dispatcher does: formulas count on all arguments
        if torch.autograd._profiler_enabled():
            implementation = record_function(self._qualname)(implementation)
        return (self._differentiated if differentiated else _computed)(*args, implementation)

    def register_autograd(self, backward, /, *, setup_context) -> None:
        """As `CustomOpDef.register_autograd`."""
        super().register_autograd(backward, setup_context=setup_context)
        self._differentiated = _differentiated(self._name, backward, setup_context)


def _computed(*inputs):
    """Call an implementation, the last input, as the dispatcher does: autograd sees no view in what it returns, and so
    lets callers write to it."""
    *args, implementation = inputs
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return implementation(*args)


def _differentiated(name: str, formula, setup_context) -> Callable:
    """Return an autograd.Function's call of (*args, implementation), whose formula knows the args alone."""

    def forward(ctx, *inputs):
        outputs = _computed(*inputs)
        setup_context(ctx=ctx, inputs=inputs[:-1], output=outputs)
        return outputs

    def backward(ctx, *gradients):
        found = formula(ctx, *gradients)
        return *(found if isinstance(found, tuple) else (found,)), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, function).apply  # which does not look for functorch: `watched` did


def watched() -> bool:
    """Return whether something traces, transforms or watches operators: the compiler, export, fake tensors, dispatch
    modes (selective checkpoints are one), function modes, functorch's transforms, torch.jit.trace."""
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_torch_function_mode_enabled() or torch._C._get_tracing_state() is not None
            or _len_torch_dispatch_stack_pre_dispatch() > 0)


def plain_device(args) -> str | None:
    """Return the type of the device that all tensors are on; None where they differ, or where one is more than numbers
    in memory: a subclass, a batch of vmap's, a negated view."""
    found = None
    for x in args:
        if isinstance(x, Tensor):
            device = _PLAIN_KEYS.get(_keys_of(x).raw_repr()) if type(x) in _PLAIN else None
            if device is None or found not in (None, device):
                return None
            found = device
    return found


def _plain_keys() -> dict[int, str]:
    """The device of a plain tensor by the keys that PyTorch dispatches it by; inference tensors lack autograd's."""
    found = {}
    for backend in ("CPU", "CUDA"):
        inference, plain, in_place = (
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
            for name in (backend, f"Autograd{backend}", "ADInplaceOrView"))
        inference |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{backend}"))
        found |= {keys.raw_repr(): backend.lower() for keys in (inference, inference | plain | in_place)}
    return found


_PLAIN_KEYS = _plain_keys()


_made = WeakTensorKeyDictionary()


class _Calls(threading.local):
    """Whether this thread is inside an operator that Python called; what the compiler made calls it otherwise."""

    are_eager = False


_calls = _Calls()


def made_once(make, *tensors: Tensor, **sizes):
    """Return make(*tensors, **sizes), made once while the first tensor lives and nobody writes to any of them.

    It is for what many calls read off one mask or index. It is made anew on each stream, whose order alone says that it
    is ready, and at each call inside of a CUDA graph's capture, since a replay has to read what the tensors hold then.
    So it is for inference tensors, which do not count how often they are written to, and in compiled graphs, which
    write to buffers of their own uncounted. Elsewhere, what writes uncounted (`.data`, NumPy, another kernel) is not
    seen.
    """
    first = tensors[0]
    others = [None if x is first else x for x in tensors]  # what is kept would keep the first alive
    uncounted = not _calls.are_eager or any(x.is_inference() for x in tensors)
    if uncounted or first.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(*tensors, **sizes)
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    key, versions = (make, stream, *sizes.items()), [x._version for x in tensors]
    kept = _made.setdefault(first, {})
    found = kept.get(key)
    if found is None or found[0] != versions or any(a is not b for a, b in zip(found[1], others)):
        for old in [old for old, (seen, *_) in kept.items() if seen[0] != versions[0]]:
            del kept[old]  # of what the first tensor held before, whatever the sizes
        found = kept[key] = versions, others, make(*tensors, **sizes)
    return found[2]


def result_like(x: Tensor, width: int | None = None) -> Tensor:
    """Return an empty tensor like x: the last dimension contiguous, the others dense in the order of x's strides.

    `width` is the size of the last dimension, where it is another than x's.

    A kernel and its fake both take their results from here, so that they agree on the layout whatever x's is: expanded,
    sliced, transposed.
    """
    shape = x.shape if width is None else (*x.shape[:-1], width)
    if x.is_contiguous():
        return x.new_empty(shape)
    order = sorted(range(x.ndim - 1), key=x.stride().__getitem__, reverse=True)
    return torch.empty_permuted(shape, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)
