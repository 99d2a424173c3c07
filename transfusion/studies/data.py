"""The pictures of the studies: digits as they are, and emoji with captions coarse enough to be learned in a minute."""
import torch

from transfusion.data import DATASETS, DataSettings
from transfusion.emoji import CATEGORIES, STYLES, Emoji
from transfusion.sequence import Image, Part, Text

KINDS = {"Smileys & Emotion": "a smiley", "People & Body": "a person", "Component": "a component", "Animals & Nature": "an animal",
         "Food & Drink": "a food", "Travel & Places": "a place", "Activities": "an activity", "Objects": "an object", "Symbols": "a symbol", "Flags": "a flag"}


class EmojiKinds:
    """The emoji at 16x16 with a category and a style for a caption, e.g. "an animal, noto style"; a class is one of each."""

    image_shape = (3, 16, 16)
    captions = tuple(f"{KINDS[category]}, {style} style" for category in CATEGORIES for style in STYLES)

    def __init__(self, split: str = "train"):
        emoji = Emoji(split, size=16)
        self.images, self.labels = emoji.images, emoji.categories * len(STYLES) + emoji.styles

    def texts(self) -> list[str]:
        """Every text that documents are made of."""
        return list(self.captions)

    def document(self, generator: torch.Generator, settings: DataSettings) -> list[Part]:
        """Draw one document: a pair in either order, or a lone image."""
        order, drop = torch.rand(2, generator=generator).tolist()
        chosen = int(torch.randint(len(self.labels), (), generator=generator))
        text, image = Text(self.captions[self.labels[chosen]]), Image(self.images[chosen])
        if order >= settings.caption_first:
            return [image, text]
        return [image] if drop < settings.caption_dropout else [text, image]


DATASETS["emoji-kinds"] = EmojiKinds
