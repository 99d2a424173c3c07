"""GenEval's score of drawn pictures (arXiv:2310.11513), by Mask2Former and CLIP of transformers.

A picture is right where each object of its prompt's "include" is found as often as asked, in the colour and at the
place that is asked, and none of "exclude" as often as is named there:

    found       objects with a score above 0.3, above 0.9 for counting; the 16 likeliest of a class at most
    colour      the likeliest of ten by CLIP, the object cut out by its box, what is not its mask grey (#999999)
    place       the direction from the other object's centre, less 0.1 of both sizes on each axis, and more than half
                of the whole distance to that side

The score is the mean over the six tasks of the share of right pictures. The published score takes Mask2Former from
mmdet and CLIP from open_clip; results here are named after what computed them.
"""
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Picture
from tqdm import tqdm

from transfusion.data.picture_files import open_picture
from transfusion.device import choose_device
from transfusion.eval.clip import Clip
from transfusion.eval.detector import Detection, Detector
from transfusion.eval.draw import PICTURES, about_drawing
from transfusion.eval.picture_features import drawn_files
from transfusion.eval.results import Result, version_of, write_result
from transfusion.files import check_writable, read_json_lines, write_text
from transfusion.settings import check

THRESHOLD, COUNTING_THRESHOLD, MOST, MARGIN, GREY = 0.3, 0.9, 16, 0.1, "#999999"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NOTE = "detector and CLIP of transformers; the published score takes mmdet's Mask2Former and open_clip"

Colours = Callable[[list[Detection], str], list[str]]
"""Detections of a class and its name to the colour of each."""


@dataclass(frozen=True)
class GenevalSettings:
    """Score pictures of GenEval's prompts: objects, counts, colours and positions."""

    drawn: Path
    """what `transfusion eval draw` made of GenEval's prompts, or any folder in GenEval's layout"""
    detector: str
    """directory of a Mask2Former of transformers, or its name where the hub's cache holds it, such as
    facebook/mask2former-swin-small-coco-instance"""
    clip: str
    """directory of a CLIPModel, or its name where the hub's cache holds it, e.g. openai/clip-vit-large-patch14"""
    out: Path | None = None
    """directory for results/ and geneval.jsonl, which GenEval's summary_scores.py reads; None: that of the pictures"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


def geneval(settings: GenevalSettings) -> list[Result]:
    """Run `transfusion eval geneval`: write and print a result for each task and for all.

    Raises:
        ValueError: a folder of another layout, networks that do not fit, or a class that the detector does not know.
    """
    check("eval geneval", settings)
    began, out, pictures = time.perf_counter(), settings.out or settings.drawn, _pictures(settings.drawn)
    check_writable("eval geneval", out)
    device = choose_device(settings.device)
    detector, clip = (kind.from_pretrained(name, device)
                      for kind, name in ((Detector, settings.detector), (Clip, settings.clip)))
    _check_names(pictures, detector)
    judge, lines = ColourJudge(clip), []
    for path, prompt in tqdm(pictures, desc="GenEval", unit="picture", dynamic_ncols=True):
        picture = open_picture(path).convert("RGB")
        found = kept(detector(picture), prompt["tag"])
        reasons = faults(found, prompt, judge.of(picture))
        lines.append({"filename": str(path), "tag": prompt["tag"], "prompt": prompt.get("prompt", ""),
                      "correct": not reasons, "reason": "\n".join(reasons), "metadata": json.dumps(prompt),
                      "details": json.dumps({name: [[*one.box, one.score] for one in ones]
                                             for name, ones in found.items()})})
    write_text(out / "geneval.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    results = list(_results(settings, detector, clip, lines, time.perf_counter() - began))
    for result in results:
        print(f"{result.metric:<16}{result.value:>9.4f}   {write_result(out, result)}")
    return results


def kept(objects: dict[str, list[Detection]], tag: str) -> dict[str, list[Detection]]:
    """Return the likeliest objects of each class, by falling score, of those above the task's threshold."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found = {name: sorted((one for one in ones if one.score > least), key=lambda one: -one.score)[:MOST]
             for name, ones in objects.items()}
    return {name: ones for name, ones in found.items() if ones}


