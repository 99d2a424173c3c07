"""What callers give the public functions, checked in one way and told in one form: tensors, numbers, and values where
looking at them is free."""
import math
import numbers
import operator

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

INT32 = -2**31, 2**31 - 1


def got(x) -> str:
    """Return what an error says of an argument of the wrong kind."""
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def shown(x) -> str:
    """Return what an error says of an argument of the wrong value: the value, where it is short."""
    return repr(x)[:80] if x is None or isinstance(x, (bool, int, float, complex, str, list, tuple)) else got(x)


def need_tensors(op: str, tensors: dict, optional: tuple[str, ...] = ()) -> None:
    """Refuse, by name, what is not a tensor; those in `optional` may be None."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (x is None and name in optional):
            module = isinstance(x, nn.Module)
            way = (f"pass {name}.weight, and its bias where there is one"
                   if module else "convert it with torch.as_tensor")
            raise ValueError(f"{op}: {name} is {None if x is None else got(x)}; a "
                             f"tensor{' or None' if name in optional else ''} fits; {way}")


def whole_number(x):
    """Return numpy's integers as an int and anything else as it is."""
    return operator.index(x) if not isinstance(x, (bool, int, torch.SymInt, Tensor)) and hasattr(x, "__index__") else x


def need_integer(op: str, name: str, x, least: int = 0) -> int:
    """Return an int of at least `least` that int32 holds; refuse bools, floats and tensors (reading one could wait for
    a device)."""
    number = whole_number(x)
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)) or not least <= number <= INT32[1]:
        raise ValueError(f"{op}: {name} is {shown(x)}; an int from {least} to {INT32[1]} fits")
    return number


def need_eps(op: str, eps) -> float:
    """Return eps as a float; refuse what is not a finite number of at least 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)) or not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {shown(eps)}; 0 or more fits, a finite number")
    return float(eps)


def need_between(op: str, name: str, x, least: float, most: float, fits: str, *, ends: bool = True) -> None:
    """Refuse what is no number from `least` to `most`, the `ends` included or not; NaN and bools are none."""
    number = isinstance(x, (int, float, numbers.Real, torch.SymFloat)) and not isinstance(x, bool)
    if not number or not (least <= x <= most if ends else least < x < most):
        raise ValueError(f"{op}: {name} is {shown(x)}; {fits}")


def need_integers(op: str, name: str, x, shape: str, device=None, *, flags: bool = False) -> Tensor:
    """Return an integer tensor from a tensor, an array or nested lists; `flags` lets bool pass. `shape` is what the
    error says fits."""
    try:
        tensor = torch.as_tensor(x, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: {name} is {shown(x)}; an integer tensor {shape} fits") from error
    if not tensor.numel() and isinstance(x, list | tuple):
        tensor = tensor.long()  # an empty list is of no dtype
    if not integers(tensor) and not (flags and tensor.dtype == torch.bool):
        raise ValueError(f"{op}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; an integer tensor {shape} "
                         "fits")
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def integers(x: Tensor) -> bool:
    """Return whether a tensor holds integers: not bool, floating-point or complex numbers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def looks(*tensors: Tensor | None) -> bool:
    """Return whether values may be looked at: plain tensors on a CPU, where nothing waits, and not while a graph is
    traced, operations are counted with tensors that hold no values, or vmap is given a batch of them."""
    if torch.compiler.is_compiling() or active_fake_mode() is not None:
        return False
    return all(x is None or x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)
               and not torch._C._functorch.is_batchedtensor(x) for x in tensors)


def need_range(op: str, name: str, x: Tensor, least: int, most: int, fits: str) -> None:
    """Refuse integers outside [least, most] where looking is free; elsewhere the caller clips them."""
    if looks(x) and x.numel() and not least <= (low := int(x.min())) <= (high := int(x.max())) <= most:
        raise ValueError(f"{op}: {name} holds {low if low < least else high}; {least} to {most} fits, {fits}")


def need_offsets(op: str, name: str, offsets: Tensor, rows: int, what: str = "image") -> None:
    """Refuse offsets that fall or leave [0, rows], where looking is free. What lies before the first and behind the
    last is padding; `what` lies between two of them."""
    if not looks(offsets):
        return
    ends = offsets.tolist()
    for n, (start, stop) in enumerate(zip(ends, ends[1:])):
        if start > stop:
            raise ValueError(f"{op}: {name} falls from {start} to {stop} at {what} {n}; offsets that never fall fit; "
                             f"put the {what}s in order")
    if ends and not 0 <= ends[0] <= ends[-1] <= rows:
        raise ValueError(f"{op}: {name} goes from {ends[0]} to {ends[-1]} and there are {rows} rows; 0 to {rows} fits")


def need_distinct(op: str, name: str, places: Tensor) -> None:
    """Refuse rows that are named twice, where looking is free."""
    if looks(places) and len(places):
        rows, counts = places.unique(return_counts=True)
        if counts.max() > 1:
            row = counts.argmax()
            raise ValueError(f"{op}: {name} names row {rows[row].item()} {counts[row].item()} times; each row at "
                             "most once fits")
