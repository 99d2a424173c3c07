"""What both backward kernels subtract in a row: delta_i = sum_d(dO_id O_id) - dLSE_i, 0 for rows that see nothing."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import ROUNDED_PRODUCTS, cdiv
from tfkernels.attention.triton.forward import load_rows
from tfkernels.attention.triton.tiles import SCALAR_ARGUMENTS

DELTA_ROWS = 16


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_bwd_delta(out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, stride_ob, stride_oh, stride_os, stride_db,
                         stride_dh, stride_ds, heads, sq,
                         HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    tiles = tl.cdiv(sq, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % tiles * BLOCK_M
    b, h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    rows = start_m + offs_m
    out = load_rows(
        out_ptr + b * stride_ob + h * stride_oh, start_m, offs_m, stride_os, sq, HEAD_DIM, D, True
    ).to(tl.float32)
    dout = load_rows(
        dout_ptr + b * stride_db + h * stride_dh, start_m, offs_m, stride_ds, sq, HEAD_DIM, D, True
    ).to(tl.float32)
    at = (b * heads + h) * sq + rows
    lse = tl.load(lse_ptr + at, mask=rows < sq, other=float("-inf"))
    dlse = 0.0 if dlse_ptr is None else tl.load(dlse_ptr + at, mask=rows < sq, other=0.0)
    empty = (lse == float("-inf")) & (tl.sum(tl.abs(out), 1) == 0)  # not so where every visible score is -inf: NaN
    delta = tl.where(empty, 0.0, tl.sum(out * dout, 1) - dlse)
    tl.store(delta_ptr + at, delta, mask=rows < sq)


def row_deltas(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, head_dim: int, padded_dim: int) -> Tensor:
    """Launch the kernel: (B, H, Sq) float32."""
    batch, heads, sq = lse.shape
    delta = torch.empty_like(lse)
    _attention_bwd_delta[(cdiv(sq, DELTA_ROWS) * batch * heads,)](
        out, dout, lse, None if dlse is None else dlse.contiguous(), delta, *out.stride()[:3], *dout.stride()[:3],
        heads, sq, HEAD_DIM=head_dim, D=padded_dim, BLOCK_M=DELTA_ROWS, num_warps=4, **ROUNDED_PRODUCTS)
    return delta
