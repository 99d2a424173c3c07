"""What a training step costs, as formulas: memory, operations, bytes and messages.

P parameters, T of them trained, L layers, N GPUs, R rows of S tokens, A visible pairs of query and key, H heads of D
columns, K heads of keys and values, C hidden columns, V words. A weight, a gradient and each of AdamW's moments has 4
bytes (float32), a frozen weight that is held in bfloat16 (F of them) 2.
"""
import math
from typing import NamedTuple

import torch
from torch import nn

from transfusion.model.config import TransfusionConfig
from transfusion.model.lora import base_of
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import IMAGE_ATTENTION, Sequence
from transfusion.train.activations import Activations

FLOAT32, BFLOAT16 = 4, 2
LAYOUTS = ("replicate", "shard", "hybrid")
"""replicate: every GPU holds all, or each group of GPUs that splits the tokens of rows; shard: all GPUs share one copy;
hybrid: the GPUs of a node share one"""


class Sizes(NamedTuple):
    """Numbers of parameters: all, those that are trained, those of one layer, all and trained, and those that are held
    in bfloat16."""

    all: int
    trained: int
    layer: int
    layer_trained: int
    layers: int
    narrow: int = 0


class Work(NamedTuple):
    """Operations of a step, each multiplication and each addition one: forward alone, and with backward."""

    forward: float
    step: float


class Memory(NamedTuple):
    """Bytes on one GPU, by kind."""

    weights: float
    gradients: float
    moments: float
    averages: float
    gathered: float
    """copies of weights in bfloat16: autocast's, of matrices that are not held so, or those that a sharded layer is
    gathered into"""
    activations: Activations
    keys: float = 0.0
    """a layer's keys and values of split rows, those of other GPUs included"""

    def peak(self, activations: float, accumulate: int = 1) -> float:
        """The largest sum of what is there at once, `now` being gathered + activations + working + keys.

            weights + moments + averages + now + gradients          of several micro-batches
            weights + moments + averages + max(now, gradients)      of one: as backward makes gradients, the others go
        """
        fixed = self.weights + self.moments + self.averages
        now = self.gathered + activations + self.activations.working + self.keys
        step = now + self.gradients if accumulate > 1 else max(now, self.gradients)
        return fixed + step


class Messages(NamedTuple):
    """Bytes that each GPU sends in a step, and the seconds that they take."""

    gathered: float
    """weights, in forward and again in backward"""
    scattered: float
    """gradients, summed and left where their weights are"""
    reduced: float
    """gradients, summed and handed to all copies"""
    seconds: float
    keys: float = 0.0
    """keys and values, and their gradients, between GPUs that split the tokens of rows"""


def sizes(model: nn.Module) -> Sizes:
    """Count the parameters of a model, also of one on the meta device or inside peft's; a tied weight counts once."""
    base = base_of(model)
    layers = base.config.text_config.get_text_config().num_hidden_layers
    own = base.backbone.blocks()[::layers]  # the first of text, and that of patches where they have their own
    everything, layer = list(model.parameters()), [p for part in own for p in part.parameters()]
    return Sizes(*(sum(p.numel() for p in some) for some in (
        everything, [p for p in everything if p.requires_grad], layer, [p for p in layer if p.requires_grad])),
        layers, sum(p.numel() for p in everything if p.dtype == torch.bfloat16))


class Keys(NamedTuple):
    """Bytes of keys and values that a GPU holds of a layer and sends in a step, where it splits rows with others."""

    held: float
    sent: float


def split_keys(text_config, by: str, split_by: int, tokens: int, micro_batches: int) -> Keys:
    """What n = `split_by` GPUs hold and send for the keys and values of `tokens`, those of a micro-batch's whole rows.

        M = 2 K D tokens / n * 2        a GPU's own, in bfloat16
        gathered    holds 2 n M         sends 3 (n - 1) M, in forward, in backward and as gradients
        ring        holds 2 M + 6 M     sends 2 (n - 1) M + n * 2 M, for gradients go around in float32

    Each layer of each micro-batch sends so much. With layers computed again it sends (n - 1) M more, which is not
    counted, nor are the patches that change GPUs.
    """
    if split_by == 1:
        return Keys(0.0, 0.0)
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    own = 2 * BFLOAT16 * text_config.num_key_value_heads * head_dim * tokens / split_by
    held, sent = {"gathered": (2 * split_by, 3 * (split_by - 1)), "ring": (8, 2 * (split_by - 1) + 2 * split_by)}[by]
    return Keys(held * own, sent * own * text_config.num_hidden_layers * micro_batches)


