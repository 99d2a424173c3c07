"""Attention one row at a time: what a program falls back to where its tiles gave something that is not finite.

The tiles multiply what a mask hides by 0. That is exact unless NaN or inf stands there, for 0 * NaN is NaN. A result
that is not finite may thus come from what the row sees or from what it must not see. A program therefore looks at its
sums once, after its loops, and does such rows over without matrix units. Here a hidden pair is never loaded, and what
the row sees goes through the same multiplications and additions as in the reference.

A loop ends early once its result is all NaN, so that a run that has diverged is not slowed down much. Its condition is
a maximum of integers, which the compiler knows to be the same in all threads; a condition on floats makes it spill.
"""
import triton
import triton.language as tl

from tfkernels.attention.triton.tiles import FAR

LOG2E = tl.constexpr(1.4426950408889634)
# LSE of a part of a row that sees keys, all with a score of -inf; a part that sees none has -inf
LOWEST = tl.constexpr(-3e38)
LOADED = 4096                  # elements of the keys (or queries) that are taken at a time


@triton.constexpr_function
def rows_at_a_time(key_dim, value_dim):
    """How many keys (or queries) a program takes at a time."""
    return LOADED // max(key_dim, value_dim)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to about an ulp: its Taylor series near 0, where 1 - exp2(...) would cancel, else exp2."""
    z = tl.minimum(x * x, 0.25)
    series = z * (-929569.0 / 638512875) + 21844.0 / 6081075
    series = z * (z * (z * (z * (z * series - 1382.0 / 155925) + 62.0 / 2835) - 17.0 / 315) + 2.0 / 15) - 1.0 / 3
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    y = (1 - e) / (1 + e)
    return tl.where(x * x < 0.25, x + x * z * series, tl.where(x < 0, -y, y))


@triton.jit
def finite_rows(x):
    """Whether each row of x (M, N) is finite throughout."""
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) > 0


@triton.jit
def finite_in_both(x, y):
    """Whether each row of x (M, N) and of y (M, K) is finite throughout; one reduction where N is K."""
    if x.shape[1] == y.shape[1]:
        return finite_rows(x * 0.0 + y * 0.0)
    return finite_rows(x) & finite_rows(y)


@triton.jit
def next_of(flags, items, after, COUNT: tl.constexpr):
    """Return the first of `items` (0, 1, ... COUNT - 1) behind `after` that is flagged, else COUNT."""
    return tl.min(tl.where(flags & (items > after), items, COUNT))


@triton.jit
def program_again(item, COUNT: tl.constexpr):
    """tl.program_id(0), for an `item` < COUNT, in a form that the compiler cannot merge with the program's first one.

    So what only a row done over needs is computed anew there, rather than held in registers through the loops before.
    """
    return tl.program_id(0) + item // COUNT


@triton.jit
def _visible_keys(cols, first, last, position, since_ptr, until_ptr, CHECK_COLUMNS: tl.constexpr):
    visible = (cols >= first) & (cols < last)
    if CHECK_COLUMNS:
        since = tl.load(since_ptr + cols, mask=visible, other=FAR)
        until = tl.load(until_ptr + cols, mask=visible, other=0)
        visible &= (since <= position) & (position < until)
    return visible


