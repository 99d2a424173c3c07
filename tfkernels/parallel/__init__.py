"""Attention of one long row over several processes, which hold its tokens in parts: context parallelism.

`cut.py` deals a row's tokens to the ranks so that each has as much attention to compute. `gathered.py` gathers keys and
values on every rank; `ring.py` passes them around where a whole row's do not fit; `shared.py` hands either to the
layers of a model as if it were a mask. `exchange.py` sends rows to the rank that needs them, as an image's patches to
the one that draws it. Nothing but torch.distributed is used, and every rank makes the same calls in the same order,
forward and backward.
"""
from tfkernels.parallel.cut import Cut, cut_by_area
from tfkernels.parallel.exchange import exchange
from tfkernels.parallel.gathered import gathered_attention
from tfkernels.parallel.ring import ring_attention
from tfkernels.parallel.shared import SharedMask

__all__ = ["Cut", "SharedMask", "cut_by_area", "exchange", "gathered_attention", "ring_attention"]
