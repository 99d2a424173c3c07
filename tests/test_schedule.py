"""The distance between a loop's request for a tile and its wait is that of loops whose schedule is known."""
import re

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.conftest import compiles
from tests.schedule import wait_distances

pytestmark = compiles


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, k, BY_TMA: tl.constexpr):
    rows, inner = tl.arange(0, 64), tl.arange(0, 64)
    x = tl.make_tensor_descriptor(x_ptr, [64, k], [k, 1], [64, 64])
    y = tl.make_tensor_descriptor(y_ptr, [k, 64], [64, 1], [64, 64])
    sums = tl.zeros([64, 64], tl.float32)
    for start in range(0, k, 64):
        if BY_TMA:
            sums = tl.dot(x.load([0, start]), y.load([start, 0]), sums)
        else:
            left = tl.load(x_ptr + rows[:, None] * k + start + inner[None, :])
            sums = tl.dot(left, tl.load(y_ptr + (start + inner)[:, None] * 64 + rows[None, :]), sums)
    tl.store(out_ptr + rows[:, None] * 64 + rows[None, :], sums)


def code(architecture: int, stages: int, by_tma: bool) -> str:
    """Triton's intermediate code of a product that walks `k`."""
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "k": "i32", "BY_TMA": "constexpr"}
    source = ASTSource(_product, signature, {"BY_TMA": by_tma}, {(i,): [["tt.divisibility", 16]] for i in range(4)})
    options = {"num_warps": 4, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ttgir"]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("architecture,by_tma", [(80, False), (90, False), (90, True)])
def test_a_loop_of_n_stages_asks_n_minus_2_tiles_before_it_waits(architecture, by_tma, stages):
    """A stage holds the tile in work, and the next is asked for behind its product."""
    assert wait_distances(code(architecture, stages, by_tma)) == [stages - 2]


def test_a_loop_of_one_stage_copies_nothing_ahead():
    """By TMA it waits as soon as it has asked."""
    assert wait_distances(code(90, 1, False)) == []
    assert wait_distances(code(90, 1, True)) == [0]


def test_a_wait_for_all_copies_is_found_to_come_at_once():
    plain = code(90, 4, False)
    assert wait_distances(plain) == [2]
    assert wait_distances(re.sub(r"(ttg\.async_wait .*num = )\d+", r"\g<1>0", plain)) == [0]
