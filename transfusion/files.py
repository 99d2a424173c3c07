"""Files that stand whole: a kill at any moment leaves the older or the newer one.

Whatever is saved is written aside, synced and renamed. One file is renamed over the older one (`written`). The files of
a checkpoint cannot all be renamed at once (`replacing`):

    .saving/   The new files are written here and synced. Until this directory is renamed, the older save stands.
    .saved/    From then on the new save counts. Its files are renamed into their places one by one; what is left of
               the older save goes, and journal.json last.

A kill in between leaves the new save partly in its place and partly in .saved. Readers put the two together without
writing anything (`whole`, `current`), and the next writer finishes the move (`settle`). checksums.json holds the CRC-32
of each file of weights, which finds every flipped bit at some 3.5 GB/s (SHA-256: 1.3 GB/s).
"""
import contextlib
import errno
import glob
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from transfusion.journal import read_journal
from transfusion.locks import in_use, locked

HOST = socket.gethostname()
SAVING, SAVED, JOURNAL, CHECKSUMS, ASIDE = ".saving", ".saved", "journal.json", "checksums.json", ".new-"
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
           "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json", "vae/*")
"""What a loader would take for a part of the new save if the older one left it behind."""
STATE = ("resume/*", "resume/state/*")
"""What resuming would take for one, where the new save holds resume/: it is one file, or the shards of processes."""
SUMMED = (".safetensors", ".distcp", ".metadata")  # ends of files that checksums are kept of
STEPS = "steps"  # the directory, in a run's, of saves that stay beside the newest
_staging: list[Path] = []                    # directories being filled: what is saved inside one is a part of it


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Name `path` in errors of the file system that do not say where they arose, safetensors' among them."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def read_json(path: Path, advice: str = "copy it again or make it anew") -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: the file does not hold one; the message names it.
    """
    value = read_json_value(path, advice)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(value).__name__}, not an object); {advice}")
    return value


def read_json_value(path: Path, advice: str) -> object:
    """What a JSON file holds, of any kind.

    Raises:
        ValueError: the file is no JSON; the message names it and the line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the objects on the lines of a file, each with its file and line for messages.

    Raises:
        ValueError: a line that holds none; the message names file and line.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if any("\udc80" <= letter <= "\udcff" for letter in line):
                raise ValueError(f"{where} is not UTF-8; save the file as UTF-8")
            try:
                value = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is damaged ({error}); an object in JSON fits") from error
            if not isinstance(value, dict):
                raise ValueError(f"{where} holds a {type(value).__name__}; an object in JSON fits")
            if line.strip():
                yield where, value


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a path of the same suffix to write to; it takes the place of `path` at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{ASIDE}{os.getpid()}@{HOST}-{path.name}")
    _clear(path.parent, glob.escape(path.name))
    try:
        with file_errors(path):
            aside.touch()
            mode = aside.stat().st_mode & 0o777  # as umask says: safetensors' files can be read by their owner alone
            yield aside
            aside.chmod(mode)
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _clear(directory: Path, names: str = "*") -> None:
    """Remove what killed writers of files of these names left: this host's, and another's that is a day old."""
    for left in directory.glob(f"{ASIDE}*-{names}"):
        pid, _, rest = left.name.removeprefix(ASIDE).partition("@")
        runs = not pid.isdigit() or Path("/proc", pid).exists() or not Path("/proc/self").exists()
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):  # directories are of others
            if not runs if rest.startswith(f"{HOST}-") else time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()


def check_writable(command: str, directory: Path) -> None:
    """Refuse a directory, which is made where it is missing, that no file can be written into.

    Raises:
        ValueError: the message names it.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{command}: {str(directory)!r} cannot be written into ({error.strerror}); a directory that "
                         "can be made and written fits") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece, in UTF-8; of other text, see `spelled`."""
    with written(path) as aside:
        aside.write_text(spelled(text), encoding="utf-8")


