"""The optimizer of every trainer, and learning rates.

Another optimizer is chosen in `build_optimizer`: the loop and the checkpoints know none by name.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from transfusion.train.average import Average
from transfusion.train.settings import OptimizerSettings, StepSettings

FACTOR = "lr_factor"
"""What an optimizer's group has whose learning rate is not that of the others."""


@dataclass(eq=False)
class Player:
    """A network that is trained, its optimizer, and the average of its weights if there is one.

    `name` tells it from another one of the same run, and `loss` is what the log calls its loss.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    averaged: Average | None = None
    name: str = ""
    loss: str = "loss"

    def __post_init__(self):
        self.built = [dict(group) for group in self.optimizer.param_groups]  # what an optimizer changes there is saved

    def prefix(self, separator: str) -> str:
        """What stands before its names: nothing, or its own name and the separator."""
        return f"{self.name}{separator}" if self.name else ""

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, times the factor of each group that has one."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(FACTOR, 1.0)


def learning_rate(step: int, optim: OptimizerSettings) -> float:
    """Linear warm-up, then min_lr + (lr - min_lr) * share, where the schedule makes `share` of its progress x.

        cosine      share = (1 + cos(pi x)) / 2     x from the end of the warm-up to the last step (arXiv:1608.03983)
        wsd         share = 1 - sqrt(x)             x from `decay_share` of the steps before the last one, until when
                                                    the rate is lr (warmup-stable-decay, arXiv:2404.06395; the form of
                                                    the decay: arXiv:2405.18392)
        constant    share = 1
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    left, decay = optim.steps - step, optim.decay_share * optim.steps
    if optim.schedule == "constant" or optim.schedule == "wsd" and left >= decay:
        return optim.lr
    if optim.schedule == "wsd":
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 - math.sqrt(1 - left / decay))
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: torch.nn.Module, optim: StepSettings, *, fused: bool | None = True) -> torch.optim.Optimizer:
    """AdamW whose weight decay reaches matrices only; `fused` is torch's option, and changes the last bits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)


def scale_rates(optimizer: torch.optim.Optimizer, chosen: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Make the learning rates of the chosen parameters `factor` times the others': they get groups of their own."""
    if factor == 1:
        return
    chosen, groups = set(chosen), []
    for group in optimizer.param_groups:
        for more, of_chosen in (({}, False), ({FACTOR: factor}, True)):
            parameters = [p for p in group["params"] if (p in chosen) == of_chosen]
            groups += [group | {"params": parameters} | more] if parameters else []
    optimizer.param_groups = groups
