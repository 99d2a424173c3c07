"""What every attention over several processes asks of its arguments, checked before the first message is sent."""
import torch
import torch.distributed as dist
from torch import Tensor

from tfkernels.mask import TransfusionMask
from tfkernels.parallel.cut import Cut


def checked_rank(op: str, q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, cut: Cut, group) -> int:
    """Return this process's rank in the group; refuse shapes that do not fit the cut.

    What a rank refuses alone leaves the others waiting, as an error in any collective does.
    """
    for name, x, kind in (("q", q, Tensor), ("k", k, Tensor), ("v", v, Tensor), ("mask", mask, TransfusionMask),
                          ("cut", cut, Cut)):
        if not isinstance(x, kind):
            raise ValueError(f"{op}: {name} is a {type(x).__name__}; a {kind.__name__} fits")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if cut.ranks != size:
        raise ValueError(f"{op}: cut has {cut.ranks} ranks and the group {size}; as many fit")
    if (mask.query_len, mask.key_len, mask.offset) != (cut.seq_len, cut.seq_len, 0):
        raise ValueError(f"{op}: mask is {mask.query_len} queries from {mask.offset} by {mask.key_len} keys and cut a "
                         f"row of {cut.seq_len}; the whole row's mask fits, the same on every rank")
    tokens = len(cut.tokens[rank])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[2] != tokens:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)} and cut gives rank {rank} {tokens} tokens; "
                             f"(batch, heads, {tokens}, head dim) fits; take them with cut.take")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"{op}: k is {k.dtype} of shape {tuple(k.shape)} and v {v.dtype} of shape {tuple(v.shape)}; "
                         "the same dtype and shape fit")
    return rank


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors as `attention` casts them under autocast: before they are sent."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