def spelled(text: str) -> str:
    """Text with escapes for what UTF-8 cannot write, such as names of files that are bytes of another encoding."""
    return text.encode(errors="backslashreplace").decode()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync directories
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(out: Path, weights: bool = True, keep: str | None = None) -> Iterator[Path]:
    """Yield an empty directory; what is written there takes its place in `out` at the end, as a whole.

    Files of other names in `out` stay, but for weights: where the new save holds any, the older save's weights, adapter
    and autoencoder go, unless `weights` is False. `keep` names a directory in `out` where the new save stays when a
    later one takes its place. Inside another `replacing` the directory is that one's.

    Raises:
        ValueError: another process writes into `out`.
        OSError: the disk is full, or the like; the older save stands.
    """
    out = Path(out)
    if any(stage == out or stage in out.parents for stage in _staging):
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with locked(out):
        settle(out)
        fresh = out / SAVING
        fresh.mkdir()
        _staging.append(fresh)
        try:
            with file_errors(out):
                yield fresh
                if not any(fresh.iterdir()):
                    fresh.rmdir()
                    return
                _seal(out, fresh, weights, keep)
                if keep is not None and (out / keep).is_dir():  # of a run that was put back to an older save
                    remove(out / keep)
                os.rename(fresh, out / SAVED)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        finally:
            _staging.remove(fresh)
        sync(out)
        _finish(out)


def _seal(out: Path, fresh: Path, weights: bool, keep: str | None) -> None:
    """Write the checksums and the journal of a new save, let others read it as umask says, and sync it."""
    for directory in [fresh, *(path for path in fresh.rglob("*") if path.is_dir())]:
        kept = checksums(out) if directory == fresh and not weights else {}  # of weights that stay
        if sums := kept | {path.name: checksum(path) for path in _summed(directory)}:
            (directory / CHECKSUMS).write_text(json.dumps({"crc32": sums}, indent=2) + "\n")
    files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if not path.is_dir())
    weights = weights and any(path for pattern in WEIGHTS for path in fresh.glob(pattern))
    patterns = (WEIGHTS if weights else ()) + (STATE if (fresh / "resume").is_dir() else ())
    older = (path for pattern in patterns for path in out.glob(pattern) if path.is_file())
    left = {str(path.relative_to(out)) for path in older} - set(files)
    if weights and files and CHECKSUMS not in files and (out / CHECKSUMS).is_file():
        left.add(CHECKSUMS)
    (fresh / JOURNAL).write_text(json.dumps({"files": files, "obsolete": sorted(left), "keep": keep}))
    mode = (fresh / JOURNAL).stat().st_mode & 0o777
    for name in files:
        (fresh / name).chmod(mode)
        sync(fresh / name)
    sync(fresh / JOURNAL)
    for directory in [*(path for path in fresh.rglob("*") if path.is_dir()), fresh]:
        sync(directory)


def _summed(directory: Path) -> list[Path]:
    """The files of a directory that checksums are kept of."""
    return sorted(path for path in directory.iterdir() if path.name.endswith(SUMMED) and path.is_file())


def _finish(out: Path) -> None:
    """Move what waits in .saved into its place; may be stopped and called again at any moment."""
    saved, journal = out / SAVED, read_journal(out / SAVED / JOURNAL)
    if journal.keep is not None:
        _link(saved, journal.files, out / journal.keep)
    places = {out}
    for name in journal.files:
        if (saved / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(saved / name, out / name)
            places.add((out / name).parent)
    for name in journal.obsolete:
        (out / name).unlink(missing_ok=True)
        places.add((out / name).parent)
    for place in places:
        if place.is_dir():
            sync(place)
        if place != out:
            with contextlib.suppress(OSError):
                place.rmdir()  # where only obsolete files were
    (saved / JOURNAL).unlink()
    shutil.rmtree(saved)
    sync(out)


def _link(saved: Path, files: list[str], place: Path) -> None:
    """Let the files of a save stand in `place` too, as hard links or, on a file system without these, as copies."""
    if place.exists():
        return
    aside = place.with_name(f"{ASIDE}{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in files:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(saved / name, aside / name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(saved / name, aside / name)
            sync(aside / name)
    for directory in [path for path in aside.rglob("*") if path.is_dir()] + [aside]:
        sync(directory)
    os.rename(aside, place)
    sync(place.parent)


def remove(directory: Path) -> None:
    """Remove a directory at once for those who look; a kill or an open file on NFS leaves a part behind an `ASIDE`."""
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=directory.parent))
    os.rename(directory, aside)
    shutil.rmtree(aside, ignore_errors=True)


