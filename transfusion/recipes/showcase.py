"""Emoji drawn in a style they were never shown in: `python -m transfusion.showcase` trains, draws and judges.

The same command goes on where it was interrupted. The model sees 459 named faces, animals, plants and dishes in two
styles, but one in ten of them in one style alone; those it draws in the other. On two CPU cores a small decoder
learns them from nothing. With a GPU, start from a language model, whose text loss is measured before and after, and
take all 1,870 emoji:

    transfusion init --llm SmolLM2-135M --patch-size 4 --objective x0 --diffusion-weight 50 --backbone adaln \\
        --positions 2d --out runs/start
    python -m transfusion.showcase --train.tune.start runs/start --train.data.no-lively --train.optim.lr 2e-4 \\
        --train.autocast --train.out runs/emoji-smollm2

Leaves in runs/emoji: the checkpoint, samples.png (held-out pairs of name and style), loss.png, the judges and
metrics.json.
"""
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor

from transfusion.command import claim, plain_errors, saved_step
from transfusion.data.latents import open_dataset
from transfusion.data.training_data import open_data
from transfusion.device import choose_device
from transfusion.eval.picture_grids import emoji_grid
from transfusion.files import write_text
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.command_line import shell_line
from transfusion.recipes.emoji import STYLES, Emoji, EmojiSettings, emoji
from transfusion.recipes.emoji_judges import Judges, bits_per_byte, draw_emoji, read_captions
from transfusion.settings import Count, NotNegative, check
from transfusion.train.classifier import ClassifierSettings
from transfusion.train.log import logged_seconds
from transfusion.train.plots import loss_curves
from transfusion.train.transfusion import TrainConfig, build_model, check_settings, start_model, train_to_end


@dataclass(frozen=True)
class ShowcaseSettings:
    """Train on emoji, draw the held-out ones, judge them."""

    train: TrainConfig = field(default_factory=emoji)
    """the training run, on emoji"""
    judge: ClassifierSettings = field(
        default_factory=lambda: ClassifierSettings(width=48, steps=1200, batch=96, move=0.06, scale=0.1))
    """of the judges"""
    each: Count = 4
    """pictures drawn for each held-out pair of name and style"""
    steps: Count = 40
    """denoising steps"""
    guidance: NotNegative = 2.0
    """classifier-free guidance scale"""
    plain_text: Path | None = None
    """text that the language model is measured on before and after; None: Python's reference manual, which every Python
    holds (pydoc_data)"""


def read_plain_text(path: Path | None) -> str:
    """The text of a file, or of Python's reference manual."""
    if path is None:
        from pydoc_data.topics import topics
        return "\n".join(topics.values())
    if not path.is_file():
        raise ValueError(f"showcase: plain_text is {str(path)!r}, which is no file; a text file fits")
    return path.read_text()


def showcase(settings: ShowcaseSettings) -> dict:
    """Train what is not trained yet, draw, judge; return what metrics.json holds."""
    check("showcase", settings)
    check_settings("showcase", settings.train, "train.")
    config = settings.train
    inputs = {"train.tune.start": config.tune.start, "train.data.latents": config.data.latents}
    with claim("showcase", config.out, inputs, resume=saved_step(config.out) is not None):
        return _showcase(settings)


