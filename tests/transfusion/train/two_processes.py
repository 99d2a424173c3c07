"""What two processes compute together, for tests/transfusion/train/test_parallel.py: run in each of them by `spawn`."""
import copy
import dataclasses
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tests.transfusion.conftest import in_training, tiny_model
from transfusion import Image, Text
from transfusion.model.backbone import Backbone
from transfusion.model.lora import base_of
from transfusion.sequence import encode, lay_out, split_rows
from transfusion.train.loop import Batch, Term, accumulate, clip_gradients
from transfusion.train.optimizer import Player
from transfusion.train.parallel import shard, whole

UNET = dict(image_layers="unet", unet_channels=(8, 16), unet_blocks=1)
MODELS = {  # options of `random_model`; "trained" is that of `TuneSettings`
    "decoder, linear": dict(image_layers="linear"),
    "decoder, dit, tied": dict(tie_word_embeddings=True),
    "decoder, unet": UNET,
    "adaln, linear": dict(backbone="adaln", image_layers="linear"),
    "adaln, dit, 2d": dict(backbone="adaln", positions="2d"),
    "adaln, unet": dict(backbone="adaln", **UNET),
    "adaln, dit, checkpointed": dict(backbone="adaln", checkpointed=True),
    "mixture_of_transformers, linear": dict(backbone="mixture_of_transformers", image_layers="linear"),
    "mixture_of_transformers, dit, 2d": dict(backbone="mixture_of_transformers", positions="2d"),
    "mixture_of_transformers, unet": dict(backbone="mixture_of_transformers", **UNET),
    "mixture_of_transformers, dit, checkpointed": dict(backbone="mixture_of_transformers", checkpointed=True),
    "decoder, dit, lora": dict(trained="lora"),
    "adaln, unet, lora": dict(backbone="adaln", trained="lora", **UNET),
    "mixture_of_transformers, dit, lora": dict(backbone="mixture_of_transformers", trained="lora"),
    "adaln, dit, images": dict(backbone="adaln", trained="images"),
    "adaln, dit, a copy each": dict(backbone="adaln"),
}
ROWS = {  # of `rows`, in the order in which each process takes them as micro-batches
    "text alone and images alone": ((0,), (1,)),
    "uneven micro-batches": ((0, 1), (2, 3)),
}


def random_model(trained="all", checkpointed=False, frozen=None, **options):
    """A model in training whose adapters, too, are random numbers."""
    return in_training(tiny_model(**options), trained, checkpointed, frozen)


class Rows:
    """A task whose micro-batches are the rows of the given numbers: text, two images, both, next to nothing."""

    def __init__(self, model, numbers):
        self.base = base_of(model)
        self.numbers, self.player = numbers, Player(model, torch.optim.SGD(model.parameters()))

    def batches(self, step):
        """The rows, of which each has times and noise of its own; that of two images has nothing to write."""
        generator = torch.Generator().manual_seed(2)
        images = [Image(torch.rand(1, 8, 8, generator=generator) * 2 - 1) for _ in range(4)]
        rows = [[[Text("a handwritten seven and a handwritten four and a handwritten two")]],
                [[images[0]], [images[1]]],
                [[Text("a"), images[2]], [images[3], Text("a handwritten two")]], [[Text("a")]]]
        parts = split_rows(lay_out([[encode(parts, self.base.tokenizer, self.base.config) for parts in row]
                                    for row in rows], 64, self.base.config.patch_dim), 4)
        images_alone = parts[1]
        parts[1] = dataclasses.replace(images_alone, target_places=images_alone.target_places[:0],
                                       text_targets=images_alone.text_targets[:0])
        return [Batch((parts[number], torch.linspace(0.2, 0.8, parts[number].image_count), torch.tensor([5, number])),
                      {"text_loss": len(parts[number].text_targets), "diffusion_loss": int(parts[number].drawn.sum())})
                for number in self.numbers]

    def losses(self, step, batch):
        """Text loss + 5 * diffusion loss."""
        output = self.player.model(*batch.inputs)
        yield self.player, {"text_loss": Term(1.0, output.text_loss),
                            "diffusion_loss": Term(5.0, output.diffusion_loss)}


def step(model, numbers):
    """Losses, gradients and their norm, of a step over the rows of these numbers; no gradient where it is None."""
    means, (player,), _ = accumulate(Rows(model, numbers), 0)
    found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return means, found, clip_gradients(player, None)


def run(rank: int, folder: Path) -> None:
    """Step with every model on the rows of this process; process 0 saves what came out."""
    shards, copies = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard"))
    found = {}
    for name, options in MODELS.items():
        model = random_model(**options)
        names = [name for name, _ in model.named_parameters()]
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        shard(model, copies if "a copy each" in name else shards)
        assert [name for name, _ in model.named_parameters()] == names
        backbone = next(module for module in model.modules() if isinstance(module, Backbone))
        assert all(isinstance(module, FSDPModule) for module in [model, *backbone.blocks()])
        share = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
        for kind, numbers in ROWS.items():
            model.zero_grad()
            found[name, kind] = *step(model, numbers[rank]), wanted, share
    found["bfloat16"] = bfloat16(shards, rank)
    if rank == 0:
        torch.save(found, folder / "found.pt")


def bfloat16(mesh, rank: int) -> dict:
    """Dtypes that the parts of a model see which computes in bfloat16, and the losses of a step."""
    model, dtypes = tiny_model(backbone="adaln", positions="2d").train(), {}

    def see(name, pick):
        return lambda _, arguments: dtypes.update({name: pick(arguments).dtype})

    shard(model, mesh, torch.bfloat16)
    model.timestep.register_forward_pre_hook(see("times", lambda x: x[0]))
    model.patch_embedding.register_forward_pre_hook(see("noised patches", lambda x: x[1]))
    model.backbone.blocks()[0].mlp.register_forward_pre_hook(see("inside a layer", lambda x: x[0]))
    means, gradients, norm = step(model, ROWS["uneven micro-batches"][rank])
    return {"dtypes": dtypes | {"gradients": {x.dtype for x in gradients.values()}}, "means": means}


def alone(options: dict, dtype: torch.dtype) -> dict:
    """What one process gives for the rows of both."""
    model = random_model(**options).to(dtype)
    return {kind: step(copy.deepcopy(model), sum(numbers, ())) for kind, numbers in ROWS.items()}
