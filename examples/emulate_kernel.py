"""Run the compiled code of a Triton kernel without a GPU: a bfloat16 row softmax, right and with a bound left out.

    python examples/emulate_kernel.py

Triton compiles the kernel for sm_90 and `ptxrun` runs the PTX on tensors of the CPU, so that a test of layouts, waits,
barriers and bfloat16 needs no GPU. The second launch reads behind the end of its rows and is told where.
"""
import torch
import triton
import triton.language as tl

import ptxrun

ROWS, COLUMNS, BLOCK = 6, 100, 128


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """out[r] = softmax(x[r]) of rows of `columns` bfloat16 numbers, one program a row."""
    places = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    if BOUNDED:
        row = tl.load(x + places, mask=inside, other=-float("inf")).to(tl.float32)
    else:
        row = tl.load(x + places).to(tl.float32)
    weights = tl.exp(row - tl.max(row, 0))
    tl.store(out + places, (weights / tl.sum(weights, 0)).to(tl.bfloat16), mask=inside)


def main() -> tuple[float, str]:
    """Return the largest error against float64, and what is said of the kernel without its bound."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    with ptxrun.emulate("sm_90", races=True):
        softmax[(ROWS,)](x, out, COLUMNS, BLOCK=BLOCK, BOUNDED=True)
        error = (out.double() - x.double().softmax(-1)).abs().max().item()
        try:
            softmax[(ROWS,)](x, out, COLUMNS, BLOCK=BLOCK, BOUNDED=False)
            said = "nothing"
        except ptxrun.OutOfBounds as caught:
            said = str(caught)
    print(f"largest error of the compiled kernel: {error:.1e}\nwithout its bound: {said}")
    return error, said


if __name__ == "__main__":
    main()
