"""Rows of a tensor that change ranks, such as the patches of images: each goes to one rank, its gradient the way back.

    forward: rank r sends `sent[s]` rows to rank s and receives `received[s]` from it        backward: the same, swapped
"""
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.compiler.disable
def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group=None) -> Tensor:
    """Return the rows that the ranks of a group send to this one, in the order of the ranks.

    Args:
        x: (rows, ...), those for rank 0 first; sizes behind the first are the same on every rank.
        sent, received: how many rows go to each rank and come from it, on the host: `sent[s]` of rank r is
            `received[r]` of rank s.
        group: process group; None for all processes.

    Returns:
        (sum of received, ...). Under autograd it requires a gradient on every rank, even where x does not, for the
        backward is a message that no rank may leave out: let each rank's loss depend on the result, rows or none.
        Integers have none.

    Raises:
        ValueError: counts that do not fit the group or x.
    """
    sent, received, size = list(sent), list(received), dist.get_world_size(group)
    if len(sent) != size or len(received) != size:
        raise ValueError(f"exchange: sent has {len(sent)} counts, received {len(received)} and the group {size} ranks; "
                         "one for each rank fits")
    if x.ndim < 1 or sum(sent) != len(x):
        raise ValueError(f"exchange: sent adds up to {sum(sent)} and x has shape {tuple(x.shape)}; as many rows fit")
    if not (x.is_floating_point() or x.is_complex()):
        return _sent(x, sent, received, group)
    return _Exchange.apply(x, x.new_empty(0, requires_grad=True), sent, received, group)


class _Exchange(torch.autograd.Function):
    """The second argument is nothing but a reason to require a gradient."""

    @staticmethod
    def forward(ctx, x, _, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _sent(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _sent(dout, ctx.received, ctx.sent, ctx.group), None, None, None, None


def _sent(x: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    """Send x and return what arrives."""
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=group)
    return arrived
