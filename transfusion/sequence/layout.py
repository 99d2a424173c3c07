"""Where things stand in packed rows: which patches are whose, and which tokens are text.

Two words are used for them throughout the package. An *image id* is the number of an image in its batch, counted over
all rows, and -1 for text. *Places* are flat indices into the B * S tokens of a batch: token s of row b has place b *
S + s.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.device import moved


class ImageLayout(NamedTuple):
    """Which patches are whose, for N images of P patches in all, one image behind the other.

    image_ids: (P,) the image that each patch belongs to.
    offsets: (N + 1,) int32, the patches of image n are those from offsets[n] on, before offsets[n + 1].
    columns: (N,) int32, how many patches make a row of the image.
    grids: N x (rows, columns) of patches, on the host.
    """

    image_ids: Tensor
    offsets: Tensor
    columns: Tensor
    grids: tuple

    @classmethod
    def of(cls, grids: list[tuple[int, int]], device=None) -> "ImageLayout":
        """Lay out images of these grids."""
        counts = torch.tensor([rows * columns for rows, columns in grids], dtype=torch.int64)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        columns = torch.tensor([columns for _, columns in grids], dtype=torch.int32)
        image_ids = torch.repeat_interleave(torch.arange(len(grids)), counts)
        layout = cls(image_ids, offsets, columns, tuple(grids))
        return layout if device is None else layout.to(device)

    def to(self, device) -> "ImageLayout":
        """Return the same layout on `device`."""
        return ImageLayout(*(moved(x, device) for x in self[:3]), self.grids)

    def by_grid(self) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """For each grid there is: (grid, ids of its images (n,), indices of their patches (n * rows * columns,)).

        Images without patches, which another rank has, are left out.
        """
        if len(set(self.grids)) == 1 and any(self.grids[0]):  # nothing to sort out, and nothing to carry to the device
            counts = len(self.grids), len(self.image_ids)
            return [(self.grids[0], *(torch.arange(count, device=self.image_ids.device) for count in counts))]
        ends, found = 0, {}
        for number, (rows, columns) in enumerate(self.grids):
            if not rows:
                continue
            numbers, patches = found.setdefault((rows, columns), ([], []))
            numbers.append(number)
            patches += range(ends, ends + rows * columns)
            ends += rows * columns
        return [(grid, *(moved(torch.tensor(x), self.image_ids.device) for x in members))
                for grid, members in found.items()]


class Modality(NamedTuple):
    """Which tokens of packed rows (B, S) are patches and which are text; padding is text.

    How many there are of both is known on the host, so that taking them apart and joining them waits for no device.

    image_ids: (B, S) int32 or int64, the image of each token, -1 for text.
    text_places: (T,) the places of text.
    patch_places: (P,) the places of patches.
    """

    image_ids: Tensor
    text_places: Tensor
    patch_places: Tensor

    def to(self, device) -> "Modality":
        """Return the same on `device`."""
        return Modality(*(moved(x, device) for x in self))

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, ...) -> text (1, T, ...) and patches (1, P, ...)."""
        rows = packed.flatten(0, 1)
        return rows.index_select(0, self.text_places)[None], rows.index_select(0, self.patch_places)[None]

    def join(self, text: Tensor, patches: Tensor) -> Tensor:
        """Undo `split`."""
        rows = text.new_empty(self.image_ids.numel(), *text.shape[2:])  # all are written: each is text or a patch
        rows = rows.index_copy_(0, self.text_places, text[0]).index_copy_(0, self.patch_places, patches[0])
        return rows.unflatten(0, self.image_ids.shape)
