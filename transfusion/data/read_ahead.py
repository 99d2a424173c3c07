"""Items of a dataset in order, read ahead by worker processes.

Signals that stop a command go to the process that it runs in, which ends its workers when it is ready to. Where a
worker is killed, whoever asks for the next item is told, and nobody before.
"""
import contextlib
import os
import signal
from collections.abc import Generator, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from transfusion.data.forking import forking

LEFT_TO_THE_RUN = signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


def read_ahead(op: str, dataset: Dataset, order: Iterable[int], workers: int, *, prefetch: int = 2,
               advice: str) -> Generator:
    """Start workers and return an iterator over what a dataset holds at the numbers of `order`.

    Where it ends or is closed, the workers end.

    Args:
        op: whom an error names.
        workers: processes; 0 reads in this one.
        prefetch: items that each of them has ready.
        advice: what helps where one of them was killed.

    Raises:
        ValueError: a worker was killed.
    """
    ahead = dict(prefetch_factor=prefetch) if workers else {}
    own = torch.Generator().manual_seed(0)             # the loader seeds its workers from it, and not from the run's
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, generator=own,
                        worker_init_fn=_start_worker, **ahead)
    with forking(), _held_back(LEFT_TO_THE_RUN), _deaths_between_items():
        items = iter(loader)                           # whose workers inherit held signals, ignore them and let them go
    return _told(items, workers, f"{op}: one of {workers} processes that read ahead was killed, perhaps for want of "
                                 f"memory or of room in /dev/shm; {advice}")


def _told(items: Iterator, workers: int, killed: str) -> Generator:
    """Yield all items; where one of their workers was killed, raise a ValueError that says so."""
    try:
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter where it held an item on its way
        if not workers or isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise ValueError(killed) from error
    finally:
        if workers:
            items._shutdown_workers()  # who would live as long as an error that somebody keeps


@contextlib.contextmanager
def _held_back(signals: tuple[int, ...]) -> Iterator[None]:
    """Let signals wait until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _deaths_between_items() -> Iterator[None]:
    """Take back the handler by which PyTorch raises at once, in the middle of a step, where a worker dies.

    Whoever asks for the next item is told as well, and there a run can still save.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _start_worker(number: int) -> None:
    """Leave Ctrl-C and a closed terminal to the run, which saves and then ends its workers; tokenize in one thread.

    A group of its own spares a worker the signals that are sent to the run's whole group, SIGTERM too.
    """
    os.setpgid(0, 0)
    for name in LEFT_TO_THE_RUN:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_RUN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)      # the run's own handler, which a forked process inherits, saves
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