def faults(objects: dict[str, list[Detection]], prompt: dict, colours: Colours) -> list[str]:
    """Return what is wrong with a picture of these objects, [] where it is right."""
    wrong, groups = [], []
    for wanted in prompt.get("include", []):
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        fault = f"expected {name}>={count}, found {len(found)}" if len(found) < count else ""
        if not fault and "color" in wanted:
            fault = _colour_fault(found, wanted, colours)
        if not fault and "position" in wanted:
            fault = _place_fault(found, wanted, groups)
        wrong += [fault] if fault else []
        groups.append(None if fault else found)
    for unwanted in prompt.get("exclude", []):
        found = objects.get(unwanted["class"], [])
        if len(found) >= unwanted["count"]:
            wrong.append(f"expected {unwanted['class']}<{unwanted['count']}, found {len(found)}")
    return wrong


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is as seen from `b`: of "left of", "right of", "above", "below" none, one or two."""
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offset.append(distance)
        beyond.append(math.copysign(max(abs(distance) - MARGIN * sizes, 0), distance))
    if all(abs(x) < 1e-3 for x in beyond):
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    sides = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {side for side, share in sides.items() if share > 0.5}


class ColourJudge:
    """Tells the colours of objects by CLIP; the texts of a class are embedded once."""

    def __init__(self, clip: Clip):
        self.clip, self.classes = clip, {}

    def of(self, picture: Picture.Image) -> Colours:
        """Return what tells the colours of objects in a picture."""
        def colours(found: list[Detection], name: str) -> list[str]:
            if name not in self.classes:
                self.classes[name] = self._texts(name)
            likeliest = (self.clip.pictures([cut_out(picture, one) for one in found]) @ self.classes[name].mT).argmax(1)
            return [COLOURS[i] for i in likeliest.tolist()]

        return colours

    def _texts(self, name: str) -> torch.Tensor:
        """An embedding (10, D) of each colour: the mean over templates, of length 1."""
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        means = self.clip.texts(texts).unflatten(0, (len(COLOURS), -1)).mean(1)
        return torch.nn.functional.normalize(means, dim=-1)


def cut_out(picture: Picture.Image, found: Detection) -> Picture.Image:
    """Return the part of a picture in an object's box, grey where its mask is not."""
    shown = picture
    if found.mask is not None:
        shown = Picture.composite(picture, Picture.new("RGB", picture.size, GREY), Picture.fromarray(found.mask))
    return shown.crop(tuple(round(side) for side in found.box))


def _colour_fault(found: list[Detection], wanted: dict, colours: Colours) -> str:
    seen = colours(found, wanted["class"])
    right = seen.count(wanted["color"])
    if right >= wanted["count"]:
        return ""
    return (f"expected {wanted['color']} {wanted['class']}>={wanted['count']}, found {right} {wanted['color']}; and "
            + ", ".join(f"{seen.count(colour)} {colour}" for colour in COLOURS if colour in seen))


def _place_fault(found: list[Detection], wanted: dict, groups: list) -> str:
    side, group = wanted["position"]
    if groups[group] is None:
        return f"no target for {wanted['class']} to be {side}"
    for one in found:
        for other in groups[group]:
            seen = relations(one, other)
            if side not in seen:
                return f"expected {wanted['class']} {side} target, found {' and '.join(sorted(seen))} target"
    return ""


def _pictures(drawn: Path) -> list[tuple[Path, dict]]:
    """Return the pictures in GenEval's layout, each with its prompt.

    Raises:
        ValueError: a drawing that is not finished, or a folder of another layout.
    """
    if (drawn / "prompts.jsonl").is_file():
        drawn_files(drawn)
    home = drawn / PICTURES if (drawn / PICTURES).is_dir() else drawn
    found = []
    for folder in sorted(path for path in home.glob("*") if path.name.isdigit() and path.is_dir()):
        said = folder / "metadata.jsonl"
        rows = [row for _, row in read_json_lines(said)] if said.is_file() else []
        if len(rows) != 1 or "tag" not in rows[0]:
            raise ValueError(f"{said} holds no prompt of GenEval; one object with a \"tag\" fits")
        found += [(path, rows[0]) for path in sorted((folder / "samples").glob("*.png")) if path.stem.isdigit()]
    if not found:
        raise ValueError(f"eval geneval: drawn is {str(drawn)!r}, which holds no 00000/metadata.jsonl with "
                         "00000/samples/0000.png; what `transfusion eval draw` makes of GenEval's prompts fits")
    return found


def _check_names(pictures: list[tuple[Path, dict]], detector: Detector) -> None:
    for path, prompt in pictures:
        for wanted in (*prompt.get("include", ()), *prompt.get("exclude", ())):
            if wanted["class"] not in detector.names:
                raise ValueError(f"eval geneval: {path} wants {wanted['class']!r}, a class that {detector.name} does "
                                 "not know; a detector of COCO's 80 classes fits GenEval's prompts")


def _results(settings: GenevalSettings, detector: Detector, clip: Clip, lines: list[dict], seconds: float):
    """Yield a result for each task and, last, their mean."""
    about, shares = about_drawing(settings.drawn), {}
    hashes = {"detector_weights_hash": detector.weights_hash, "clip_weights_hash": clip.weights_hash}
    for task in (*TASKS, *sorted({line["tag"] for line in lines} - set(TASKS))):
        right = [line["correct"] for line in lines if line["tag"] == task]
        if right:
            shares[task] = sum(right) / len(right), len(right)
    missing = [task for task in TASKS if task not in shares]
    shares["overall"] = sum(share for share, _ in shares.values()) / len(shares), len(lines)
    for task, (share, count) in shares.items():
        lacking = f"; the mean is over {len(shares) - 1} tasks, without {', '.join(missing)}"
        yield Result("geneval", task, share, count, "transformers", version_of("transformers"), seconds,
                     **{**about, "details": about["details"] | hashes}, resize=detector.resize(),
                     judge=f"Mask2Former {detector.name}, CLIP {clip.name}",
                     note=NOTE + (lacking if missing and task == "overall" else ""))
