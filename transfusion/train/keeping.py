"""Which saves of a run stay: the newest in `out`, and older ones, on demand, in `out`/steps.

    out/steps/00001000/    the save of 1,000 steps: a run's directory of its own, which `from_pretrained` loads and
                           --out out/steps/00001000 --resume goes on from

A save that is to stay is linked there when it takes its place in `out`, so that it takes no room until a newer one
comes. What need not stay goes when the newer one is whole.
"""
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from transfusion.files import ASIDE, STEPS, remove, replacing
from transfusion.locks import LOCK
from transfusion.train.log import LOG
from transfusion.train.settings import RunSettings


@contextlib.contextmanager
def save_place(config: RunSettings, step: int) -> Iterator[Path]:
    """Yield an empty directory for the save after `step` steps, as `replacing` does, then remove what need not stay."""
    stays, place = config.keep_last > 0 or _for_good(config, step), f"{STEPS}/{step:08d}"
    if stays and _is_run(config.out / place):
        print(f"{config.out / place} holds another run, which stays; this save is in {config.out} alone", flush=True)
        stays = False
    with replacing(config.out, keep=place if stays else None) as fresh:
        yield fresh
    if (config.out / STEPS).is_dir():
        _prune(config, step)


def kept_steps(out: Path) -> list[int]:
    """The steps whose saves stay in `out`/steps, in order."""
    return sorted(int(path.name) for path in (out / STEPS).glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def _for_good(config: RunSettings, step: int) -> bool:
    return config.keep_every is not None and step % config.keep_every == 0


def _is_run(place: Path) -> bool:
    """Whether somebody trains in a save's directory or did, as `--out out/steps/00001000 --resume` does."""
    return any((place / name).exists() for name in (LOCK, LOG))


def _prune(config: RunSettings, newest: int) -> None:
    """Remove saves that need not stay and in which nobody went on.

    Those after `newest` are of a run that was put back to an older save.
    """
    place = config.out / STEPS
    for left in place.glob(f"{ASIDE}*"):  # a kill came in between, or somebody read it
        shutil.rmtree(left, ignore_errors=True)
    steps = [step for step in kept_steps(config.out) if step <= newest]
    last = steps[-config.keep_last:] if config.keep_last else []
    for step in steps:
        if step not in last and not _for_good(config, step) and not _is_run(place / f"{step:08d}"):
            remove(place / f"{step:08d}")