def _showcase(settings: ShowcaseSettings) -> dict:
    config, began = settings.train, time.perf_counter()
    text, device = read_plain_text(settings.plain_text), choose_device(config.device)
    metrics = {"text_bits_per_byte_before": bits_per_byte(_untrained(config).to(device).eval(), text)}
    out = train_to_end(config)
    trained = time.perf_counter()

    held_out = config.data.open("held-out")
    judges = Judges(config.data.open("all"), out / "judges", settings.judge)
    model = Transfusion.from_pretrained(out).to(device).eval()
    if model.vae is not None:
        model.vae.autoencoder.to(device)
    metrics["text_bits_per_byte_after"] = bits_per_byte(model, text)
    shown = judges.real.pictures[judges.places(held_out.labels, 1 - held_out.styles)]
    drawn, found = judge_drawings(settings, model, judges, held_out, shown)
    metrics |= found | judge_captions(config, model, held_out)
    metrics |= {"guidance": settings.guidance, "sampling_steps": settings.steps,
                "train_seconds": logged_seconds(out / "log.jsonl"), "measure_seconds": time.perf_counter() - trained,
                "total_seconds": time.perf_counter() - began}

    titles = [held_out.caption_of(i) for i in range(len(held_out.labels))]
    emoji_grid(out / "samples.png", titles, shown, drawn.unflatten(0, (-1, settings.each)), held_out.pictures)
    loss_curves(out / "loss.png", out / "log.jsonl")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _untrained(config: TrainConfig) -> Transfusion:
    """The model that training starts from."""
    if not isinstance(config.data, EmojiSettings):
        raise ValueError(f"showcase: train.data.name is {config.data.name!r}; the settings of emoji fit, EmojiSettings")
    data = open_data(config.data)
    return build_model(config, data) if config.tune.start is None else start_model(config, data)


def judge_drawings(settings: ShowcaseSettings, model: Transfusion, judges: Judges, held_out: Emoji,
                   shown: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Draw the held-out names in the style never shown and in the other; return the first and what the judges read.

    Beside them they read the pictures that were `shown` (N, C, H, W), one for each held-out pair, as if they had been
    drawn for it.
    """
    size = open_dataset(settings.train.data, "held-out")[0].image_shape[1:]
    pair = torch.arange(len(held_out.labels)).repeat_interleave(settings.each)
    labels, styles, drawn, metrics = held_out.labels[pair], held_out.styles[pair], {}, {}
    for name, asked in (("held_out", styles), ("trained", 1 - styles)):
        captions = [held_out.caption(held_out.names[label], STYLES[style]) for label, style in zip(labels, asked)]
        print(f"drawing {len(captions)} pictures of {name.replace('_', '-')} pairs ...", flush=True)
        drawn[name] = draw_emoji(model, captions, steps=settings.steps, guidance=settings.guidance,
                                 seed=settings.train.seed, image_size=size)
        metrics |= {f"{name}_{key}": value for key, value in judges.read(drawn[name], labels, asked).items()}
    read = judges.read(shown[pair], labels, styles)
    return drawn["held_out"], metrics | {f"shown_{key}": value for key, value in read.items()}


def judge_captions(config: TrainConfig, model: Transfusion, held_out: Emoji) -> dict[str, float]:
    """Let the model caption the held-out pictures, and those of the same names that it was shown."""
    metrics = {}
    for name, split in (("held_out", "held-out"), ("trained", "train")):
        real = open_dataset(config.data, split)[0]
        chosen = torch.isin(real.labels, held_out.labels).nonzero()[:, 0].tolist()
        read = read_captions(model, real.pictures[chosen], [real.caption_of(i) for i in chosen])
        metrics |= {f"{name}_{key}": value for key, value in read.items()}
    return metrics


def report(metrics: dict, out: Path) -> None:
    """Print the measurements and where everything lies."""
    print(f"\n{'measurement':<32}value")
    for name, value in metrics.items():
        print(f"{name:<32}{value:.4g}")
    print(f"\ncheckpoint   {out}\npictures     {out}/samples.png {out}/loss.png\nnumbers      {out}/metrics.json")
    line = shell_line("sample", "--model", out, "--prompt", "a red apple, noto style", "--out", "apple.png")
    print(f"\ntry          {line}")


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m transfusion.showcase`."""
    settings = tyro.cli(ShowcaseSettings, prog="python -m transfusion.showcase", description=__doc__, args=args)
    with plain_errors(resumes=True):
        report(showcase(settings), settings.train.out)


if __name__ == "__main__":
    main()
