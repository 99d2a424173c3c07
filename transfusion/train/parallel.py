"""One step on several processes: parameters in shards, losses and gradients as sums over all of them.

    loss = sum over processes and micro-batches of (count / count over all) * mean         gradient: of this sum

Each process holds a shard of every parameter, of its gradient and of what the optimizer keeps (FSDP2, `fully_shard`).
A layer is gathered when it runs, forward or backward, and given up behind it; what is not in a layer (embeddings, image
layers, norms, text head) is gathered once for the whole forward. Without a process group nothing here does anything.
"""
import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from transfusion.model.lora import base_of


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, offload: bool = False) -> nn.Module:
    """Split the parameters of a Transfusion, or of the adapters around it, among the processes of `mesh`, in place.

    Names stay what they were; parameters become DTensors. Gradients are sums over processes, not means: a loss carries
    its share of the whole, as in `transfusion.train.loop.accumulate`. Every process takes the same number of forward
    and backward passes; what its rows hold does not matter: text alone, images alone, nothing to write.

    Args:
        model: in which every process has equal weights, on the device of `mesh`.
        mesh: of one dimension; of two, the first of which holds copies and the second the shards.
        dtype: what is gathered and computed in, such as bfloat16; None for the parameters' own. Gradients are summed
            in float32, and times, patches and latents keep their own dtype.
        offload: keep shards, their gradients and so what an optimizer makes of them in the memory of the CPU; a layer's
            shard is copied to the device where it is gathered.
    """

    def policy(cast_inputs: bool) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32,
                                    cast_forward_inputs=cast_inputs)

    places = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    model.register_forward_hook(reach_every_parameter)  # runs before FSDP's own hooks
    for layer in base_of(model).backbone.blocks():
        fully_shard(layer, mesh=mesh, mp_policy=policy(True), offload_policy=places)
    fully_shard(model, mesh=mesh, mp_policy=policy(False), offload_policy=places)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend has
    return model


def sum_copies(model: nn.Module, now: bool) -> None:
    """Let the next backward pass sum gradients over copies of the weights, or not: once a step is enough.

    Over the shards of a copy each backward pass sums them: no process ever holds the gradient of the whole model.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


def reach_every_parameter(model: nn.Module, arguments: tuple, output):
    """Let the loss of rows without an image depend on every parameter, with gradients of 0.

    A U-Net does not run without an image, and processes that sum their gradients must all have the same ones. The
    parameters of layers, which always run, are in shards here.
    """
    sequence, *_ = arguments
    if sequence.image_count:
        return None
    gathered = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    nothing = sum(p.flatten()[:0].sum() for p in gathered)
    return output._replace(loss=output.loss + nothing, diffusion_loss=output.diffusion_loss + nothing)


def sum_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts over all processes, which count the same things. The only wait of a step for other processes."""
    if not dist.is_initialized():
        return dict(counts)
    numbers = torch.tensor([counts[name] for name in sorted(counts)], dtype=torch.int64)
    dist.all_reduce(numbers)
    return dict(zip(sorted(counts), numbers.tolist()))


def sum_means(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each process's parts of means over all, added up: the means themselves."""
    if not dist.is_initialized():
        return dict(means)
    names = sorted(means)
    numbers = torch.stack([means[name].float() for name in names])
    dist.all_reduce(numbers)
    return dict(zip(names, numbers))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather what a sharded model holds outside its layers, so that parts of it run that are not its forward pass.

    Layers gather themselves when they run. All processes enter this together and make the same calls inside.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(x: Tensor) -> Tensor:
    """Return a tensor that processes hold in shards, or in parts of a sum, as one."""
    return x.full_tensor() if isinstance(x, DTensor) else x
