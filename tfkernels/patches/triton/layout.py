"""Where the kernels find a token's elements in latents of any layout: see `tfkernels.patches.latents`."""
import triton
import triton.language as tl
from torch import Tensor

from tfkernels._launch import next_power_of_2
from tfkernels._library import INTERPRET

# elements of one program, and of one row in it; the interpreter's cross many edges
TILE, WIDEST = (64, 16) if INTERPRET else (2048, 1024)
# read one number per image, or a size: no reason to compile again (see `tfkernels.attention.triton.tiles`)
SCALAR_ARGUMENTS = ["signal_ptr", "noise_ptr", "seed_ptr", "x0_factor_ptr", "eps_factor_ptr", "offsets_ptr",
                    "columns_ptr", "images", "steps", "rows", "grid_rows", "grid_columns", "stride_xn", "stride_xc",
                    "stride_xh", "stride_xw"]


def geometry(
    x: Tensor, offsets: Tensor | None, columns: Tensor | None, patch: int
) -> tuple[list[Tensor], list[int], dict]:
    """Return a kernel's pointers (offsets, columns), its integers behind `images` and its constexprs; any layout."""
    layout = {1: "packed", 2: "tokens", 4: "latents"}[x.ndim]
    grid = (x.shape[2] // patch, x.shape[3] // patch) if layout == "latents" else (1, 1)
    strides = x.stride() if layout == "latents" else (0, 0, 0, 0)
    steps = 0 if offsets is None else len(offsets).bit_length()
    pointers = [x if offsets is None else offsets, x if columns is None else columns]
    return pointers, [steps, *grid, *strides], {"LAYOUT": layout, "SEARCH": offsets is not None, "PATCH": patch}


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """What a kernel reads without strides, contiguous; latents (N, C, H, W) keep theirs."""
    return [x if x is None or x.ndim == 4 else x.contiguous() for x in tensors]


def tile(dim: int) -> dict:
    """Return the constexprs of a program's tile: D, and how many rows and elements of a row it takes at a time."""
    block = min(max(4, next_power_of_2(dim)), WIDEST)
    return {"DIM": dim, "BLOCK_R": max(1, TILE // block), "BLOCK_D": block}


@triton.jit
def locate(row, offsets_ptr, images, steps, rows, tokens, SEARCH: tl.constexpr):
    """Image, its first row, its rows and whether it exists, for each of the rows (R,) int32."""
    if SEARCH:
        low, high = row * 0, row * 0 + images + 1
        for _ in range(steps):  # how many offsets are <= row
            middle = (low + high) // 2
            passed = (low < high) & (tl.load(offsets_ptr + middle, mask=low < high, other=0) <= row)
            low, high = tl.where(passed, middle + 1, low), tl.where(passed, high, middle)
        image = low - 1
        inside = (image >= 0) & (image < images) & (row < rows)
        start = tl.load(offsets_ptr + image, mask=inside, other=0)
        count = tl.load(offsets_ptr + image + 1, mask=inside, other=1) - start
    else:
        image, inside = row // tokens, row < rows
        start, count = image * tokens, row * 0 + tokens
    return image, start, count, inside


@triton.jit
def addresses(row, image, start, count, inside, d, columns_ptr, rows, grid_columns, stride_xn, stride_xc, stride_xh,
              stride_xw,
              LAYOUT: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr):
    """Offsets (R, BLOCK_D) int64 of elements `d` of the rows, and which of them exist."""
    valid = inside[:, None] & (d < DIM)[None, :]
    c, i, j, t = d // (PATCH * PATCH), d // PATCH % PATCH, d % PATCH, row - start
    if LAYOUT == "tokens":
        at = row[:, None].to(tl.int64) * DIM + d[None, :]
    elif LAYOUT == "latents":
        y, x = t // grid_columns * PATCH, t % grid_columns * PATCH
        of_row = image.to(tl.int64) * stride_xn + y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
        of_element = c.to(tl.int64) * stride_xc + i.to(tl.int64) * stride_xh + j.to(tl.int64) * stride_xw
        at = of_row[:, None] + of_element[None, :]
    else:
        columns = tl.maximum(tl.load(columns_ptr + image, mask=inside, other=1), 1)
        of_row = (start.to(tl.int64) * DIM + (t // columns).to(tl.int64) * columns * (PATCH * PATCH)
                  + t % columns * PATCH)
        plane = count.to(tl.int64) * (PATCH * PATCH)
        at = of_row[:, None] + c[None, :] * plane[:, None] + (i[None, :] * columns[:, None] * PATCH + j[None, :])
        valid &= at < rows.to(tl.int64) * DIM
    return at, valid
