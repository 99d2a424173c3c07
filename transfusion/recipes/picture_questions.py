"""Questions about pictures, with answers, in LLaVA's format.

    python -m transfusion.recipes.picture_questions --out DIR
    python -m transfusion.recipes.picture_questions --out DIR --drawings STYLES

The pictures are the emoji of the package (`transfusion.recipes.emoji`, 32x32, free licences), or with --drawings the
animals, plants, dishes and drinks among those in nine styles (`transfusion.recipes.emoji_styles`), one at a time and as
scenes of 64x64 with up to four of them. Names and kinds are the published ones. Of nine styles each question to train
on shows a view of its own, turned, moved and coloured twice; held-out pictures are shown as they are. Twice, because
image layers are surer of pictures that they were trained on: what reads them shall know doubt, too. Of pictures to
compare half are changed, once, and half are shown as they are: two changes leave little of a style.

    name       What is this?                                        a red apple
    category   Is this a feeling, something in nature or ... ?      something to eat or drink
    kind       What kind of thing is this?                          food fruit
    style      In which style is this drawn?                        noto       (two views of each picture)
    presence   Is there a red apple?                                yes, or no
    count      How many times is there a red apple?                 one to four
    place      Where is a red apple?                                top left, or: there is none
    same       Do both pictures show the same thing?                yes, or no
    alike      Are both pictures drawn in the same style?           yes, or no (twice as often as `same`)

Each question is a conversation of its own, for the answer to one would help with the next, and stands before its
pictures: in a mixture of transformers whose text is frozen, patches alone learn to look, and so they know for what. No
answer of yes-or-no, of counts, and of two styles, is more frequent than another, and a third of what is looked for is
nowhere, so that who does not look is right as often as chance. Held-out questions are about pictures that training
never shows: those that `Emoji` or `read_drawings` holds out, scenes of them alone, and comparisons of one of them with
another picture. Training asks no style of names that are held out in some, because the held-out styles would never be
the right answer.

    DIR/train.json, DIR/held-out.json    LLaVA's rows, with `kinds`, a word of the list above
    DIR/pictures/                        what they name
    DIR/mix.yaml                         the mixture of train.json, for `transfusion data check` and training
"""
import json
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm

from transfusion.command import plain_errors
from transfusion.data.picture_files import to_picture
from transfusion.files import replacing
from transfusion.recipes.align_pictures import PLACES, changed
from transfusion.recipes.emoji import CATEGORIES, LIVELY, SHIPPED, STYLES, Emoji, held_out_pairs
from transfusion.recipes.emoji_styles import THINGS, Drawings, read_drawings
from transfusion.settings import Count, Seed, check

KINDS = ("name", "category", "kind", "style", "presence", "count", "place", "same", "alike")
SAID = dict(zip(CATEGORIES, (
    "a face or a feeling", "a person or a part of one", "an animal or a plant", "something to eat or drink",
    "a place or a vehicle", "a game or a feast", "an object", "a symbol", "a flag")))
COUNTS = ("one", "two", "three", "four")
Change = Callable[[Tensor, torch.Generator], Tensor]  # of pictures (N, C, H, W)
NATURE = {"animal": "an animal", "monkey": "an animal", "plant": "a plant"}
EATEN = "something to eat or drink"
MIXTURE = """\
# {count:,} conversations about pictures of emoji under free licences, which the folder `licences` holds
pictures: {{sizes: [[32, 32], [64, 64]]}}
chat: {{template: tokenizer, system: "", image_position: keep}}
held_out: 0.0
sources:
  - {{format: llava, path: train.json, images: pictures, drawn: none, name: questions}}
"""


@dataclass(frozen=True)
class PictureQuestionSettings:
    """Write pictures of emoji, and questions about them with answers, in LLaVA's format."""

    out: Path
    """directory to write"""
    drawings: Path | None = None
    """what `python -m transfusion.recipes.emoji_styles` wrote: nine styles; None: the two of the package"""
    lively: bool = True
    """of the package's emoji faces, animals, plants and dishes alone: 459 of the 1,870 names"""
    scenes: Count = 5000
    """pictures of several emoji to train on"""
    pairs: Count = 6000
    """pairs of pictures to compare, to train on"""
    held_out: Count = 400
    """held-out scenes, and as many pairs"""
    seed: Seed = 0
    """of what is drawn at random"""


