"""GPUs that a training can be planned for. The numbers are their makers', none is measured.

Peaks are of dense bfloat16 products that are added up in float32, as PyTorch's are; data sheets that print a number
"with sparsity" print twice as much. Links are of one GPU to the others of its node, both directions together.
"""
from typing import NamedTuple


class GPU(NamedTuple):
    """One kind of GPU."""

    teraflops: float
    """dense bfloat16 peak"""
    memory: int
    """GiB on the card; data sheets write this number as GB"""
    bandwidth: float
    """of the memory, GB/s"""
    link: float
    """NVLink or PCIe, GB/s, both directions together"""
    source: str


GPUS = {
    "A100-40": GPU(312, 40, 1555, 600, "NVIDIA A100 data sheet, 2021, SXM"),
    "A100-80": GPU(312, 80, 2039, 600, "NVIDIA A100 data sheet, 2021, SXM"),
    "H100": GPU(989, 80, 3350, 900, "NVIDIA H100 data sheet, SXM (1,979 TFLOP/s with sparsity)"),
    "H200": GPU(989, 141, 4800, 900, "NVIDIA H200 data sheet, SXM (1,979 TFLOP/s with sparsity)"),
    "B200": GPU(2250, 180, 8000, 1800, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    "L40S": GPU(362, 48, 864, 64, "NVIDIA L40S data sheet (733 TFLOP/s with sparsity); PCIe 4"),
    "RTX4090": GPU(165, 24, 1008, 64, "NVIDIA Ada GPU architecture, appendix A; PCIe 4"),
}
