"""Packed rows in parts, so that one part at a time is in memory."""
import torch
from torch import Tensor

from transfusion.sequence.layout import ImageLayout, Modality
from transfusion.sequence.packing import Sequence


def split_rows(sequence: Sequence, parts: int) -> list[Sequence]:
    """Split B packed rows, in order, into `parts` sequences of about B / parts rows each.

    One part is the sequence itself. `left_out` stays with the whole: smaller parts have none.
    """
    if parts == 1:
        return [sequence]
    ends = torch.arange(len(sequence.tokens)).tensor_split(parts)
    return [_rows(sequence, int(rows[0]), int(rows[-1]) + 1) for rows in ends]


def _rows(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Rows `start` to `stop` and the images in them."""
    length = sequence.tokens.shape[1]
    first, last = start * length, stop * length

    def inside(places: Tensor) -> Tensor:
        return (places >= first) & (places < last)

    patches, targets = inside(sequence.patch_places), inside(sequence.target_places)
    owners = sequence.layout.image_ids[patches]
    image, end = (int(owners[0]), int(owners[-1]) + 1) if len(owners) else (0, 0)
    image_ids = sequence.image_ids[start:stop]
    modality = Modality(torch.where(image_ids < 0, image_ids, image_ids - image),
                        *(places[inside(places)] - first for places in sequence.modality[1:]))
    return Sequence(
        tokens=sequence.tokens[start:stop], positions=sequence.positions[start:stop],
        documents=sequence.documents[start:stop], spans=_trimmed(sequence.spans[start:stop]),
        hidden=_trimmed(sequence.hidden[start:stop]), target_places=sequence.target_places[targets] - first,
        text_targets=sequence.text_targets[targets], patches=sequence.patches[patches], modality=modality,
        image_first=sequence.image_first[image:end], drawn=sequence.drawn[image:end],
        layout=ImageLayout.of(list(sequence.layout.grids[image:end])))


def _trimmed(spans: Tensor) -> Tensor:
    """Spans (B, M, 2), padded with start == end, without the padding that these rows all have."""
    width = int((spans[..., 1] > spans[..., 0]).sum(1).max())
    return spans[:, :width]
