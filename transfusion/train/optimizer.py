"""What training runs share: AdamW, its learning rate, and the moving average of the weights.

`optim` are a run's settings, with steps, lr, min_lr, warmup, betas, weight_decay and ema.
"""
import math

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def learning_rate(step: int, optim) -> float:
    """Linear warm-up, then a cosine down to min_lr."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: torch.nn.Module, optim) -> torch.optim.AdamW:
    """AdamW whose weight decay reaches matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=optim.lr, betas=optim.betas, fused=True)


def average_decay(count: int, ema: float) -> float:
    """Decay of the average once it holds the weights of `count` steps: min(ema, (1 + count) / (10 + count)).

    Without this warm-up (TensorFlow's ExponentialMovingAverage with num_updates) the first step's weights would keep a
    share of ema^steps, most of the average of a short run; with it a short run averages its last tenth.
    """
    return min(ema, (1 + count) / (10 + count))


def build_average(model: torch.nn.Module, optim) -> AveragedModel:
    """Exponential moving average of what is trained, its decay warmed up; what is frozen stays in memory once."""
    averaged = AveragedModel(model)

    def update(kept: list[torch.Tensor], new: list[torch.Tensor], _) -> None:
        decay = average_decay(int(averaged.n_averaged), optim.ema)  # a count on the host: nothing waits
        get_ema_multi_avg_fn(decay)(kept, new, None)

    averaged.multi_avg_fn = update
    for copied, p in zip(averaged.module.parameters(), model.parameters()):
        if not p.requires_grad:
            copied.data = p.data
    return averaged
