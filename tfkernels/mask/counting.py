"""How many keys each query of a mask sees, counted without looking at the pairs.

    visible_i = #{j in [lo_i, hi_i): since_j <= i} - #{j in [lo_i, hi_i): until_j <= i}        where since_j <= until_j

Each of the two counts asks how many values of one run are small. A wavelet matrix (Claude and Navarro, The wavelet
matrix, SPIRE 2012) answers it for all queries at once: it sorts the values bit by bit and follows where the ends of
each run go. That takes O(S log S) time and O(S) memory.
"""
import torch
from torch import Tensor


def visible_keys(lo: Tensor, hi: Tensor, key_since: Tensor, key_until: Tensor, rows_exact: bool, offset: int) -> Tensor:
    """Return how many keys each query sees, (B, Sq) int64, from the integers of a `TransfusionMask`."""
    query_len, key_len = lo.shape[1], key_since.shape[1]
    lo, hi = lo.long().clamp(0, key_len), hi.long().clamp(0, key_len)
    hi = torch.maximum(lo, hi)
    if rows_exact:
        return hi - lo
    batch = max(lo.shape[0], key_since.shape[0])
    lo, hi = lo.expand(batch, -1), hi.expand(batch, -1)
    since = (key_since.long() - offset).clamp(0, query_len).expand(batch, -1)
    until = torch.maximum(since, (key_until.long() - offset).clamp(0, query_len).expand(batch, -1))
    after = torch.arange(1, query_len + 1, device=lo.device).expand_as(lo)
    return _count_below(since, lo, hi, after) - _count_below(until, lo, hi, after)


def _count_below(values: Tensor, lo: Tensor, hi: Tensor, limits: Tensor) -> Tensor:
    """Return #{j in [lo_i, hi_i): values_j < limits_i}, (B, Sq), for values and limits from 0 to Sq."""
    counts = torch.zeros_like(limits)
    for bit in reversed(range(limits.shape[1].bit_length())):
        ones = values >> bit & 1
        zeros_before = torch.nn.functional.pad((1 - ones).cumsum(1), (1, 0))               # (B, Sk + 1)
        lo_zeros, hi_zeros, zeros = zeros_before.gather(1, lo), zeros_before.gather(1, hi), zeros_before[:, -1:]
        larger = (limits >> bit & 1).bool()
        counts += torch.where(larger, hi_zeros - lo_zeros, 0)
        lo, hi = (torch.where(larger, zeros + end - before, before) for end, before in ((lo, lo_zeros), (hi, hi_zeros)))
        values = values.gather(1, ones.argsort(dim=1, stable=True))
    return counts
