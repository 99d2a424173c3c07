"""The moving average of what is trained, as tensors beside the model: no second model stands in memory.

    average <- decay * average + (1 - decay) * weights        decay of step n: min(ema, (1 + n) / (10 + n))

The tensors are of the parameters' own kind, so that in a sharded model each process averages the shards that it holds.
"""
import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def average_decay(count: int, ema: float) -> float:
    """Decay of the average once it holds the weights of `count` steps: min(ema, (1 + count) / (10 + count)).

    This is the warm-up of TensorFlow's ExponentialMovingAverage with num_updates. Without it the first step's weights
    would keep a share of ema^steps, most of the average of a short run. With it a short run averages its last tenth.
    """
    return min(ema, (1 + count) / (10 + count))


class Average:
    """The exponential moving average of a model's trained parameters, its decay warmed up.

    Build it after `shard`, which puts other parameters in place of a model's.
    """

    def __init__(self, model: torch.nn.Module, ema: float):
        """`ema` is the decay after its warm-up; with 0 the average is the weights themselves, and no tensor is kept."""
        self.ema = ema
        parameters = trained_parameters(model) if ema else {}
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        self.n_averaged = torch.tensor(0)  # on the host, where reading it waits for nothing

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Take in the weights after a step; the first ones are copied."""
        if self.tensors:
            kept, new = list(self.tensors.values()), list(trained_parameters(model).values())
            if (count := int(self.n_averaged)) == 0:
                for average, weights in zip(kept, new):  # DTensors have no _foreach_copy_
                    average.copy_(weights)
            else:
                get_ema_multi_avg_fn(average_decay(count, self.ema))(kept, new, None)
        self.n_averaged += 1

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """Put the averages into the model, and the trained weights back at the end, also after an error.

        Both change places one tensor at a time, so that this takes the memory of the largest one. Inside, nothing may
        be trained or saved for going on.
        """
        exchanged: list[str] = []
        parameters = trained_parameters(model)
        try:
            for name in self.tensors:
                self._exchange(name, parameters[name])
                exchanged.append(name)
            _give_up_gathered(model)
            yield
        finally:
            for name in exchanged:
                self._exchange(name, parameters[name])
            _give_up_gathered(model)

    @torch.no_grad()
    def _exchange(self, name: str, p: torch.nn.Parameter) -> None:
        trained = p.detach().clone()
        p.copy_(self.tensors[name])
        self.tensors[name].copy_(trained)


def _give_up_gathered(model: torch.nn.Module) -> None:
    """Let a sharded model gather its weights anew: those of the root stay gathered between forward passes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
