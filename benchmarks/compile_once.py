"""Triton's cache on disk, with a lock: of several processes that want the same kernel at once, one compiles and the
others wait for its result.

    TRITON_CACHE_MANAGER=benchmarks.compile_once:WaitingCacheManager

Triton looks a kernel up, compiles it where it is missing and writes what it found; processes that look before another
has written all compile. Here the look-up of a missing kernel takes a lock that writing it gives back. A process that
dies gives its lock back by that, and nobody waits for a lock longer than WAIT seconds: then it compiles too.
"""

import fcntl
import os
import time

from triton.runtime.cache import FileCacheManager

WAIT = 90.0
PAUSE = 0.05


class WaitingCacheManager(FileCacheManager):
    """The file cache, whose `get_group` holds the kernel's lock from a miss until `put_group`."""

    lock: int | None = None

    def get_group(self, filename):
        """What is in the cache, after waiting for the process that is compiling it."""
        found = super().get_group(filename)
        if found is None and self._locked():
            found = super().get_group(filename)  # written while this process waited
            if found is not None:
                self._unlock()
        return found

    def put_group(self, filename, group):
        """Write the group and let the others read it."""
        path = super().put_group(filename, group)
        self._unlock()
        return path

    def __del__(self):
        self._unlock()

    def _locked(self) -> bool:
        if self.lock is None:
            self.lock = os.open(os.path.join(self.cache_dir, "lock"), os.O_CREAT | os.O_RDWR)
        deadline = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return True  # whatever is there by now counts, and if nothing is, it is compiled here
                time.sleep(PAUSE)

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
