"""What looks at a run, in one process and in two; run in each of them by `spawn`."""
import copy
import functools
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.transfusion.train.two_processes import MODELS, ROWS, random_model, step
from transfusion import Text
from transfusion.data.training_data import DrawnRows
from transfusion.model.lora import base_of
from transfusion.recipes.digits import Digits, DigitsSettings
from transfusion.sequence import Context
from transfusion.train.average import Average
from transfusion.train.optimizer import Player
from transfusion.train.parallel import shard, whole
from transfusion.train.samples import Samples, SamplesSettings
from transfusion.train.validation import Validation, ValidationSettings

WATCHED = ("decoder, dit, tied", "adaln, unet, lora", "mixture_of_transformers, linear", "adaln, dit, 2d")
"""Models of `MODELS` that two processes look at together."""
SHARED = WATCHED[2:]
"""Those whose processes share the tokens of each row; of the others each takes rows of its own."""
COUNT = 5  # rows, so that the second process has one that counts nothing


def held_out(model, count=COUNT):
    """Held-out rows of digits for a model."""
    base, settings = base_of(model), DigitsSettings(caption_first=0.5, noise_limit=0.5)
    return DrawnRows(Digits(), settings, base.tokenizer, base.config, 2, 96).held_out(count)


def player_of(model):
    """A player whose averages are not its weights."""
    player = Player(model, torch.optim.SGD(model.parameters()), Average(model, 0.5))
    with torch.no_grad():
        for x in player.averaged.tensors.values():
            x.mul_(1.1)
    return player


def look(model, folder, rank=0, ranks=1, share=None):
    """What the watchers find, and whether weights and averages are what they were; pictures are written by rank 0."""
    player = player_of(model)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    kept = {name: whole(x).clone() for name, x in player.averaged.tensors.items()}
    validation = Validation(ValidationSettings(every=2, bins=3), held_out(model), player, steps=9,
                            rank=0 if share else rank, ranks=1 if share else ranks, share=share)
    samples = Samples(SamplesSettings(every=2, steps=2), [Text("a handwritten two"), Text("one")], player,
                      base_of(model), folder, steps=9, writes=rank == 0)
    found = validation.after(2) | samples.after(2)
    same = all(torch.equal(whole(p.detach()), x) for p, x in zip(model.parameters(), before))
    same &= all(torch.equal(whole(player.averaged.tensors[name]), x) for name, x in kept.items())
    return {name: value for name, value in found.items() if "seconds" not in name}, same and model.training


def run(rank: int, folder: Path) -> None:
    """Look at sharded models together, between two steps of training; process 0 saves what came out."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for number, name in enumerate(WATCHED):
        model = shard(random_model(**MODELS[name]), mesh)
        before = step(model, ROWS["uneven micro-batches"][rank])[0]
        model.zero_grad()
        share = functools.partial(base_of(model).share, context=Context()) if name in SHARED else None
        numbers, same = look(model, folder / str(number), rank, 2, share)
        after = step(model, ROWS["uneven micro-batches"][rank])[0]
        found[name] = numbers, same, all(torch.equal(before[key], after[key]) for key in before)
    if rank == 0:
        torch.save(found, folder / "found.pt")


def alone(name, folder):
    """What one process finds."""
    return look(copy.deepcopy(random_model(**MODELS[name])), folder)
