"""The pictures of the studies: digits as they are, and emoji with captions coarse enough to be learned in a minute."""
import torch

from transfusion.data.batches import DATASETS, DataSettings
from transfusion.recipes.emoji import STYLES, Emoji
from transfusion.sequence import Image, Part, Text

KINDS = {"Smileys & Emotion": "a smiley", "People & Body": "a person", "Animals & Nature": "an animal or a plant", "Food & Drink": "food or drink",
         "Travel & Places": "a place or a vehicle", "Activities": "an activity", "Objects": "an object", "Symbols": "a symbol", "Flags": "a flag"}


class EmojiKinds:
    """The emoji at 16x16 with a category and a style for a caption, e.g. "an animal, noto style"; a class is one of each."""

    image_shape = (3, 16, 16)
    captions = tuple(f"{kind}, {style} style" for kind in KINDS.values() for style in STYLES)

    def __init__(self, split: str = "train"):
        emoji, order = Emoji(split), list(KINDS)
        kinds = torch.tensor([order.index(name) for name in emoji.category_names])[emoji.categories]
        self.images, self.labels = torch.nn.functional.avg_pool2d(emoji.images, emoji.size // 16), kinds * len(STYLES) + emoji.styles

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
