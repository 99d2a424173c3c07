"""Teach image layers to write captions in words: `python -m transfusion.recipes.align_pictures`.

A picture of 32x32 has 16 tokens in patches of 8x8. They are taught to be the language model's own embeddings of

    name (6 tokens)   place (2)   kind (4)   style (4)

filled up with full stops. So a picture reads to the language model as text that says what is in it, before it has seen
one. Half of the views stand alone, half in scenes of two by two, where each thing has 16 tokens of its own and a place,
"top left" to "bottom right": where a patch lies is otherwise told by rotations of queries and keys alone.

The image layers end in a softmax over the V words of all captions, and a token is the mean of the words' embeddings,
weighted by it (`transfusion.model.image_layers.unet.WordConnector`). No decoder runs: one core takes some 200 views a
second. For weights p_j of place j and the caption's word w_j there,

    loss = 4 sum_part a_part mean_j -log p_j[w_j] + classifiers

where a_part is in `WEIGHTS` and j runs over the part's places. The classifiers, linear ones of the mean feature for
each part, are thrown away. All names are learned, and none of the pictures that `read_drawings` holds out.

Most names are missing in some styles: few artists drew everything, and what is held out is a name as one family of
artists drew it. A model that learns which pairs never occur will answer a held-out picture wrongly. So p_j of a name
leaves out words that names have in that place, but none that is shown in the same style, and p_j of a style words of
the styles that the name is not shown in: a pair that is never shown counts neither for nor against. What no name or
style has in that place counts against; otherwise the mean would be of such words for the most part.
"""
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from tfkernels import patchify
from transfusion.command import claim, plain_errors
from transfusion.data.batches import step_generator
from transfusion.files import write_text
from transfusion.model.image_layers.unet import WordConnector
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.emoji_styles import THINGS, Drawings, read_drawings
from transfusion.sequence import ImageLayout
from transfusion.settings import Count, Share, check
from transfusion.train.loop import Batch, Term, fit
from transfusion.train.optimizer import Player, build_optimizer
from transfusion.train.resuming import found_resume
from transfusion.train.settings import RunSettings, StepSettings, check_steps, defaults

SLOTS = {"name": 6, "place": 2, "kind": 4, "style": 4}
"""Tokens of a picture that each part of its caption has."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
NOTHING = "nothing"  # the name of a white tile
BLANK = 0.2          # share of a scene's tiles that are white
WEIGHTS = {"name": 0.5, "place": 0.25, "kind": 0.25, "style": 1.0}
TERMS = ("captions", "classifiers")


@dataclass(frozen=True)
@defaults(steps=4500, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
class AlignOptimSettings(StepSettings):
    """Steps; the learning rate is reached after a fortieth of them, and a cosine takes it to 0."""

    batch: Count = 96
    """views of a step, a multiple of 8: half alone, half in scenes"""
    things: Share = 0.5
    """share of views that show what questions are about; the others show any name"""


@dataclass(frozen=True)
@defaults(out=Path("runs/see/aligned"))
class AlignSettings(RunSettings):
    """Teach the image layers of a Transfusion to write captions in its language model's embeddings."""

    model: Path = Path("runs/see/init")
    """checkpoint of `transfusion init`, whose image layers make one token of 8x8 pixels"""
    drawings: Path = Path("runs/see/styles")
    """what `python -m transfusion.recipes.emoji_styles` wrote"""
    optim: AlignOptimSettings = field(default_factory=AlignOptimSettings)


class Captions:
    """Captions of drawings as tokens: for each part of them, which word stands in each of its places.

    words: (V,) ids in the tokenizer. spelled: (names, slots) places among the words, of each part.
    """

    def __init__(self, drawings: Drawings, tokenizer):
        texts = {"name": drawings.names, "place": (*PLACES, ""), "kind": drawings.kind_names,
                 "style": drawings.style_names}
        stop = tokenizer(".", add_special_tokens=False).input_ids[0]
        filled = []
        for part, count in SLOTS.items():
            ids = [tokenizer(f" {text}", add_special_tokens=False).input_ids[:count] if text else []
                   for text in (*texts[part], NOTHING)]
            filled.append(torch.tensor([one + [stop] * (count - len(one)) for one in ids]))
        self.words, places = torch.cat([ids.flatten() for ids in filled]).unique(return_inverse=True)
        self.spelled = {part: own.view_as(ids) for part, own, ids in
                        zip(SLOTS, places.split([ids.numel() for ids in filled]), filled)}

    def read(self, part: str, scores: Tensor) -> Tensor:
        """Return the log-likelihood (N, names) of each name of a part, of scores (N, slots, V)."""
        chances = scores.log_softmax(-1)
        return sum(chances[:, j, spelled] for j, spelled in enumerate(self.spelled[part].T))


