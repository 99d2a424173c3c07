"""A small ResNet (arXiv:1512.03385) that tells real pictures apart: a judge of drawn ones, and features where no pretrained network is at hand.

    python -m transfusion.train.classifier data:digits --out runs/judge

Basic blocks, AdamW under a cosine, label smoothing (arXiv:1512.00567, section 7), and pictures moved, scaled and brightened a little, never mirrored:
a mirrored seven is no seven. The batch of a step is a pure function of (seed, step): the same call after an interruption goes on from the last state
kept. What is saved is a checkpoint of transformers that `Features` loads.
"""
import copy
import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from transfusion.command import Interrupt, claim, saved_run
from transfusion.data.batches import step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.device import choose_device, seconds_of
from transfusion.eval.features import Features, Preprocessing, in_batches
from transfusion.files import LOCK, load_tensors, read_json, replacing
from transfusion.settings import Count, Decay, NotNegative, Positive, Seed, Share, check
from transfusion.train.checkpoint import check_finite, check_weights, numbers

DIVERGED = "what was saved before stands; train again with a lower lr"


@dataclass(frozen=True)
class ClassifierSettings:
    """What is trained, and how long."""

    size: Count = 32
    """side that pictures are stretched to; the network halves it twice before its first stage and once before each other"""
    width: Count = 32
    """channels of the first stage; each next one has twice as many"""
    depths: tuple[Count, ...] = (1, 1, 1)
    """basic blocks of each stage"""
    steps: Count = 400
    """batches to train on"""
    batch: Count = 128
    """pictures of a batch, drawn with replacement"""
    lr: Positive = 3e-3
    """highest learning rate, reached after a twentieth of the steps; a cosine takes it to 0"""
    weight_decay: NotNegative = 0.05
    """AdamW's, on matrices and kernels only"""
    smoothing: Share = 0.1
    """share of the target that all labels have in common"""
    move: Share = 0.1
    """pictures are moved by up to this share of their side, each way"""
    scale: Decay = 0.15
    """pictures are scaled by up to this share"""
    brightness: NotNegative = 0.1
    """up to this much is added to all pixels of a picture"""
    seed: Seed = 0
    """of the weights, the batches and what is done to pictures"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    keep_every: Count = 200
    """steps after which the state is kept, so that the same call goes on from there"""


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
    """Train on pictures (N, C, H, W) in [-1, 1] with labels (N,), write a checkpoint to `out` and return it as it loads.

    Raises:
        ValueError: settings that do not fit, labels without a name or of another count than pictures, or a directory
            that holds something else.
    """
    check("train_classifier", settings)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(f"train_classifier: images has shape {tuple(images.shape)} and labels {tuple(labels.shape)}; (N, C, height, width) and (N,) "
                         "fit")
    if labels.min() < 0 or labels.max() >= len(label_names):
        raise ValueError(f"train_classifier: labels is from {labels.min()} to {labels.max()}; 0 to {len(label_names) - 1} fit: they have names")
    out = Path(out)
    with claim("train_classifier", out):
        check_out(out)
        return _train(images, labels, label_names, out, settings)


def _train(images: Tensor, labels: Tensor, label_names: Sequence[str], out: Path, settings: ClassifierSettings) -> Features:
    pictures = [*images.shape, zlib.crc32(images.contiguous().numpy()), zlib.crc32(labels.contiguous().numpy())]
    run = json.loads(json.dumps({"settings": dataclasses.asdict(settings), "labels": list(label_names), "pictures": pictures}))
    if _finished(out) == run:
        print(f"{out} is this classifier already", flush=True)
        return Features.from_pretrained(out)
    device = choose_device(settings.device)
    network = build_network(images.shape[1], label_names, settings).to(device)
    prepare = Preprocessing(images.shape[1], (settings.size, settings.size), [0.5], [0.5])

    def loss_of(network: ResNetForImageClassification, step: int) -> Tensor:
        generator = step_generator(settings.seed, step)
        chosen = torch.randint(len(images), (settings.batch,), generator=generator)
        pictures = augment(prepare(images[chosen].to(device)), settings, generator)
        return torch.nn.functional.cross_entropy(network(pictures).logits, labels[chosen].to(device), label_smoothing=settings.smoothing)

    optimizer = torch.optim.AdamW([
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=settings.lr)
    start = _restore(out, run, network, optimizer)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {len(label_names)} labels, {len(images)} pictures: "
          f"{settings.steps - start} steps of {settings.batch} pictures take about "
          f"{(settings.steps - start) * _step_seconds(network, loss_of) / 60:.1f} minutes on {device}", flush=True)
    progress = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=f"judge {out.name}", unit="step", smoothing=0.05,
                    dynamic_ncols=True)
    with Interrupt() as stop:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            loss = loss_of(network, step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            found = numbers(loss=loss, grad_norm=norm)
            check_finite("train_classifier", out, step, found, DIVERGED)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{found['loss']:.3f}")
            stopped = stop.asked and step + 1 < settings.steps
            if stopped or (step + 1) % settings.keep_every == 0:
                _keep(out, run, network, optimizer, step + 1)
            if stopped:
                progress.close()
                raise KeyboardInterrupt(f"{out}: {step + 1:,} of {settings.steps:,} steps are done; the same command goes on")
    save(network, out, run)
    return Features.from_pretrained(out)


def build_network(channels: int, label_names: Sequence[str], settings: ClassifierSettings) -> ResNetForImageClassification:
    """Return a freshly initialised ResNet in training mode; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ResNetForImageClassification(ResNetConfig(
            num_channels=channels, embedding_size=settings.width, hidden_sizes=[settings.width * 2**stage for stage in range(len(settings.depths))],
            depths=list(settings.depths), layer_type="basic", id2label=dict(enumerate(label_names)),
            label2id={name: label for label, name in enumerate(label_names)})).train()


