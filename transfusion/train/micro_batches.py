"""Packed rows in parts, so that one part at a time is in memory."""
import torch
from torch import Tensor

from transfusion.sequence.packing import ImageLayout, Modality, Sequence


def split_rows(sequence: Sequence, parts: int) -> list[Sequence]:
    """Split B packed rows into `parts` sequences of about B / parts rows each, in order; all B rows in one part are the sequence itself.

    `left_out` stays with the whole: the parts have none.
    """
    if parts == 1:
        return [sequence]
    ends = torch.arange(len(sequence.tokens)).tensor_split(parts)
    return [_rows(sequence, int(rows[0]), int(rows[-1]) + 1) for rows in ends]


def _rows(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Rows `start` to `stop` and the images in them."""
    length = sequence.tokens.shape[1]
    first, last = start * length, stop * length

    def inside(flat: Tensor) -> Tensor:
        return (flat >= first) & (flat < last)

    patches = inside(sequence.patch_rows)
    owners = sequence.layout.image[patches]
    image, end = (int(owners[0]), int(owners[-1]) + 1) if len(owners) else (0, 0)
    of_token = sequence.image[start:stop]
    modality = Modality(torch.where(of_token < 0, of_token, of_token - image),
                        *(rows[inside(rows)] - first for rows in sequence.modality[1:]))
    text = inside(sequence.text_rows)
    return Sequence(
        sequence.tokens[start:stop], sequence.positions[start:stop], sequence.documents[start:stop],
        _trimmed(sequence.spans[start:stop]), _trimmed(sequence.hidden[start:stop]),
        sequence.text_rows[text] - first, sequence.text_targets[text], sequence.patches[patches], modality,
        sequence.image_first[image:end], sequence.drawn[image:end], ImageLayout.of(list(sequence.layout.grids[image:end])))


def _trimmed(spans: Tensor) -> Tensor:
    """Spans (B, M, 2), padded with start == end, without the padding that these rows all have."""
    width = int((spans[..., 1] > spans[..., 0]).sum(1).max())
    return spans[:, :width]
