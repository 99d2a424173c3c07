"""Work in a child process that is killed at one of its calls that change or sync files."""
import os
import sys

# audit events; os.replace is a rename, too
CALLS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def in_a_child(work, kill_at=None):
    """Run `work` in a forked process that dies at one of its calls that change or sync files.

    Return the exit status, 0 where it came to its end.
    """
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work, kill_at), 0)[1])


def start_child(work, kill_at=None):
    """Start `work` as `in_a_child` runs it; return the process's number."""
    pid = os.fork()
    if pid:
        return pid
    left, fsync = kill_at, os.fsync

    def count(*_):
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                os._exit(9)

    def audited(event, args):
        if event in CALLS or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR
                                                                                         | os.O_CREAT):
            count()

    status = 1
    try:
        sys.addaudithook(audited)
        os.fsync = lambda handle: (count(), fsync(handle))
        work()
        status = 0
    finally:
        os._exit(status)
