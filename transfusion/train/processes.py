"""The processes that train one run together, as torchrun starts them, and what each of them is for.

    torchrun --nproc-per-node 8 -m transfusion.train PRESET --parallel.replicate 2 --parallel.context 2

    rank = (copy * shard + part) * context + piece        copy < replicate, part < shard, piece < context

Each of `replicate` copies of the weights is split over shard x context processes (FSDP2; with several copies HSDP), as
torchtitan does it: those that share rows then sum their gradients with the others. A step's rows are split over the
replicate x shard groups of processes, and the tokens of a group's rows over its `context` processes.

Process 0, the main one, alone prints and writes. What fails in one process ends all of them: the main one says why. A
run of one process starts no communication.
"""
import contextlib
import datetime
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transfusion.device import PATIENCE, choose_device, launched, own_device
from transfusion.files import spelled
from transfusion.sequence import CONTEXT_ATTENTION
from transfusion.settings import Count, OneOf, check

MEETING = datetime.timedelta(seconds=60)
"""how long processes wait for each other at the beginning"""
SPEAKING = datetime.timedelta(seconds=5)
"""how long a process that fails waits for the main one to say that the run ends"""
SAID = 2000  # bytes of an error's text that processes tell each other
PLAIN = ValueError, OSError, FloatingPointError, SafetensorError  # errors that a command says in one line
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}

_runs = itertools.count()


class FailedElsewhere(ValueError):
    """Another process failed, and the main one says why."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes that torchrun starts share a run; the product of the three is their number."""

    shard: Count | None = None
    """processes that share one copy of the weights, and split rows; None: all that the others leave"""
    replicate: Count = 1
    """copies of the weights, each in processes of its own, which split rows too"""
    context: Count = 1
    """processes that split the tokens of the same rows, and share the copy of the weights as well"""
    context_by: Annotated[str, OneOf(CONTEXT_ATTENTION)] = "gathered"
    """what brings these processes the keys and values of each other's tokens: gathered, a layer's all at once; or ring,
    those of one process at a time, which holds less and computes attention once more in backward"""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """what layers gather their weights in and compute in; weights are kept and gradients are summed in float32"""
    offload: bool = False
    """keep weights, gradients and what the optimizer keeps in the memory of the CPU, where it steps as well"""


@dataclass(frozen=True)
class Processes:
    """One of the processes of a run: its place among them, and the groups that it belongs to.

    device: that it computes on, None where settings choose it. mesh: what weights are split over, of one dimension or,
    with several copies, of two (copies, shards); None where they are not split. data_rank, data_ranks: which part of a
    step's rows it takes, of how many. context_rank, context_ranks, context_group: the same of the tokens of these rows;
    no group where they are not split.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    mesh: DeviceMesh | None = None
    data_rank: int = 0
    data_ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1
    context_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Do in all processes what may fail in some: where it fails in one, it fails in all.

        An error holds the frames that it passed, with all that a run has, so no frame keeps the error: neither would
        go before the garbage collector comes, perhaps in a thread that saves, and ends the readers of a run long over.

        Raises:
            ValueError: in the main process, where another one failed; what it says is that one's error.
            FailedElsewhere: in the others; `start_processes` ends them without a word.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        try:
            said = gather_text("" if error is None else str(error) or type(error).__name__)
            if not any(said):
                return
            if error is not None and (self.is_main or not isinstance(error, PLAIN)):
                raise agreed(error)
            if self.is_main:
                first = next(rank for rank, text in enumerate(said) if text)
                raise agreed(ValueError(f"{said[first]} (said by process {first} of {self.size})"))
            raise agreed(FailedElsewhere()) from error
        finally:
            del error

    def exchange(self, counts: Mapping[str, int], error: Exception | None = None, rows: int = 0
                 ) -> tuple[dict[str, int], dict[str, int]]:
        """Return counts of rows, over the processes that take rows before this one's and over all; the same names.

        `rows` is a checksum of the rows; processes that share rows must have the same.

        Raises:
            Exception: `error`, as `agreeing` says, where one of the processes has one.
            ValueError: processes that share rows differ in rows or counts.
        """
        names = sorted(counts)
        numbers = torch.tensor([int(error is not None), rows, *(counts[name] for name in names)], dtype=torch.int64)
        gathered = [numbers]
        if self.size > 1:
            gathered = [torch.empty_like(numbers) for _ in range(self.size)]
            dist.all_gather(gathered, numbers)
        if any(int(one[0]) for one in gathered):
            with self.agreeing():
                try:
                    if error is not None:
                        raise error
                finally:
                    del error  # see `agreeing`
        shared = torch.stack(gathered).unflatten(0, (-1, self.context_ranks))
        if (shared != shared[:, :1]).any():
            raise agreed(ValueError("train: processes that share rows (parallel.context) read different ones, as where "
                                    "one of them cannot read a file that the others can; --resume goes on"))
        held = shared[:, 0, 2:]
        before, totals = held[:self.data_rank].sum(0), held.sum(0)
        return dict(zip(names, before.tolist())), dict(zip(names, totals.tolist()))

    def check_same(self, text: str, why: str) -> None:
        """Refuse processes of which one has another short text than the main one, and say why.

        Raises:
            ValueError: in all of them, as `agreeing` says.
        """
        if self.size == 1:
            return
        said = gather_text(text)
        with self.agreeing():
            if len(set(said)) > 1:
                raise ValueError(why)

    @contextlib.contextmanager
    def main_holds(self, held: contextlib.AbstractContextManager) -> Iterator[None]:
        """Enter a context in the main process alone; where that fails, all processes end as `agreeing` says."""
        with contextlib.ExitStack() as stack:
            with self.agreeing():
                if self.is_main:
                    stack.enter_context(held)
            yield


ALONE = Processes()
"""a run of one process"""


@contextlib.contextmanager
def start_processes(command: str, settings: ParallelSettings, device: str = "auto") -> Iterator[Processes]:
    """Meet the other processes of the run, if torchrun started several, and part from them at the end.

    Args:
        command: whose name stands in errors.
        device: as in `choose_device`; of a GPU the kind alone, for each process takes the one that is its own.

    Raises:
        ValueError: settings, or a device, that do not fit the processes, or processes that do not come.
        SystemExit: in the other processes, when the main one ends with an error.
    """
    size = started()
    if size == 1:
        check(command, settings, "parallel.")
        _sizes(command, settings, 1)
        _check_alone(command, settings)
        yield ALONE
        return
    rank, store = _meet(command, device)
    parts = True
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            here = Processes(rank, size)
            with here.agreeing():
                check(command, settings, "parallel.")
                here = _place(command, here, settings, device)
            yield here
    except BaseException as error:
        parts = is_agreed(error) or dist.get_backend() == "gloo"  # others wait for the whole group, and it for them
        if rank == 0:
            store.set("ended", str(error))
        elif isinstance(error, FailedElsewhere) or _has_ended(store):
            time.sleep(1)  # torchrun ends all processes when one fails; the main one speaks first
            raise SystemExit(1) from None
        raise
    finally:
        if parts:
            dist.destroy_process_group()


def agreed(error: Exception) -> Exception:
    """Note of an error that all processes end with one, and so may still speak with each other; return it."""
    error.agreed = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether all processes of the run end with an error, and so together."""
    return getattr(error, "agreed", False)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Read a command line, which is the same for all processes: what is wrong with it, the main one alone says."""
    if launched()[0] == 0:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    except (SystemExit, *PLAIN) as end:
        time.sleep(1)
        raise SystemExit(1 if getattr(end, "code", 1) else 0) from None


def started() -> int:
    """How many processes torchrun started, this one included; 1 without it."""
    return launched()[1]


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process: all of them then do the same."""
    if not dist.is_initialized():
        return flag
    number = torch.tensor(int(flag))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def gather_text(text: str) -> list[str]:
    """Return the text of each process, at most `SAID` bytes of it, in the order of ranks."""
    own = torch.zeros(SAID, dtype=torch.uint8)
    encoded = spelled(text).encode()[:SAID]
    own[:len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    texts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(texts, own)
    return [bytes(x.tolist()).rstrip(b"\0").decode(errors="ignore") for x in texts]


def _meet(command: str, device: str) -> tuple[int, dist.Store]:
    """Start communication; return this process's rank and the store that all of them reach."""
    kind = _kind(device)
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{command}: WORLD_SIZE is {os.environ['WORLD_SIZE']}, and its processes did not meet within "
                         f"{MEETING.seconds} s ({str(error).splitlines()[0]}); torchrun starts all of them and says "
                         "where they meet") from error
    store = dist.PrefixStore(f"run {next(_runs)}", store)  # torchrun's outlives a run, and another one may follow
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return rank, store


