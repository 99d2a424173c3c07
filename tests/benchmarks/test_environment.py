"""What is said of a device."""
import pytest

from benchmarks import environment


@pytest.mark.parametrize(
    "name,peak",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("CPU: something", None)],
)
def test_the_roofline_is_known_by_the_devices_name(name, peak):
    assert environment.peak_tflops(name) == peak
