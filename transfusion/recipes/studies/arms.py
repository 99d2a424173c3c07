"""What is compared: arms are changes of one training run, studies are pairs of arms beside the paper's numbers."""
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from transfusion.recipes.digits import DIGIT_NAMES, Digits, DigitsSettings
from transfusion.recipes.studies.emoji_kinds import EmojiKinds, EmojiKindsSettings
from transfusion.recipes.studies.vq import VQSettings
from transfusion.settings import Count, NotNegative
from transfusion.train.classifier import ClassifierSettings
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig


@dataclass(frozen=True)
class Arm:
    """Changes of a data set's base run.

    `pictures` are continuous "patches", or "codes" of a VQ autoencoder (transfusion.recipes.studies.representations).
    """

    name: str
    model: Mapping = field(default_factory=dict)
    data: Mapping = field(default_factory=dict)
    pictures: str = "patches"

    def config(self, base: TrainConfig, out: Path, seed: int) -> TrainConfig:
        """The arm's training run."""
        return replace(base, out=out, seed=seed, model=replace(base.model, **self.model),
                       data=replace(base.data, **self.data))


@dataclass(frozen=True)
class Measuring:
    """How a trained model is measured."""

    draws: Count = 300
    """pictures drawn from captions, every class as often"""
    steps: Count = 30
    """denoising steps of each"""
    guidance: NotNegative = 3.0
    """scale of classifier-free guidance, of patches and of codes (the paper's ablations: 3)"""


@dataclass(frozen=True)
class StudyData:
    """A data set of the studies: the base run of all its arms, and three sizes of patches; the base has the second."""

    name: str
    captions: tuple[str, ...]
    """of each class"""
    titles: tuple[str, ...]
    """of each class, short"""
    base: TrainConfig
    patches: tuple[int, int, int]
    channels: tuple[int, ...]
    """of the U-Net, at the resolutions of the largest patches; smaller ones have the first of them"""
    measuring: Measuring = Measuring()
    autoencoder: VQSettings = VQSettings()
    classifier: ClassifierSettings = ClassifierSettings()

    def arms(self) -> dict[str, Arm]:
        """Every arm of the data set by name."""
        small, middle, large = self.patches
        unet = {size: {"image_layers": "unet", "patch_size": size, "unet_channels": self.channels[:size.bit_length()]}
                for size in self.patches}
        arms = (Arm("linear"), Arm("linear-causal", model={"image_attention": "causal"}),
                Arm("unet", model=unet[middle]), Arm("unet-causal", model=unet[middle] | {"image_attention": "causal"}),
                Arm("unet-no-limit", model=unet[middle], data={"noise_limit": 1.0}),
                Arm(f"linear-patch-{small}", model={"patch_size": small}),
                Arm(f"linear-patch-{large}", model={"patch_size": large}),
                Arm(f"unet-patch-{large}", model=unet[large]), Arm("codes", pictures="codes"))
        return {arm.name: arm for arm in arms}


_DECODER = ModelSettings(hidden=64, layers=3, heads=2, kv_heads=2, mlp=176, image_layers="linear", objective="v",
                         unet_blocks=1)
_PAIRS = {"caption_first": 0.5, "caption_dropout": 0.1, "noise_limit": 0.5}
_OPTIM = OptimSettings(steps=1200, rows=8, seq_len=256, lr=2e-3, min_lr=1e-5, warmup=50, weight_decay=0.05, ema=0.995)
_RUN = TrainConfig(model=_DECODER, data=DigitsSettings(**_PAIRS), optim=_OPTIM, device="cpu", save_every=100)


def digits() -> StudyData:
    """Handwritten digits, 8x8: 16 patches of 2x2, or 64 or 4."""
    return StudyData("digits", tuple(map(Digits.caption, range(10))), DIGIT_NAMES, _RUN, (1, 2, 4), (16, 32, 32))


def emoji() -> StudyData:
    """Emoji, 16x16: 16 patches of 4x4, or 64 or 4."""
    base = replace(_RUN, model=replace(_DECODER, patch_size=4), data=EmojiKindsSettings(**_PAIRS))
    titles = tuple(caption.removesuffix(" style") for caption in EmojiKinds.classes)
    return StudyData("emoji", EmojiKinds.classes, titles, base, (2, 4, 8), (16, 32, 32, 32),
                     measuring=Measuring(draws=306), autoencoder=VQSettings(channels=(16, 32, 32), codes=256))


