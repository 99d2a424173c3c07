"""The angles of rotary position embedding, and positions in two dimensions.

Both are plain PyTorch on the device and do not wait for it.
"""
import torch
from torch import Tensor

from tfkernels._arguments import got, need_range, need_tensors


def rotary_table(positions: Tensor, frequencies: Tensor, axes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions * frequencies, float32 (..., S, R/2).

    The angle is a float32 product of the position as float32 (whole numbers to 2^24 are exact) and the frequency, as
    Hugging Face's models compute theirs: weights were trained with those roundings.

    Args:
        positions: (S,) or (B, S), or with `axes` (..., S, A): a number for each of A axes, such as row and column.
            Tokens whose numbers are equal, text, turn to the bit as in one dimension.
        frequencies: (R/2,) float32, such as theta^(-2 i / R).
        axes: (R/2,) int64, the axis that each frequency turns with; `torch.arange(R // 2) % 2` gives them out in turn.
            A number that is none of 0 to A - 1 raises on a CPU; on a GPU, where looking would synchronise, it is the
            nearest of them.

    Raises:
        ValueError: a shape or dtype that does not fit, named.
    """
    need_tensors("rotary_table", {"positions": positions, "frequencies": frequencies, "axes": axes}, ("axes",))
    if frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        raise ValueError(f"rotary_table: frequencies is {frequencies.dtype} of shape {tuple(frequencies.shape)}; "
                         "float32 (R/2,) fits")
    if axes is not None and (axes.shape != frequencies.shape or axes.dtype != torch.int64):
        raise ValueError(f"rotary_table: axes is {axes.dtype} of shape {tuple(axes.shape)} and frequencies has "
                         f"{len(frequencies)} elements; int64 ({len(frequencies)},) fits, an axis for each frequency")
    least = 1 if axes is None else 2
    if positions.ndim not in (least, least + 1):
        raise ValueError(f"rotary_table: positions has shape {tuple(positions.shape)} and axes is "
                         f"{'None' if axes is None else 'given'}; (S,) or (B, S) fits without axes, (S, A) or (B, S, "
                         "A) with them")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"rotary_table: positions is {got(positions)}; integers or floating-point numbers fit")
    if axes is not None:
        need_range("rotary_table", "axes", axes, 0, positions.shape[-1] - 1, "for positions has that many axes")
        axes = axes.clamp(0, max(0, positions.shape[-1] - 1))
    positions = positions.float()
    angles = (positions[..., None] if axes is None else positions[..., axes]) * frequencies
    return angles.cos(), angles.sin()


def grid_positions(positions: Tensor, index: Tensor, columns: Tensor) -> Tensor:
    """Return (B, S, 2), the row and column of every token.

        patch t of an image whose first token has position s:  (s + t // columns, s + t % columns)
        text at position p:                                    (p, p)

    Tokens behind an image keep their positions, so that text turns as it would in one dimension. All this is computed
    on the device, without synchronisation.

    Args:
        positions: (B, S) or (S,) integers, one more for each token of an image.
        index: like positions, int32 or int64: the image id of each token, over the whole batch, negative for text. An
            image's first token must be there. N or more raises on a CPU; on a GPU, where looking would synchronise, it
            is text.
        columns: (N,) int32 or int64, how many patches of image n make a row; less than 1 raises on a CPU and is 1 on a
            GPU.

    Raises:
        ValueError: a shape or dtype that does not fit, named.
    """
    need_tensors("grid_positions", {"positions": positions, "index": index, "columns": columns})
    integers = (torch.int32, torch.int64)
    if positions.dtype not in integers:
        raise ValueError(f"grid_positions: positions is {positions.dtype}; int32 or int64 fits")
    if index.shape != positions.shape or index.dtype not in integers:
        raise ValueError(f"grid_positions: index is {index.dtype} of shape {tuple(index.shape)} and positions has "
                         f"shape {tuple(positions.shape)}; int32 or int64 of the same shape fits, the image of each "
                         "token, -1 for text")
    if columns.ndim != 1 or columns.dtype not in integers:
        raise ValueError(f"grid_positions: columns is {columns.dtype} of shape {tuple(columns.shape)}; int32 or int64 "
                         "(images,) fits, the patches in a row of each")
    images = columns.shape[0]
    need_range("grid_positions", "index", index, torch.iinfo(index.dtype).min, images - 1, "negative for text, for "
                                                                                           f"columns has {images} "
                                                                                           "images")
    need_range("grid_positions", "columns", columns, 1, torch.iinfo(columns.dtype).max, "the patches in a row")
    text = (index < 0) | (index >= images)
    # text is behind the last image
    image = torch.where(text, images, index.long())
    first = positions.new_full((images + 1,), torch.iinfo(positions.dtype).max)
    # a minimum of integers: the order is nothing
    first = first.scatter_reduce(0, image.flatten(), positions.flatten(), "amin")
    start = torch.where(text, positions, first[image])
    patch = positions - start
    width = torch.nn.functional.pad(columns.to(positions.dtype).clamp(min=1), (0, 1), value=1)[image]
    return torch.stack((start + patch // width, start + patch % width), -1)
