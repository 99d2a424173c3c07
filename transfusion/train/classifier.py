"""A small ResNet (arXiv:1512.03385) that tells real pictures apart: it judges drawn ones, and its features measure.

    python -m transfusion.train.classifier data:digits --out runs/judge

It has basic blocks and is trained by AdamW under a cosine with label smoothing (arXiv:1512.00567, section 7). Pictures
are moved, scaled and brightened a little, but never mirrored: a mirrored seven is no seven. The batch of a step depends
on (seed, step) alone, so that the same call after an interruption goes on from the last state saved. What is written at
the end is a checkpoint of transformers that `Features` loads.
"""
import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from transfusion.command import claim, saved_run
from transfusion.data.batches import step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.device import choose_device
from transfusion.eval.features import Features, Preprocessing, in_batches
from transfusion.files import read_json
from transfusion.locks import LOCK
from transfusion.settings import Count, Decay, NotNegative, Share, check
from transfusion.train.log import LOG
from transfusion.train.loop import Batch, Term, end_run, fit
from transfusion.train.optimizer import Player, build_optimizer
from transfusion.train.resuming import same_run
from transfusion.train.settings import JobSettings, RunSettings, StepSettings, check_steps, defaults

CLASSIFIER = "classifier.json"  # what a finished one was made of


@dataclass(frozen=True)
@defaults(steps=400, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.05, save_every=200)
class ClassifierSettings(JobSettings, StepSettings):
    """What is trained, and how long; lr is reached after a twentieth of the steps, and a cosine takes it to 0."""

    size: Count = 32
    """side that pictures are stretched to; the network halves it twice, and once more for each stage after the first"""
    width: Count = 32
    """channels of the first stage; each next one has twice as many"""
    depths: tuple[Count, ...] = (1, 1, 1)
    """basic blocks of each stage"""
    batch: Count = 128
    """pictures of a batch, drawn with replacement"""
    smoothing: Share = 0.1
    """share of the target that all labels have in common"""
    move: Share = 0.1
    """pictures are moved by up to this share of their side, each way"""
    scale: Decay = 0.15
    """pictures are scaled by up to this share"""
    brightness: NotNegative = 0.1
    """up to this much is added to all pixels of a picture"""


@dataclass(frozen=True)
class ClassifierRun(RunSettings):
    """A training run: what the classifier is made of."""

    settings: ClassifierSettings = ClassifierSettings()
    """how it is trained"""
    labels: tuple[str, ...] = ()
    """names of what it tells apart"""
    pictures: tuple[int, ...] = ()
    """shape and checksums of the pictures and their labels"""


@dataclass(frozen=True)
class JudgeConfig:
    """Train a classifier of a data set's pictures: a judge of drawn ones."""

    data: DatasetSettings = field(default_factory=DatasetSettings)
    label: str = "name"
    """what to tell apart; a label that the data set does not have is answered with those that it has"""
    out: Path = Path("runs/judge")
    """directory of the checkpoint"""
    settings: ClassifierSettings = field(default_factory=ClassifierSettings)


def train_classifier(images: Tensor, labels: Tensor, label_names: Sequence[str], out: Path,
                     settings: ClassifierSettings = ClassifierSettings()) -> Features:  # noqa: B008 (frozen)
    """Train on pictures (N, C, H, W) in [-1, 1] with labels (N,), write a checkpoint to `out` and return it, loaded.

    Raises:
        ValueError: settings that do not fit, labels without a name or of another count than pictures, or a directory
            that holds something else.
    """
    check("train_classifier", settings)
    check_steps("train_classifier", settings, "batch")
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(f"train_classifier: images has shape {tuple(images.shape)} and labels "
                         f"{tuple(labels.shape)}; (N, C, height, width) and (N,) fit")
    if labels.min() < 0 or labels.max() >= len(label_names):
        raise ValueError(f"train_classifier: labels is from {labels.min()} to {labels.max()}; 0 to "
                         f"{len(label_names) - 1} fit: they have names")
    out = Path(out)
    with claim("train_classifier", out):
        check_out(out)
        return _train(images, labels, label_names, out, settings)


