"""Kernel of `linear_cross_entropy`: one program per row of logits.

It reads the row once for its maximum and sum (online softmax, arXiv:1805.02867) and, where a gradient is wanted,
overwrites the logits with their gradient dz. What a call leaves out is None, which Triton compiles as a constant: the
options cost nothing where they are off, and a value of theirs is no reason to compile again where they are on.
"""
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, next_power_of_2
from tfkernels._library import INTERPRET
from tfkernels.attention.triton.rows import tanh
from tfkernels.losses.reference import EntropyOptions

# logits that one block holds; small in the interpreter, so that tests reach the loops
WIDEST = 32 if INTERPRET else 8192
LOG2E = tl.constexpr(1.4426950408889634)


def launch_config(vocabulary: int) -> Config:
    """Return the rows (1), logits, warps and stages of a program."""
    block = min(max(next_power_of_2(vocabulary), 32), WIDEST)
    return Config(1, block, max(1, min(8, block // 512)), 2)


@triton.jit
def _load_logits(logits_ptr, cols, softcap, V: tl.constexpr, STRIDE: tl.constexpr):
    """The logits in float32, bounded where there is a bound, -inf behind the last word.

    STRIDE, unlike V, keeps the loads wide; what lies between the two is not read.
    """
    z = tl.load(logits_ptr + cols, mask=cols < STRIDE, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return tl.where(cols < V, z, float("-inf"))


@triton.jit(do_not_specialize=["targets_ptr", "places_ptr", "row_weight_ptr", "losses_ptr", "lse_ptr", "lse_weight_ptr",
                               "tokens"])
def _cross_entropy_rows(logits_ptr, targets_ptr, places_ptr, row_weight_ptr, losses_ptr, lse_ptr, lse_weight_ptr,
                        tokens, softcap, smoothing, z_loss,
                        V: tl.constexpr, STRIDE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr,
                        BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    target, place = tl.load(targets_ptr + r), tl.load(places_ptr + r)
    logits_ptr += r * STRIDE
    exists = (place >= 0) & (place < tokens)
    if exists & (target < 0):
        tl.store(losses_ptr + r, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + r, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + cols, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=cols < STRIDE)
    else:
        exists &= (target >= 0) & (target < V)
        # before dz takes its place
        chosen = tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
        if softcap is not None:
            chosen = softcap * tanh(chosen / softcap)
        peak, total = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
        level = tl.zeros([], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = _load_logits(logits_ptr, cols, softcap, V, STRIDE)
            higher = tl.maximum(peak, tl.max(z))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # words may be ruled out by -inf, a block of them too
            total = total * tl.exp2((peak - base) * LOG2E) + tl.sum(tl.exp2((z - base) * LOG2E))
            peak = higher
            if smoothing is not None:
                level += tl.sum(tl.where(cols < V, z, 0.0))
        if (smoothing is None) and (z_loss is None):
            tl.store(losses_ptr + r, tl.log(total) + (peak - chosen))
        else:
            loss = tl.log(total) + (peak - chosen)
            if smoothing is not None:
                loss += smoothing * (chosen - level / V)
            if z_loss is not None:
                loss += z_loss * (tl.log(total) + peak) * (tl.log(total) + peak)
            tl.store(losses_ptr + r, loss)
        if lse_ptr is not None:
            tl.store(lse_ptr + r, tl.where(exists, tl.log(total) + peak, float("nan")))
        if GRADIENT:
            scale = tl.load(row_weight_ptr + r) if WEIGHT else 1.0
            scale, inverse = tl.where(exists, scale, float("nan")), 1.0 / total
            of_p = scale                                                                   # what p counts for in dz
            if z_loss is not None:
                of_p = scale * (1 + 2 * z_loss * (tl.log(total) + peak))
            if lse_weight_ptr is not None:
                of_p += tl.load(lse_weight_ptr + r)
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                z = _load_logits(logits_ptr, cols, softcap, V, STRIDE)
                p = tl.exp2((z - peak) * LOG2E) * inverse
                if (smoothing is None) and (z_loss is None) and (lse_weight_ptr is None):
                    dz = scale * tl.where(cols == target, p - 1.0, p)
                elif smoothing is None:
                    dz = of_p * p - tl.where(cols == target, scale, 0.0)
                else:
                    dz = of_p * p - scale * (smoothing / V + tl.where(cols == target, 1 - smoothing, 0.0))
                if softcap is not None:
                    bent = z / softcap
                    dz *= (1 - bent) * (1 + bent)
                tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < STRIDE)


def entropy(logits: Tensor, targets: Tensor, places: Tensor, row_weight: Tensor | None, lse_weight: Tensor | None,
            losses: Tensor, lse: Tensor | None, tokens: int, gradient: bool, options: EntropyOptions) -> Tensor:
    """Write `losses` and, where it is wanted, `lse`, and with `gradient` return dz, which takes the logits' place."""
    launch, stride = launch_config(logits.shape[1]), logits.stride(0)
    whole = logits.as_strided((len(logits), stride), (stride, 1))                          # rows with what pads them
    softcap, smoothing, z_loss = (x or None for x in options)
    _cross_entropy_rows[(len(logits),)](whole, targets, places, losses if row_weight is None else row_weight, losses,
                                        lse, lse_weight, tokens, softcap, smoothing, z_loss,
                                        V=logits.shape[1], STRIDE=stride,
                                        WEIGHT=row_weight is not None, GRADIENT=gradient, BLOCK=launch.block_n,
                                        num_warps=launch.num_warps, num_stages=launch.num_stages)
    return logits
