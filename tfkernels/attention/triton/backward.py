"""Backward attention kernels, deterministic and without atomics: one for dQ, one for dK and dV.

    P = exp(S - LSE),  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = dS K * scale,  dK = dS^T Q * scale
    delta_i = sum_d(dO_id O_id) - dLSE_i

dQ walks the keys of a tile of queries, as the forward kernel does. dK/dV walks, for a tile of keys, the queries between
since and until, for every query head that shares the key head, or for some of them (see `parts.py`). It has one loop,
which compares only at the two edges; three loops, as in the forward, would spill.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import Config, cdiv, loads_by_tma, lookup, multiprocessors
from tfkernels._library import result_like
from tfkernels.attention.sinks import sink_gradients
from tfkernels.attention.triton.delta import row_deltas
from tfkernels.attention.triton.forward import (
    batch_stride,
    core,
    dot_precision,
    head_dims,
    load_rows,
    mask_pair,
    row_bounds,
    rows_contiguous,
    rows_of,
    sees_keys,
)
from tfkernels.attention.triton.parts import empty_head_parts, head_splits, store_or_part, sum_parts
from tfkernels.attention.triton.rows import (
    LOG2E,
    dkv_row,
    dq_row,
    finite_in_both,
    finite_rows,
    next_of,
    program_again,
    tanh,
)
from tfkernels.attention.triton.tiles import FAR, SCALAR_ARGUMENTS, alive, next_run, tile_bounds, walks_runs

DQ_CONFIGS = {  # (architecture, bytes per element, padded head dim)
    (80, 2, 32): Config(128, 32, 4, 3), (80, 2, 64): Config(128, 32, 8, 3),
    (80, 2, 128): Config(64, 32, 4, 2), (80, 2, 256): Config(32, 32, 4, 2, 255),
    (80, 2, 512): Config(32, 16, 8, 2),
    (80, 4, 32): Config(32, 32, 4, 2, 255), (80, 4, 64): Config(32, 16, 4, 2, 255),
    (80, 4, 128): Config(16, 16, 4, 2, 255), (80, 4, 256): Config(16, 16, 8, 1, 255),
    (90, 2, 32): Config(128, 64, 8, 3), (90, 2, 64): Config(128, 64, 8, 3),
    (90, 2, 128): Config(128, 64, 8, 3), (90, 2, 256): Config(128, 32, 8, 3),
    (90, 2, 512): Config(32, 32, 8, 3),
    (90, 4, 32): Config(32, 32, 4, 2, 255), (90, 4, 64): Config(32, 16, 4, 2, 255),
    (90, 4, 128): Config(16, 16, 8, 2, 255), (90, 4, 256): Config(16, 16, 8, 1, 255),
    (100, 2, 32): Config(128, 32, 4, 3), (100, 2, 64): Config(128, 32, 4, 3),
    (100, 2, 128): Config(64, 64, 8, 2, 255), (100, 2, 256): Config(64, 32, 8, 2),
    (100, 2, 512): Config(32, 32, 8, 2),
    (100, 4, 32): Config(32, 32, 4, 2, 255), (100, 4, 64): Config(32, 16, 4, 2, 255),
    (100, 4, 128): Config(16, 16, 4, 2, 255), (100, 4, 256): Config(16, 16, 4, 1, 255),
    (80, 2, 64, "heavy"): Config(128, 16, 8, 3), (80, 2, 128, "heavy"): Config(128, 16, 8, 2, 255),
    (80, 4, 32, "heavy"): Config(32, 16, 4, 2, 255),
    (90, 2, 128, "heavy"): Config(128, 32, 8, 3), (90, 2, 256, "heavy"): Config(128, 16, 8, 2),
    (90, 4, 256, "heavy"): Config(16, 16, 4, 1, 255),
    (100, 2, 64, "heavy"): Config(128, 32, 8, 3), (100, 2, 128, "heavy"): Config(64, 32, 8, 2),
    (120, 2, 128): Config(64, 32, 4, 2, 255)}
DKV_CONFIGS = {
    (80, 2, 32): Config(32, 128, 8, 3), (80, 2, 64): Config(16, 128, 8, 2),
    (80, 2, 128): Config(32, 32, 4, 2, 255), (80, 2, 256): Config(16, 32, 4, 2, 255),
    (80, 2, 512): Config(16, 16, 8, 2),
    (80, 4, 32): Config(16, 32, 4, 2, 255), (80, 4, 64): Config(32, 16, 8, 2, 255),
    (80, 4, 128): Config(16, 16, 16, 1, 255), (80, 4, 256): Config(16, 16, 4, 1, 255),
    (90, 2, 32): Config(64, 128, 8, 3), (90, 2, 64): Config(32, 128, 8, 3),
    (90, 2, 128): Config(32, 128, 8, 3), (90, 2, 256): Config(16, 64, 8, 3),
    (90, 2, 512): Config(16, 16, 8, 3),
    (90, 4, 32): Config(32, 32, 8, 2, 255), (90, 4, 64): Config(32, 16, 8, 2, 255),
    (90, 4, 128): Config(16, 16, 8, 2, 255), (90, 4, 256): Config(16, 16, 16, 1, 255),
    (100, 2, 32): Config(32, 64, 8, 2, 255), (100, 2, 64): Config(64, 128, 8, 2),
    (100, 2, 128): Config(16, 128, 8, 2), (100, 2, 256): Config(16, 64, 8, 2),
    (100, 2, 512): Config(16, 16, 8, 2),
    (100, 4, 32): Config(16, 32, 8, 2, 255), (100, 4, 64): Config(16, 16, 8, 2, 255),
    (100, 4, 128): Config(16, 16, 4, 1, 255), (100, 4, 256): Config(16, 16, 16, 1, 255),
    (80, 2, 256, "heavy"): Config(16, 32, 8, 2),
    (90, 2, 128, "heavy"): Config(16, 128, 8, 3), (90, 2, 256, "heavy"): Config(16, 32, 8, 3),
    (100, 4, 64, "heavy"): Config(16, 32, 8, 2, 255),
    (80, 4, 32, "heavy"): Config(32, 16, 4, 2, 255), (80, 4, 128, "heavy"): Config(16, 16, 4, 1, 255),
    (80, 4, 256, "heavy"): Config(16, 16, 16, 1, 255),
}


@triton.jit
def _load_lse(lse_ptr, rows, sq):
    """LSE in base 2; +inf for empty and outside rows, so that their P = exp2(S - LSE) is 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < sq, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _dq_tile(dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, n, rows, lo, hi, since_ptr, until_ptr, limit,
             scale, softcap,
             HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
             BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
             PRECISION: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, n, offs_n, stride_ks, limit, HEAD_DIM, D, MASKED)
    v = load_rows(v_ptr, n, offs_n, stride_vs, limit, HEAD_DIM_V, D_V, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        bent = tanh(s * (scale / softcap))
        p = tl.exp2(bent * (softcap * LOG2E) - lse[:, None])
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if SOFTCAP:
        ds *= 1 - bent * bent
    if MASKED:
        cols = n + offs_n
        visible = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None])
        if CHECK_COLUMNS:
            since = tl.load(since_ptr + cols, mask=cols < limit, other=FAR)
            until = tl.load(until_ptr + cols, mask=cols < limit, other=0)
            visible &= (since[None, :] <= rows[:, None]) & (rows[:, None] < until[None, :])
        ds = tl.where(visible, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_step(dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, start, stop, rows, lo, hi, since_ptr,
             until_ptr, limit, scale, softcap,
             HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
             BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
             PRECISION: tl.constexpr):
    for n in range(start, stop, BLOCK_N):
        dq = _dq_tile(dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, n, rows, lo, hi, since_ptr,
                      until_ptr, limit, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, MASKED, CHECK_COLUMNS,
                      SOFTCAP, PRECISION)
    return dq


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_bwd_dq(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr,
                      bounds_ptr, dq_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb,
                      stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_db, stride_dh, stride_ds,
                      stride_mask_rows, stride_mask_columns, heads, group, sq, sk, offset, scale, softcap,
                      HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
                      PRECISION: tl.constexpr, TMA: tl.constexpr):
    tiles = tl.cdiv(sq, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M
    b, h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    k_head, v_head = k_ptr + b * stride_kb + h // group * stride_kh, v_ptr + b * stride_vb + h // group * stride_vh
    key_since, key_until = since_ptr + b * stride_mask_columns, until_ptr + b * stride_mask_columns
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    rows = start_m + offs_m

    lo, hi, first, core_first, core_last, last = row_bounds(lo_ptr + b * stride_mask_rows,
                                                            hi_ptr + b * stride_mask_rows, rows, sq, sk)
    k_head = rows_of(k_head, stride_ks, last, HEAD_DIM, D, BLOCK_N, TMA)
    v_head = rows_of(v_head, stride_vs, last, HEAD_DIM_V, D_V, BLOCK_N, TMA)
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, start_m, offs_m, stride_qs, sq, HEAD_DIM, D, True)
    dout = load_rows(dout_ptr + b * stride_ob + h * stride_oh, start_m, offs_m, stride_os, sq, HEAD_DIM_V, D_V, True)
    lse = _load_lse(lse_ptr + (b * heads + h) * sq, rows, sq)
    delta = tl.load(delta_ptr + (b * heads + h) * sq + rows, mask=rows < sq, other=0.0)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    if CHECK_COLUMNS:
        tiles_n = tl.cdiv(sk, BLOCK_N)
        bounds_ptr += 4 * tiles_n * b * (stride_mask_columns > 0)
        start, end = start_m + offset, tl.minimum(start_m + BLOCK_M, sq) + offset
        at, stop = first // BLOCK_N, tl.cdiv(last, BLOCK_N)
        if walks_runs(D, D_V, 128, q_ptr.dtype.element_ty):
            while at < stop:
                partial, full, at = next_run(bounds_ptr, at, stop, tiles_n, start, end, core_first, core_last, BLOCK_N)
                dq = _dq_step(dq, q, dout, lse, delta, k_head, v_head, stride_ks, stride_vs, partial * BLOCK_N,
                              full * BLOCK_N, rows + offset, lo, hi, key_since, key_until, last, scale, softcap,
                              HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, True, True, SOFTCAP, PRECISION)
                dq = _dq_step(
                    dq, q, dout, lse, delta, k_head, v_head, stride_ks, stride_vs, full * BLOCK_N, at * BLOCK_N,
                    rows + offset, lo, hi, key_since, key_until, last, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V,
                    BLOCK_N, False, False, SOFTCAP, PRECISION
                )
        else:
            for tile in range(at, stop):
                if alive(bounds_ptr, tile, tiles_n, start, end):
                    dq = _dq_tile(dq, q, dout, lse, delta, k_head, v_head, stride_ks, stride_vs, tile * BLOCK_N,
                                  rows + offset, lo, hi, key_since, key_until, last, scale, softcap, HEAD_DIM, D,
                                  HEAD_DIM_V, D_V, BLOCK_N, True, True, SOFTCAP, PRECISION)
    else:
        core_start, core_stop = core(first, core_first, core_last, last, BLOCK_N)
        for n in range(first, last - core_stop + core_start, BLOCK_N):  # the partial tiles on both sides of the core
            tile = n + tl.where(n >= core_start, core_stop - core_start, 0)
            dq = _dq_tile(dq, q, dout, lse, delta, k_head, v_head, stride_ks, stride_vs, tile, rows + offset, lo, hi,
                          key_since, key_until, last, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_N, True,
                          False, SOFTCAP, PRECISION)
        dq = _dq_step(dq, q, dout, lse, delta, k_head, v_head, stride_ks, stride_vs, core_start, core_stop,
                      rows + offset, lo, hi, key_since, key_until, last, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V,
                      BLOCK_N, False, False, SOFTCAP, PRECISION)
    good = finite_rows(dq)
    pid = program_again(tl.min(good.to(tl.int32)), 2)
    b, h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    rows = (tiles - 1 - pid % tiles) * BLOCK_M + offs_m
    some = sees_keys(lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows, rows, sq, 0, sk)
    good = (rows < sq) & (good | (some == 0))
    pointers = dq_ptr + b * stride_db + h * stride_dh + rows.to(tl.int64)[:, None] * stride_ds + offs_d[None, :]
    dq = tl.where(some[:, None], dq * scale, 0.0)
    tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=good[:, None] & (offs_d < HEAD_DIM)[None, :])

    bad = (rows < sq) & (good == 0)
    m = next_of(bad, offs_m, -1, BLOCK_M)
    while m < BLOCK_M:
        pid_m = program_again(m, BLOCK_M)
        row = ((tiles - 1 - pid_m % tiles) * BLOCK_M + m).to(tl.int64)
        b_m, h_m = (pid_m // tiles // heads).to(tl.int64), (pid_m // tiles % heads).to(tl.int64)
        row_dq = dq_row(
            q_ptr + b_m * stride_qb + h_m * stride_qh + row * stride_qs,
            k_ptr + b_m * stride_kb + h_m // group * stride_kh,
            v_ptr + b_m * stride_vb + h_m // group * stride_vh,
            dout_ptr + b_m * stride_ob + h_m * stride_oh + row * stride_os, stride_ks, stride_vs,
            tl.load(lse_ptr + (b_m * heads + h_m) * sq + row), tl.load(delta_ptr + (b_m * heads + h_m) * sq + row),
            tl.maximum(tl.load(lo_ptr + b_m * stride_mask_rows + row), 0),
            tl.minimum(tl.load(hi_ptr + b_m * stride_mask_rows + row), sk),
            row + offset, since_ptr + b_m * stride_mask_columns, until_ptr + b_m * stride_mask_columns,
            scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, CHECK_COLUMNS, SOFTCAP)
        tl.store(dq_ptr + b_m * stride_db + h_m * stride_dh + row * stride_ds + offs_d,
                 (row_dq * scale).to(dq_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
        m = next_of(bad, offs_m, m, BLOCK_M)


@triton.jit
def _query_bounds(since_ptr, until_ptr, cols, offset, sq, sk):
    """Load the rows [since, until) that see each of `cols`; none for columns outside."""
    since = tl.load(since_ptr + cols, mask=cols < sk, other=FAR)
    until = tl.load(until_ptr + cols, mask=cols < sk, other=0)
    return tl.maximum(since - offset, 0), tl.minimum(until - offset, sq)


@triton.jit
def _dkv_tile(dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr, stride_qs,
              stride_os, m, compare, cols, limit, sk, offset, scale, softcap,
              HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
              BLOCK_M: tl.constexpr, CHECK_ROWS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    offs_m = tl.arange(0, BLOCK_M)
    rows = m + offs_m
    q = load_rows(q_ptr, m, offs_m, stride_qs, limit, HEAD_DIM, D, True)
    dout = load_rows(dout_ptr, m, offs_m, stride_os, limit, HEAD_DIM_V, D_V, True)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = _load_lse(lse_ptr, rows, limit)
    if SOFTCAP:
        bent = tanh(s * (scale / softcap))
        p = tl.exp2(bent * (softcap * LOG2E) - lse[None, :])
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse[None, :])
    if compare:
        since, until = _query_bounds(since_ptr, until_ptr, cols, offset, limit, sk)
        visible = (since[:, None] <= rows[None, :]) & (rows[None, :] < until[:, None])
        if CHECK_ROWS:
            lo = tl.load(lo_ptr + rows, mask=rows < limit, other=0)
            hi = tl.load(hi_ptr + rows, mask=rows < limit, other=0)
            visible &= (cols[:, None] >= lo[None, :]) & (cols[:, None] < hi[None, :])
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(delta_ptr + rows, mask=rows < limit, other=0.0)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    if SOFTCAP:
        ds *= 1 - bent * bent
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_step(dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr, stride_qs,
              stride_os, first, core_start, core_stop, last, cols, limit, sk, offset, scale, softcap,
              HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
              BLOCK_M: tl.constexpr, CHECK_ROWS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    for m in tl.range(first, last, BLOCK_M, disable_licm=True):
        dk, dv = _dkv_tile(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr, stride_qs,
            stride_os, m, (m < core_start) | (m >= core_stop), cols, limit, sk, offset, scale, softcap, HEAD_DIM, D,
            HEAD_DIM_V, D_V, BLOCK_M, CHECK_ROWS, SOFTCAP, PRECISION
        )
    return dk, dv


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def _attention_bwd_dkv(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, since_ptr, until_ptr,
                       bounds_ptr, dk_ptr, dv_ptr, parts_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh,
                       stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_dkb,
                       stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_mask_rows,
                       stride_mask_columns, splits, heads, group, sq, sk, offset, scale, softcap,
                       HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK_ROWS: tl.constexpr, SOFTCAP: tl.constexpr,
                       PRECISION: tl.constexpr):
    tiles = tl.cdiv(sk, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % tiles * BLOCK_N
    b, h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)  # h: of kv heads x splits
    offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, D), tl.arange(0, D_V)
    cols = start_n + offs_n
    key_since, key_until = since_ptr + b * stride_mask_columns, until_ptr + b * stride_mask_columns
    since, until = _query_bounds(key_since, key_until, cols, offset, sq, sk)
    seen = since < until
    first, last = tl.min(tl.where(seen, since, FAR)), tl.max(tl.where(seen, until, 0))
    core_first, core_last = tl.max(tl.where(seen, since, 0)), tl.min(tl.where(seen, until, FAR))
    first = tl.minimum(first, last)

    k_head, v_head = k_ptr + b * stride_kb + h // splits * stride_kh, v_ptr + b * stride_vb + h // splits * stride_vh
    k = load_rows(k_head, start_n, offs_n, stride_ks, sk, HEAD_DIM, D, True)
    v = load_rows(v_head, start_n, offs_n, stride_vs, sk, HEAD_DIM_V, D_V, True)
    row_lo, row_hi = lo_ptr + b * stride_mask_rows, hi_ptr + b * stride_mask_rows
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D_V], tl.float32)
    core_start, core_stop = core(first, core_first, core_last, last, BLOCK_M)
    tiles_m = tl.cdiv(sq, BLOCK_M)
    bounds_ptr += 4 * tiles_m * b * (stride_mask_rows > 0)
    for g in tl.range(group, disable_licm=True):
        head = h * group + g
        q_head, dout_head = q_ptr + b * stride_qb + head * stride_qh, dout_ptr + b * stride_ob + head * stride_oh
        lse_head, delta_head = (lse_ptr + (b * heads * group + head) * sq,
                                delta_ptr + (b * heads * group + head) * sq)
        if CHECK_ROWS:
            at, stop, end = first // BLOCK_M, tl.cdiv(last, BLOCK_M), tl.minimum(start_n + BLOCK_N, sk)
            if walks_runs(D, D_V, 64, q_ptr.dtype.element_ty):
                while at < stop:
                    partial, full, at = next_run(bounds_ptr, at, stop, tiles_m, start_n, end, core_first, core_last,
                                                 BLOCK_M)
                    dk, dv = _dkv_step(dk, dv, k, v, q_head, dout_head, lse_head, delta_head, row_lo, row_hi, key_since,
                                       key_until, stride_qs, stride_os, partial * BLOCK_M, full * BLOCK_M, at * BLOCK_M,
                                       at * BLOCK_M, cols, last, sk, offset,
                                       scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_M, CHECK_ROWS, SOFTCAP,
                                       PRECISION)
            else:
                for tile in tl.range(at, stop, disable_licm=True):
                    if alive(bounds_ptr, tile, tiles_m, start_n, end):
                        dk, dv = _dkv_tile(
                            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, row_lo, row_hi, key_since, key_until,
                            stride_qs, stride_os, tile * BLOCK_M, True, cols, last, sk, offset, scale, softcap,
                            HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_M, CHECK_ROWS, SOFTCAP, PRECISION
                        )
        else:
            dk, dv = _dkv_step(dk, dv, k, v, q_head, dout_head, lse_head, delta_head, row_lo, row_hi, key_since,
                               key_until, stride_qs, stride_os, first, core_start, core_stop, last, cols, last, sk,
                               offset, scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_M, CHECK_ROWS, SOFTCAP,
                               PRECISION)
    good = finite_in_both(dk, dv)
    pid = program_again(tl.min(good.to(tl.int32)), 2)
    b, h = (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)
    start_n = pid % tiles * BLOCK_N
    cols = start_n + offs_n
    since, until = _query_bounds(since_ptr + b * stride_mask_columns, until_ptr + b * stride_mask_columns, cols, offset,
                                 sq, sk)
    seen = since < until
    good = (cols < sk) & (good | (seen == 0))
    dk, dv = tl.where(seen[:, None], dk * scale, 0.0), tl.where(seen[:, None], dv, 0.0)
    row = start_n.to(tl.int64) + offs_n[:, None]
    part = parts_ptr + ((b * heads + h) * sk + row) * (HEAD_DIM + HEAD_DIM_V)
    store_or_part(dk_ptr + b * stride_dkb + h * stride_dkh + row * stride_dks + offs_d[None, :],
                  part + offs_d[None, :], dk, good[:, None] & (offs_d < HEAD_DIM)[None, :], splits)
    store_or_part(dv_ptr + b * stride_dvb + h * stride_dvh + row * stride_dvs + offs_v[None, :],
                  part + HEAD_DIM + offs_v[None, :], dv, good[:, None] & (offs_v < HEAD_DIM_V)[None, :], splits)

    bad = (cols < sk) & (good == 0)
    n = next_of(bad, offs_n, -1, BLOCK_N)
    while n < BLOCK_N:
        pid_n = program_again(n, BLOCK_N)
        col = (pid_n % tiles * BLOCK_N + n).to(tl.int64)
        b_n, h_n = (pid_n // tiles // heads).to(tl.int64), (pid_n // tiles % heads).to(tl.int64)
        place = (b_n * heads + h_n) * group * sq
        col_dk, col_dv = dkv_row(
            k_ptr + b_n * stride_kb + h_n // splits * stride_kh + col * stride_ks,
            v_ptr + b_n * stride_vb + h_n // splits * stride_vh + col * stride_vs,
            q_ptr + b_n * stride_qb + h_n * group * stride_qh, dout_ptr + b_n * stride_ob + h_n * group * stride_oh,
            lse_ptr + place, delta_ptr + place,
            lo_ptr + b_n * stride_mask_rows, hi_ptr + b_n * stride_mask_rows, stride_qh, stride_qs, stride_oh,
            stride_os,
            tl.maximum(tl.load(since_ptr + b_n * stride_mask_columns + col) - offset, 0),
            tl.minimum(tl.load(until_ptr + b_n * stride_mask_columns + col) - offset, sq), col, group, sq,
            scale, softcap, HEAD_DIM, D, HEAD_DIM_V, D_V, CHECK_ROWS, SOFTCAP)
        part_n = parts_ptr + ((b_n * heads + h_n) * sk + col) * (HEAD_DIM + HEAD_DIM_V)
        store_or_part(dk_ptr + b_n * stride_dkb + h_n * stride_dkh + col * stride_dks + offs_d,
                      part_n + offs_d, col_dk * scale, offs_d < HEAD_DIM, splits)
        store_or_part(dv_ptr + b_n * stride_dvb + h_n * stride_dvh + col * stride_dvs + offs_v,
                      part_n + HEAD_DIM + offs_v, col_dv, offs_v < HEAD_DIM_V, splits)
        n = next_of(bad, offs_n, n, BLOCK_N)


def attention_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       lo: Tensor, hi: Tensor, since: Tensor, until: Tensor, rows_exact: bool, columns_exact: bool,
                       offset: int, scale: float, softcap: float, sinks: Tensor | None = None) -> list[Tensor]:
    """Launch the backward kernels: dq, dk, dv in the inputs' dtype, laid out as `result_like` says; then any dsinks."""
    dq, dk, dv = (result_like(x) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return [dq.zero_(), dk.zero_(), dv.zero_()] + ([] if sinks is None else [torch.zeros_like(sinks)])
    q, k, v, out, dout = (rows_contiguous(x) for x in (q, k, v, out, dout))
    (lo, hi), (since, until) = mask_pair(lo, hi), mask_pair(since, until)
    (batch, heads, sq, _), (kv_heads, sk) = q.shape, k.shape[1:3]
    dims = head_dims(q, v)
    widest = max(dims["D"], dims["D_V"])
    delta = row_deltas(out, dout, lse, dlse, dims["HEAD_DIM_V"], dims["D_V"])
    shared = (batch_stride(lo), batch_stride(since))
    group, sizes = heads // kv_heads, (sq, sk, offset, scale, softcap)
    constants = dict(**dims, SOFTCAP=softcap > 0, PRECISION=dot_precision(q))
    config = lookup(DQ_CONFIGS, q, widest, heavy=not rows_exact)
    bounds = lo if rows_exact else tile_bounds(since, until, config.block_n)
    _attention_bwd_dq[(cdiv(sq, config.block_m) * batch * heads,)](
        q, k, v, dout, lse, delta, lo, hi, since, until, bounds, dq,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], *shared, heads, group,
        *sizes, BLOCK_M=config.block_m, BLOCK_N=config.block_n, CHECK_COLUMNS=not rows_exact,
        TMA=loads_by_tma(config, k, v), **constants, **config.options)
    config = lookup(DKV_CONFIGS, q, widest, heavy=softcap > 0 or not columns_exact)
    bounds = lo if columns_exact else tile_bounds(lo, hi, config.block_m)
    programs = cdiv(sk, config.block_n) * batch * kv_heads
    splits = head_splits(programs, group, multiprocessors(q.device))
    parts = empty_head_parts(k, v, splits) if splits > 1 else delta
    _attention_bwd_dkv[(programs * splits,)](
        q, k, v, dout, lse, delta, lo, hi, since, until, bounds, dk, dv, parts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        *shared, splits, kv_heads * splits, group // splits, *sizes,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, CHECK_ROWS=not columns_exact, **constants, **config.options)
    if splits > 1:
        sum_parts(parts, dk, dv, dims)
    return [dq, dk, dv] + ([] if sinks is None else [sink_gradients(sinks, lse, delta)])
