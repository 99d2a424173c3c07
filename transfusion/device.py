"""The device that a setting names."""
import torch


def choose_device(name: str) -> torch.device:
    """Return cpu, cuda, ... as named, or for "auto" the accelerator if there is one."""
    if name == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu" if name == "auto" else name)
