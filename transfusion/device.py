"""The device that a setting names, and how long it takes for something."""
import time
from collections.abc import Callable

import torch


def choose_device(name: str) -> torch.device:
    """Return cpu, cuda, ... as named, or for "auto" the accelerator if there is one."""
    if name == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu" if name == "auto" else name)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls, the device's own work included."""
    seconds = 0.0
    for _ in range(2):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        seconds = time.perf_counter() - began
    return seconds


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
