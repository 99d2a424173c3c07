"""Layers that keep less, by activation checkpointing, and layers that torch.compile makes faster.

What a checkpointed layer makes between its input and its output is made again in the backward pass:

    none        everything is kept
    selective   results of matrix products and of attention are kept; all else, which is cheap, is computed again
    full        inputs of layers alone are kept, and each layer runs twice

Layers are what is checkpointed (arXiv:1604.06174; the selective kind as in arXiv:2205.05198, section 5). It changes
memory and time, and no number.
"""
from collections.abc import Callable
from functools import partial

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from transfusion.model.transfusion import Transfusion

RECOMPUTE = ("none", "selective", "full")
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.convolution.", "tfkernels.attention_forward.")
"""Operations whose results selective checkpointing keeps; all others are computed again."""


def checkpoint_layers(model: Transfusion, recompute: str) -> None:
    """Let the layers of a model in training compute again what `recompute`, one of RECOMPUTE, says."""
    if recompute == "none":
        return
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if recompute == "selective" else {}
    # transformers' name for it since 5.20, and before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kept})


def compile_layers(model: Transfusion, backend: str | Callable = "inductor", *, whole: bool = True) -> None:
    """Compile each layer by itself, before `shard`. Numbers of images and patches may change from step to step.

    A layer is compiled for each form that its inputs have: the first layer's embeddings, the others' residual stream,
    and numbers of images in general once they have changed. A layer is one graph; where it is not `whole`, because
    processes share its rows, it is one in front of attention, which talks to the others, and one behind it.
    """
    for layer in model.backbone.blocks():
        layer.compile(backend=backend, fullgraph=whole)


def _policy(_, operation, *arguments, **options) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation).startswith(PRODUCTS) else CheckpointPolicy.PREFER_RECOMPUTE
