"""Masks that other libraries wrote as numbers to add to the scores, read back as visible or not."""
import torch
from torch import Tensor

_HIDES = -1000.0  # exp(-1000) is 0 in float32; libraries hide with -inf, the dtype's lowest number or -10000


def visible_pairs(op: str, attention_mask: Tensor) -> Tensor:
    """Return True where `attention_mask`, bool or added to the scores, lets a query see a key: what adds 0.

    Raises:
        ValueError: integers, or a number added that neither keeps nor hides (a position bias).
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not attention_mask.is_floating_point():
        raise ValueError(f"{op}: attention_mask is {attention_mask.dtype}; bool, or numbers to add to the scores, "
                         "fits; call attention_mask.bool()")
    visible = attention_mask == 0
    plain = (visible | (attention_mask <= _HIDES)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(plain, f"{op}: attention_mask adds numbers other than 0 and below {_HIDES:.0f}")
    elif not plain:
        raise ValueError(f"{op}: attention_mask adds numbers other than 0 and below {_HIDES:.0f} to the scores (a "
                         "bias); masks that keep or hide fit; use the library's own attention for this model")
    return visible
