"""Attention for Hopper in Gluon, for the emulator to run: TMA, mbarriers, wgmma, and warps that do different work.

    out_i = sum_j softmax_j(scale q_i . k_j over lo_i <= j < hi_i) v_j;  a query that sees nothing gets 0

One warp, the producer, starts the copies of tiles of keys and values into a ring of STAGES buffers. Two groups of four
warps, the consumers, take 64 queries each: S = Q K^T, softmax, O += P V. `ready` mbarriers count the bytes of a copy,
`free` ones the two consumers that have read a buffer. Heads are rows of one 2-D tensor.
"""
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.8
ROWS = gl.constexpr(64)    # queries of a consumer
WIDTH = gl.constexpr(64)   # keys of a tile
FAR = gl.constexpr(2147483647)
LOG2E = 1.4426950408889634


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _visible_keys(lo_ptr, hi_ptr, rows, queries):
    """Each query's keys, and the first and last that any of them sees."""
    lo = gl.load(lo_ptr + rows, mask=rows < queries, other=0)
    hi = gl.load(hi_ptr + rows, mask=rows < queries, other=0)
    last = gl.reduce(gl.where(lo < hi, hi, 0), 0, _larger)
    first = gl.minimum(gl.reduce(gl.where(lo < hi, lo, FAR), 0, _smaller), last)
    return lo, hi, first, last


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free, query_row, key_row,
             first, last, D: gl.constexpr, STAGES: gl.constexpr):
    for half in gl.static_range(2):
        mbarrier.expect(q_ready.index(half), ROWS * D * 2)
        start_copy(q_desc, [query_row + ROWS * half, 0], q_ready.index(half), q_s.index(half))
    for n in range(first, last, WIDTH):
        turn = (n - first) // WIDTH
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), WIDTH * D * 2)
        start_copy(k_desc, [key_row + n, 0], k_ready.index(stage), k_s.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), WIDTH * D * 2)
        start_copy(v_desc, [key_row + n, 0], v_ready.index(stage), v_s.index(stage))


@gluon.jit
def _consume(half: gl.constexpr, q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free, lo_ptr, hi_ptr, out_ptr,
             first_row, head, queries, first, last, scale, D: gl.constexpr, STAGES: gl.constexpr):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    rows = first_row + ROWS * half + gl.arange(0, ROWS, BY_ROW)
    lo, hi, _, _ = _visible_keys(lo_ptr, hi_ptr, rows, queries)
    out = gl.zeros([ROWS, D], gl.float32, SUMS)
    none = gl.zeros([ROWS, WIDTH], gl.float32, SCORES)
    total, peak = gl.zeros([ROWS], gl.float32, BY_ROW), gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
    mbarrier.wait(q_ready.index(half), 0)
    for n in range(first, last, WIDTH):
        turn = (n - first) // WIDTH
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        s = warpgroup_mma(q_s.index(half), k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(stage), count=1)
        keys = gl.expand_dims(n + gl.arange(0, WIDTH, gl.SliceLayout(0, SCORES)), 0)
        visible = (keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1))
        s = gl.where(visible, s * scale, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(s, 1))
        shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        p, shrink, peak = gl.exp2(s - gl.expand_dims(shift, 1)), gl.exp2(peak - shift), new_peak
        total = total * shrink + gl.sum(p, 1)
        out = out * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2))
        mbarrier.wait(v_ready.index(stage), phase)
        out = warpgroup_mma(p, v_s.index(stage), out, is_async=True)
        out = warpgroup_mma_wait(0, deps=(out,))
        mbarrier.arrive(v_free.index(stage), count=1)
    share = gl.convert_layout(gl.where(total > 0, 1.0 / gl.where(total > 0, total, 1.0), 0.0), gl.SliceLayout(1, SUMS))
    row = gl.expand_dims(first_row + ROWS * half + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS)), 1)
    at = (head * queries + row) * D + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, SUMS)), 0)
    gl.store(out_ptr + at, (out * gl.expand_dims(share, 1)).to(gl.bfloat16), mask=(row < queries) & (at >= 0))


@gluon.jit
def attention_kernel(q_desc, k_desc, v_desc, lo_ptr, hi_ptr, out_ptr, group, queries, keys, scale,
                     D: gl.constexpr, STAGES: gl.constexpr):
    """One program: 2 * ROWS queries of one head."""
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WIDTH, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WIDTH, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_ready.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    first_row, head = gl.program_id(0) * 2 * ROWS, gl.program_id(1)
    rows = first_row + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    lo, hi, first, last = _visible_keys(lo_ptr, hi_ptr, rows, queries)
    gl.warp_specialize([
        (_consume, (0, q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free, lo_ptr, hi_ptr, out_ptr, first_row,
                    head, queries, first, last, scale, D, STAGES)),
        (_consume, (1, q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free, lo_ptr, hi_ptr, out_ptr, first_row,
                    head, queries, first, last, scale, D, STAGES)),
        (_produce, (q_desc, k_desc, v_desc, q_s, k_s, v_s, q_ready, k_ready, v_ready, k_free, v_free,
                    head * queries + first_row, head // group * keys, first, last, D, STAGES)),
    ], [4, 1], [240, 24])


def attention(q, k, v, lo, hi, *, stages: int = 2):
    """q (H, Sq, D), k and v (H / group, Sk, D), all bfloat16; lo and hi (Sq,) int32. Returns (H, Sq, D)."""
    heads, queries, dim = q.shape
    out, layout = torch.empty_like(q), gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    described = [TensorDescriptor(x, [x.shape[0] * x.shape[1], dim], [dim, 1], [64, dim], layout) for x in (q, k, v)]
    grid = -(-queries // (2 * ROWS.value)), heads
    attention_kernel[grid](*described, lo, hi, out, heads // k.shape[0], queries, k.shape[1], dim ** -0.5 * LOG2E,
                           D=dim, STAGES=stages, num_warps=4)
    return out