def shards(layout: str, gpus: int, gpus_per_node: int, split_by: int = 1) -> int:
    """Return how many GPUs share one copy of weights, gradients and moments; `split_by` split the tokens of rows."""
    return {"replicate": split_by, "shard": gpus, "hybrid": max(split_by, min(gpus, gpus_per_node))}[layout]


def memory(count: Sizes, shared_by: int, activations: Activations, keys: float = 0.0, averaged: bool = True) -> Memory:
    """Bytes on one GPU where `shared_by` GPUs share each copy; weights are `averaged` unless `ema` is 0.

        weights (4 P - 2 F) / n     gradients 4 T / n     AdamW's moments 8 T / n     averaged weights 4 T / n

    One GPU's own weights that are not held in bfloat16 are copied to it by autocast: `activations.copies`. Sharded
    weights are gathered in bfloat16, those outside the layers for the whole step and two layers at a time (one at work,
    one on its way), and these layers' gradients are whole in bfloat16 before they are summed and scattered:
    2 (P - L layer) + 2 * (2 layer + 2 layer_trained).
    """
    gathered = activations.copies
    if shared_by > 1:
        outside = count.all - count.layers * count.layer
        gathered = BFLOAT16 * outside + 2 * BFLOAT16 * (count.layer + count.layer_trained)
    trained = FLOAT32 * count.trained / shared_by
    averages = trained if averaged else 0.0
    weights = (FLOAT32 * count.all - (FLOAT32 - BFLOAT16) * count.narrow) / shared_by
    return Memory(weights, trained, 2 * trained, averages, gathered, activations, keys)


def work(model: nn.Module, plain: Transfusion, rows: Sequence) -> dict[str, Work]:
    """Operations for packed rows, by what is computed.

        layers      2 for each weight of a layer's matrices and each token that it sees
        attention   4 H D A for each layer
        text head   2 V C for each text target (where the rows of BOI and EOI learn, it has a gradient of all rows)
        images      2 for each weight of image layers and each place that it is applied at

    Backward costs the same again for the gradients of what comes in, and once more for those of trained weights:
    attention 3 times its forward, frozen matrices 2 times, trained ones 3 times. (The attention kernels compute their
    scores again, so that they take 3.5 times; as is usual, that is not counted.)

    Args:
        model: what is trained, perhaps with adapters; it may be on the meta device.
        plain: the same without adapters.
    """
    config = plain.config
    base = base_of(model)
    text, tokens, patches = config.text_config.get_text_config(), rows.tokens.numel(), len(rows.patches)
    own = getattr(base.backbone, "image_layers", None)  # of patches, in a mixture of transformers
    blocks = base.backbone.blocks()[:text.num_hidden_layers]
    layers = _matrices(blocks, tokens if own is None else tokens - patches)
    if own is not None:
        layers = _sum(layers, _matrices(own, patches))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    masks = base.backbone.masks(IMAGE_ATTENTION[config.image_attention].mask(rows))
    areas = {kind: int(mask.area().sum()) for kind, mask in masks.items()}
    attention = 4 * text.num_attention_heads * head_dim * sum(areas[kind] for kind in base.backbone.kinds)
    head = 2 * plain.get_output_embeddings().weight.numel() * len(rows.text_targets)
    learns = any(p.requires_grad for p in base.get_output_embeddings().parameters())  # also if BOI and EOI alone do
    return {"layers": layers, "attention": Work(attention, 3 * attention),
            "text head": Work(head, (3 if learns else 2) * head), "images": _images(plain, config, rows)}


def _sum(*parts: Work) -> Work:
    return Work(*(sum(x) for x in zip(*parts)))


def _matrices(modules, places: float) -> Work:
    """Matrices and filters of modules, each applied at so many places; a module that peft keeps unused counts not."""
    found = [(p.numel(), p.requires_grad) for module in modules for name, p in module.named_parameters()
             if p.ndim in (2, 4) and "original_module" not in name and "trainable_tokens" not in name]
    forward = 2 * places * sum(count for count, _ in found)
    return Work(forward, sum(2 * places * count * (3 if trained else 2) for count, trained in found))


