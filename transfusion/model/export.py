"""A plain checkpoint of a model or an adapter, or of its decoder alone for programs that know no images.

    transfusion export --model runs/lora --out runs/merged              the adapter is merged into its model's weights
    transfusion export --model runs/lora --out runs/llm --decoder       a checkpoint for AutoModelForCausalLM

Merging computes W + (alpha / rank) B A once (arXiv:2106.09685), so that the result needs neither peft nor the model
that the adapter was trained on.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.command import claim
from transfusion.model.loading import DTYPES
from transfusion.model.transfusion import Transfusion
from transfusion.settings import OneOf, check


@dataclass(frozen=True)
class ExportSettings:
    """Write a plain checkpoint of a model or adapter, or its decoder alone as a language model of transformers."""

    model: Path
    """directory of a checkpoint or an adapter"""
    out: Path
    """directory of the new checkpoint"""
    base: Path | None = None
    """of an adapter: its model, where it is not found by itself"""
    decoder: bool = False
    """write the language model alone, in its own class and format, as AutoModelForCausalLM loads it; image layers and
    weights of patches are left out"""
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    """of the written weights; None: as they are"""


def export(settings: ExportSettings) -> Path:
    """Run `transfusion export`; return the new checkpoint's directory.

    Raises:
        ValueError: settings that do not fit; `out` is a file, cannot be written, holds a checkpoint, or is, holds or
            lies in `model` or `base`.
    """
    check("export", settings)
    with claim("export", settings.out, {"model": settings.model, "base": settings.base}, resume=False):
        options = {} if settings.dtype is None else {"dtype": settings.dtype}
        model = Transfusion.from_pretrained(settings.model, base=settings.base, **options)
        saved = model.backbone.decoder if settings.decoder else model
        (model.save_decoder if settings.decoder else model.save_pretrained)(settings.out)
        print(f"{settings.out}: {type(saved).__name__} of {sum(p.numel() for p in saved.parameters()):,} parameters "
              f"in {str(saved.dtype).removeprefix('torch.')}")
    return settings.out
