"""The one tolerance rule: a kernel may err at most twice as much as plain PyTorch in the same dtype, both against float64."""
import torch
from torch import Tensor


def assert_as_accurate(name: str, actual: Tensor, rounded: Tensor, exact: Tensor, terms: Tensor | None = None, factor: float = 2.0) -> None:
    """Compare in the maximum and in the mean; infinities must stand in the same places.

    `exact` is the reference in float64, `rounded` the reference in the kernel's dtype. Where plain PyTorch happens to err by 0
    (softmax over one key) a kernel still rounds: one last bit of the result is allowed, and where `exact` is a sum that
    cancels, one last bit in float32 of `terms`, the same sum over absolute values.
    """
    finite = torch.isfinite(exact)
    assert torch.equal(actual[~finite].double(), exact[~finite]), f"{name}: infinite entries differ"
    actual, rounded, exact, terms = (x if x is None else x[finite] for x in (actual, rounded, exact, terms))
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum().item()} of {actual.numel()} values are not finite"
    if exact.numel() == 0:
        return
    ours, theirs = ((t.double() - exact).abs() for t in (actual, rounded))
    ulp = torch.finfo(actual.dtype).eps * exact.abs()
    if terms is not None:
        ulp = ulp + torch.finfo(torch.float32).eps * terms
    for stat, of in (("max", torch.amax), ("mean", torch.mean)):
        limit = factor * of(theirs).item() + of(ulp).item()
        assert of(ours).item() <= limit, (
            f"{name}: {stat} error {of(ours).item():.3e} exceeds {limit:.3e} ({factor}x PyTorch's {of(theirs).item():.3e} + {of(ulp).item():.3e})")
