"""What a command does around its work.

It claims the directory that it writes, stops when it is told to, and ends with one line where something is wrong.
"""
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from transfusion.files import current, read_json, settle
from transfusion.locks import locked

ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a command, beside Ctrl-C; batch systems such as SLURM send SIGUSR1 before a job's time is over."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINT = ("config.json", "adapter_config.json", "cache.json", "classifier.json", "model.safetensors",
              "model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
"""Files that show that a directory holds a checkpoint or a cache."""


@contextlib.contextmanager
def plain_errors(resumes: bool = False) -> Iterator[None]:
    """End a command with one line in place of a traceback.

    That is where its input or a file is wrong, its loss is not finite, or it was stopped. SIGTERM, SIGHUP and
    SIGUSR1 stop a command as Ctrl-C does. `resumes`: the same command goes on from there. What the encoding of the
    output cannot write, as of names of files, is spelled out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    with _signals(_stop, ENDS):
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            raise SystemExit(f"error: {error}") from None
        except (OSError, SafetensorError) as error:
            raise SystemExit(f"error: {file_error(error)}") from None
        except KeyboardInterrupt as stop:
            said = str(stop) or ("the same command goes on" if resumes else "by Ctrl-C")
            raise SystemExit(f"stopped: {said}") from None


def file_error(error: Exception) -> str:
    """One line for an error of the file system: the file, what is wrong, and the way out."""
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    said = " ".join(str(error).split()) or type(error).__name__
    if name is not None and number is not None:
        said = f"{name}: {error.strerror}"
    ways = {**dict.fromkeys(FULL, "what was saved before stands; make room, or name a directory on another disk, and "
                                  "run the command again (train: with --resume)"),
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS),
                            "a file or directory that this user may read and write fits"),
            errno.ENOENT: "name one that is there"}
    return f"{said}; {ways[number]}" if number in ways else said


def _stop(number: int, _) -> None:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


@contextlib.contextmanager
def _signals(handler, numbers) -> Iterator[None]:
    """Handle signals in the main thread and put the handlers back; what is ignored, as by nohup, stays so.

    SIGUSR1 is handled all the same: examples/slurm_train.sh has torchrun ignore it, and its processes inherit that.
    """
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
        for number in numbers:
            if number == signal.SIGUSR1 or signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupt:
    """The first Ctrl-C, SIGTERM or SIGHUP asks the loop to save and stop; a second one stops at once.

    SIGUSR1 asks it, too, as often as it comes: a batch system may send it more than once, and SIGTERM afterwards.
    """

    asked = urged = False

    def __enter__(self):
        self.handlers = _signals(self.ask, (signal.SIGINT, *ENDS))
        self.handlers.__enter__()
        return self

    def ask(self, number: int, _) -> None:
        """Take note of a signal."""
        if self.urged and number != signal.SIGUSR1:
            by = "a second Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            raise KeyboardInterrupt(f"at once, by {by}; what was saved before stands")
        self.asked, self.urged = True, self.urged or number != signal.SIGUSR1

    def __exit__(self, *error):
        self.handlers.__exit__(*error)


@contextlib.contextmanager
def claim(command: str, out: Path, inputs: Mapping[str, Path | None] | None = None,
          resume: bool | None = None, alone: bool = True) -> Iterator[None]:
    """Hold `out` for a command that will write there; what killed saves left is finished or cleared.

    `inputs` are directories, by the settings that name them, that the command reads. `resume`: True goes on with the
    run in `out`, False starts one, and None leaves the contents of `out` to the command. `alone`: whether the command
    is one process; otherwise the main one of several claims `out` for all.

    Raises:
        ValueError: `out` is a file, cannot be written, is in use by another process, is or holds an input, or holds
            what is not this run; or a command that is one process was started several times by a launcher. Nothing was
            written then.
    """
    out = Path(out)
    if alone:
        check_alone(command)
    check_apart(command, out, inputs or {})
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
            settle(out)
        except ValueError as error:
            raise ValueError(f"{command}: {error}") from None
        except OSError as error:
            raise ValueError(f"{command}: out is {str(out)!r}, which cannot be written ({error.strerror}: "
                             f"{error.filename}); a directory that can be made and written fits") from error
        if resume is not None:
            check_out(command, out, resume)
        yield


def check_not_written(command: str, name: str, given: Path | None, written: Path) -> None:
    """Refuse an input that the command would write over."""
    if given is not None and Path(given).resolve() == Path(written).resolve():
        raise ValueError(f"{command}: {name} is {str(given)!r}, which the command would write over; another --out fits")


def check_alone(command: str) -> None:
    """Refuse to be one of several processes that do the same."""
    for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)):
        value = os.environ.get(name, "").strip()
        if value.isdigit() and int(value) > alone:
            raise ValueError(f"{command}: {name} is {value}, as torchrun sets it; this command is one process; "
                             "start it without a launcher of several")


def check_apart(command: str, out: Path, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an `out` that is a file, is one of `inputs`, lies in one or holds one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{command}: out is {str(out)!r}, which is a file; a directory fits")
    ours = out.resolve()
    for name, path in inputs.items():
        theirs = None if path is None else Path(path).resolve()
        if theirs is not None and (ours == theirs or ours in theirs.parents or theirs in ours.parents):
            raise ValueError(f"{command}: out is {str(out)!r} and {name} {str(path)!r}; what is read would be "
                             "written over; a directory of its own fits for --out")


def check_out(command: str, out: Path, resume: bool) -> None:
    """Refuse to go on with a run that is not there, and to write over a run or a checkpoint that is."""
    step = saved_step(out)
    if resume and step is None:
        raise ValueError(f"{command}: resume is set and out is {str(out)!r}, which holds no saved run; a "
                         "directory that train has saved into fits")
    if not resume and step is not None:
        raise ValueError(f"{command}: out is {str(out)!r}, which holds a run of {step:,} steps; --resume goes on "
                         "with it, another --out starts anew")
    found = next((name for name in CHECKPOINT if (out / name).exists()), None)
    if not resume and found is not None:
        raise ValueError(f"{command}: out is {str(out)!r}, which holds {found} of something else; a new or an "
                         "empty directory fits; take another --out")


def saved_run(out: Path) -> dict | None:
    """What resume/run.json says of the run that is saved in `out`, None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    old = out / "resume.old" / "run.json"  # where a kill between two renames of earlier versions left it
    path = next((path for path in (current(out, "resume/run.json"), old) if path.is_file()), None)
    if path is None:
        return None
    advice = "restore it, or start anew with another --out"
    run = read_json(path, advice)
    if not isinstance(run.get("step"), int):
        raise ValueError(f"{path} is damaged (it names no step); {advice}")
    return run


def saved_step(out: Path) -> int | None:
    """Steps of the run that is saved in `out`, None where there is none."""
    run = saved_run(Path(out))
    return None if run is None else run["step"]