def settle(out: Path) -> None:
    """Finish a whole save that a kill interrupted and clear what others left; for who holds the lock of `out`."""
    if (out / SAVED / JOURNAL).is_file():
        _finish(out)
    # earlier versions renamed twice, and a kill in between left this
    if (out / "resume.old").is_dir() and not (out / "resume" / "run.json").is_file():
        shutil.rmtree(out / "resume", ignore_errors=True)
        os.rename(out / "resume.old", out / "resume")
    for name in (SAVED, SAVING, "resume.new", "resume.old"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    _clear(out)


def unfinished(out: Path) -> bool:
    """Whether a kill left the newest save of `out` partly in .saved; a process that is moving it now is waited for."""
    journal, began = Path(out) / SAVED / JOURNAL, time.monotonic()
    while journal.is_file() and in_use(Path(out)) and time.monotonic() - began < 10:
        time.sleep(0.02)
    return journal.is_file()


def current(out: Path, name: str) -> Path:
    """The file `name` of the newest save in `out`, wherever it is."""
    waiting = Path(out) / SAVED / name
    return waiting if unfinished(out) and waiting.exists() else Path(out) / name


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yield a directory that holds the newest save of `out`.

    It is `out` itself or, where a kill left the save in two places, a directory of links to its files.
    """
    out = Path(out)
    if not unfinished(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as view:
        for name in read_journal(out / SAVED / JOURNAL).files:
            (Path(view) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(view) / name).symlink_to(current(out, name).resolve())
        yield Path(view)


def checksum(path: Path) -> str:
    """The CRC-32 of a file, eight hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def verify(directory: Path) -> None:
    """Refuse weights in `directory` that are cut off or differ from checksums.json.

    Files that it does not name need only be whole.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    for path in _summed(Path(directory)):
        _check(path)


def _check(path: Path) -> None:
    while True:
        sums = checksums(path.parent)
        problem = _problem(path, sums.get(path.name))
        if problem is None or sums == checksums(path.parent):  # otherwise a newer save took its place meanwhile
            break
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); copy it again or make it anew")


def check_files(directory: Path) -> None:
    """Refuse a checkpoint with a damaged file; what else is wrong with it, its loader says.

    Raises:
        ValueError: the message names the file.
    """
    for name in ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
                 "preprocessor_config.json", "model.safetensors.index.json",
                 "diffusion_pytorch_model.safetensors.index.json"):
        if (Path(directory) / name).is_file():
            read_json(Path(directory) / name)
    verify(directory)


def checksums(out: Path) -> dict[str, str]:
    """The CRC-32 of each file of weights in `out`, as it was saved; {} for what other programs wrote."""
    path = current(out, CHECKSUMS)
    sums = read_json(path, "delete it to load the weights unchecked").get("crc32") if path.is_file() else {}
    return sums if isinstance(sums, dict) else {}


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, checked against the checksums beside it.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it or make it anew")
    _check(path)
    return load_file(path, device=device)


def _problem(path: Path, expected: str | None) -> str | None:
    """What is wrong with a file of weights, None where nothing is."""
    open(path, "rb").close()  # an error of the file system, safetensors' own would not name the file
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except SafetensorError as error:
        return str(error)
    if expected is not None and (found := checksum(path)) != expected:
        return (f"its checksum is {found}, in {path.parent / CHECKSUMS} {expected}; delete that one if the weights "
                "were changed on purpose")
    return None
