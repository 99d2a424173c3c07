"""What several processes save and load together, for tests/transfusion/train/test_sharded_saves.py: run by `spawn`."""
import contextlib
import errno
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from tests.gloo_processes import meet
from tests.transfusion.train.two_processes import random_model, step
from transfusion.model.lora import TuneSettings
from transfusion.train import loop
from transfusion.train.average import trained_parameters
from transfusion.train.checkpoint import training_state
from transfusion.train.parallel import shard, whole
from transfusion.train.sharded import Saver, without_memory
from transfusion.train.transfusion import OptimSettings, TrainConfig, TransfusionTask

MODELS = {"unet": dict(backbone="adaln", image_layers="unet", unet_channels=(8, 16), unet_blocks=1),
          "frozen": dict(frozen=("patch_embedding", "timestep")),
          "tied": dict(tie_word_embeddings=True)}
ADAPTERS = {"lora": dict(trained="lora"), "images": dict(backbone="adaln", trained="images")}
STEPS = 2  # before the save


def small_task(out: Path, model, mesh=None) -> TransfusionTask:
    """A task without data around a model, sharded over `mesh` if there is one."""
    lean = None if mesh is None else without_memory(model)
    model = model if mesh is None else shard(model, mesh)
    config = TrainConfig(out=out, optim=OptimSettings(ema=0.6, lr=1e-2, rows=4), tune=TuneSettings(
        start=Path("start") if hasattr(model, "peft_config") else None,
        trained="lora" if hasattr(model, "peft_config") else "all"))
    return TransfusionTask(config, None, model, model, written=lean)


def train(task: TransfusionTask, rows: tuple[int, ...], steps: int) -> list[float]:
    """Take steps on the same rows, `rows` of them in this process; return losses."""
    losses, player = [], task.player
    for _ in range(steps):
        means, _, _ = step(player.model, rows)
        loop.take_step(player, is_skipped=False)
        losses.append(float(means["loss"]))
    return losses


def contents(task: TransfusionTask) -> dict[str, torch.Tensor]:
    """All that is saved, whole."""
    return {name: whole(x.detach()).clone() for name, x in training_state(task.players)[0].items()}


def resumed(out: Path, model, mesh=None) -> TransfusionTask:
    """The same task after the save in `out`."""
    task = small_task(out, model, mesh)
    assert loop.restore(task.config, task.players, ()) == STEPS
    return task


def rows_of(rank: int, size: int) -> tuple[int, ...]:
    """The rows, four in all, of a process."""
    return tuple(range(4))[rank * 4 // size:(rank + 1) * 4 // size]


def save_and_go_on(rank: int, folder: Path) -> None:
    """Two processes save, go on, and load what one process and they themselves saved."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, options in MODELS.items():
        out, rows = folder / name, rows_of(rank, 2)
        task = small_task(out, random_model(**options), mesh)
        train(task, rows, STEPS)
        with Saver(out) as saver:
            loop.save("train", task.config, task, STEPS, "", saver)
            found[name, "saved"] = contents(task)
            found[name, "losses"] = train(task, rows, 2)  # while the save is written
            saver.wait()
        again = resumed(out, random_model(**options), mesh)
        found[name, "loaded"] = contents(again)
        found[name, "losses again"] = train(again, rows, 2)
        found[name, "from one"] = contents(resumed(folder / f"one {name}", random_model(**options), mesh))
    for name, options in ADAPTERS.items():
        task = small_task(folder / name, random_model(**options), mesh)
        train(task, rows_of(rank, 2), STEPS)
        with Saver(folder / name) as saver:
            loop.save("train", task.config, task, STEPS, "", saver, is_last=True)
    found |= failures(rank, folder, mesh)
    if rank == 0:
        torch.save(found, folder / "found.pt")


def failures(rank: int, folder: Path, mesh) -> dict:
    """A disk that is full for the other process, weights that are not finite in it, and an error in it alone."""
    found, out = {}, folder / "full"
    task = small_task(out, random_model(), mesh)
    with Saver(out) as saver:
        loop.save("train", task.config, task, 1, "", saver)
        saver.wait()
        with full_disk() if rank == 1 else contextlib.nullcontext(), captured(folder / f"said {rank}"):
            loop.save("train", task.config, task, 2, "", saver)
            found["full disk"] = error_of(saver.wait)
        with unreadable() if rank == 0 else contextlib.nullcontext(), captured(folder / f"unread {rank}"):
            loop.save("train", task.config, task, 2, "", saver)
            found["unreadable"] = error_of(saver.wait)
        with torch.no_grad():
            if rank == 1:
                next(iter(task.player.averaged.tensors.values())).to_local().fill_(float("nan"))
        found["not finite"] = error_of(lambda: loop.save("train", task.config, task, 3, "", saver))
    return found


@contextlib.contextmanager
def full_disk():
    """Let writes of shards fail as on a full disk."""
    write = torch.serialization._save  # what DCP ends in

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.serialization._save = fail
    try:
        yield
    finally:
        torch.serialization._save = write


@contextlib.contextmanager
def unreadable():
    """Let reads of shards fail, as of those that another node wrote to a disk of its own."""
    read = dcp.FileSystemReader.read_data

    def fail(*_, **__):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "__1_0.distcp")

    dcp.FileSystemReader.read_data = fail
    try:
        yield
    finally:
        dcp.FileSystemReader.read_data = read


def save_step_2(rank: int, folder: Path, model) -> None:
    """One of two processes that replace the save in `run` by that of step 2, whose weights are all 0.02."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        meet(rank, 2, folder)
        task = small_task(folder / "run", model, init_device_mesh("cpu", (2,)))
        fill(task, 2)
        with Saver(folder / "run") as saver:
            loop.save("train", task.config, task, 2, "", saver)
            saver.wait()


def fill(task: TransfusionTask, number: int) -> None:
    """Let all weights and averages be a hundredth of a number."""
    with torch.no_grad():
        for x in (*trained_parameters(task.player.model).values(), *task.player.averaged.tensors.values()):
            x.fill_(number / 100)


@contextlib.contextmanager
def captured(path: Path):
    """Keep what is said on stderr in a file."""
    with open(path, "w") as file, contextlib.redirect_stderr(file):
        yield


def error_of(call) -> str:
    """The name and the words of the error that a call ends with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def four(rank: int, folder: Path) -> None:
    """Four processes load what two saved, among it tensors of fewer rows than processes, and go on."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for name, options in MODELS.items():
        task = resumed(folder / name, random_model(**options), mesh)
        found[name, "loaded"] = contents(task)
    out = folder / "of four"  # of the last model, whose weights are tied
    with Saver(out) as saver:
        task.config = TrainConfig(out=out)
        loop.save("train", task.config, task, STEPS, "", saver)
        found["losses"] = train(task, rows_of(rank, 4), 2)
        saver.wait()
    if rank == 0:
        torch.save(found, folder / "found-4.pt")
