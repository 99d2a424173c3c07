"""The emoji of the studies: 16x16 pixels, with captions coarse enough to be learned in a minute."""
from dataclasses import dataclass

import torch

from transfusion.data.dataset import CaptionedPictures, DatasetSettings
from transfusion.recipes.emoji import STYLES, Emoji

KINDS = {
    "Smileys & Emotion": "a smiley", "People & Body": "a person", "Animals & Nature": "an animal or a plant",
    "Food & Drink": "food or drink", "Travel & Places": "a place or a vehicle", "Activities": "an activity",
    "Objects": "an object", "Symbols": "a symbol", "Flags": "a flag"}


@dataclass(frozen=True)
class EmojiKindsSettings(DatasetSettings):
    """Emoji, 16x16, with captions such as "an animal or a plant, noto style"."""

    name = "emoji-kinds"

    def open(self, split: str = "train") -> "EmojiKinds":
        """As `DatasetSettings.open`."""
        return EmojiKinds(split)


class EmojiKinds(CaptionedPictures):
    """The emoji at 16x16 with a category and a style for a caption; a class is one of each."""

    classes = tuple(f"{kind}, {style} style" for kind in KINDS.values() for style in STYLES)

    def __init__(self, split: str = "train"):
        emoji, order = Emoji(split), list(KINDS)
        kinds = torch.tensor([order.index(name) for name in emoji.category_names])[emoji.categories]
        self.labels = kinds * len(STYLES) + emoji.styles
        super().__init__(torch.nn.functional.avg_pool2d(emoji.pictures, emoji.size // 16),
                         [self.classes[label] for label in self.labels])

    def texts(self) -> list[str]:
        """As `Dataset.texts`: of every class, in its order."""
        return list(self.classes)
