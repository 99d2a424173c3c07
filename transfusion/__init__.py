"""Transfusion: one LLaMA-shaped model that writes text and draws images, with tfkernels inside."""
from transfusion.diffusion.guidance import Guidance
from transfusion.model.config import TransfusionConfig
from transfusion.model.transfusion import Transfusion, TransfusionOutput
from transfusion.sequence import Image, Part, Sequence, Text

__all__ = ["Guidance", "Image", "Part", "Sequence", "Text", "Transfusion", "TransfusionConfig", "TransfusionOutput"]
__version__ = "0.1.0"