def _place(command: str, here: Processes, settings: ParallelSettings, device: str) -> Processes:
    """Fill in what a process is for."""
    copies, shard, context = _sizes(command, settings, here.size)
    kind, own = _kind(device), own_device(command, device, here.rank, here.size)
    if own.type != "cpu":
        torch.accelerator.set_device_index(own.index)
    sizes = ((copies, shard * context), ("copy", "shard")) if copies > 1 else ((here.size,), ("shard",))
    mesh = init_device_mesh(kind, sizes[0], mesh_dim_names=sizes[1])
    placed = replace(here, device=own, mesh=mesh, data_rank=here.rank // context, data_ranks=copies * shard)
    if context == 1:
        return placed
    rows = init_device_mesh(kind, (copies * shard, context), mesh_dim_names=("rows", "context"))
    return replace(placed, context_rank=here.rank % context, context_ranks=context,
                   context_group=rows.get_group("context"))


def _sizes(command: str, settings: ParallelSettings, size: int) -> tuple[int, int, int]:
    """(replicate, shard, context), whose product is `size`."""
    others = settings.replicate * settings.context
    shard = max(1, size // others) if settings.shard is None else settings.shard
    if shard * others != size:
        named = "" if settings.shard is None else f"parallel.shard is {settings.shard}, "
        raise ValueError(f"{command}: {named}parallel.replicate is {settings.replicate} and parallel.context "
                         f"{settings.context}, and {_processes(size)} started; numbers whose product is {size} fit, "
                         "or, without parallel.shard, divide it; torchrun --nproc-per-node says how many start")
    return settings.replicate, shard, settings.context


def _check_alone(command: str, settings: ParallelSettings) -> None:
    """Refuse to one process what several of them do."""
    for name, way in (("dtype", "--autocast computes in bfloat16"), ("offload", "leave it out")):
        value = getattr(settings, name)
        if value != getattr(ParallelSettings(), name):
            raise ValueError(f"{command}: parallel.{name} is {value!r} and one process was started; it is for several, "
                             f"which torchrun starts; {way}")


def _processes(size: int) -> str:
    return "one process was" if size == 1 else f"{size} processes were"


def _kind(device: str) -> str:
    """cpu, cuda, ...: what a setting of a device names or chooses."""
    return (choose_device("auto") if device == "auto" else torch.device(device)).type


def _has_ended(store: dist.Store) -> bool:
    """Whether the main process says soon that it ends, too; unknown where it took the store with it."""
    try:
        store.wait(["ended"], SPEAKING)
    except RuntimeError:
        return False
    return True
