"""Objects in pictures by transformers' Mask2Former (arXiv:2112.01527), with the scores of its instance inference.

Each of the 100 likeliest pairs of query and class is an object: score = p(class | query) * mean of the mask's
probabilities over its pixels above 1/2 (section 3.1 and the authors' `instance_inference`). Its box holds the mask.
"""
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from transfusion.eval.pretrained import load_whole, local_directory, preprocessor
from transfusion.eval.results import weights_hash

OBJECTS, SHORTEST, LONGEST, DIVISOR = 100, 800, 1333, 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis
snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork
knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed
dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone microwave oven toaster sink
refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"""
NAMES = [name.replace("_", " ") for name in COCO.split()]
"""COCO's 80 classes in the order of its ids, as GenEval calls them"""

FITS = ("a directory of a Mask2Former, or its name in the hub's cache, e.g. "
        "facebook/mask2former-swin-small-coco-instance, fits")


class Detection(NamedTuple):
    """An object: its score, box (left, top, right, bottom) in pixels, and mask (height, width), True inside."""

    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector:
    """A Mask2Former with instance classes, and what it wants to see.

    Args:
        model: the network.
        said: what its preprocessor_config.json says.
        name: what results call it.
        digest: the hash of its weights.
    """

    def __init__(self, model: Mask2FormerForUniversalSegmentation, said: dict, name: str, digest: str):
        self.model, self.name, self.weights_hash = model.eval().requires_grad_(False), name, digest
        size, labels = said.get("size", {}), model.config.id2label
        self.shortest, self.longest = size.get("shortest_edge", SHORTEST), size.get("longest_edge", LONGEST)
        self.mean, self.std = (torch.tensor(said.get(key, value)).view(3, 1, 1)
                               for key, value in (("image_mean", MEAN), ("image_std", STD)))
        self.names = NAMES if len(labels) == len(NAMES) else [labels[label] for label in range(len(labels))]

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device) -> "Detector":
        """Load a directory that transformers wrote, or what the hub's cache holds of a name.

        Raises:
            ValueError: it is no Mask2Former.
        """
        op = "Detector.from_pretrained"
        path = local_directory(op, name, FITS)
        loaded = load_whole(Mask2FormerForUniversalSegmentation, path, f"{op}: name is {str(name)!r}", FITS)
        return cls(loaded.network.to(device), preprocessor(path), str(name), weights_hash(path))

    def resize(self) -> str:
        """Say what the network sees of a picture."""
        return f"the whole picture, shortest side to {self.shortest}, longest at most {self.longest}, bilinear (Pillow)"

    @torch.inference_mode()
    def __call__(self, picture: Picture.Image) -> dict[str, list[Detection]]:
        """Return the objects of each class in an RGB picture, by falling score."""
        pixels, (height, width) = self._input(picture)
        out = self.model(pixel_values=pixels.to(self.model.device))
        probabilities = out.class_queries_logits[0].softmax(-1)[:, :-1]                    # (Q, K), without "nothing"
        scores, order = probabilities.flatten().topk(min(OBJECTS, probabilities.numel()))
        queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
        masks = F.interpolate(out.masks_queries_logits, pixels.shape[-2:], mode="bilinear")[..., :height, :width]
        masks = F.interpolate(masks, (picture.height, picture.width), mode="bilinear")[0][queries]   # (100, H, W)
        inside = masks > 0
        certain = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores, labels, inside = (scores * certain).tolist(), labels.tolist(), inside.cpu()
        found = {}
        for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
            detection = Detection(scores[i], box_of(inside[i]), inside[i].numpy())
            found.setdefault(self.names[labels[i]], []).append(detection)
        return found

    def _input(self, picture: Picture.Image) -> tuple[Tensor, tuple[int, int]]:
        """The network's input (1, 3, H, W), padded to whole patches, and the size before padding."""
        scale = min(self.shortest / min(picture.size), self.longest / max(picture.size))
        width, height = (max(1, round(side * scale)) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Picture.Resampling.BILINEAR)
        pixels = (torch.from_numpy(np.array(resized)).movedim(-1, 0) / 255 - self.mean) / self.std
        return F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR))[None], (height, width)


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) around a mask, right and bottom behind its last pixels; zeros of none."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return tuple(map(float, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
