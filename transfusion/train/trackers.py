"""Where a run's numbers go besides log.jsonl: TensorBoard, and Weights & Biases. Both are packages to install.

A resumed run goes on in the same curves. TensorBoard hides what an earlier process wrote after the last save; Weights &
Biases finds the run by the id that is kept in the run's directory, and draws those steps twice.
"""
import contextlib
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from transfusion.files import written

WANDB_ID = "wandb.id"


class Tracker(Protocol):
    """A place for the numbers of each step."""

    def write(self, record: Mapping[str, float]) -> None:
        """Take the numbers of the step `record["step"]`."""

    def sync(self) -> None:
        """Hand on what was taken."""

    def close(self, *, failed: bool) -> None:
        """End, after a run that failed or did not."""


class TensorBoard:
    """Curves in the run's tensorboard/, for `tensorboard --logdir`."""

    def __init__(self, out: Path, settings: Mapping, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def write(self, record: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Write to the disk."""
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        """Write to the disk and end."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its variables decide where that is: WANDB_PROJECT, WANDB_MODE=offline and others."""

    def __init__(self, out: Path, settings: Mapping, step: int):
        import wandb

        file = out / WANDB_ID
        identity = file.read_text().strip() if step and file.is_file() else uuid.uuid4().hex[:8]
        self.run = wandb.init(id=identity, resume="allow", name=out.name, dir=str(out), config=dict(settings))
        self.run.define_metric("*", step_metric="step")  # its own counter never goes back
        with written(file) as aside:
            aside.write_text(identity + "\n")

    def write(self, record: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        self.run.log(dict(record))

    def sync(self) -> None:
        """Nothing: its own process sends."""

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(op: str, names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: the first of them, and how it is installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{op}: log is {name!r}, and the package {name} is not installed; install it (pip install "
                             f"{name}) or leave it out: log.jsonl has the same numbers")


def start_trackers(op: str, names: Sequence[str], out: Path, settings: Mapping, step: int) -> list[Tracker]:
    """Start trackers for a run that goes on from `step`.

    Raises:
        ValueError: one of them is not installed or does not start.
    """
    check_trackers(op, names)
    trackers = []
    for name in dict.fromkeys(names):
        try:
            trackers.append(TRACKERS[name](out, settings, step))
        except Exception as error:  # of a package that is not ours: no network, no key, no room
            for tracker in trackers:
                with contextlib.suppress(Exception):
                    tracker.close(failed=True)
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{op}: log is {name!r}, which does not start: {said}; mend that or leave it out: "
                             "log.jsonl has the same numbers"
                             + ("; with WANDB_MODE=offline it needs neither network nor key" * (name == "wandb"))
                             ) from error
    return trackers
