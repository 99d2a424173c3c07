"""One writer at a time: a directory that a process writes into is locked until it is done or dies."""
import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
_held: dict[tuple[int, int, str], int] = {}  # locks by process, thread and directory: their holders may take them again


@contextlib.contextmanager
def locked(out: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing into `out`, which is made where it is missing.

    The lock goes when its process does.

    Raises:
        ValueError: another process holds it; `wait` waits for that one instead.
    """
    out = Path(out)
    key = os.getpid(), threading.get_ident(), os.path.realpath(out)
    if key in _held:
        yield
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    handle = _lock(out, wait)
    _held[key] = handle
    try:
        yield
    finally:
        del _held[key]
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_ino == os.stat(out / LOCK).st_ino:
                os.unlink(out / LOCK)
        os.close(handle)
        with contextlib.suppress(OSError):  # a directory that was made for nothing
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def sharing_lock(out: Path, owner: int) -> Iterator[None]:
    """Let this thread write into `out` while the thread `owner` of the same process holds its lock, if it does."""
    process, place = os.getpid(), os.path.realpath(out)
    key, theirs = (process, threading.get_ident(), place), _held.get((process, owner, place))
    if theirs is not None:
        _held.setdefault(key, theirs)
    try:
        yield
    finally:
        if theirs is not None:
            _held.pop(key, None)


def _let_go() -> None:
    """Close what a forked child inherited: a lock is its holder's, however long his children live."""
    for handle in set(_held.values()):
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _lock(out: Path, wait: bool) -> int:
    """Open and lock `out`/.lock; a file that its last holder removed meanwhile does not count."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            if out.is_dir():
                raise
            continue  # its last holder removed the directory just now
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_ino == os.stat(out / LOCK).st_ino:
                with contextlib.suppress(OSError):  # a full disk: who holds it is good to know, no more
                    os.truncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise ValueError(f"{str(out)!r} is in use by {holder}; wait until it ends, stop it, or take another "
                             "directory") from None
        except FileNotFoundError:
            pass
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                return handle  # a file system without locks
            os.close(handle)
            raise
        os.close(handle)


def in_use(out: Path) -> bool:
    """Whether some process holds the lock of `out`; writes nothing."""
    try:
        handle = os.open(out / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)
