"""Fine-tune a checkpoint on a folder of one's own pictures with captions.

    python examples/finetune_own_pictures.py START FOLDER OUT

FOLDER holds pictures and beside each a text file of the same name with its caption: cat.jpg and cat.txt. START is a
checkpoint that draws pixels, such as `runs/emoji` or one that `transfusion init` made from a language model. Pictures
are cropped and resized to what it draws. Runs on the CPU or a CUDA GPU; Ctrl-C saves, and the same command goes on.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from transfusion import TransfusionConfig
from transfusion.command import saved_step
from transfusion.data.dataset import CaptionedPictures, DatasetSettings
from transfusion.data.picture_files import SUFFIXES, read_picture
from transfusion.model.lora import TuneSettings
from transfusion.train import OptimSettings, TrainConfig, train


@dataclass(frozen=True)
class CaptionedFolderSettings(DatasetSettings):
    """A folder of pictures with captions in text files; one picture in ten is held out."""

    folder: Path = Path("pictures")
    """pictures, and NAME.txt beside NAME.png with its caption"""
    size: tuple[int, int] = (32, 32)
    """height and width that pictures are cropped and resized to"""
    channels: int = 3
    """3, colour, or 1, grey"""

    name = "captioned-folder"

    def open(self, split: str = "train") -> CaptionedPictures:
        """Read one split, "train" or "held-out"."""
        paths = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES)
        paths = [path for number, path in enumerate(paths) if (number % 10 == 9) == (split == "held-out")]
        if not paths:
            raise ValueError(f"captioned-folder: folder {str(self.folder)!r} has no {split} pictures; ten or more fit")
        captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
        pictures = torch.stack([read_picture(path, self.size, self.channels) for path in paths])
        return CaptionedPictures(pictures, captions)


def main(start: Path, folder: Path, out: Path, steps: int = 500, trained: str = "all") -> Path:
    """Fine-tune; `trained` is all, images (a language model stays as it is) or lora. Return the directory."""
    config = TransfusionConfig.from_pretrained(start)
    data = CaptionedFolderSettings(folder=folder, size=tuple(config.image_size), channels=config.image_channels)
    optim = OptimSettings(steps=steps, lr=1e-4, warmup=min(50, steps), ema=0.99)
    return train(TrainConfig(out=out, data=data, tune=TuneSettings(start=start, trained=trained), optim=optim,
                             resume=saved_step(out) is not None))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
