"""The mask of a row that ranks share: what a layer is given in place of its mask, so that it need not know of ranks."""
from collections.abc import Callable

import torch
from torch import Tensor

from tfkernels.mask import TransfusionMask
from tfkernels.parallel.cut import Cut
from tfkernels.parallel.gathered import gathered_attention


class SharedMask:
    """A whole row's mask, and how the attention of its tokens is done by several ranks.

    `tfkernels.integrations.transformers` takes it as `transfusion_mask`. It is no dataclass, for FSDP makes those anew
    in every layer that it shards.
    """

    def __init__(self, whole: TransfusionMask, cut: Cut, group=None,
                 attention: Callable[..., Tensor] = gathered_attention):
        """Take the mask and the cut that are the same on every rank, and `gathered_attention` or `ring_attention`."""
        self.whole, self.cut, self.group, self.attention = whole, cut, group, attention

    def of(self, whole: TransfusionMask) -> "SharedMask":
        """Return the same with another mask of the row, such as one with a window."""
        return SharedMask(whole, self.cut, self.group, self.attention)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
               softcap: float | None = None) -> Tensor:
        """Return the attention of this rank's queries: (B, H, T, D) x (B, K, T, D) -> (B, H, T, D)."""
        return self.attention(q, k, v, self.whole, self.cut, self.group, scale=scale, softcap=softcap)
