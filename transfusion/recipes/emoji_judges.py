"""How well a model draws emoji in a style that it was never shown them in, and names emoji it was never shown.

Two judges that never saw the model (`transfusion.train.classifier`), trained on all real pictures, held-out ones too,
read what is drawn: its name, its style.

    name, name_in_five      share of drawn pictures that the judge of names reads as asked, first or among its
                            first five guesses
    style                   share that the judge of styles reads as asked
    nearest                 share whose nearest real picture, among both styles of all names in the judge's features, is
                            exactly the asked one
    frechet                 Frechet distance in the judge's features between drawn pictures and the real ones of
                            the asked names and styles
    caption, caption_name   share of pictures whose written caption is exactly theirs, or has the right name
"""
import math
from pathlib import Path

import torch
from torch import Tensor

from transfusion.data.model_images import decoded
from transfusion.device import choose_device
from transfusion.eval.features import in_batches
from transfusion.eval.metrics import frechet_distance
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.emoji import STYLES, Emoji
from transfusion.sequence import Image, Text
from transfusion.train.classifier import ClassifierSettings, train_classifier


class Judges:
    """A judge of names and one of styles, trained on every real picture of `real` (split "all").

    They are kept in `out` and read from there the next time.
    """

    def __init__(self, real: Emoji, out: Path, settings: ClassifierSettings):
        self.real, device = real, choose_device(settings.device)
        self.names = train_classifier(real.pictures, real.labels, real.names, out / "names", settings).to(device)
        self.styles = train_classifier(real.pictures, real.styles, STYLES, out / "styles", settings).to(device)
        self.features = in_batches(self.names.pooled, real.pictures)                         # (N, F)

    def read(self, drawn: Tensor, labels: Tensor, styles: Tensor) -> dict[str, float]:
        """Judge pictures (M, C, H, W) that were drawn for `labels` and `styles` (M,)."""
        guesses = in_batches(self.names.logits, drawn).topk(min(5, len(self.real.names))).indices
        features = in_batches(self.names.pooled, drawn)
        nearest = torch.cdist(features, self.features).argmin(1)
        right = {
            "name": guesses[:, 0] == labels, "name_in_five": (guesses == labels[:, None]).any(1),
            "style": in_batches(self.styles.logits, drawn).argmax(1) == styles,
            "nearest": (self.real.labels[nearest] == labels) & (self.real.styles[nearest] == styles)}
        asked = self.features[self.places(labels, styles)]
        shares = {name: x.double().mean().item() for name, x in right.items()}
        return shares | {"frechet": frechet_distance(features, asked)}

    def places(self, labels: Tensor, styles: Tensor) -> list[int]:
        """Where the real picture of each (label, style) stands in `real`."""
        place = {pair: i for i, pair in enumerate(zip(self.real.labels.tolist(), self.real.styles.tolist()))}
        return [place[pair] for pair in zip(labels.tolist(), styles.tolist())]


def draw_emoji(model: Transfusion, captions: list[str], **options) -> Tensor:
    """Draw one picture for each caption: (M, C, H, W) in [-1, 1], decoded where the model draws latents."""
    latents = torch.stack([image.latent for image in model.draw(captions, **options)])
    return decoded(latents, model.vae).clamp(-1, 1)


def read_captions(model: Transfusion, images: Tensor, captions: list[str]) -> dict[str, float]:
    """Let the model write behind `images` (N, C, H, W), pictures or latents, and compare with their captions."""
    written = model.caption([Image(image) for image in images], max_new_tokens=48)
    name = [said.rpartition(",")[0] == caption.rpartition(",")[0]                          # "a red apple, noto style"
            for said, caption in zip(written, captions, strict=True)]
    exact = [said == caption for said, caption in zip(written, captions)]
    return {"caption": sum(exact) / len(captions), "caption_name": sum(name) / len(captions)}


@torch.no_grad()
def bits_per_byte(model: Transfusion, text: str, window: int = 256, windows: int = 64) -> float:
    """Return the bits per byte of plain text, UTF-8, under the language model.

    Its first `windows` pieces of `window` tokens are read, each behind BOS.
    """
    tokens = torch.tensor(Text(text).token_ids(model.tokenizer, model.config))
    pieces = tokens[:len(tokens) // window * window].view(-1, window)[:windows]
    if not len(pieces):
        raise ValueError(f"bits_per_byte: text has {len(tokens)} tokens; at least {window} fit")
    start = torch.full((len(pieces), 1), model.tokenizer.bos_token_id)
    nats = 0.0
    for piece in torch.cat([start, pieces], 1).split(8):
        logits = model.text_logits(piece[:, :-1].to(model.device)).float()
        targets = piece[:, 1:].flatten().to(model.device)
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return nats / math.log(2) / sum(len(said.encode()) for said in model.tokenizer.batch_decode(pieces))
