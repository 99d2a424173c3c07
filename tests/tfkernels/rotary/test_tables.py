"""The tables of rotary angles and the positions of patches on their grids."""
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.conftest import DEVICE, traced
from tests.tfkernels.rotary.test_rotary import Sizes, frequencies, random_inputs
from tests.tfkernels.rotary.test_rotary_torch import T
from tfkernels import grid_positions, qk_norm_rotary, rotary_table


def test_the_table_is_hugging_faces_to_the_bit():
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_theta=500000.0)).to(DEVICE)
    positions = torch.tensor([[0, 1, 2, 77, 8191, 131071], [0, 1, 0, 1, 2, 3]], device=DEVICE)
    theirs = embedding(torch.zeros(1, device=DEVICE), positions)
    for ours, twice in zip(rotary_table(positions, embedding.inv_freq), theirs):
        assert ours.dtype == torch.float32 and torch.equal(torch.cat([ours, ours], -1), twice)


def mixed_row():
    """Text, image 1 of 2 x 3 patches, text, images 0 (2 x 2) and 2 (1 x 4) side by side, text; the same documents a
    second time, behind one more."""
    index = torch.tensor([-1] * 2 + [1] * 6 + [-1] + [0] * 4 + [2] * 4 + [-1] * 2)
    positions = torch.arange(len(index))
    index = torch.stack([torch.cat([index, torch.full((3,), -1)]),
                         torch.cat([torch.full((3,), -1), torch.where(index < 0, index, index + 3)])])
    positions = torch.stack([torch.cat([positions, torch.arange(3)]), torch.cat([torch.arange(3), positions])])
    return positions.to(DEVICE), index.to(DEVICE), torch.tensor([2, 3, 4, 2, 3, 4], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_patches_lie_on_a_grid_that_starts_where_their_image_does(dtype):
    positions, index, columns = (x.to(dtype) for x in mixed_row())
    found = grid_positions(positions, index, columns)
    assert found.dtype == dtype and found.shape == (*positions.shape, 2)
    seen = {}
    for b in range(2):
        for s in range(positions.shape[1]):
            p, n = positions[b, s].item(), index[b, s].item()
            t = seen[n] = seen.get(n, -1) + 1 if n >= 0 else 0
            start, width = p - t, columns[n].item() if n >= 0 else 1
            assert found[b, s].tolist() == [start + t // width, start + t % width]
    assert torch.equal(found[0], grid_positions(positions[0], index[0], columns[:3]))


def test_text_of_a_mixed_row_turns_as_in_one_dimension_to_the_bit():
    positions, index, columns = mixed_row()
    grid, axes = grid_positions(positions, index, columns), torch.arange(8, device=DEVICE) % 2
    one, two = rotary_table(positions, frequencies(8)), rotary_table(grid, frequencies(8), axes)
    tensors, _, _ = random_inputs(Sizes(2, 1, 1, positions.shape[1], 16, 8))
    flat, mixed = (qk_norm_rotary(*(x.float() for x in tensors.values()), *table) for table in (one, two))
    for a, b in (*zip(one, two), *((x.transpose(1, 2), y.transpose(1, 2)) for x, y in zip(flat, mixed))):
        assert torch.equal(a[index < 0], b[index < 0]) and not torch.equal(a[index >= 0], b[index >= 0])


def test_positions_of_text_alone_are_equal_on_both_axes():
    positions = torch.arange(7, device=DEVICE)[None]
    found = grid_positions(positions, torch.full_like(positions, -2), positions.new_empty(0))
    assert torch.equal(found, positions[..., None].expand(-1, -1, 2))
    assert grid_positions(positions[:, :0], positions[:, :0], positions.new_empty(0)).shape == (1, 0, 2)


@traced
def test_positions_and_tables_compile_whole():
    positions, index, columns = mixed_row()

    def table(positions, index, columns):
        return rotary_table(grid_positions(positions, index, columns), frequencies(8),
                            torch.arange(8, device=DEVICE) % 2)

    for ours, expected in zip(torch.compile(table, fullgraph=True, backend="aot_eager")(positions, index, columns),
                              table(positions, index, columns)):
        assert torch.equal(ours, expected)


def test_tables_and_positions_that_do_not_fit_are_refused_by_name():
    positions = torch.zeros(2, 5, dtype=torch.int64)
    for message, arguments in {
        "rotary_table: frequencies is torch.float64 of shape .8,.; float32 .R/2,.": (positions, T[0].double()),
        "rotary_table: frequencies is torch.float32 of shape .5, 8.": (positions, T),
        "rotary_table: axes is torch.int64 of shape .5,. and frequencies has 8 elements; int64 .8,.": (positions, T[0],
                                                                                                       positions[0]),
        "rotary_table: axes is torch.float32": (positions, T[0], T[0]),
        "rotary_table: positions has shape .2, 5, 1. and axes is None; .S,. or .B, S.": (positions[..., None], T[0]),
        "rotary_table: positions has shape .5,. and axes is given; .*.B, S, A.": (positions[0], T[0],
                                                                                  torch.zeros(8, dtype=torch.int64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            rotary_table(*arguments)
    for message, arguments in {
        "grid_positions: positions is torch.float32; int32 or int64": (positions.float(), positions, positions[0]),
        "grid_positions: index is torch.int64 of shape .2, 4. and positions has shape .2, 5.": (positions,
                                                                                                positions[:, :4],
                                                                                                positions[0]),
        "grid_positions: index is torch.float32": (positions, positions.float(), positions[0]),
        "grid_positions: columns is torch.int64 of shape .2, 5.; int32 or int64 .images,.": (positions, positions,
                                                                                             positions),
    }.items():
        with pytest.raises(ValueError, match=message):
            grid_positions(*arguments)