def learning_rate(step: int, settings: ClassifierSettings) -> float:
    """Linear warm-up over a twentieth of the steps times a cosine down to 0."""
    warm_up = min(1.0, (step + 1) / max(1, settings.steps // 20))
    return settings.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def augment(pictures: Tensor, settings: ClassifierSettings, generator: torch.Generator) -> Tensor:
    """Move, scale and brighten each of (N, C, H, W) by its own random amounts; what comes in from outside repeats the edge."""
    amounts = (2 * torch.rand(4, len(pictures), generator=generator) - 1).to(pictures)
    zoom, shift, zero = 1 + settings.scale * amounts[0], 2 * settings.move * amounts[1:3], torch.zeros_like(amounts[0])
    matrix = torch.stack([torch.stack([zoom, zero, shift[0]], 1), torch.stack([zero, zoom, shift[1]], 1)], 1)  # (N, 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, pictures.shape, align_corners=False)
    moved = torch.nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return (moved + settings.brightness * amounts[3].view(-1, 1, 1, 1)).clamp(-1, 1)


def check_out(out: Path) -> None:
    """Refuse a directory that holds something else than a classifier of this module."""
    theirs = [path for path in out.iterdir() if path.name != LOCK]
    ours = (out / "classifier.json").is_file() or "run" in (saved_run(out) or {})
    if theirs and not ours:
        raise ValueError(f"train_classifier: out is {str(out)!r}, which holds files and no classifier.json; an empty directory or one that this "
                         "command wrote fits")


def save(network: ResNetForImageClassification, out: Path, run: dict) -> None:
    """Write the checkpoint, what its pictures go through, and what it was made of, together; the state kept on the way goes."""
    size = run["settings"]["size"]
    check_weights("train_classifier", out, run["settings"]["steps"], network.state_dict(), DIVERGED)
    with replacing(out) as fresh:
        network.save_pretrained(fresh)
        ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5], image_std=[0.5]).save_pretrained(fresh)
        (fresh / "classifier.json").write_text(json.dumps(run | {"finished": True}, indent=2) + "\n")
    shutil.rmtree(out / "resume", ignore_errors=True)


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


def _finished(out: Path) -> dict | None:
    """What the classifier in `out` was made of, None where there is none or only half of one."""
    path = out / "classifier.json"
    run = read_json(path, "delete the directory to train anew") if path.is_file() else {}
    return run if run.pop("finished", False) else None


def _keep(out: Path, run: dict, network: ResNetForImageClassification, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write what going on needs; a kill while writing leaves the state before, and an older classifier stays until the new one is whole."""
    state = {f"network.{name}": x for name, x in network.state_dict().items()}
    state |= {f"optimizer.{i}.{key}": x for i, values in optimizer.state_dict()["state"].items() for key, x in values.items()}
    check_weights("train_classifier", out, step, state, DIVERGED)
    with replacing(out, weights=False) as fresh:
        (fresh / "resume").mkdir()
        save_file({name: x.contiguous() for name, x in state.items()}, fresh / "resume" / "state.safetensors")
        (fresh / "resume" / "run.json").write_text(json.dumps({"step": step, "run": run}))


def _restore(out: Path, run: dict, network: ResNetForImageClassification, optimizer: torch.optim.Optimizer) -> int:
    """Load what `_keep` wrote for the same pictures, labels and settings; return the step to go on from, 0 where there is no such state."""
    kept, saved = out / "resume", saved_run(out) or {}
    if saved.get("run") != run:
        return 0
    state, moments = load_tensors(kept / "state.safetensors"), {}
    network.load_state_dict({name.removeprefix("network."): x for name, x in state.items() if name.startswith("network.")})
    for name, x in state.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            moments.setdefault(int(i), {})[key] = x
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    print(f"going on from step {saved['step']} of the run kept in {kept}", flush=True)
    return saved["step"]


def _step_seconds(network: ResNetForImageClassification, loss_of: Callable) -> float:
    """Seconds of a second step, taken on a copy."""
    trial = copy.deepcopy(network)
    return seconds_of(lambda: loss_of(trial, 0).backward(), network.device)


if __name__ == "__main__":
    from transfusion.recipes.command_line import judge_main

    judge_main()
