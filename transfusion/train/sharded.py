"""Saves of a run whose weights several processes hold in shards (torch.distributed.checkpoint, DCP).

    resume/state/__RANK_0.distcp     the shards of one process: model.NAME, averaged.NAME, optimizer.NAME.KEY
    resume/state/.metadata           which part of which tensor lies where, in DCP's own form, a pickle
    resume/run.json, config.json, model.safetensors, ...      as those of one process

A save stops training for as long as its tensors take to the host's memory. A thread of each process then writes its
shards to a directory that all processes see; when all are on the disk, the main process makes the checkpoint from them
and moves the whole into its place (transfusion/files.py). What goes wrong before that leaves the older save. Any number
of processes goes on from such a save, and from that of one process: DCP gives each the shards that it needs.
"""
import contextlib
import copy
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from transfusion.command import file_error, saved_step
from transfusion.files import SAVING
from transfusion.locks import sharing_lock
from transfusion.train.processes import agreed

SHARDS = Path("resume", "state")
"""where a save in shards has them"""
PATIENCE = timedelta(minutes=30)
"""how long a process waits for the others to write their shards"""

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # each reads alone


class SaveError(ValueError):
    """A save failed, in this process or another one; the older one stands."""


class Saver:
    """Saves in the background, one at a time. All processes of a run call the same methods after the same steps."""

    def __init__(self, out: Path):
        """Every process of the default group takes part; `out` is a directory that all of them see."""
        self.out, self.group = Path(out), dist.new_group(backend="gloo", timeout=PATIENCE)
        self.is_main = dist.get_rank() == 0
        self.owner = threading.get_ident()  # of the main process's lock of `out`
        self.thread: threading.Thread | None = None
        self.failed: str | None = None
        self.began, self.took = 0.0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._join()

    def start(self, state: Mapping[str, Tensor], place: AbstractContextManager[Path], finish: Callable[[Path], None],
              step: int) -> None:
        """Copy tensors to the host's memory and save them while training goes on; an earlier save is waited for.

        Args:
            state: of the same names in all processes.
            place: gives the main process the directory to write to, in `out`, and moves it to its place at the end.
            finish: writes the rest of the save there, in the main process, when all shards are written.
        """
        self._join()
        copies = {name: x.detach().to("cpu", copy=True) for name, x in state.items()}
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self._save, args=(copies, place, finish, step), daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """`agreeing` of these processes, once nothing is being saved."""
        self._join()
        with agreeing(self.group):
            yield

    def wait(self) -> None:
        """Wait for the save that was started last.

        Raises:
            SaveError: it failed.
        """
        self._join()
        if self.failed is not None:
            raise agreed(SaveError(self.failed))

    def seconds(self) -> float:
        """How long the last save took, or the present one has taken if that is longer."""
        present = 0.0 if self.thread is None or not self.thread.is_alive() else time.monotonic() - self.began
        return max(self.took, present)

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _save(self, state: dict[str, Tensor], place: AbstractContextManager[Path], finish: Callable[[Path], None],
              step: int) -> None:
        """Save, and keep what went wrong for `wait`; the main process says it at once."""
        self.failed = None
        try:
            with agreeing(self.group), sharing_lock(self.out, self.owner):
                self._write(state, place, finish)
        except Exception as error:
            self.failed = f"the save of {step:,} steps failed: {one_line(error)}"
            if self.is_main:
                stands = saved_step(self.out)
                kept = "nothing was saved before" if stands is None else f"that of {stands:,} steps stands"
                print(f"\n{self.failed}; {kept}", file=sys.stderr, flush=True)
        self.took = time.monotonic() - self.began

    def _write(self, state: dict[str, Tensor], place: AbstractContextManager[Path],
               finish: Callable[[Path], None]) -> None:
        with contextlib.ExitStack() as stack:
            with agreeing(self.group):  # that the directory is there, and empty
                fresh = stack.enter_context(place) if self.is_main else self.out / SAVING
            with plain_failures():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(fresh / SHARDS), process_group=self.group)
            if self.is_main:
                finish(fresh)


@contextlib.contextmanager
def plain_failures() -> Iterator[None]:
    """Raise the first of the errors that a CheckpointException holds, which is no Exception and many lines long."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextlib.contextmanager
def agreeing(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Do in all processes what may fail in some: where it fails in one, it fails in all.

    Raises:
        SaveError: in a process where it went well.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    try:
        said: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, error and one_line(error), group=group)
        if error is not None:
            raise agreed(error)
        if first := next(filter(None, said), None):
            raise agreed(SaveError(first))
    finally:
        del error  # see `Processes.agreeing`


def one_line(error: Exception) -> str:
    """An error in one line: the file and what is wrong with it, or the last line that Python says of it."""
    if isinstance(error, OSError | SafetensorError):
        return file_error(error)
    return str(error) if isinstance(error, ValueError) else traceback.format_exception_only(error)[-1].strip()


def shapes_of(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the tensors of a save in shards, by name."""
    found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: (x.size, x.properties.dtype) for name, x in found.items() if isinstance(x, TensorStorageMetadata)}


def read_shards(directory: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors, whole ones or shards of any layout, with those of their names; each process reads for itself."""
    with plain_failures():
        dcp.load(dict(targets), storage_reader=dcp.FileSystemReader(directory), no_dist=True)


def whole_weights(save: Path) -> dict[str, Tensor]:
    """The averages of a save's trained weights, themselves where nothing is averaged, and its buffers: whole and on the
    host, by their names in the model."""
    shapes = shapes_of(save / SHARDS)
    names = {name.removeprefix("model."): name for name in shapes if name.startswith("model.")}
    names = {name: averaged if (averaged := f"averaged.{name}") in shapes else kept for name, kept in names.items()}
    found = {kept: torch.empty(shapes[kept][0], dtype=shapes[kept][1]) for kept in names.values()}
    read_shards(save / SHARDS, found)
    return {name: found[kept] for name, kept in names.items()}


def without_memory(model: nn.Module, *shared) -> nn.Module:
    """Return a copy of a model whose parameters take no memory, for what is saved beside weights.

    Make it before the model is sharded: a thread that saves must not look at a model that gathers and gives up its
    weights meanwhile. `shared` are objects inside it that are not copied.
    """
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(one): one for one in shared})


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x
