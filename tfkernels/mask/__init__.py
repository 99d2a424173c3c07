"""Attention masks as a few integers per token: `TransfusionMask`.

The masks of published models are in `tfkernels.mask.recipes`; `python -m tfkernels.mask` draws them.
"""
from tfkernels.mask.mask import TransfusionMask

__all__ = ["TransfusionMask"]
