"""The layout of what `qk_norm_rotary` returns: kernels, CPU and tracing all allocate it here, so that they agree."""
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """A copy only where the elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def even_rows(x: Tensor) -> Tensor:
    """(B, S, half) whose batch rows begin whole rows apart, 0 included; a copy only where they do not."""
    return x if x.stride(-1) == 1 and x.stride(1) and x.stride(0) % x.stride(1) == 0 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Dense (B, H, S, D), in memory (B, S, H, D) where x's heads are closer together than its tokens."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2) if x.stride(1) < x.stride(2) else x.new_empty(x.shape)


def empty_gradients(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps):
    """Return dq, dk, dq_weight and dk_weight to be filled; what nobody asked for has no elements."""
    dq, dk = (cos.new_empty(0) if x is None else empty_like(x) for x in (dq_out, dk_out))
    dq_weight, dk_weight = (cos.new_empty(0 if x is None else x.shape, dtype=None if x is None else x.dtype)
                            for x in (q_weight, k_weight))
    return dq, dk, dq_weight, dk_weight