class Network(nn.Module):
    """A model's image layers, with what only training needs: linear classifiers of the mean feature."""

    def __init__(self, model: Transfusion, captions: Captions):
        super().__init__()
        self.patch, self.layers = model.config.patch_size, model.patch_embedding
        features = model.config.unet_channels[-1]
        self.heads = nn.ModuleDict({part: nn.Sequential(nn.LayerNorm(features), nn.Linear(features, len(names)))
                                    for part, names in captions.spelled.items()})
        self.register_buffer("condition", model.timestep(torch.zeros(1)).detach(), persistent=False)           # (1, C)

    def forward(self, pictures: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) of tiles x tiles drawings -> the scores (N * tiles^2, 16, V) of each drawing's words,
        and its mean feature."""
        rows, columns = (side // self.patch for side in pictures.shape[-2:])
        layout = ImageLayout.of([(rows, columns)] * len(pictures), pictures.device)
        (_, maps), = self.layers.features(patchify(pictures, self.patch), self.condition.expand(len(pictures), -1),
                                          layout)
        scores, features = (self._by_drawing(x, tiles) for x in (self.layers.output.scores(maps[-1]), maps[-1]))
        return scores, features.mean(1)

    @staticmethod
    def _by_drawing(maps: Tensor, tiles: int) -> Tensor:
        """(N, D, R, C) -> (N * tiles^2, R C / tiles^2, D)."""
        parts = maps.unflatten(3, (tiles, -1)).unflatten(2, (tiles, -1))                  # (N, D, tiles, R, tiles, C)
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def connect_words(model: Transfusion, captions: Captions) -> None:
    """Let the model's image layers end in a connector to the captions' words, which are not trained here."""
    words = model.get_input_embeddings().weight.detach()[captions.words]                                       # (V, C)
    connector = WordConnector(model.config.unet_channels[-1], words.shape[1], len(words))
    connector.vectors.weight.requires_grad_(False).copy_(words.T[:, :, None, None])
    model.patch_embedding.output, model.config.unet_words = connector, len(words)


class ShownPairs:
    """Which names and styles are shown together; what is not, training leaves out of their softmaxes.

    answers: names by style (styles + 1, names + 1), and styles by name. words: those that the answers have in each of
    their places, (styles + 1, slots, V) and (names + 1, slots, V). The last style and name are a white tile's, beside
    which all is shown.
    """

    def __init__(self, shown: Drawings, captions: Captions):
        names = torch.zeros(len(shown.style_names) + 1, len(shown.names) + 1, dtype=torch.bool)
        names[shown.styles, shown.labels] = names[-1] = names[:, -1] = True
        self.answers = {"name": names, "style": names.T}
        self.words = {part: self._words(answers, captions.spelled[part], len(captions.words))
                      for part, answers in self.answers.items()}

    @staticmethod
    def _words(answers: Tensor, spelled: Tensor, count: int) -> Tensor:
        """The words that answers (N, answers) have in their places: (N, slots, count)."""
        found = torch.zeros(len(answers), spelled.shape[1], count, dtype=torch.bool)
        rows, labels = answers.nonzero().unbind(1)
        found[rows[:, None], torch.arange(spelled.shape[1]), spelled[labels]] = True
        return found

    def only(self, part: str, scores: Tensor, read: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A part's scores of words (N, slots, V) and of answers (N, answers), -inf for what is never shown together."""
        if part not in self.answers:
            return scores, read
        given, words = labels["style" if part == "name" else "name"], self.words[part]
        return (scores.masked_fill(words.any(0) & ~words[given], -math.inf),
                read.masked_fill(~self.answers[part][given], -math.inf))


