"""GPUs that a training can be planned for. The numbers are their makers', none is measured.

Peaks are of dense bfloat16 products that are added up in float32, as PyTorch's are; data sheets that print a number
"with sparsity" print twice as much. Links are of one GPU to the others of its node, both directions together.
"""
import re
from typing import NamedTuple

import torch


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
NAMES = {
    "A100-40": r"A100-SXM4-40GB", "A100-80": r"A100-SXM4-80GB", "H100": r"H100 80GB HBM3", "H200": r"H200",
    "B200": r"B200", "L40S": r"L40S", "RTX4090": r"RTX 4090",
}
"""What CUDA calls them, behind "NVIDIA"; cards of the same name with other peaks, as on PCIe, are not among them."""


def gpu_named(name: str) -> GPU | None:
    """Return the GPU of a name that CUDA gives, such as "NVIDIA H100 80GB HBM3"; None where it is not known."""
    return next((GPUS[kind] for kind, known in NAMES.items()
                 if re.fullmatch(rf"(NVIDIA )?(GeForce )?{known}", name)), None)


def gpu_of(device: torch.device) -> GPU | None:
    """Return which GPU a device is; None for the CPU and for what is not known."""
    return gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
