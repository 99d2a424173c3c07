"""Attention of one long row over several processes, which hold its tokens in parts: context parallelism.

`cut.py` deals a row's tokens to the ranks so that each has as much attention to compute. `gathered.py` gathers keys and
values on every rank; `ring.py` passes them around where a whole row's do not fit. Nothing but torch.distributed is
used, and every rank makes the same calls in the same order, forward and backward.
"""
from tfkernels.parallel.cut import Cut, cut_by_area
from tfkernels.parallel.gathered import gathered_attention
from tfkernels.parallel.ring import ring_attention

__all__ = ["Cut", "cut_by_area", "gathered_attention", "ring_attention"]