class AlignTask:
    """Views of drawings, alone and in scenes, whose tokens are to be those of their captions."""

    unit, shown = "pictures", ("captions", "classifiers")

    def __init__(self, config: AlignSettings, model: Transfusion, drawings: Drawings):
        self.config, self.model = config, model
        self.drawings, self.held = drawings.of(~drawings.held), drawings.of(drawings.held)
        self.captions = Captions(drawings, model.tokenizer)
        self.pairs = ShownPairs(self.drawings, self.captions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            connect_words(model, self.captions)
            self.network = Network(model, self.captions)
        self.size = config.optim.batch
        self.player = Player(self.network, build_optimizer(self.network, config.optim, fused=None))
        self.players = (self.player,)
        asked = torch.tensor([name in THINGS for name in drawings.category_names])[self.drawings.categories]
        self.pools = asked.nonzero()[:, 0], torch.arange(len(asked))

    def batches(self, step: int) -> list[Batch]:
        """Draw a step's views and labels; half of them become scenes, some of whose tiles are white."""
        optim, generator = self.config.optim, step_generator(self.config.seed, step)
        things = round(optim.things * optim.batch)
        chosen = torch.cat([pool[torch.randint(len(pool), (count,), generator=generator)]
                            for pool, count in zip(self.pools, (things, optim.batch - things))])
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        views = changed(self.drawings.pictures[chosen], generator)
        half = optim.batch // 2
        labels = labels_of(self.drawings.of(chosen))
        labels["place"] = torch.full((optim.batch,), len(PLACES))
        labels["place"][half:] = torch.arange(half) % len(PLACES)
        blank = torch.rand(optim.batch, generator=generator) < BLANK
        blank[:half] = False
        views[blank] = 1.0
        for part, names in self.captions.spelled.items():
            labels[part] = labels[part].masked_fill(blank, len(names) - 1)
        scenes = views[half:].unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        parts = [part.chunk(optim.accumulate) for part in (views[:half], scenes)]
        targets = torch.stack([labels[part] for part in SLOTS], 1)                                              # (N, 4)
        targets = [part.chunk(optim.accumulate) for part in (targets[:half], targets[half:])]
        return [Batch((alone, scene, torch.cat(target)), dict.fromkeys(TERMS, len(alone)))
                for alone, scene, *target in zip(*parts, *targets)]

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """The equation of the module."""
        alone, scenes, targets = batch.inputs
        scores, features = map(torch.cat, zip(self.network(alone, 1), self.network(scenes, 2)))
        labels = dict(zip(SLOTS, targets.unbind(1)))
        captions, classifiers = 0, 0
        for part, own in split(scores).items():
            own, read = self.pairs.only(part, own, self.network.heads[part](features), labels)
            words = self.captions.spelled[part][labels[part]]
            captions += WEIGHTS[part] * F.cross_entropy(own.flatten(0, 1), words.flatten())
            classifiers += F.cross_entropy(read, labels[part])
        yield self.player, {"captions": Term(4.0, captions), "classifiers": Term(1.0, classifiers)}

    def save(self, directory: Path, step: int) -> None:
        """After the last step, write the model with its image layers."""
        if step == self.config.optim.steps:
            self.model.save_pretrained(directory)


class HeldOut:
    """How many held-out pictures' captions are read right, measured after every save."""

    def __init__(self, task: AlignTask, every: int):
        self.task, self.every = task, every

    def after(self, done: int) -> dict[str, float]:
        """Return the accuracies, where it is time for them."""
        if done % self.every and done != self.task.config.optim.steps:
            return {}
        found = {f"held_out_{part}": share for part, share in accuracies(self.task).items()}
        print(f"step {done:,}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()), flush=True)
        return found


@torch.no_grad()
def accuracies(task: AlignTask) -> dict[str, float]:
    """Return for name, kind and style the share of held-out pictures whose caption's likeliest one is right.

    It is chosen among the names, kinds and styles of what questions are about.
    """
    found, scores = {}, split(task.network(task.held.pictures, 1)[0])
    for part, labels in labels_of(task.held).items():
        known = labels_of(task.drawings.of(task.pools[0]))[part].unique()
        read = task.captions.read(part, scores[part])[:, known]
        found[part] = (known[read.argmax(1)] == labels).double().mean().item()
    return found


def split(scores: Tensor) -> dict[str, Tensor]:
    """The scores (N, 16, V) of each part of captions."""
    return dict(zip(SLOTS, scores.split(tuple(SLOTS.values()), 1)))


def labels_of(drawings: Drawings) -> dict[str, Tensor]:
    """Name, kind and style of each drawing."""
    return {"name": drawings.labels, "kind": drawings.kinds, "style": drawings.styles}


def changed(pictures: Tensor, generator: torch.Generator, untouched: float = 0.3) -> Tensor:
    """Turn, stretch, move, mirror and colour each of (N, C, H, W) by its own random amounts, and cut holes into some.

    A share stays as it is. White is what lies outside, for the edges are white.
    """
    count, side = len(pictures), pictures.shape[-1]
    angle, zoom, wide, right, down, vivid, bright = (2 * torch.rand(7, count, generator=generator) - 1)
    gains = 1 + 0.05 * (2 * torch.rand(count, pictures.shape[1], 1, 1, generator=generator) - 1)
    mirror, hole, kept = torch.rand(3, count, generator=generator)
    angle, zoom, wide = 0.12 * angle, 1 + 0.1 * zoom, 1 + 0.06 * wide
    flip = torch.where(mirror < 0.3, -1.0, 1.0)
    rows = (torch.stack([flip * zoom * wide * angle.cos(), -zoom * angle.sin(), 0.14 * right], 1),
            torch.stack([flip * zoom * angle.sin(), zoom * angle.cos(), 0.14 * down], 1))
    grid = F.affine_grid(torch.stack(rows, 1), pictures.shape, align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    grey = moved.mean(1, keepdim=True)
    moved = grey + (moved - grey) * (1 + 0.12 * vivid.view(-1, 1, 1, 1))
    moved = 1 + (moved - 1) * gains * (1 + 0.05 * bright.view(-1, 1, 1, 1))  # white stays white
    x, y = torch.randint(side, (2, count, 1, 1), generator=generator)
    axis = torch.arange(side)
    cut = ((axis[:, None] - y).abs() < side // 7) & ((axis - x).abs() < side // 7) & (hole < 0.3).view(-1, 1, 1)
    moved = torch.where(cut[:, None], 1.0, moved).clamp(-1, 1)
    return torch.where((kept < untouched).view(-1, 1, 1, 1), pictures, moved)


def learning_rate(step: int, optim: AlignOptimSettings) -> float:
    """Linear warm-up over a fortieth of the steps times a cosine down to 0."""
    warm_up = min(1.0, (step + 1) / max(1, optim.steps // 40))
    return optim.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / optim.steps))


def align(config: AlignSettings) -> dict[str, float]:
    """Train, write the model to `config.out` and return the accuracies on held-out pictures.

    Raises:
        ValueError: settings that do not fit, or a model whose pictures of 32x32 do not have 16 tokens.
        KeyboardInterrupt: it was stopped before its last step; what it has is saved.
    """
    config = found_resume(config)
    check("align_pictures", config)
    check_steps("align_pictures", config.optim, "batch", "optim.")
    if config.optim.batch % (8 * config.optim.accumulate):
        raise ValueError(f"align_pictures: optim.batch is {config.optim.batch}; a multiple of 8 for each of the "
                         f"{config.optim.accumulate} micro-batches fits")
    if config.autocast:
        raise ValueError("align_pictures: autocast is True; False fits, for the image layers are trained in float32")
    if config.device not in ("auto", "cpu"):
        raise ValueError(f"align_pictures: device is {config.device!r}; 'cpu' fits, where the small image layers are "
                         "trained in minutes")
    drawings = read_drawings(config.drawings)
    if drawings.held.all() or not drawings.held.any():
        raise ValueError(f"align_pictures: drawings is {str(config.drawings)!r}, of whose {len(drawings.held):,} "
                         f"pictures {int(drawings.held.sum()):,} are held out; some, but not all, fit: fetch them anew")
    model = Transfusion.from_pretrained(config.model, dtype=torch.float32)
    patches = (drawings.pictures.shape[-1] // model.config.patch_size)**2
    if (model.tokenizer is None or model.vae is not None or model.config.image_layers != "unet"
            or patches != sum(SLOTS.values())):
        raise ValueError(f"align_pictures: model is {str(config.model)!r}, with image layers "
                         f"{model.config.image_layers!r} and {patches} tokens a picture; U-Net layers that make "
                         f"{sum(SLOTS.values())} of pixels, and a tokenizer fit: `transfusion init --image-layers unet "
                         "--patch-size 8 --unet-channels 16 64 128 256`")
    with claim("align_pictures", config.out, {"model": config.model, "drawings": config.drawings}, config.resume):
        task = AlignTask(config, model, drawings)
        done = fit("align_pictures", config, config.optim, task, functools.partial(learning_rate, optim=config.optim),
                   fixed=("model", "drawings", "seed", "optim.batch", "optim.steps"),
                   watchers=(HeldOut(task, config.save_every),))
        if done < config.optim.steps:
            raise KeyboardInterrupt(f"{config.out}: {done:,} of {config.optim.steps:,} steps are done; add --resume to "
                                    "the same command to go on")
        found = accuracies(task)
    write_text(config.out / "align.json", json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    """Entry point of `python -m transfusion.recipes.align_pictures`."""
    with plain_errors():
        align(tyro.cli(AlignSettings, prog="python -m transfusion.recipes.align_pictures"))


if __name__ == "__main__":
    main()
