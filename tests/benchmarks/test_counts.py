"""Counts of the kernels' compiled code: what they may waste at most, and one kernel's numbers worked out by hand."""
import re
from pathlib import Path

import pytest

from benchmarks.counts import apart, page
from tests.conftest import compiles
from tfkernels._launch import TRITON

pytestmark = compiles

ROOT = Path(__file__).parents[2]

as_counted = pytest.mark.skipif(TRITON < (3, 9), reason="older Tritons lay these kernels' data out in other ways")

FEW_NUMBERS = ("_diffusion_loss_images", "_attention_merge", "_head_loss_factors")  # less than a sector an image or row
READ_ONCE = ("_attention_decode", "_attention_bwd_delta", "_norm_bwd_images")
OPERATORS = ("attention, hidden images, D 128", "decoding, D 64", "modulated_rms_norm", "patchify")


@pytest.fixture(scope="module")
def rows():
    """Every row of OPERATORS, on both architectures."""
    return [row for found in apart(OPERATORS).values() for row in found]


def of(rows, **wanted):
    """The rows with these fields, at least one."""
    found = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    assert found, wanted
    return found


def test_attentions_products_are_computed_once(rows):
    """Warps that share a tile too small for them would each compute the same: a row of the launch table is wrong."""
    for row in rows:
        if row.kernel in ("_attention_fwd", "_attention_bwd_dq", "_attention_bwd_dkv"):
            assert row.products[0] == row.products[1], row


@as_counted
def test_shared_memory_has_no_bank_conflicts_but_for_the_heads_backward(rows):
    for row in rows:
        most = 1.3 if row.kernel == "_head_loss_bwd" else 1.0
        assert row.shared[0] <= most * row.shared[1], row


def test_tensors_are_written_once_and_in_whole_sectors(rows):
    for row in rows:
        if row.kernel not in ("_patchify_bwd", *FEW_NUMBERS):
            assert row.ratio("store") < 1.1, row


def test_what_is_needed_once_is_read_once(rows):
    for kernel in READ_ONCE:
        for row in of(rows, kernel=kernel):
            if "diffusion_loss" not in row.operator:
                assert row.ratio("load") < 1.1, row


@as_counted
def test_patches_of_two_by_two_ask_for_four_and_eight_times_the_sectors(rows):
    """A warp holds 64 bytes of each of 4 patches. In the latents, pairs of 4 bytes lie in a sector of their own."""
    for row in of(rows, operator="patchify", kernel="_patchify_fwd"):
        assert (row.ratio("load"), row.ratio("store")) == (4, 1)
    for row in of(rows, operator="patchify", kernel="_patchify_bwd"):
        assert (row.ratio("load"), row.ratio("store")) == (1, 8)


def test_the_norms_bytes_are_those_worked_out_by_hand(rows):
    """512 rows of 1,024 bfloat16 in 4 warps. The second half of the rows is of image 0."""
    token_tensor, table, vector = 512 * 2048, 2048, 2048
    for row in of(rows, operator="modulated_rms_norm", kernel="_norm_fwd"):
        ids, rstd = 512 * 8, 512 * 4
        assert row.least == {"load": token_tensor + vector + 2 * table + ids, "store": token_tensor + rstd}
        of_a_row = 2048 + vector + 4 * 32                    # x, weight, the sector of its image id for each warp
        assert row.moved["load"] == 512 * of_a_row + 256 * 2 * table
        assert row.moved["store"] == token_tensor + 512 * 32


def test_the_page_has_a_line_for_each_kernel_and_each_operator(rows):
    text = page({"sm_90": rows})
    for row in rows:
        assert f"| {row.operator}: {row.phase} | `{row.kernel}` | {row.launches} | " in text


def test_the_page_counts_every_kernel_of_the_operators():
    """The mask's own kernel is not among them, rows wider than 4,096 columns have a kernel more, and what sums the
    parts of dK and dV runs where their programs leave some of the device idle, as they do not of this small one."""
    launched = {name for path in (ROOT / "tfkernels").rglob("*.py")
                for name in re.findall(r"\b(_\w+)\[(?:grid|\()", path.read_text())}
    counted = set(re.findall(r"\| `(_\w+)` \|", (ROOT / "docs" / "counts.md").read_text()))
    assert len(launched) > 20 and launched - counted == {"_mask_intervals", "_norm_bwd_means", "_attention_bwd_sum"}
