"""A checkpoint ready to be used: its model in evaluation mode, with its autoencoder, on a device."""
from pathlib import Path

import torch

from transfusion.device import choose_device
from transfusion.model.transfusion import Transfusion

DTYPES = ("float32", "bfloat16", "float16")
"""Of weights, as options name them."""


def load_model(path: Path, device: str) -> Transfusion:
    """Load a checkpoint, and its autoencoder if it has one, onto a device that `choose_device` knows.

    Of several GPUs the one named becomes this process's current one, as libraries expect of who works on it alone.
    """
    where = choose_device(device)
    if where.index is not None and where.type != "cpu":
        torch.accelerator.set_device_index(where.index)
    model = Transfusion.from_pretrained(path).eval().to(where)
    if model.vae is not None:
        model.vae.to(where)
    return model
