"""How a checkpoint is loaded, as the command line and lmms-eval's model arguments say it."""
from dataclasses import dataclass
from typing import Annotated

import torch

from transfusion.model.loading import DTYPES
from transfusion.settings import OneOf


@dataclass(frozen=True)
class ModelSettings:
    """How a checkpoint is loaded."""

    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    """of the weights; None: as they are saved"""

    def cast(self, model):
        """Return the model with its weights in `dtype`."""
        return model if self.dtype is None else model.to(getattr(torch, self.dtype))