DATA = {"digits": digits, "emoji": emoji}


class Metric(NamedTuple):
    """A column: what it is, whether more is better, and the paper's measurement that it stands for ("": none)."""

    title: str
    more_is_better: bool
    paper: str = ""


METRICS = {
    "frechet": Metric("Fréchet distance", False, "FID"),
    "precision": Metric("precision", True),
    "recall": Metric("recall", True),
    "label_accuracy": Metric("label accuracy", True, "CLIP"),
    "caption_accuracy": Metric("caption accuracy", True, "CIDEr"),
    "caption_loss": Metric("caption loss given the picture", False),
    "text_loss": Metric("text loss", False, "C4 ppl"),
}


class Row(NamedTuple):
    """An arm in a study and its line in the paper's table: (C4 ppl, CIDEr, FID, CLIP), or none."""

    arm: str
    label: str
    paper: tuple[float, float, float, float] | None = None

    def number(self, metric: str) -> float | None:
        """The paper's number that stands for `metric`."""
        names = ("C4 ppl", "CIDEr", "FID", "CLIP")
        name = METRICS[metric].paper
        return self.paper[names.index(name)] if self.paper is not None and name else None


class Study(NamedTuple):
    """A table of the paper: its rows, and the pairs of them whose order is compared."""

    name: str
    table: int
    question: str
    size: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]


LINEAR, UNET = (10.4, 16.0, 20.3, 24.0), (10.3, 25.4, 16.7, 25.4)


def studies(data: StudyData) -> dict[str, Study]:
    """The studies of a data set by name."""
    small, middle, large = data.patches
    sizes = {  # the paper's patches, of latents
        1: ((10.3, 12.0, 21.0, 24.0), None),
        2: (LINEAR, UNET),
        4: ((10.9, 14.3, 25.6, 22.6), (10.7, 29.9, 16.0, 25.7)),
        8: ((11.7, 11.3, 43.5, 18.9), (11.4, 29.5, 16.1, 25.2))}
    every = (
        Study("attention", 5, "bidirectional or causal attention inside an image", "0.76B",
              (Row("linear", "linear, bidirectional", LINEAR),
               Row("linear-causal", "linear, causal", (10.4, 12.7, 61.3, 23.0)),
               Row("unet", "U-Net, bidirectional", UNET),
               Row("unet-causal", "U-Net, causal", (10.3, 23.3, 16.8, 25.3))),
              (("linear", "linear-causal"), ("unet", "unet-causal"))),
        Study("image-layers", 7, "linear or U-Net image layers", "0.16B",
              (Row("linear", "linear", (14.8, 6.2, 37.6, 20.0)),
               Row("unet", "U-Net", (14.4, 15.3, 18.8, 23.9))),
              (("unet", "linear"),)),
        Study("noise-limit", 8, "a limit to the noise of pictures before their captions, or none", "0.76B",
              (Row("unet", "limit 0.5", (10.3, 29.4, 16.5, 25.4)),
               Row("unet-no-limit", "no limit", UNET)),
              (("unet", "unet-no-limit"),)),
        Study("patch-size", 6, "patches of three sizes", "0.76B",
              (Row(f"linear-patch-{small}", f"linear, {small}x{small}", sizes[small][0]),
               Row("linear", f"linear, {middle}x{middle}", sizes[middle][0]),
               Row(f"linear-patch-{large}", f"linear, {large}x{large}", sizes[large][0]),
               Row("unet", f"U-Net, {middle}x{middle}", sizes[middle][1]),
               Row(f"unet-patch-{large}", f"U-Net, {large}x{large}", sizes[large][1])),
              ((f"linear-patch-{small}", "linear"), ("linear", f"linear-patch-{large}"),
               ("unet", f"unet-patch-{large}"))),
        Study("tokens", 3, "continuous patches or codes of a VQ autoencoder", "7B",
              (Row("linear", "Transfusion", (7.72, 27.2, 16.8, 25.5)),
               Row("codes", "Chameleon", (8.41, 18.0, 29.6, 24.3))),
              (("linear", "codes"),)))
    return {study.name: study for study in every}
