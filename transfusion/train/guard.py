"""A guard against steps that would throw a run back: losses and gradient norms far above their running medians.

    spike    x > factor * median of the last `window` steps that were taken

One batch of odd data can give such a step, after which a run takes long to come back, or never does. Where PaLM's loss
spiked, its training went back to a save and left out some hundred batches (arXiv:2204.02311, section 5.1); here the
step itself is not taken.
"""
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from transfusion.train.optimizer import Player
from transfusion.train.settings import GuardSettings

SKIPPED = "skipped"
"""What the record of a skipped step has: the number of steps skipped so far."""


class Spike(FloatingPointError):
    """The guard ends a run: in all its processes, which have the same numbers."""

    agreed = True


class Guard:
    """Looks at each step before it is taken. What it knows is in the log, so that a resumed run goes on as before.

    Every process of a run comes to the same decision: losses and gradient norms are those of all processes.
    """

    def __init__(self, command: str, settings: GuardSettings, players: Iterable[Player], records: Sequence[Mapping]):
        """`records` are those of the steps before the first one, in order."""
        self.command, self.settings = command, settings
        names = [name for player in players for name in (player.loss, f"{player.prefix('_')}grad_norm")]
        self.past = {name: deque(maxlen=settings.window) for name in names}
        self.skipped = self.in_a_row = 0
        for record in records:
            self._take_in(record, SKIPPED in record)

    def skips(self, step: int, found: Mapping[str, float]) -> bool:
        """Whether a step must be skipped; one line says so, and why.

        Raises:
            Spike: the run must stop before it.
        """
        settings = self.settings
        wrong = "" if settings.do == "none" else self._wrong(found)
        if wrong and settings.do == "stop":
            raise Spike(f"{self.command}: step {step:,} has {wrong}; it is not taken; --resume with --guard.do "
                        "none takes it, with --guard.do skip leaves it out")
        self._take_in(found, bool(wrong))
        if self.in_a_row > settings.patience:
            raise Spike(f"{self.command}: step {step:,} has {wrong}, and the {settings.patience} steps before it were "
                        "skipped already; --resume with a lower optim.lr, another guard.factor or more guard.patience")
        if wrong:
            tqdm.write(f"step {step:,} has {wrong}; it is skipped, as were {self.skipped - 1:,} before")
        return bool(wrong)

    def notes(self, is_skipped: bool) -> dict[str, int]:
        """What the record of a step is told."""
        return {SKIPPED: self.skipped} if is_skipped else {}

    def _take_in(self, found: Mapping[str, float], is_skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        self.skipped += is_skipped
        for name, values in self.past.items():
            if name in found and not is_skipped:
                values.append(found[name])

    def _wrong(self, found: Mapping[str, float]) -> str:
        """What is not as it should be, in words."""
        for name, values in self.past.items():
            if name not in found:
                continue
            if not math.isfinite(found[name]):
                if self.settings.do == "skip":
                    return f"a {name} of {found[name]}"
                continue  # `check_finite` ends the run
            median = statistics.median(values) if len(values) == values.maxlen else math.inf
            if 0 < median * self.settings.factor < found[name]:  # a loss with negative terms has no factor
                return (f"a {name} of {found[name]:.4g}, {found[name] / median:.1f} times its median over "
                        f"{len(values)} steps, {median:.4g}")
        return ""