def _images(plain: Transfusion, config: TransfusionConfig, rows: Sequence) -> Work:
    """Timesteps, once an image, and what stands before and behind the decoder."""
    images, patches = rows.image_count, len(rows.patches)
    before, behind = plain.patch_embedding, plain.image_head
    once = [module for module in (plain.timestep, getattr(plain.backbone, "modulation", None)) if module is not None]
    if config.image_layers == "unet":
        return _sum(_matrices(once, images), _unet(before, before.down, before.input, before.output, 1, rows),
                    _unet(behind, behind.up, behind.output, behind.input, 0, rows))
    once += [module for layer in (before, behind) for name, module in layer.named_children() if name != "linear"]
    once.append(before.linear)  # it takes the timestep once and then each patch
    return _sum(_matrices(once, images), _matrices([before.linear, behind.linear], patches))


def _unet(half: nn.Module, scales: nn.ModuleList, fine: nn.Module, coarse: nn.Module, step: int,
          rows: Sequence) -> Work:
    """One half of a U-Net: its convolutions at every position of their resolutions, its timesteps once an image.

    Resolution i has 4^(k - i) positions in a patch, from i = 0, the finest, to k. `scales[i]` writes resolution
    i + `step`.
    """
    places = [len(rows.patches) * 4**i for i in reversed(range(len(half.levels)))]
    parts = [_matrices([fine], places[0]), _matrices([coarse], places[-1])]
    parts += [_matrices([scale], places[i + step]) for i, scale in enumerate(scales)]
    for level, count in zip(half.levels, places):
        parts.append(_matrices([module for module in level.modules() if isinstance(module, nn.Conv2d)], count))
        parts.append(_matrices([block.time_emb_proj for block in level], rows.image_count))
    return _sum(*parts)


def moved(count: Sizes, activations: float, micro_batches: int) -> float:
    """Bytes that a step reads and writes at least, of a GPU that holds all weights.

        2 (3 P - F) micro_batches  weights in bfloat16: written as copies, unless held so, and read in forward and in
                                   backward
        2 activations              written and read again
        48 T                       gradients written, read for their norm and read by AdamW, which reads and writes
                                   weights and both moments: 4 * (3 + 2 + 4), and the average's 4 * 3
    """
    weights = BFLOAT16 * (3 * count.all - count.narrow)
    return (weights + 2 * activations) * micro_batches + FLOAT32 * 12 * count.trained


def messages(shared_by: int, count: Sizes, gpus: int, gpus_per_node: int, micro_batches: int, link: float,
             network: float, split_by: int = 1, keys: float = 0.0) -> Messages:
    """What is sent in a step where n = `shared_by` GPUs share a copy, m = N / n copies.

        gathered    2 (n - 1) / n * 2 P for each micro-batch     all-gathers, in bfloat16, of all weights
        scattered   (n - 1) / n * 4 T for each micro-batch       reduce-scatters, in float32, of trained weights
        reduced     2 (m - 1) / m * 4 T / n                      all-reduces of what a GPU holds of the gradients
        keys        of `split_keys`                              between the `split_by` GPUs that split rows

    Rings inside a node run at half of `link`, one direction's bytes a second. A ring across nodes uses all network
    cards of a node together, `gpus_per_node` times `network`, and passes through the links, too: the slower counts.
    The m copies are reduced by n such rings at once, or by as many as a node has GPUs, which share the cards.
    """
    n, inside = shared_by, link / 2
    m = gpus // n

    def rate(ring: int, rings: int = 1) -> float:
        return inside if ring <= gpus_per_node else min(inside, network * gpus_per_node / rings)

    gathered = 2 * (n - 1) / n * BFLOAT16 * count.all * micro_batches
    scattered = (n - 1) / n * FLOAT32 * count.trained * micro_batches
    reduced = 2 * (m - 1) / m * FLOAT32 * count.trained / n
    seconds = (gathered + scattered) / rate(n) + reduced / rate(gpus, min(n, gpus_per_node)) + keys / rate(split_by)
    return Messages(gathered, scattered, reduced, seconds, keys)


def rows_on_a_gpu(rows: int, gpus: int, accumulate: int) -> int:
    """Rows of the largest micro-batch on one GPU."""
    return max(1, math.ceil(rows / gpus / accumulate))
