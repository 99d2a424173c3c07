"""What every watcher of a run has in common: when it looks, and that it leaves everything as it was."""
import contextlib
from collections.abc import Iterator

import torch

from transfusion.train.optimizer import Player


def is_due(done: int, every: int, steps: int) -> bool:
    """Whether a watcher looks after `done` of `steps` steps: every so many, and after the last; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)


@contextlib.contextmanager
def averaged_weights(player: Player, device: torch.device | None = None) -> Iterator[None]:
    """Put the averages into the model, in evaluation mode; put weights, mode and random state back at the end.

    `device` is that the model computes on, None for that of its weights. A compiled model runs as it is written: rows
    and prompts have shapes of their own here, each of which would be compiled.
    """
    model = player.model
    modes = [(module, module.training) for module in model.modules()]
    device = device or next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if player.averaged is not None:
            stack.enter_context(player.averaged.applied(model))
        model.eval()
        try:
            yield
        finally:
            for module, is_training in modes:
                module.training = is_training