def _train(images: Tensor, labels: Tensor, label_names: Sequence[str], out: Path,
           settings: ClassifierSettings) -> Features:
    pictures = (*images.shape, zlib.crc32(images.contiguous().numpy()), zlib.crc32(labels.contiguous().numpy()))
    run = ClassifierRun(seed=settings.seed, save_every=settings.save_every, device=settings.device, out=out,
                        settings=settings, labels=tuple(label_names), pictures=pictures)
    if is_finished(run):
        print(f"{out} is this classifier already", flush=True)
        return Features.from_pretrained(out)
    device = choose_device(settings.device)
    task = ClassifierTask(run, images, labels, build_network(images.shape[1], label_names, settings).to(device))
    count = sum(p.numel() for p in task.network.parameters())
    print(f"{count / 1e6:.2f} M parameters, {len(label_names)} labels, {len(images)} pictures", flush=True)
    run = dataclasses.replace(run, resume=same_run(run, ("settings", "labels", "pictures")))
    done = fit("train_classifier", run, settings, task, lambda step: learning_rate(step, settings), fixed=(),
               way_on="what was saved before stands; train again with a lower lr")
    end_run(run, settings, done)
    return Features.from_pretrained(out)


class ClassifierTask:
    """Pictures, changed a little, that a network tells apart."""

    unit, shown = "pictures", ("loss",)

    def __init__(self, run: ClassifierRun, images: Tensor, labels: Tensor, network: ResNetForImageClassification):
        self.run, self.images, self.labels, self.network = run, images, labels, network
        size = run.settings.size
        self.prepare = Preprocessing(images.shape[1], (size, size), [0.5], [0.5])
        self.size = run.settings.batch
        self.player = Player(network, build_optimizer(network, run.settings, fused=None))
        self.players = (self.player,)

    def batches(self, step: int) -> list[Batch]:
        """Draw a step's pictures, change them, and split them; batch norm sees one micro-batch at a time."""
        settings, device = self.run.settings, self.network.device
        generator = step_generator(settings.seed, step)
        chosen = torch.randint(len(self.images), (settings.batch,), generator=generator)
        pictures = augment(self.prepare(self.images[chosen].to(device)), settings, generator)
        parts = zip(*(x.tensor_split(settings.accumulate) for x in (pictures, self.labels[chosen].to(device))))
        return [Batch(part, {"loss": len(part[0])}) for part in parts]

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """Cross-entropy with label smoothing."""
        pictures, labels = batch.inputs
        logits = self.network(pictures).logits
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=self.run.settings.smoothing)
        yield self.player, {"loss": Term(1.0, loss)}

    def save(self, directory: Path, step: int) -> None:
        """After the last step, write the checkpoint, what its pictures go through, and what it was made of.

        Until then an older classifier in the directory stands.
        """
        settings = self.run.settings
        if step < settings.steps:
            return
        size = {"height": settings.size, "width": settings.size}
        self.network.save_pretrained(directory)
        ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(directory)
        (directory / CLASSIFIER).write_text(json.dumps(made_of(self.run) | {"finished": True}, indent=2) + "\n")


