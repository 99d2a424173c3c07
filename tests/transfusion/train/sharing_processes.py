"""What four processes compute that share rows by twos, for tests/transfusion/train/test_sharing.py."""
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.transfusion.train.two_processes import MODELS, ROWS, Rows, random_model
from transfusion.sequence import CONTEXT_ATTENTION, Context
from transfusion.train.loop import accumulate, clip_gradients
from transfusion.train.parallel import shard, whole

NAMES = ("decoder, unet", "adaln, dit, 2d", "mixture_of_transformers, dit, checkpointed", "adaln, unet, lora",
         "adaln, dit, images")


class SharedRows(Rows):
    """A task whose rows several ranks share."""

    def __init__(self, model, numbers, context):
        super().__init__(model, numbers)
        self.context = context

    def batches(self, step):
        """This rank's shares of the rows, and what they count."""
        found = []
        for batch in super().batches(step):
            part = self.base.share(batch.inputs[0], self.context)
            counts = {"text_loss": len(part.text_targets), "diffusion_loss": int(part.drawn.sum())}
            found.append(batch._replace(inputs=(part, *batch.inputs[1:]), counts=counts))
        return found


def step(task):
    """Losses, gradients and their norm."""
    means, (player,), _ = accumulate(task, 0)
    gradients = {name: whole(p.grad).clone() for name, p in player.model.named_parameters() if p.grad is not None}
    return means, gradients, whole(clip_gradients(player, None))


def alone(name, kind):
    """A step of one process."""
    return step(Rows(random_model(**MODELS[name]).double(), sum(ROWS[kind], ())))


def run(rank: int, folder) -> None:
    """Step with every model: weights in shards over all four, rows over the pairs, tokens inside each pair."""
    mesh, pairs = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "context"))
    found = {}
    for name in NAMES:
        for way, attention in CONTEXT_ATTENTION.items():
            model = random_model(**MODELS[name]).double()
            shard(model, mesh)
            for kind, numbers in ROWS.items():
                model.zero_grad()
                task = SharedRows(model, numbers[rank // 2], Context(pairs.get_group("context"), attention))
                found[name, kind, way] = step(task)
    if rank == 0:
        torch.save(found, folder / "found.pt")
