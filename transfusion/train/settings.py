"""Settings that training runs share: where a run computes and saves, and how its optimizer steps.

Each option is written here once, with what it means and what fits. A trainer's settings extend these classes by what is
its own; where it starts from other values, `defaults` names them:

    @dataclass(frozen=True)
    @defaults(steps=400, lr=3e-3)
    class ClassifierSettings(JobSettings, StepSettings): ...
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

from transfusion.settings import Count, Decay, NotNegative, OneOf, Positive, Range, Seed, WholeNumber
from transfusion.train.trackers import TRACKERS

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class JobSettings:
    """What any training needs to know about where it runs."""

    seed: Seed = 0
    """seed of all that is random: initialisation, data and noise"""
    save_every: Count = 500
    """steps between saves"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


@dataclass(frozen=True)
class GuardSettings:
    """What happens at a step whose loss or gradient norm is far above those before it."""

    do: Annotated[str, OneOf(("none", "skip", "stop"))] = "none"
    """none: the step is taken; skip: its gradients are dropped, as are those of a step that is not finite; stop:
    the run saves and stops before it"""
    factor: Annotated[float, Range(above=1)] = 5.0
    """largest loss or gradient norm that passes, as a multiple of its running median"""
    window: Count = 100
    """steps that the median is taken over; until so many have been taken, no step counts as too far above it"""
    patience: Count = 10
    """steps in a row that may be skipped; one more, and the run saves and stops"""


@dataclass(frozen=True)
class RunSettings(JobSettings):
    """A training run in a directory of its own."""

    out: Path = Path("runs/train")
    """directory for the checkpoint, the log and what resuming needs"""
    resume: bool = False
    """go on from what `out` holds"""
    auto_resume: bool = False
    """go on from what `out` holds, or begin where it holds no run: for jobs that are started again as they were"""
    allow_changed: bool = False
    """go on with other settings of model, data or seed, too; what changed is kept in resume/run.json"""
    keep_last: WholeNumber = 0
    """how many of the newest saves are also kept in `out`/steps; 0: none"""
    keep_every: Count | None = None
    """steps between saves that are kept there for good, a multiple of save_every; None: none is"""
    stop_after: Count | None = None
    """stop (and save) after this step, as Ctrl-C would"""
    autocast: bool = False
    """compute in bfloat16 under autocast"""
    max_hours: Positive | None = None
    """save and stop in time, so that the run takes at most so many hours from its first step; None: no limit"""
    guard: GuardSettings = GuardSettings()
    log: tuple[Annotated[str, OneOf(TRACKERS)], ...] | None = None
    """where the numbers of log.jsonl go as well: tensorboard, wandb, both"""

    def __post_init__(self):
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(f"train: keep_every is {self.keep_every:,}; a multiple of save_every, "
                             f"{self.save_every:,}, fits")


@dataclass(frozen=True)
class StepSettings:
    """How many steps an optimizer takes, and how far each goes."""

    steps: Count = 1000
    """optimizer steps in all"""
    lr: Positive = 3e-4
    """peak learning rate"""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's betas"""
    weight_decay: NotNegative = 0.1
    """AdamW's decay of matrices and filters"""
    clip: Positive | None = 1.0
    """largest gradient norm; None: any"""
    accumulate: Count = 1
    """micro-batches that a step's batch is split into, one in memory at a time; their gradients are added up"""


@dataclass(frozen=True)
class OptimizerSettings(StepSettings):
    """Steps under a schedule of learning rates, and the average of the weights.

    The defaults are the paper's: 3e-4, betas 0.9 and 0.95, decay 0.1, clip 1.
    """

    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    """learning rates after the warm-up: cosine, down to min_lr; wsd, constant and then down to min_lr over the last
    `decay_share` of the steps; constant"""
    decay_share: Annotated[float, Range(above=0, high=1)] = 0.1
    """share of the steps in which wsd lowers the learning rate"""
    min_lr: NotNegative = 1.5e-5
    """learning rate at the end of cosine and wsd; lr at most"""
    warmup: WholeNumber = 100
    """steps of linear warm-up"""
    ema: Decay = 0.999
    """decay of the averaged weights that are saved, after n steps at most (1 + n) / (10 + n); 0 keeps no average"""


def defaults(**values) -> Callable[[type], type]:
    """Give a settings class, below `@dataclass`, other default values for options that its base classes write."""
    def change(kind: type) -> type:
        hints = get_type_hints(kind, include_extras=True)
        kind.__annotations__ = {**inspect.get_annotations(kind), **{name: hints[name] for name in values}}
        for name, value in values.items():
            setattr(kind, name, value)
        return kind
    return change


def check_steps(op: str, optim: StepSettings, batch: str, prefix: str = "") -> None:
    """Refuse settings of steps that do not fit each other; their names stand behind `prefix`.

    `batch` is the name of the one that says how large a batch is.

    Raises:
        ValueError: the first of them, named.
    """
    has_schedule = isinstance(optim, OptimizerSettings)
    if has_schedule and optim.schedule != "constant" and optim.min_lr > optim.lr:
        raise ValueError(f"{op}: {prefix}min_lr is {optim.min_lr:g} and {prefix}lr {optim.lr:g}; at most lr fits; "
                         f"lower {prefix}min_lr or raise {prefix}lr")
    if has_schedule and optim.schedule == "wsd":
        stable = optim.steps - optim.decay_share * optim.steps
        if optim.warmup > stable:
            raise ValueError(f"{op}: {prefix}warmup is {optim.warmup} and {prefix}decay_share {optim.decay_share:g} of "
                             f"{optim.steps} steps; at most {int(stable)} steps of warm-up fit before wsd's decay; "
                             f"lower one of them or raise {prefix}steps")
    if optim.accumulate > getattr(optim, batch):
        raise ValueError(f"{op}: {prefix}accumulate is {optim.accumulate} and {prefix}{batch} {getattr(optim, batch)}; "
                         f"at most {batch} fits; lower {prefix}accumulate")