@triton.jit
def _load_visible(base, places, visible, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Load the rows at base + places as float32 (N, D), 0 where they are hidden."""
    offs_d = tl.arange(0, D)
    return tl.load(base + places[:, None] + offs_d[None, :], mask=visible[:, None] & (offs_d < HEAD_DIM)[None, :],
                   other=0.0).to(tl.float32)


@triton.jit
def page_of(table_ptr, place, visible, pages):
    """The page numbers that a block table holds; a number that is none of the `pages` becomes the first or the last."""
    return tl.minimum(tl.maximum(tl.load(table_ptr + place, mask=visible, other=0), 0), pages - 1).to(tl.int64)


@triton.jit
def _places(cols, visible, table_ptr, pages, stride_page, stride, PAGE_SIZE: tl.constexpr):
    """Offsets of the keys `cols` of a plain cache, or of a paged one."""
    at = cols.to(tl.int64)
    if PAGE_SIZE == 0:
        return at * stride
    return page_of(table_ptr, at // PAGE_SIZE, visible, pages) * stride_page + at % PAGE_SIZE * stride


@triton.jit
def _dot_rows(x, y):
    """x (D,) times each row of y (N, D).

    fma(x, y, 0) is the rounded product, which the compiler does not fuse with the sum over lanes: there each lane would
    add its own exact product to the other's rounded one, and lanes that share a row would differ in the last bit.
    """
    return tl.sum(tl.fma(x[None, :], y, 0.0), 1)


@triton.jit
def _scores(x, y, scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 scores of the row x (D,) and the rows of y (N, D), and the soft cap's slope there."""
    s = _dot_rows(x, y) * scale
    if SOFTCAP:
        bent = tanh(s / softcap)
        return bent * (softcap * LOG2E), 1 - bent * bent
    return s * LOG2E, tl.full(s.shape, 1.0, tl.float32)


@triton.jit
def _weights(s, lse):
    """softmax of base-2 scores; as in the reference, NaN where the row's LSE is infinite (only -inf scores, or inf)."""
    return tl.where(tl.abs(lse) < float("inf"), tl.exp2(s - lse), float("nan"))


@triton.jit
def attend_row(q_ptr, k_ptr, v_ptr, table_ptr, pages, stride_k_page, stride_ks, stride_v_page, stride_vs, first, last,
               position, since_ptr, until_ptr, scale, softcap,
               HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
               PAGE_SIZE: tl.constexpr, CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return one row's output (D_V,) over the keys [first, last) and its base-2 LSE; LOWEST if all scores are -inf."""
    N: tl.constexpr = rows_at_a_time(D, D_V)
    offs_n, offs_d = tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
    total, peak, seen, infinite, unknown = 0.0, float("-inf"), 0, 0, 0
    n = first
    while (n < last) & (unknown == 0):
        visible = _visible_keys(n + offs_n, first, last, position, since_ptr, until_ptr, CHECK_COLUMNS)
        k = _load_visible(k_ptr, _places(n + offs_n, visible, table_ptr, pages, stride_k_page, stride_ks, PAGE_SIZE),
                          visible, HEAD_DIM, D)
        s, _ = _scores(q, k, scale, softcap, SOFTCAP)
        s = tl.where(visible, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s))
        shift = tl.where(tl.abs(new_peak) < float("inf"), new_peak, 0.0)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(s - shift))
        peak = new_peak
        seen = tl.maximum(seen, tl.max(visible.to(tl.int32)))
        infinite = tl.maximum(infinite, tl.max((s == float("inf")).to(tl.int32)))
        unknown = tl.max((s != s).to(tl.int32))
        n += N
    lse = tl.where(tl.abs(peak) < float("inf"), peak + tl.log2(total), peak)
    lse = tl.where((seen > 0) & (peak == float("-inf")), LOWEST, lse)
    lse = tl.where(unknown > 0, float("nan"), lse)
    out = tl.zeros([D_V], tl.float32)
    n = first
    while (n < last) & (seen > infinite + unknown):
        visible = _visible_keys(n + offs_n, first, last, position, since_ptr, until_ptr, CHECK_COLUMNS)
        k = _load_visible(k_ptr, _places(n + offs_n, visible, table_ptr, pages, stride_k_page, stride_ks, PAGE_SIZE),
                          visible, HEAD_DIM, D)
        s, _ = _scores(q, k, scale, softcap, SOFTCAP)
        v = _load_visible(v_ptr, _places(n + offs_n, visible, table_ptr, pages, stride_v_page, stride_vs, PAGE_SIZE),
                          visible, HEAD_DIM_V, D_V)
        out += tl.sum(tl.where(visible, tl.exp2(s - lse), 0.0)[:, None] * v, 0)
        n += N
    return tl.where(infinite + unknown > 0, float("nan"), out), lse


@triton.jit
def add_sink(lse, sinks_ptr, head):
    """Count a head's sink: the factor of outputs that were normalised without it, and the base-2 LSE with it."""
    sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
    peak = tl.maximum(lse, sink)
    shift = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
    part = tl.exp2(lse - shift)
    total = part + tl.exp2(sink - shift)
    return part / total, shift + tl.log2(total)