class Asked(NamedTuple):
    """A question, its answer, and what it is about (one of `KINDS`)."""

    kind: str
    question: str
    answer: str


class Conversation(NamedTuple):
    """A question about some pictures."""

    number: str
    pictures: tuple[Path, ...]
    asked: Asked

    def row(self) -> dict:
        """As LLaVA writes it, with the kind of its question."""
        names = [path.name for path in self.pictures]
        turns = [{"from": "human", "value": self.asked.question + "\n<image>" * len(names)},
                 {"from": "gpt", "value": self.asked.answer}]
        return {"id": self.number, "image": names[0] if len(names) == 1 else names, "conversations": turns,
                "kinds": [self.asked.kind]}


class Questions:
    """Asks about the pictures of one split.

    Args:
        drawings: all pictures.
        shown: numbers of those that conversations are about.
        folder: where pictures are written.
        split: "train" or "held-out", in the names of scenes.
        generator: of what is drawn at random.
        change: what each picture goes through before it is shown; None: nothing, and one file serves all questions.
        pair_change: the same of pictures to compare.
        unstyled: labels of which no style is asked.
    """

    def __init__(self, drawings: Drawings, shown: Tensor, folder: Path, split: str, generator: torch.Generator,
                 change: Change | None = None, pair_change: Change | None = None, unstyled: Container[int] = ()):
        self.drawings, self.shown, self.folder, self.split = drawings, shown, folder, split
        self.generator, self.change, self.pair_change, self.unstyled = generator, change, pair_change, unstyled
        self.named = [Emoji.caption(name, "").rpartition(",")[0] for name in drawings.names]

    def about_one(self) -> Iterator[Conversation]:
        """Each picture alone: its name, category, kind and style, and whether it is there, and whether another is."""
        drawings = self.drawings
        choices = " or ".join(drawings.category_names)
        for i in self.shown.tolist():
            label, style = int(drawings.labels[i]), drawings.style_names[drawings.styles[i]]
            kind, category = drawings.kind_names[drawings.kinds[i]], drawings.category_names[drawings.categories[i]]
            asked = [
                Asked("name", "What is this?", self.named[label]),
                Asked("category", f"Is this {choices}?", category),
                Asked("kind", "What kind of thing is this?", kind),
                self._is_there(label), self._is_not_there(label, {label})]
            if label not in self.unstyled:
                asked += [Asked("style", "In which style is this drawn?", style)] * (1 if self.change is None else 2)
            for number, one in enumerate(asked):
                use = f"{one.kind}-{number}"
                yield Conversation(f"{use}-{i}", (self._single(i, use, self.change),), one)

    def about_scenes(self, count: int) -> Iterator[Conversation]:
        """Two by two places, some with copies of one emoji, one with another: what is there, how many, or where."""
        for number in range(count):
            copies = number % len(COUNTS) + 1
            many, other = self._two_things()
            places = self._order(len(PLACES))
            filled = dict.fromkeys(places[:copies], many)
            if copies < len(PLACES):
                filled[places[copies]] = other
            labels = {int(self.drawings.labels[i]) for i in filled.values()}
            there = self._presence(sorted(labels))
            times = Asked("count", f"How many times is there {self._name(many)}?", COUNTS[copies - 1])
            where = self._place(other, places[copies], labels) if copies < len(PLACES) else there
            asked = (there, times, where)[number // len(COUNTS) % 3]
            picture = self._scene(f"{self.split}-scene-{number}", filled)
            yield Conversation(f"scene-{number}", (picture,), asked)

    def about_pairs(self, count: int, beside: Tensor) -> Iterator[Conversation]:
        """A picture, and one of `beside`: whether they show the same thing, or (twice as often) in the same style.

        The same thing comes in both styles, so that only what is shown tells; of what has one picture alone, that
        picture is shown twice.
        """
        labels, styles = self.drawings.labels, self.drawings.styles
        for number in range(count):
            i = self._one_of(self.shown)
            same_thing, same_style = bool(number % 2), bool(number // 2 % 2)
            fits = (labels[beside] == labels[i]) == same_thing
            fits &= (styles[beside] == styles[i]) == same_style
            near = fits & (self.drawings.kinds[beside] == self.drawings.kinds[i])
            other = beside[near if near.any() and self._coin() else fits]
            if not len(other):
                continue
            both = [i, self._one_of(other)]
            if self._coin():
                both.reverse()
            asked = [
                Asked("same", "Do both pictures show the same thing?", "yes" if same_thing else "no"),
                Asked("alike", "Are both pictures drawn in the same style?", "yes" if same_style else "no")]
            shown = tuple(self._single(one, f"pair-{number}-{place}", self.pair_change)
                          for place, one in enumerate(both))
            yield Conversation(f"pair-{number}", shown, asked[min(number // 4 % 3, 1)])

    def _presence(self, there: list[int]) -> Asked:
        """Whether a thing is there, as often one of `there` as not; half of those that are not are of its kind."""
        label = there[self._below(len(there))]
        return self._is_there(label) if self._coin() else self._is_not_there(label, set(there))

    def _is_there(self, label: int) -> Asked:
        return Asked("presence", f"Is there {self.named[label]}?", "yes")

    def _is_not_there(self, label: int, there: set[int]) -> Asked:
        return Asked("presence", f"Is there {self.named[self._absent(label, there)]}?", "no")

    def _place(self, i: int, place: int, there: set[int]) -> Asked:
        """Where a thing is, or, once in three times, one that is nowhere."""
        if self._below(3):
            return Asked("place", f"Where is {self._name(i)}?", PLACES[place])
        name = self.named[self._absent(int(self.drawings.labels[i]), there)]
        return Asked("place", f"Where is {name}?", "there is none")

    def _absent(self, label: int, there: set[int]) -> int:
        """Another thing than those that are there, half of the time of the kind of `label` where one is."""
        shown = self.drawings.labels[self.shown]
        kinds = self.drawings.kinds[self.shown]
        absent = torch.tensor([int(one) not in there for one in shown])
        near = absent & (kinds == kinds[shown == label][0])
        return int(shown[self._one_of((near if near.any() and self._coin() else absent).nonzero()[:, 0])])

    def _two_things(self) -> tuple[int, int]:
        """Two pictures of different things."""
        first = self._one_of(self.shown)
        labels = self.drawings.labels
        return first, self._one_of(self.shown[labels[self.shown] != labels[first]])

    def _name(self, i: int) -> str:
        return self.named[int(self.drawings.labels[i])]

    def _single(self, i: int, use: str, change: Change | None) -> Path:
        """The file of a picture alone; of changed ones each use has its own."""
        style = self.drawings.style_names[self.drawings.styles[i]].replace(" ", "_")
        name = f"{style}-{int(self.drawings.labels[i])}"
        path = self.folder / (f"{name}.png" if change is None else f"{name}-{use}.png")
        if not path.exists():
            self._view(i, change).save(path)
        return path

    def _view(self, i: int, change: Change | None) -> Picture.Image:
        picture = self.drawings.pictures[i]
        return to_picture(picture if change is None else change(picture[None], self.generator)[0])

    def _scene(self, name: str, filled: dict[int, int]) -> Path:
        size = self.drawings.pictures.shape[-1]
        scene = Picture.new("RGB", (2 * size, 2 * size), "white")
        for place, i in filled.items():
            scene.paste(self._view(i, self.change), (place % 2 * size, place // 2 * size))
        path = self.folder / f"{name}.png"
        scene.save(path)
        return path

    def _order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def _one_of(self, numbers: Tensor) -> int:
        return int(numbers[self._below(len(numbers))])

    def _coin(self) -> bool:
        return bool(self._below(2))

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


def shipped_drawings(lively: bool) -> Drawings:
    """The package's emoji; their categories are put into words."""
    emoji = Emoji("all", SHIPPED, LIVELY if lively else CATEGORIES)
    return Drawings(emoji.pictures, emoji.labels, emoji.styles, emoji.kinds, emoji.categories,
                    held_out_pairs(emoji.names)[emoji.styles, emoji.labels], emoji.names, STYLES, emoji.kind_names,
                    [SAID[name] for name in emoji.category_names])


def things(folder: Path) -> Drawings:
    """Animals, plants, dishes and drinks in nine styles; the kind says to which of the three categories one belongs."""
    drawings = read_drawings(folder)
    said = [NATURE.get(kind.split()[0], EATEN) for kind in drawings.kind_names]
    names = list(dict.fromkeys((*NATURE.values(), EATEN)))
    categories = torch.tensor([names.index(word) for word in said])[drawings.kinds]
    asked = torch.tensor([name in THINGS for name in drawings.category_names])[drawings.categories]
    return drawings._replace(categories=categories, category_names=names).of(asked)


def half_changed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (N, C, H, W), half of them changed."""
    return changed(pictures, generator, untouched=0.5)


def changed_twice(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (N, C, H, W), all of them changed, and most of them once more."""
    return changed(changed(pictures, generator, untouched=0.0), generator)


def write(settings: PictureQuestionSettings) -> Path:
    """Write pictures, questions and the mixture; the directory appears whole or not at all. Return it.

    Held-out questions are drawn first, so that they stay what they are however many there are to train on.

    Raises:
        ValueError: settings that do not fit, or a directory without drawings.
    """
    check("picture_questions", settings)
    is_shipped = settings.drawings is None
    drawings = shipped_drawings(settings.lively) if is_shipped else things(settings.drawings)
    held, every = drawings.held, torch.arange(len(drawings.held))
    generator = torch.Generator().manual_seed(settings.seed)
    partly_held_out = set(drawings.labels[held].tolist())
    splits = {  # shown, shown beside, scenes, pairs, changes (of pairs, too), names of which no style is asked
        "held-out": (held, held | ~held, settings.held_out, settings.held_out, (None, None), ()),
        "train": (~held, ~held, settings.scenes, settings.pairs,
                  (None, None) if is_shipped else (changed_twice, half_changed), partly_held_out)}
    with replacing(settings.out, weights=False) as fresh:
        (fresh / "pictures").mkdir()
        for split, (shown, beside, scenes, pairs, changes, unstyled) in splits.items():
            questions = Questions(drawings, every[shown], fresh / "pictures", split, generator, *changes, unstyled)
            parts = questions.about_one(), questions.about_scenes(scenes), questions.about_pairs(pairs, every[beside])
            said = list(tqdm(chain(*parts), desc=split, unit="conversation"))
            rows = ",\n".join(json.dumps(one.row(), ensure_ascii=False) for one in said)
            (fresh / f"{split}.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
            asked = Counter(one.asked.kind for one in said)
            print(f"{split}: {len(said):,} conversations; "
                  + ", ".join(f"{asked[kind]:,} {kind}" for kind in KINDS))
            if split == "train":
                (fresh / "mix.yaml").write_text(MIXTURE.format(count=len(said)))
        shutil.copytree(SHIPPED / "licences", fresh / "licences")
        if not is_shipped:
            shutil.copy(settings.drawings / "LICENCES.txt", fresh / "licences")
    print(f"look at them: transfusion data check {settings.out / 'mix.yaml'} --model MODEL, one whose tokenizer has a "
          "chat template")
    return settings.out


def main() -> None:
    """Entry point of `python -m transfusion.recipes.picture_questions`."""
    with plain_errors():
        write(tyro.cli(PictureQuestionSettings, prog="python -m transfusion.recipes.picture_questions"))


if __name__ == "__main__":
    main()
