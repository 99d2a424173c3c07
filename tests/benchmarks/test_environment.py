"""What is said of a device."""
import pytest

from benchmarks import environment
from transfusion.train.gpus import GPUS


@pytest.mark.parametrize(
    "name,peak",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("CPU: something", None)],
)
def test_the_roofline_is_known_by_the_devices_name(name, peak):
    assert environment.peak_tflops(name) == peak


def test_the_peaks_are_those_that_a_training_is_planned_with():
    names = {"A100-40": "NVIDIA A100-SXM4-40GB", "A100-80": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3",
             "H200": "NVIDIA H200", "B200": "NVIDIA B200"}
    assert all(environment.peak_tflops(name) == GPUS[gpu].teraflops for gpu, name in names.items())