@triton.jit
def finished(out, lse, sinks_ptr, head):
    """Output and natural LSE of a row that is not split, from those of its only part, and its head's sink if there are
    sinks.

    With only -inf scores the output is NaN, or what a sink leaves of it: 0.
    """
    if sinks_ptr is not None:
        factor, total = add_sink(tl.where(lse == LOWEST, float("-inf"), lse), sinks_ptr, head)
        return out * factor, tl.where(lse == float("-inf"), lse, total / LOG2E)
    return tl.where(lse == LOWEST, float("nan"), out), tl.where(lse == LOWEST, float("-inf"), lse / LOG2E)


@triton.jit
def dq_row(q_ptr, k_ptr, v_ptr, dout_ptr, stride_ks, stride_vs, lse, delta, first, last, position, since_ptr, until_ptr,
           scale, softcap,
           HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
           CHECK_COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return one query's gradient (D,), but for the factor `scale`, from the keys [first, last)."""
    N: tl.constexpr = rows_at_a_time(D, D_V)
    offs_n, offs_d = tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
    offs_v = tl.arange(0, D_V)
    dout = tl.load(dout_ptr + offs_v, mask=offs_v < HEAD_DIM_V, other=0.0).to(tl.float32)
    dq = tl.zeros([D], tl.float32)
    n, known = first, 1
    while (n < last) & (known > 0):
        visible = _visible_keys(n + offs_n, first, last, position, since_ptr, until_ptr, CHECK_COLUMNS)
        at = (n + offs_n).to(tl.int64)
        k = _load_visible(k_ptr, at * stride_ks, visible, HEAD_DIM, D)
        v = _load_visible(v_ptr, at * stride_vs, visible, HEAD_DIM_V, D_V)
        s, slope = _scores(q, k, scale, softcap, SOFTCAP)
        ds = tl.where(visible, _weights(s, lse * LOG2E) * (_dot_rows(dout, v) - delta) * slope, 0.0)
        dq += tl.sum(ds[:, None] * k, 0)
        known = tl.max(((dq == dq) & (offs_d < HEAD_DIM)).to(tl.int32))
        n += N
    return dq


@triton.jit
def dkv_row(k_ptr, v_ptr, q_ptr, dout_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, stride_qh, stride_qs, stride_oh,
            stride_os, first, last, col, group, sq, scale, softcap,
            HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
            CHECK_ROWS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return one key's dk (D,), without the factor `scale`, and dv (D_V,), from queries [first, last) of `group` heads.
    """
    M: tl.constexpr = rows_at_a_time(D, D_V)
    offs_m, offs_d, offs_v = tl.arange(0, M), tl.arange(0, D), tl.arange(0, D_V)
    k = tl.load(k_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offs_v, mask=offs_v < HEAD_DIM_V, other=0.0).to(tl.float32)
    dk, dv = tl.zeros([D], tl.float32), tl.zeros([D_V], tl.float32)
    g, m, known = 0, first, 1
    while (g < group) & (first < last) & (known > 0):
        rows = m + offs_m
        visible = rows < last
        if CHECK_ROWS:
            lo = tl.load(lo_ptr + rows, mask=visible, other=0)
            hi = tl.load(hi_ptr + rows, mask=visible, other=0)
            visible &= (lo <= col) & (col < hi)
        at = rows.to(tl.int64)
        q = _load_visible(q_ptr, at * stride_qs, visible, HEAD_DIM, D)
        dout = _load_visible(dout_ptr, at * stride_os, visible, HEAD_DIM_V, D_V)
        lse = tl.load(lse_ptr + at, mask=visible, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + at, mask=visible, other=0.0)
        s, slope = _scores(k, q, scale, softcap, SOFTCAP)
        p = tl.where(visible, _weights(s, lse), 0.0)
        ds = tl.where(visible, p * (_dot_rows(v, dout) - delta) * slope, 0.0)
        dk += tl.sum(ds[:, None] * q, 0)
        dv += tl.sum(p[:, None] * dout, 0)
        if HEAD_DIM == HEAD_DIM_V:  # one reduction
            known = tl.max((((dk == dk) | (dv == dv)) & (offs_d < HEAD_DIM)).to(tl.int32))
        else:
            known = tl.maximum(tl.max(((dk == dk) & (offs_d < HEAD_DIM)).to(tl.int32)),
                               tl.max(((dv == dv) & (offs_v < HEAD_DIM_V)).to(tl.int32)))
        m += M
        if m >= last:
            m = first
            g += 1
            q_ptr += stride_qh
            dout_ptr += stride_oh
            lse_ptr += sq
            delta_ptr += sq
    return dk, dv