def build_network(channels: int, label_names: Sequence[str],
                  settings: ClassifierSettings) -> ResNetForImageClassification:
    """Return a freshly initialised ResNet in training mode; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ResNetForImageClassification(ResNetConfig(
            num_channels=channels, embedding_size=settings.width,
            hidden_sizes=[settings.width * 2**stage for stage in range(len(settings.depths))],
            depths=list(settings.depths), layer_type="basic", id2label=dict(enumerate(label_names)),
            label2id={name: label for label, name in enumerate(label_names)})).train()


def learning_rate(step: int, settings: ClassifierSettings) -> float:
    """Linear warm-up over a twentieth of the steps times a cosine down to 0."""
    warm_up = min(1.0, (step + 1) / max(1, settings.steps // 20))
    return settings.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def augment(pictures: Tensor, settings: ClassifierSettings, generator: torch.Generator) -> Tensor:
    """Move, scale and brighten each of (N, C, H, W) by its own random amounts; what lies outside repeats the edge."""
    amounts = (2 * torch.rand(4, len(pictures), generator=generator) - 1).to(pictures)
    zoom, shift, zero = 1 + settings.scale * amounts[0], 2 * settings.move * amounts[1:3], torch.zeros_like(amounts[0])
    rows = torch.stack([zoom, zero, shift[0]], 1), torch.stack([zero, zoom, shift[1]], 1)
    matrix = torch.stack(rows, 1)  # (N, 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, pictures.shape, align_corners=False)
    moved = torch.nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return (moved + settings.brightness * amounts[3].view(-1, 1, 1, 1)).clamp(-1, 1)


def check_out(out: Path) -> None:
    """Refuse a directory that holds something else than a classifier of this module, finished or begun."""
    theirs = [path for path in out.iterdir() if path.name not in (LOCK, LOG)]
    saved = saved_run(out) or {}
    ours = (out / CLASSIFIER).is_file() or "run" in saved or "labels" in saved.get("config", {})
    if theirs and not ours:
        raise ValueError(f"train_classifier: out is {str(out)!r}, which holds files and no {CLASSIFIER}; an empty "
                         "directory or one that this command wrote fits")


def made_of(run: ClassifierRun) -> dict:
    """What decides a classifier's weights, as classifier.json holds it."""
    parts = {"settings": dataclasses.asdict(run.settings), "labels": run.labels, "pictures": run.pictures}
    return json.loads(json.dumps(parts))


def is_finished(run: ClassifierRun) -> bool:
    """Whether `out` holds the classifier that a run would make.

    Settings that an older version's file does not name had today's default values. How often it was saved is no matter.
    """
    path = run.out / CLASSIFIER
    theirs = read_json(path, "delete the directory to train anew") if path.is_file() else {}
    if not theirs.pop("finished", False):
        return False
    ours = made_of(run)
    for parts in (ours, theirs):
        parts["settings"] = made_of(ClassifierRun())["settings"] | parts["settings"]
        for name in ("save_every", "keep_every"):
            parts["settings"].pop(name, None)
    return theirs == ours


def accuracy(features: Features, images: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose highest logit is their label's."""
    return (in_batches(features.logits, images).argmax(1) == labels).double().mean().item()


def balanced_accuracy(features: Features, images: Tensor, labels: Tensor) -> float:
    """Return the mean over labels of the accuracy on the label's pictures: rare labels count as much as common ones."""
    right = (in_batches(features.logits, images).argmax(1) == labels).double()
    return torch.stack([right[labels == label].mean() for label in labels.unique()]).mean().item()


def judge(config: JudgeConfig) -> float:
    """Train on a data set's pictures; print and return the balanced accuracy on held-out ones."""
    check("classifier", config)
    train, held_out = (config.data.open(split) for split in ("train", "held-out"))
    known = train.labels_by_name()
    if config.label not in known:
        raise ValueError(f"classifier: label is {config.label!r}; {', '.join(known) or 'nothing'} fits data set "
                         f"{config.data.name!r}")
    labels, asked = (dataset.labels_by_name()[config.label] for dataset in (train, held_out))
    pictures, real = (dataset.pictures[torch.arange(len(dataset.pictures))] for dataset in (train, held_out))
    features = train_classifier(pictures, labels.of_pictures, labels.names, config.out, config.settings)
    share = balanced_accuracy(features, real, asked.of_pictures)
    print(f"{100 * accuracy(features, real, asked.of_pictures):.2f} % of {len(real)} held-out pictures are read right, "
          f"{100 * share:.2f} % in the mean over labels\ncheckpoint   {config.out}")
    return share


if __name__ == "__main__":
    from transfusion.recipes.command_line import judge_main

    judge_main()
