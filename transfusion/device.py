"""The device that a setting names, this process's among several, and how long it takes for something."""
import datetime
import os
import time
from collections.abc import Callable

import torch

PATIENCE = datetime.timedelta(minutes=30)
"""how long processes wait whenever one needs what another one has"""


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


def launched() -> tuple[int, int]:
    """Return this process's number and how many there are, as torchrun says; (0, 1) without it."""
    given = (os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE"))
    rank, size = (int(value) if value.isdigit() else 0 for value in given)
    return (rank, size) if size > 1 else (0, 1)


def own_device(command: str, name: str, rank: int, size: int) -> torch.device:
    """Return the device of process `rank` of `size`: of several, each takes the GPU of its place on this machine.

    Args:
        command: whose name stands in errors.
        name: as in `choose_device`; of a GPU the kind alone where there are several processes.

    Raises:
        ValueError: as `choose_device`, a GPU that is named to several processes, or more processes than GPUs.
    """
    named = choose_device(name)
    if size == 1:
        return named
    if named.index is not None:
        raise ValueError(f"{command}: device is {name!r} and there are {size} processes, each of which takes a GPU of "
                         f"its own; {named.type!r} fits")
    if named.type == "cpu":
        return named
    place = int(os.environ.get("LOCAL_RANK", rank))
    if place >= torch.accelerator.device_count():
        raise ValueError(f"{command}: device is {name!r} and process {place} has no GPU of its own, for this machine "
                         f"has {torch.accelerator.device_count()}; as many processes fit, or 'cpu'")
    return torch.device(named.type, place)


def moved(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return x on a device; a copy to the host is waited for, for it is read there at once."""
    return x.to(device, non_blocking=torch.device(device).type != "cpu")


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
