"""What processes that read data inherit from the one that forks them."""
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Fork processes in this block: what is there now their garbage collector never ends.

    What waits for the garbage collector may be a process group of a run that is over. Its destructor wakes the threads
    of the group, which a forked process does not have, and waits for them for good: the reader never reads.
    """
    is_frozen = gc.get_freeze_count() > 0  # by whoever calls, who may want it so
    gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()
