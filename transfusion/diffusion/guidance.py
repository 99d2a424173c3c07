"""Classifier-free guidance: what a prediction under the whole prompt is moved away from, by how much, and when.

    nothing = f(no prompt),  images = f(the prompt's images alone),  whole = f(the prompt)

    prediction = nothing + text * (whole - nothing)                                      arXiv:2207.12598, eq. 6
               = nothing + image * (images - nothing) + text * (whole - images)          with an image scale
                                                                                         (arXiv:2211.09800, eq. 3)
    prediction <- rescale * prediction * std(whole) / std(prediction) + (1 - rescale) * prediction
                                                                                         arXiv:2305.08891, eq. 15, 16
"""
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import arg

from transfusion.settings import Range, Share, check

Scale = Annotated[float, Range(0, 1e4)]  # far above what is of use, far below where float32 overflows


@dataclass(frozen=True)
class Guidance:
    """Scales of guidance; a plain number where one is expected means `Guidance(number)`."""

    text: Annotated[Scale, arg(name="guidance")] = 3.0
    """classifier-free guidance scale of the whole prompt; 1 is no guidance"""
    image: Annotated[Scale | None, arg(name="image-guidance")] = None
    """scale of the prompt's images alone, for editing; None does not tell them from the text"""
    interval: Annotated[tuple[Share, Share], arg(name="guidance-interval")] = (0.0, 1.0)
    """times (low, high) between which guidance is on (arXiv:2404.07724); outside, only the whole prompt is asked"""
    rescale: Annotated[Share, arg(name="guidance-rescale")] = 0.0
    """share of the prediction that is given back the spread of the unguided one"""

    def __post_init__(self):
        check("Guidance", self)
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"Guidance: interval is {self.interval}; two times 0 <= low <= high <= 1 fit")

    @property
    def contexts(self) -> tuple[str, ...]:
        """What has to be asked where guidance is on, the whole prompt first."""
        if self.image is not None:
            return "whole", "images", "nothing"
        return ("whole",) if self.text == 1 else ("whole", "nothing")

    def active(self, t: float) -> bool:
        """Whether guidance is on at time t."""
        return len(self.contexts) > 1 and self.interval[0] <= t <= self.interval[1]

    def combine(self, predictions: Tensor) -> Tensor:
        """Predictions of the contexts (K, R, P, D) to one (R, P, D)."""
        whole, *others = predictions
        if not others:
            return whole
        if self.image is None:
            guided = torch.lerp(others[0], whole, self.text)
        else:
            images, nothing = others
            guided = nothing + self.image * (images - nothing) + self.text * (whole - images)
        if not self.rescale:
            return guided
        spread = whole.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True).clamp(min=1e-12)
        return guided * torch.lerp(torch.ones_like(spread), spread, self.rescale)
