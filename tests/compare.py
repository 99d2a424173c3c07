"""The one tolerance rule: a kernel may err at most twice as much as plain PyTorch in the same dtype.

Both errors are measured against float64.
"""
import torch
from torch import Tensor


def assert_as_accurate(name: str, actual: Tensor, rounded: Tensor, exact: Tensor, terms: Tensor | None = None,
                       factor: float = 2.0) -> None:
    """Assert that the largest and the mean error fit, and that infinities stand in the same places.

    Args:
        name: what is compared, for the message.
        actual: the kernel's result.
        rounded: the reference, computed in the kernel's dtype.
        exact: the reference, computed in float64.
        terms: where `exact` is a sum that cancels, the same sum over absolute values.
        factor: times the reference's own error that the kernel may err.

    Where plain PyTorch happens to err by 0 (softmax over one key) a kernel still rounds. So one last bit of the result
    is allowed on top, and one last bit in float32 of `terms`.
    """
    finite = torch.isfinite(exact)
    assert torch.equal(actual[~finite].double(), exact[~finite]), f"{name}: infinite entries differ"
    actual, rounded, exact, terms = (x if x is None else x[finite] for x in (actual, rounded, exact, terms))
    bad = (~torch.isfinite(actual)).sum().item()
    assert bad == 0, f"{name}: {bad} of {actual.numel()} values are not finite"
    if exact.numel() == 0:
        return
    ours, theirs = ((t.double() - exact).abs() for t in (actual, rounded))
    ulp = torch.finfo(actual.dtype).eps * exact.abs()
    if terms is not None:
        ulp = ulp + torch.finfo(torch.float32).eps * terms
    for stat, of in (("max", torch.amax), ("mean", torch.mean)):
        limit = factor * of(theirs).item() + of(ulp).item()
        assert of(ours).item() <= limit, (
            f"{name}: {stat} error {of(ours).item():.3e} exceeds {limit:.3e} "
            f"({factor}x PyTorch's {of(theirs).item():.3e} + {of(ulp).item():.3e})")
