"""A frozen image classifier of transformers as an instrument.

It gives hidden states, pooled features and logits of pictures, with gradients to the pictures.

Pictures in [-1, 1] become what the classifier was trained on: repeated to its channels where they are grey, stretched
to its size (bilinear, antialiased, the whole picture: nothing is cropped), then (pixels in [0, 1] - mean) / std.
Size, mean and std are read from preprocessor_config.json, else from the `pretrained_cfg` of a timm checkpoint, else
the config's image_size (or the picture's own) and 0.5 hold.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel

from transfusion.eval.pretrained import load_network, load_whole, preprocessor
from transfusion.files import current, whole

FITS = "a convolutional classifier of transformers (ResNet, ConvNeXt, RegNet, timm's through TimmWrapper) fits"


class Preprocessing(NamedTuple):
    """What a classifier wants to see: pixels in [0, 1] times `scale`, less mean, over std."""

    channels: int
    size: tuple[int, int] | None  # (height, width), None: the picture's own
    mean: list[float]
    std: list[float]
    scale: float = 1.0

    @classmethod
    def read(cls, path: Path, config: dict) -> "Preprocessing":
        """Read what a checkpoint directory says, its config.json given."""
        said, timm = preprocessor(path), config.get("pretrained_cfg") or {}
        channels = timm.get("input_size", [config.get("num_channels", 3)])[0]
        if not said:
            size = timm["input_size"][1:] if timm else config.get("image_size")
            return cls(channels, _sides(size), timm.get("mean", [0.5]), timm.get("std", [0.5]))
        size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
        normal = said.get("do_normalize", True)
        mean, std = (said.get("image_mean", [0.5]), said.get("image_std", [0.5])) if normal else ([0.0], [1.0])
        sides = _sides(size) if said.get("do_resize", True) or said.get("do_center_crop") else None
        scale = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255.0
        return cls(channels, sides, _each(mean), _each(std), scale)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [-1, 1] to the classifier's input."""
        if pictures.ndim != 4 or pictures.shape[1] not in (1, self.channels):
            raise ValueError(f"Features: pictures has shape {tuple(pictures.shape)}; (N, {self.channels}, height, "
                             "width) and grey "
                             "(N, 1, height, width) fit")
        x = pictures.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = torch.nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((x + 1) / 2 * self.scale - mean) / std


class Features:
    """A frozen classifier: batch norm uses its running statistics, no parameter has a gradient, pictures have one.

    Args:
        body: the network without its head, whose output has a `pooler_output`.
        classifier: the network with its head, None where the checkpoint has none.
        preprocessing: what the network wants to see.
        name: what reports call it.
    """

    def __init__(self, body: PreTrainedModel, classifier: PreTrainedModel | None, preprocessing: Preprocessing,
                 name: str):
        self.body, self.classifier, self.preprocessing, self.name = body, classifier, preprocessing, name
        for network in (body, classifier or body):
            network.eval().requires_grad_(False)
        labels = classifier.config.id2label if classifier is not None else {}
        self.label_names = [labels[label] for label in range(len(labels))]

    @classmethod
    def from_pretrained(cls, path: Path) -> "Features":
        """Load a directory with config.json and safetensors as transformers writes it.

        Pickled weights and code of others are refused.

        Raises:
            ValueError: no such directory, another kind of model, or weights that are absent, pickled or incomplete.
        """
        if not current(path, "config.json").is_file():
            raise ValueError(f"Features.from_pretrained: path is {str(path)!r}, which holds no config.json; a "
                             "directory that transformers wrote fits")
        with whole(path) as directory:
            return cls._load(directory, path)

    @classmethod
    def _load(cls, path: Path, home: Path) -> "Features":
        given = f"Features.from_pretrained: path is {str(path)!r}"
        body, _, head = load_whole(AutoModel, path, given, FITS)
        classifier = None
        if head:
            loaded = load_network(AutoModelForImageClassification, path, given, FITS)
            classifier = None if loaded.missing else loaded.network
        config = body.config.to_dict()
        name = f"{config.get('architecture', body.config.model_type)} ({home})"
        return cls(body, classifier, Preprocessing.read(path, config), name)

    def to(self, device: torch.device | str) -> "Features":
        """Move the networks; pictures follow them."""
        self.body.to(device)
        if self.classifier is not None:
            self.classifier.to(device)
        return self

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Pictures (N, C, H, W) in [-1, 1] to hidden states (N, C_i, h_i, w_i), from fine to coarse.

        Raises:
            ValueError: a network whose hidden states are not maps, such as a vision transformer.
        """
        states = list(self.body(self._input(pictures), output_hidden_states=True).hidden_states)
        if any(state.ndim != 4 for state in states):
            raise ValueError(f"Features.stages: {self.name} has hidden states of shape {tuple(states[-1].shape)}, "
                             f"not (N, C, h, w); {FITS}")
        return states

    def pooled(self, pictures: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [-1, 1] to the features (N, F) that the head reads.

        Raises:
            ValueError: a network that does not pool its features.
        """
        pooled = getattr(self.body(self._input(pictures)), "pooler_output", None)
        if pooled is None:
            raise ValueError(f"Features.pooled: {self.name} has no pooled features; {FITS}")
        return pooled.flatten(1)

    def logits(self, pictures: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [-1, 1] to logits (N, K).

        Raises:
            ValueError: a checkpoint without a head.
        """
        if self.classifier is None:
            raise ValueError(f"Features.logits: {self.name} has no classification head; a checkpoint of a "
                             "...ForImageClassification model fits")
        return self.classifier(self._input(pictures)).logits

    def _input(self, pictures: Tensor) -> Tensor:
        return self.preprocessing(pictures.to(self.body.device, self.body.dtype))


@torch.inference_mode()
def in_batches(read: Callable[[Tensor], Tensor], pictures: Tensor, rows: int = 64) -> Tensor:
    """Return read(pictures) without gradients, some rows at a time, on the CPU; read is e.g. `features.pooled`."""
    return torch.cat([read(batch).cpu() for batch in pictures.split(rows)])


def _sides(size: dict | list | int | None) -> tuple[int, int] | None:
    """(height, width) from the ways in which checkpoints write a size; a shortest edge is both sides."""
    if size is None:
        return None
    if isinstance(size, dict):
        return tuple(size[key] for key in ("height", "width")) if "height" in size else (size["shortest_edge"],) * 2
    return (size, size) if isinstance(size, int) else tuple(size)


def _each(value: list[float] | float) -> list[float]:
    return [value] if isinstance(value, (int, float)) else value
