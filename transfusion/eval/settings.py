"""How a model is asked, as the command line and lmms-eval's model arguments say it."""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from transfusion.data.chat import TEMPLATES, ChatSettings
from transfusion.data.grids import MODES, GridSettings
from transfusion.data.mixture import read_mixture
from transfusion.eval.questions import Asking
from transfusion.settings import Count, OneOf

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AskingSettings:
    """How questions are put: as the mixture says that the model was trained on, or as LLaVA does."""

    mixture: Path | None = None
    """the file of the mixture that the model was trained on, whose chat and pictures count; the three options below
    are then left out"""
    template: Annotated[str, OneOf(TEMPLATES)] = "vicuna_v1"
    """the chat template"""
    mode: Annotated[str, OneOf(MODES)] = "pad"
    """pictures are padded to a square, cropped to the nearest grid, or cut to their central square"""
    side: Count | None = None
    """pixels of a picture's side; None: as the model draws"""
    max_new_tokens: Count | None = None
    """tokens of an answer at most; None: as many as the benchmark says, and 32 of questions of one's own"""

    def asking(self, model) -> Asking:
        """Return what `Asker` takes.

        Raises:
            ValueError: options that do not fit, or beside a mixture that says them.
        """
        if self.mixture is not None:
            if (self.template, self.mode, self.side) != ("vicuna_v1", "pad", None):
                raise ValueError(f"eval: mixture is {str(self.mixture)!r}, which says how pictures are shown and what "
                                 "template is written; leave template, mode and side out")
            mixture = read_mixture(self.mixture)
            return Asking(mixture.chat, mixture.pictures)
        factor = 1 if model.vae is None else model.vae.factor
        side = self.side or model.config.image_size[0] * factor
        return Asking(ChatSettings(template=self.template, image_position="front"),
                      GridSettings(side=side, mode=self.mode))


@dataclass(frozen=True)
class ModelSettings:
    """How a checkpoint is loaded."""

    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    """of the weights; None: as they are saved"""

    def cast(self, model):
        """Return the model with its weights in `dtype`."""
        return model if self.dtype is None else model.to(getattr(torch, self.dtype))
