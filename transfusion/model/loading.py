"""A checkpoint ready to be used: its model in evaluation mode, with its autoencoder, on a device."""
from pathlib import Path

from transfusion.device import choose_device
from transfusion.model.transfusion import Transfusion

DTYPES = ("float32", "bfloat16", "float16")
"""Of weights, as options name them."""


def load_model(path: Path, device: str) -> Transfusion:
    """Load a checkpoint, and its autoencoder if it has one, onto a device that `choose_device` knows."""
    where = choose_device(device)
    model = Transfusion.from_pretrained(path).eval().to(where)
    if model.vae is not None:
        model.vae.to(where)
    return model
