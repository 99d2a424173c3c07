"""The device that a setting names, and how long it takes for something."""
import time
from collections.abc import Callable

import torch


def choose_device(name: str) -> torch.device:
    """Return cpu, cuda, ... as named, or for "auto" the accelerator if there is one.

    Raises:
        ValueError: a device that does not exist or that this machine has not.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    here = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if device is None or (device.index or 0) >= here.get(device.type, 0):
        kind = accelerator.type if accelerator else ""
        fits = ["auto", "cpu"] + ([kind, f"{kind}:0 to :{here[kind] - 1}"] if accelerator else [])
        raise ValueError(f"device is {name!r}, which this machine does not have; {', '.join(fits)} fit")
    return device


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
