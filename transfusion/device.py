"""The device that a setting names, and how long it takes for something."""
import difflib
import time
from collections.abc import Callable

import torch


def choose_device(name: str) -> torch.device:
    """Return cpu, cuda, cuda:1, ... as named, or for "auto" the accelerator if there is one.

    Raises:
        ValueError: a device that this machine has not.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    names = ["cpu"]
    if accelerator is not None:
        names += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        raise ValueError(f"device is {name!r}; 'auto', {', '.join(map(repr, names))} fit on this machine"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    return torch.device(name)


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
