"""Runs of several processes, for tests/transfusion/train/test_processes.py: torchrun starts this in each of them."""
import contextlib
import dataclasses
import gc
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

import transfusion.train.transfusion as trainer
from tests.transfusion.train.own_data import tiny
from transfusion.data.mixture_data import MixtureFileSettings, MixtureRows
from transfusion.data.training_data import DrawnRows
from transfusion.recipes.digits import DigitsSettings
from transfusion.train.processes import ParallelSettings
from transfusion.train.samples import SamplesSettings
from transfusion.train.settings import GuardSettings
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig, train
from transfusion.train.validation import ValidationSettings


def digits(out: Path, parallel: ParallelSettings = ParallelSettings(), **optim) -> TrainConfig:  # noqa: B008
    """A run of a few steps on digits, whose rows hold different numbers of images and of text targets."""
    settings = dict(steps=5, rows=4, seq_len=96, lr=1e-2, warmup=1, ema=0.9) | optim
    return TrainConfig(out=out, parallel=parallel, device="cpu", data=DigitsSettings(caption_first=0.5, story=0.2),
                       model=ModelSettings(hidden=32, layers=2, heads=2, kv_heads=2, mlp=64),
                       optim=OptimSettings(**settings))


def watched(config: TrainConfig) -> TrainConfig:
    """The same run, looked at after every second step and the last."""
    return dataclasses.replace(config, validate=ValidationSettings(every=2, rows=3, bins=2),
                               samples=SamplesSettings(every=2, steps=1, count=2))


def runs(folder: Path) -> dict[str, TrainConfig]:
    """Runs that give the same losses on any number of processes; folder/mix.yaml and folder/vae are their data."""
    mixture = tiny(folder / "mixture", folder / "mix.yaml",
                   MixtureFileSettings(file=folder / "mix.yaml", vae=folder / "vae", workers=1))
    mixture = dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, patch_size=1),
                                  optim=dataclasses.replace(mixture.optim, rows=4))
    return {"digits": digits(folder / "digits"),
            "accumulated": digits(folder / "accumulated", accumulate=2),
            "logit-normal": dataclasses.replace(digits(folder / "logit-normal", times="logit-normal", steps=2)),
            "copies": watched(digits(folder / "copies", ParallelSettings(replicate=2), steps=3, accumulate=2)),
            "offloaded, full": watched(dataclasses.replace(
                digits(folder / "offloaded, full", ParallelSettings(offload=True), steps=3), recompute="full")),
            "compiled": dataclasses.replace(digits(folder / "compiled", steps=3), compile=True),
            "selective": dataclasses.replace(
                digits(folder / "selective", steps=3), recompute="selective",
                model=ModelSettings(hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, backbone="adaln")),
            "context": digits(folder / "context", ParallelSettings(context=2), steps=3),
            "guarded": dataclasses.replace(
                digits(folder / "guarded", steps=8, image_lr=3.0, schedule="wsd", decay_share=0.5),
                guard=GuardSettings(do="skip", window=2, factor=1.0001, patience=8)),
            "context, compiled": watched(dataclasses.replace(
                digits(folder / "context, compiled", ParallelSettings(context=2), steps=3), compile=True)),
            "ring, selective": dataclasses.replace(
                digits(folder / "ring, selective", ParallelSettings(context=2, context_by="ring"), steps=3,
                       accumulate=2), recompute="selective"),
            "mixture": mixture,
            "mixture, accumulated": dataclasses.replace(
                mixture, out=folder / "mixture, accumulated",
                optim=dataclasses.replace(mixture.optim, accumulate=2))}


def layouts(folder: Path) -> dict[str, TrainConfig]:
    """Runs of four processes, in other layouts, that give the losses of "digits"."""
    return {"copies of shards": digits(folder / "copies of shards", ParallelSettings(shard=2, replicate=2)),
            "shards of four": digits(folder / "shards of four"),
            "rows and tokens": digits(folder / "rows and tokens", ParallelSettings(shard=2, context=2))}


def refused(name: str, config: TrainConfig, folder: Path) -> None:
    """Train what ends in an error; note which one, and in which process."""
    rank = os.environ["RANK"]
    try:
        train(config)
        said = "nothing"
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{name} {rank}.txt").write_text(said)


@contextlib.contextmanager
def drawing(kind: type, step: int, change) -> Iterator[list[weakref.ref]]:
    """Call `change` when the rows of a step are drawn; gives what draws them. Garbage is not collected meanwhile."""
    whole, drawn = kind.draw, []

    def draw(self, number, generator):
        drawn.append(weakref.ref(self))
        if number == step:
            change()
        return whole(self, number, generator)

    kind.draw = draw
    gc.disable()
    try:
        yield drawn
    finally:
        gc.enable()
        kind.draw = whole


@contextlib.contextmanager
def other_texts() -> Iterator[None]:
    """Let one process make its tokenizer of other texts."""
    whole = trainer.train_tokenizer
    if os.environ["RANK"] == "1":
        trainer.train_tokenizer = lambda texts, size: whole(["zebras in zinc zones"], size)
    try:
        yield
    finally:
        trainer.train_tokenizer = whole


@contextlib.contextmanager
def differing(step: int) -> Iterator[None]:
    """Let one process draw other rows at a step."""
    whole = DrawnRows.draw

    def draw(self, number, generator):
        if number == step and os.environ["RANK"] == "1":
            generator = torch.Generator().manual_seed(1)
        return whole(self, number, generator)

    DrawnRows.draw = draw
    try:
        yield
    finally:
        DrawnRows.draw = whole


def note_held(name: str, drawn: list[weakref.ref], folder: Path) -> None:
    """Note whether the rows of a run that is over are still there, which would keep its readers."""
    assert drawn
    (folder / f"{name} {os.environ['RANK']} held.txt").write_text(str(sum(rows() is not None for rows in drawn)))


def fail() -> None:
    """Be the one process whose data cannot be read."""
    if os.environ["RANK"] == "1":
        raise OSError("data: too many files are gone")


def stop() -> None:
    """Be the one process that a signal reaches."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """All runs, and what ends them."""
    print("a process speaks")
    for config in runs(folder).values():
        train(config)
    refused("product", digits(folder / "refused", ParallelSettings(replicate=3)), folder)
    refused("rows", digits(folder / "refused", rows=3), folder)
    refused("device", dataclasses.replace(digits(folder / "refused"), device="cpu:0"), folder)
    refused("taken", digits(folder / "digits"), folder)
    with drawing(DrawnRows, 3, fail) as drawn:
        refused("failed", digits(folder / "failed"), folder)
        note_held("failed", drawn, folder)
    with drawing(MixtureRows, 2, fail) as drawn:
        refused("mixture failed", dataclasses.replace(runs(folder)["mixture"], out=folder / "mixture failed"), folder)
        note_held("mixture failed", drawn, folder)
    with other_texts():
        refused("tokenizers", digits(folder / "refused"), folder)
    with differing(2):
        refused("differing", digits(folder / "differing", ParallelSettings(context=2)), folder)
    with drawing(DrawnRows, 2, stop):
        train(digits(folder / "stopped"))


if __name__ == "__main__":
    if os.environ["WORLD_SIZE"] == "2":
        main(Path(sys.argv[1]))
    else:
        for config in layouts(Path(sys.argv[1])).values():
            train(config)
        train(digits(Path(sys.argv[1]) / "bfloat16", ParallelSettings(dtype="bfloat16"), steps=3))
