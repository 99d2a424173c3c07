"""A data set of one's own: a class of settings that says how to open it, and pictures with captions.

    python examples/own_dataset.py runs/shapes

The pictures here are painted, discs and squares in three colours; yours come from wherever you have them, as a tensor
(N, C, H, W) in [-1, 1] with a caption each. Order of caption and image, captions left out for guidance, noise limits
and resuming are the trainer's work. It takes minutes on a CPU; Ctrl-C saves, and the same command goes on.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transfusion import Transfusion
from transfusion.command import saved_step
from transfusion.data.dataset import CaptionedPictures, DatasetSettings
from transfusion.data.model_images import save_image
from transfusion.train import ModelSettings, OptimSettings, TrainConfig, train

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
SIDE = 16


@dataclass(frozen=True)
class ShapesSettings(DatasetSettings):
    """Discs and squares of different sizes and places; what every data set has (captions first, ...) is inherited."""

    count: int = 600
    """pictures to train on"""

    name = "shapes"

    def open(self, split: str = "train") -> CaptionedPictures:
        """Return one split, "train" or "held-out"."""
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        made = [paint(generator, number) for number in range(self.count if split == "train" else self.count // 10)]
        pictures, captions = zip(*made)
        return CaptionedPictures(torch.stack(pictures), captions)


def paint(generator: torch.Generator, number: int) -> tuple[Tensor, str]:
    """Return a picture (3, 16, 16), white but for one shape, and its caption."""
    colour, kind = list(COLOURS)[number % 3], ("disc", "square")[number // 3 % 2]
    radius, *centre = (torch.rand(3, generator=generator) * torch.tensor([3, 4, 4]) + torch.tensor([3, 6, 6])).tolist()
    down, across = (torch.arange(SIDE)[:, None] - centre[0]).abs(), (torch.arange(SIDE) - centre[1]).abs()
    inside = (down**2 + across**2 if kind == "disc" else torch.maximum(down, across) ** 2) <= radius**2
    return torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], 1.0), f"a {colour} {kind}"


def main(out: Path, steps: int = 1500) -> Path:
    """Train on the shapes, draw one of each and return the directory."""
    train(TrainConfig(
        out=out, resume=saved_step(out) is not None, data=ShapesSettings(caption_first=0.7),
        model=ModelSettings(hidden=96, layers=3, mlp=256, patch_size=4),
        optim=OptimSettings(steps=steps, rows=8, seq_len=128, lr=2e-3, warmup=min(50, steps), ema=0.99)))
    model = Transfusion.from_pretrained(out).eval()
    prompts = [f"a {colour} {kind}" for colour in COLOURS for kind in ("disc", "square")]
    for prompt, image in zip(prompts, model.draw(prompts, steps=25, guidance=2.0)):
        save_image(image, out / f"{prompt}.png")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/shapes"))
