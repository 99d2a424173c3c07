"""When asynchronous work is done, and which warp goes next."""
from dataclasses import dataclass

import numpy as np

SCHEDULES = ("early", "late", "random")


@dataclass(frozen=True)
class Schedule:
    """early: copies and products are done when they are issued. late: when they are waited for. random: in between,
    by the throw of a coin, and warps go on by themselves in an order that changes now and then.

    early and late run threads in the order of the program, many warps at a time.
    """

    name: str = "late"
    seed: int = 0

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule: schedule is {self.name!r}; one of {SCHEDULES} fits")

    @property
    def early(self) -> bool:
        """Whether the copy engine is done at once."""
        return self.name == "early"

    @property
    def apart(self) -> bool:
        """Whether each warp goes by itself."""
        return self.name == "random"

    def at_once(self, coin: "Coin") -> bool:
        """Whether a copy or a product that is issued now is done now."""
        return self.early or self.name == "random" and coin.throw(1 - coin.laziness)


class Coin:
    """The chances of one random schedule: how late work is done, and which warp goes first."""

    def __init__(self, seed: int, warps: int):
        self.random = np.random.default_rng(seed)
        self.laziness = float(self.random.choice([0.0, 0.5, 1.0]))
        self.delivery = float(self.random.choice([0.0, 0.01, 0.1, 0.5]))  # chance that the copy engine goes next
        self.priority = self.random.random(warps)

    def throw(self, chance: float) -> bool:
        """True by a chance."""
        return bool(self.random.random() < chance)

    def shuffle(self):
        """New priorities of warps, every twentieth time."""
        if self.throw(0.05):
            self.priority = self.random.random(len(self.priority))

    def pick(self, count: int) -> int:
        """One of `count`."""
        return int(self.random.integers(count))
